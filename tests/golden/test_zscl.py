"""ZSCL and its relatives against trajectories of the public code: losses per step and the weights that are carried on."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import golden_cases as golden
import pytest
import torch
from torch import Tensor

import cl_kernels as clk
from cl_methods.methods import METHODS, Batch, Method
from cl_methods.training.loop import train_on_batches

TRAJECTORIES = ["zscl_task1_full", *golden.names("zscl_task2_*")]


def zscl_switches(case: str) -> set[str]:
    """Which parts of ZSCL the metadata of a trajectory switches on."""
    meta = golden.load(case)[1]
    parts = "image_loss text_loss relation_loss feature_mse l2 we we_wise moving_avg wise_merge"
    return {part for part in parts.split() if meta.get(part)}


SINGLE = {"weight_ensemble": ({"we"}, {"we_wise"}), "weight_consolidation": ({"l2"},)}
OWN_NAMES = [
    *(("lwf_vr" if "lwf_vr" in case else "lwf", case) for case in golden.names("zscl_task2_lwf*")),
    *(("wise_ft", case) for case in golden.names("zscl_task2_wise_merge*")),
    *((kind, case) for kind, parts in SINGLE.items() for case in TRAJECTORIES if zscl_switches(case) in parts),
]
LOSS_TOLERANCE, ADAMW_TOLERANCE, SGD_TOLERANCE, ANCHOR_TOLERANCE = 2e-5, 5e-5, 1e-5, 2e-4


def zscl_config(meta: dict[str, Any]) -> Any:
    """The configuration that the metadata of a trajectory describes."""
    teacher = str(meta.get("teacher", "zscl_start"))
    mixed = "ref_wise_alpha" in meta
    previous = not mixed and teacher == meta["load"] != "zscl_start"
    texts = {None: "captions", "random_tokens": "random"}.get(meta.get("ref_texts"), "classes")
    names = {"n": "start", "t": "previous", "zeroshot": "zero_shot"}
    return METHODS["zscl"].Config(
        lr=meta["lr"],
        iterations=meta["iterations"],
        warmup=meta["warmup_length"],
        label_smoothing=meta["label_smoothing"],
        weight_decay=meta["weight_decay"],
        betas=tuple(meta["betas"]),
        temperature=meta["T"],
        image_loss=bool(meta.get("image_loss")),
        text_loss=bool(meta.get("text_loss")),
        relation_loss=bool(meta.get("relation_loss")),
        feature_mse=bool(meta.get("feature_mse")),
        distillation_weight=meta.get("kd_weight", 1.0),
        teacher="mixed" if mixed else "previous" if previous else "zero_shot",
        teacher_mix=meta.get("ref_wise_alpha", 0.8),
        reference_texts=texts,
        reference_images="task" if "ref_images" in meta else "reference",
        consolidation=meta.get("l2", 0.0),
        ensemble="wise" if meta.get("we_wise") else "mean" if meta.get("we") else "none",
        ensemble_wise_alpha=meta.get("we_wise_alpha", 0.98),
        average_every=meta.get("avg_freq", 100),
        moving_average=names.get(meta.get("moving_avg"), "none"),
        moving_average_decay=meta.get("mv_avg_decay", 0.999),
        wise_merge=names.get(meta.get("wise_merge"), "none"),
        wise_merge_alpha=meta.get("wise_ft_alpha", 0.8),
    )


def config_of(kind: str, meta: dict[str, Any]) -> Any:
    """The same as settings of the method called ``kind``, by the fields that it has."""
    config, config_type = zscl_config(meta), METHODS[kind].Config
    if kind == "zscl":
        return config
    own = {entry.name for entry in fields(config_type)}
    shared = {entry.name: getattr(config, entry.name) for entry in fields(config) if entry.name in own}
    merge = {"alpha": config.wise_merge_alpha, "towards": config.wise_merge} if kind == "wise_ft" else {}
    return config_type(**shared, **merge)


def batches(data: dict[str, Tensor], meta: dict[str, Any]) -> list[Batch]:
    """Batches in the stored order, cyclic; reference batches likewise, or the task's own in reversed order."""
    images, labels = data[f"{meta['train']}.images"], data[f"{meta['train']}.labels"]
    reference = images.flip(0) if "ref_images" in meta else data["ref_images"]
    rows = torch.arange(reference.shape[0] * reference.shape[1]).view(reference.shape[:2])
    found = []
    for step in range(meta["iterations"] + 1):
        own, other = step % len(images), step % len(reference)
        found.append(Batch(images[own], labels[own], step, reference[other], rows[other]))
    return found


