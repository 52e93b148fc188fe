"""PROOF's summed projections and cross-modal fusion, values and gradients, against the public code's."""

from __future__ import annotations

from typing import Any

import golden_cases as golden
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cl_methods.components.cross_modal_fusion import CrossModalFusion
from cl_methods.methods.proof_network import ProofNetwork, SummedProjection

CASES = golden.names("proof_fusion*")
FUSION = {
    "w_q": "query.weight",
    "w_k": "key.weight",
    "w_v": "value.weight",
    "fc.weight": "output.weight",
    "fc.bias": "output.bias",
    "ln.weight": "norm.weight",
    "ln.bias": "norm.bias",
}


def summed(tensors: dict[str, Tensor], kind: str, tasks: int, *, train_all: bool) -> SummedProjection:
    """The projections of the file as the method sums them when one task follows the other."""
    projection = SummedProjection(tensors["image"].shape[1])
    for index in range(tasks):
        projection.extend(train_all=train_all)
        weight, bias = (tensors[f"proj_{kind}.{index}.{part}"] for part in ("weight", "bias"))
        before = [tensors[f"proj_{kind}.{one}.weight"] for one in range(index)]
        earlier = torch.stack(before).sum(dim=0) if before else torch.zeros_like(weight)
        before = [tensors[f"proj_{kind}.{one}.bias"] for one in range(index)]
        earlier_bias = torch.stack(before).sum(dim=0) if before else torch.zeros_like(bias)
        with torch.no_grad():
            projection.weight.copy_(earlier + weight if train_all else weight)
            projection.bias.copy_(earlier_bias + bias if train_all else bias)
        if not train_all:
            torch.testing.assert_close(projection.frozen_weight, earlier)
            torch.testing.assert_close(projection.frozen_bias, earlier_bias)
    return projection


def network(tensors: dict[str, Tensor], meta: dict[str, Any]) -> ProofNetwork:
    """The network after all tasks: earlier projections and prompts merged, the last ones train; all texts do."""
    made = ProofNetwork(meta["D"], 0.1, 0.0)
    made.image = summed(tensors, "image", meta["tasks"], train_all=False)
    made.text = summed(tensors, "text", meta["tasks"], train_all=True)
    prompts = [tensors[f"context.{index}"] for index in range(meta["tasks"])]
    made.frozen_prompts = torch.cat(prompts[:-1]) if len(prompts) > 1 else prompts[0][:0]
    made.prompts = torch.nn.Parameter(prompts[-1].clone())
    parameters = golden.under(tensors, "fusion.")
    assert parameters.keys() == FUSION.keys()
    made.fusion = CrossModalFusion(meta["D"], 0.1)
    made.fusion.load_state_dict({FUSION[name]: value for name, value in parameters.items()})
    made.fusion.norm.eps = meta["layer_norm_eps"]
    assert meta["temperature"] == pytest.approx(meta["D"] ** 0.5)
    return made.eval()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dense", [False, True], ids=["shared", "one sequence per image"])
def test_fusion(name: str, dense: bool) -> None:
    """The attention that is done once for all images, and the one that training with dropout needs, at dropout 0."""
    tensors, meta = golden.load(name)
    made = network(tensors, meta)
    images = F.normalize(made.image(tensors["image"]), dim=1)
    texts = F.normalize(made.text(tensors["text"]), dim=1)
    prototypes = F.normalize(made.image(tensors["prototypes"]), dim=1)
    assert golden.max_error(images, tensors["projected_image"]) < 1e-5
    assert golden.max_error(texts, tensors["projected_text"]) < 1e-5
    if dense:
        shared = made.fusion.shared(texts, prototypes, made.context())
        own = made.fusion.image_tokens(images)
        classes = made.fusion.dense_classes(own, shared)
        fused = (made.fusion.image_outputs(own, shared), *classes.split(len(texts)))
    else:
        out = made.fusion(images, texts, prototypes, made.context())
        fused = (out.images, out.texts, out.prototypes)
    total = torch.zeros(())
    for value, kind in zip(fused, ("image", "text", "proto"), strict=True):
        assert golden.max_error(value, tensors[f"out_{kind}"]) < 1e-5, kind
        total = total + (value * tensors[f"up_{kind}"]).sum()
    total.backward()
    last = meta["tasks"] - 1
    expected = {f"fusion.{ours}": tensors[f"grad.fusion.{theirs}"] for theirs, ours in FUSION.items()}
    expected["prompts"] = tensors[f"grad.context.{last}"]
    for kind in ("image", "text"):
        for part in ("weight", "bias"):
            expected[f"{kind}.{part}"] = tensors[f"grad.proj_{kind}.{last}.{part}"]
    found = {key: value.grad for key, value in made.named_parameters() if key != "log_scale"}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert golden.max_error(found[key], value) < 2e-5, key


@pytest.mark.parametrize("name", CASES)
def test_projections_of_all_tasks_have_the_same_gradient(name: str) -> None:
    """Which is why their sum can stand for them."""
    tensors, meta = golden.load(name)
    for kind in ("image", "text"):
        for part in ("weight", "bias"):
            every = [tensors[f"grad.proj_{kind}.{index}.{part}"] for index in range(meta["tasks"])]
            assert all(golden.max_error(one, every[0]) < 1e-5 for one in every)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("per_image", [True, False])
def test_scores_of_the_test_are_those_of_the_outputs(name: str, per_image: bool) -> None:
    """``ĩ·t̃ + ĩ·p̃`` of the batch, and of every image as if it were alone."""
    tensors, meta = golden.load(name)
    made = network(tensors, meta)
    images, texts = tensors["projected_image"], tensors["projected_text"]
    prototypes = F.normalize(made.image(tensors["prototypes"]), dim=1)
    context = made.context()
    shared = made.fusion.shared(texts, prototypes, context)
    expected = tensors["out_image"] @ (tensors["out_text"] + tensors["out_proto"]).T
    if per_image:
        alone = [made.fusion(one[None], texts, prototypes, context) for one in images]
        expected = torch.cat([one.images @ (one.texts + one.prototypes).T for one in alone]).detach()
    scores = made.fusion.scores(images, shared, per_image=per_image)
    assert golden.max_error(scores, expected) < 1e-5
