"""RanPAC's Gram matrix, prototypes, ridge and head over a sequence of tasks against the public code's."""

from __future__ import annotations

from types import SimpleNamespace

import golden_cases as golden
import pytest
import torch
from torch import Tensor

from cl_methods.datasets.images import TensorImages
from cl_methods.datasets.task import Task
from cl_methods.methods import Batch, RanPAC

CASES = golden.names("ranpac*")
NOTHING = TensorImages(torch.zeros(0, 3, 1, 1, dtype=torch.uint8))


def learn_tasks(name: str) -> list[tuple[int, int, dict[str, Tensor], dict[str, Tensor], RanPAC]]:
    """(task, classes so far, what the file holds of it, the method's state, the method) after each task."""
    tensors, meta = golden.load(name)
    found, seen = [], 0
    backbone = SimpleNamespace(
        model=torch.nn.Identity(),
        device=torch.device("cpu"),
        encode_images=lambda features: features,
        class_embeddings=lambda names, templates: torch.ones(len(names), meta["D"]),
    )
    method = RanPAC(backbone, RanPAC.Config(width=meta["M"]))
    method.load_state_dict({"projection": tensors["w_rand"]})
    while f"task{len(found)}.features" in tensors:
        index = len(found)
        expected = golden.under(tensors, f"task{index}.")
        before, seen = seen, len(expected["weight"])
        task = Task(f"task{index}", tuple(f"class {row}" for row in range(before, seen)), ("{}",), *[NOTHING] * 3)
        method.before_task(index, task)
        for step, rows in enumerate(torch.arange(len(expected["features"])).split(48)):  # batches must not matter
            method.learn(Batch(expected["features"][rows], expected["labels"][rows] - before, step))
        method.after_task(index, task)
        state = {key: value.clone() for key, value in method.state_dict().items()}
        state["scores"] = method.head_scores(tensors["test"])
        found.append((index, seen, expected, state, method))
    assert found
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_value(name: str) -> None:
    meta = golden.load(name)[1]
    for index, seen, expected, state, _ in learn_tasks(name):
        assert golden.max_error(state["gram"], expected["G"]) < 1e-5, index
        assert golden.max_error(state["prototypes"], expected["Q"][:, :seen]) < 1e-5, index
        assert not expected["Q"][:, seen:].any()
        assert float(state["ridge"]) == pytest.approx(float(expected["lambda"])), index
        assert golden.relative_error(state["weight"], expected["weight"]) < 1e-3, index
        assert golden.relative_error(meta["head_scale"] * state["scores"], expected["logits"]) < 1e-3, index
        assert torch.equal(state["scores"].argmax(dim=1), expected["prediction"]), index


@pytest.mark.parametrize("name", CASES)
def test_logits_rank_the_learnt_classes_as_the_head_does(name: str) -> None:
    tensors, meta = golden.load(name)
    _, seen, expected, _, method = learn_tasks(name)[-1]
    method.backbone.logit_scale = torch.tensor(100.0)
    everything = Task("all", tuple(f"class {row}" for row in range(seen)), ("{}",), *[NOTHING] * 3)
    test = tensors["test"] / tensors["test"].norm(dim=1, keepdim=True)
    scaled = method.logits(test, everything)
    assert torch.equal(scaled.argmax(dim=1), method.head_scores(test).argmax(dim=1))
    assert meta["M"] == method.stored("gram").shape[0]
    assert expected["weight"].shape == method.stored("weight").shape