class Distillation:
    """Stands in for ``feature_distill_kl`` and notes the image direction alone, as the reference values list it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.image: list[float] = []
        self._original = clk.feature_distill_kl
        monkeypatch.setattr(clk, "feature_distill_kl", self)

    def __call__(self, student: Tensor, teacher: Tensor, anchors: Tensor, **options: Any) -> Tensor:
        if options.get("mask_diagonal"):  # relations among images are listed elsewhere
            return self._original(student, teacher, anchors, **options)
        alone = self._original(student.detach(), teacher, anchors, **{**options, "rows": 1.0, "columns": 0.0})
        self.image.append(float(alone))
        return self._original(student, teacher, anchors, **options)


def run(method: Method, meta: dict[str, Any], data: dict[str, Tensor], table: golden.TokenTable) -> dict[str, list]:
    """Train one task as the metadata says; the logged terms by name, one entry per step."""
    task, log = golden.task(meta["train"], table), {}
    method.before_task(int(meta["train"].removeprefix("task")) - 1, task)
    sgd = torch.optim.SGD([p for _, p in method.trainable()], lr=meta["lr"]) if meta["optimizer"] == "SGD" else None

    def note(report: Any) -> None:
        for name, value in report.log.values().items():
            log.setdefault(name, []).append(value)

    train_on_batches(
        method,
        batches(data, meta),
        iterations=meta["iterations"],
        warmup=meta["warmup_length"],
        lr=meta["lr"],
        seed=0,
        task_index=0,
        optimizer=sgd,
        on_step=note,
    )
    method.after_task(0, task)
    return log


@pytest.mark.parametrize("case", TRAJECTORIES)
def test_trajectory(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = golden.load(case)[1]
    kind = "zscl" if meta.get("load") == "zscl_start" or zscl_switches(case) else "finetune"
    check_trajectory(case, kind, monkeypatch)


@pytest.mark.parametrize(("kind", "case"), OWN_NAMES)
def test_trajectory_under_its_own_name(kind: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The methods that are switches of ZSCL give the same when called by name, with their own settings."""
    check_trajectory(case, kind, monkeypatch)


