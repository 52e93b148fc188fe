"""DIKI's residual prompt attention, task densities and test rule against the public code's."""

from __future__ import annotations

from typing import Any

import golden_cases as golden
import pytest
import torch
from torch import Tensor, nn

from cl_methods.components.gaussian import fit_gaussian
from cl_methods.components.prompt_attention import residual_prompt_attention
from cl_methods.datasets.task import Task
from cl_methods.methods import DIKI, Batch

ATTENTION = [
    (name, str(case["case"])) for name in golden.names("diki_attention*") for case in golden.load(name)[1]["cases"]
]
MODELS = golden.names("diki_model*")


def attention_layer(tensors: dict[str, Tensor], heads: int) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(tensors["out_proj.weight"].shape[0], heads, batch_first=True)
    with torch.no_grad():
        for name, value in layer.named_parameters():
            value.copy_(tensors[name])
    return layer


@pytest.mark.parametrize(("name", "case"), ATTENTION)
def test_attention_and_gradients(name: str, case: str) -> None:
    tensors, meta = golden.load(name)
    meta = next(entry for entry in meta["cases"] if str(entry["case"]) == case)
    shared = {key: tensors[f"{case}.{key}"] for key in ("x", "upstream", "prefix_pool", "out")}
    parts = golden.under(tensors, f"{case}.")
    layer = attention_layer(parts, meta["heads"])
    x, pool = shared["x"].transpose(0, 1).requires_grad_(), shared["prefix_pool"].requires_grad_()
    ids = parts["prompt_ids"]
    prompts = pool[ids[0]] if len(ids) == 1 else pool[ids].transpose(0, 1)
    length = x.shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1) if meta["causal"] else None
    assert ("batch_weight" in parts) == meta["weighted"]
    out = residual_prompt_attention(x, layer, prompts[0], prompts[1], parts.get("batch_weight"), mask)
    assert golden.max_error(out.transpose(0, 1), shared["out"]) < 1e-5
    out.backward(shared["upstream"].transpose(0, 1))
    assert golden.max_error(x.grad.transpose(0, 1), parts["grad_x"]) < 2e-5
    assert golden.max_error(pool.grad, parts["grad_prefix_pool"]) < 2e-5


def build(name: str, **settings: Any) -> tuple[DIKI, list[Task], dict[str, Tensor], dict[str, Tensor]]:
    """The tiny CLIP with the file's prompts and fitted Gaussians, the tasks, the file's tensors and the shared data."""
    tensors, meta = golden.load(name)
    data = golden.load("zscl_data")[0]
    count = meta["tasks_learnt"]
    table = golden.TokenTable(**{f"task{index}": data[f"task{index + 1}.class_tokens"] for index in range(count)})
    tasks = [golden.task(f"task{index}", table) for index in range(count)]
    length = tensors["prefix_pool.visual"].shape[2]
    method = DIKI(golden.tiny_clip(table), DIKI.Config(depth=meta["prompt_depth"], prompts=length, **settings))
    method.prompts.add(len(tensors["prefix_pool.visual"]))
    with torch.no_grad():
        for place, prompts in method.prompts.blocks.items():
            for task, pool in enumerate(tensors[f"prefix_pool.{place.partition('_')[0]}"]):
                prompts.keys[task].copy_(pool[0])
                prompts.values[task].copy_(pool[1])
    for index in range(count):
        mean, covariance = fit_gaussian(tensors[f"fit_features.{index}"])
        assert golden.max_error(mean, tensors["means"][index]) < 1e-5
        assert golden.max_error(covariance, tensors["covars"][index]) < 1e-5
        method.gaussians.add(tensors["means"][index], tensors["covars"][index])
    assert {place for place, _ in method.prompts.blocks.items()} == {"visual_0", "text_0"}
    return method, tasks, tensors, data


@pytest.mark.parametrize("name", MODELS)
def test_densities_and_weights(name: str) -> None:
    method, _, tensors, _ = build(name)
    features = method.backbone.encode_images(tensors["images"])
    assert golden.max_error(features, tensors["features"]) < 1e-5
    assert golden.max_error(method.gaussians.log_prob(features), tensors["log_prob"]) < 1e-4
    prompts, weights = method.injection(features)
    assert golden.max_error(weights, tensors["sample_weight"]) < 1e-4
    assert torch.equal(prompts, tensors["test.task0.sample_ids"])


@pytest.mark.parametrize("name", MODELS)
def test_batch_scope_gives_the_published_logits(name: str) -> None:
    method, tasks, tensors, _ = build(name, scope="batch")
    asked: list[tuple[int, float]] = []
    encode = method._texts
    method._texts = lambda task, prompt, weight: asked.append((prompt, weight)) or encode(task, prompt, weight)
    for index, task in enumerate(tasks):
        expected = golden.under(tensors, f"test.task{index}.")
        assert golden.max_error(method.logits(tensors["images"], task), expected["logits"]) < 2e-5
        prompt, weight = asked[-1]
        assert prompt == int(expected["chosen"])
        assert weight == pytest.approx(float(expected["text_weight"]), rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_training_path(name: str) -> None:
    """Logits with full weight, and the loss with its gradients; prompts of other tasks have none."""
    method, tasks, tensors, data = build(name)
    for index, task in enumerate(tasks):
        errors = []
        for prompt in range(len(method.prompts)):
            with method.prompts.active(prompt):
                texts = method.backbone.encode_texts(method.training_texts(task))
                scores = method.backbone.logit_scale * method.backbone.encode_images(tensors["images"]) @ texts.T
            errors.append(golden.max_error(scores, tensors[f"train.task{index}.logits"]))
        right, next_best, *_ = sorted(errors)  # the file says in words, not in data, which prompts it used
        assert right < 2e-5 < 1e-2 < next_best, errors
    method.before_task(0, tasks[0])
    batch = Batch(data["task1.images"][0], data["task1.labels"][0], 0)
    loss = method.loss(batch)["loss"]
    assert golden.max_error(loss, tensors["train.loss"]) < 2e-5
    loss.backward()
    for place, prompts in method.prompts.blocks.items():
        expected = tensors[f"train.grad_{place.partition('_')[0]}"]
        assert not expected[1:].any()
        found = torch.stack([prompts.keys[0].grad, prompts.values[0].grad])
        assert golden.max_error(found, expected[0]) < 2e-5, place
        assert all(prompts.keys[task].grad is None for task in range(1, len(expected)))