def check_trajectory(case: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, meta = golden.load(case)
    data, _ = golden.load("zscl_data")
    table = golden.TokenTable(
        task1=data["task1.class_tokens"], task2=data["task2.class_tokens"], caption=data["caption_tokens"]
    )
    method = METHODS[kind](golden.tiny_clip(table), config_of(kind, meta), golden.reference("caption", table))
    if meta.get("ref_texts") == "random_tokens":
        monkeypatch.setattr(method, "reference_tokens", lambda task: data["random_tokens"])
    if meta["load"] != "zscl_start":
        start, _ = golden.load(meta["load"].removesuffix(".final"))
        method.load_state_dict(golden.clip_state(golden.under(start, "final.")))
    distillation = Distillation(monkeypatch)
    log = run(method, meta, data, table)

    assert len(log["loss"]) == meta["optimiser_steps"]
    assert golden.max_error(torch.tensor(log["loss"]), expected["loss"]) < LOSS_TOLERANCE
    if distillation.image:
        assert golden.max_error(torch.tensor(distillation.image), expected["loss_kd_image"]) < LOSS_TOLERANCE
    if "loss_l2" in expected:
        assert golden.max_error(torch.tensor(log["consolidation"]), expected["loss_l2"]) < ANCHOR_TOLERANCE
    check_weights(method, expected, meta)


def check_weights(method: Method, expected: dict[str, Tensor], meta: dict[str, Any]) -> None:
    tolerance = SGD_TOLERANCE if meta["optimizer"] == "SGD" else ADAMW_TOLERANCE
    state, seen = method.backbone.model.state_dict(), 0
    full = golden.clip_state(golden.under(expected, "final.")) if "final.token_embedding.ids" in expected else {}
    rows = golden.under(expected, "final_rows4.")
    ids = expected.get("final_rows.token_embedding.ids")
    if ids is not None:
        assert (
            golden.relative_error(state["token_embedding.weight"][ids], expected["final_rows.token_embedding"])
            < tolerance
        )
    for name, value in {**full, **rows}.items():
        ours = state[name][: len(value)] if value.ndim else state[name]
        if meta["optimizer"] != "SGD":
            ours, value = golden.without_key_bias(name, ours), golden.without_key_bias(name, value)
        assert golden.relative_error(ours, value) < tolerance, name
        seen += 1
    assert seen, "the file holds no final weights"
    if "final_delta_norm" in expected:
        check_distances(state, expected, meta, tolerance)


def check_distances(
    state: dict[str, Tensor], expected: dict[str, Tensor], meta: dict[str, Any], tolerance: float
) -> None:
    """How far every parameter has moved, to the accuracy with which it is known itself."""
    start_file, _ = golden.load(meta["load"].removesuffix(".final"))
    start = golden.clip_state(golden.under(start_file, "final."))
    distances = expected["final_delta_norm"]
    assert len(meta["param_order"]) == len(distances)
    for name, distance in zip(meta["param_order"], distances.tolist(), strict=True):
        name = name.replace("token_embedding.rows", "token_embedding.weight")
        if name.endswith("in_proj_bias") and meta["optimizer"] != "SGD":
            continue
        moved = float((state[name].double() - start[name].double()).norm())
        assert moved == pytest.approx(distance, rel=tolerance, abs=tolerance * float(start[name].norm())), name


def kd_cases() -> list[dict[str, Any]]:
    return golden.load("zscl_kd")[1]["cases"]


@pytest.mark.parametrize("case", kd_cases(), ids=lambda case: str(case["case"]))
@pytest.mark.parametrize("term", ["image_loss", "text_loss", "both", "relation_loss"])
def test_distillation(case: dict[str, Any], term: str) -> None:
    """Values and gradients of the distillation terms, as the method computes them."""
    tensors = golden.under(golden.load("zscl_kd")[0], f"{case['case']}.")
    raw = tensors["student_raw"].clone().requires_grad_()
    student = raw / raw.norm(dim=-1, keepdim=True)
    student.retain_grad()
    assert golden.max_error(student, tensors["student"]) < 1e-5
    if term == "relation_loss":
        value = clk.feature_distill_kl(
            student,
            tensors["teacher"],
            student,
            teacher_anchors=tensors["teacher"],
            logit_scale=case["s"],
            temperature=case["T"],
            columns=0.0,
            mask_diagonal=True,
        )
    else:
        value = clk.feature_distill_kl(
            student,
            tensors["teacher"],
            tensors["teacher_text"],
            logit_scale=case["s"],
            temperature=case["T"],
            rows=float(term in ("image_loss", "both")),
            columns=float(term in ("text_loss", "both")),
        )
    value.backward()
    assert golden.max_error(value, tensors[term]) < 1e-5
    assert golden.max_error(student.grad, tensors[f"{term}.grad_student"]) < LOSS_TOLERANCE
    assert golden.max_error(raw.grad, tensors[f"{term}.grad_student_raw"]) < LOSS_TOLERANCE
