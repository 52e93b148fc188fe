"""``clk profile --static`` of open_clip's models, ordinary and not: the counts come, soon, or a sentence says why not."""

from __future__ import annotations

import time

import pytest
import torch

from cl_kernels.profile import Recorder
from cl_kernels.profile.shapes import ShapeMemory
from cl_methods import lazy_open_clip
from cl_methods.profiling.report import profile_method
from cl_methods.profiling.steps import Step

HUB = "of the Hugging Face hub, which says how it is built"
NO_BLOCKS = "has no open_clip residual blocks"


def profiled(model: str, method: str, images: int = 64, classes: int = 100):
    return profile_method(Step(model, method, images, classes, "meta", {}))


@pytest.mark.parametrize(("model", "parameters"), [("ViT-B-16-SigLIP", 203.16e6), ("ViTamin-S", 62.47e6)])
def test_a_tower_of_another_kind_is_counted(model, parameters):
    """A sigmoid loss's text tower with a tokenizer of the hub, which no shape needs; a timm tower that is half convolutions."""
    profile = profiled(model, "finetune", 2, 2)
    whole = profile.sides["adapted"].whole
    assert whole.trainable == pytest.approx(parameters, rel=0.01)
    assert whole.flops_backward > 1.5 * whole.flops_forward
    assert whole.waits == 0


def test_a_text_tower_of_the_hub_is_refused_with_a_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=f"the text tower of roberta-ViT-B-32 is roberta-base {HUB}"):
        profiled("roberta-ViT-B-32", "finetune", 2, 2)


def test_a_remembered_shape_is_the_one_that_torch_finds():
    """Strides, dtypes, lists and numbers of one kind and another; views and results in place are not remembered."""
    x = torch.zeros(3, 4, 5, device="meta")
    memory = ShapeMemory()
    aten = torch.ops.aten
    calls = [
        (aten.add.Tensor, (x, x.transpose(0, 2).contiguous().transpose(0, 2))),
        (aten.add.Tensor, (x.transpose(0, 1), x.transpose(0, 1))),
        (aten.add.Tensor, (x, x.half())),
        (aten.mul.Tensor, (x.int(), 2)),
        (aten.mul.Tensor, (x.int(), 2.0)),
        (aten.mul.Tensor, (x.int(), True)),
        (aten.sum.dim_IntList, (x, [0, 2], True)),
        (aten.sum.dim_IntList, (x, [0, 2], False)),
        (aten.topk.default, (x, 2)),
        (aten.native_layer_norm.default, (x, [5], None, None, 1e-5)),
        (aten.cat.default, ([x, x], 1)),
        (aten._foreach_add.Scalar, ([x, x[0]], 1.0)),
    ]
    for function, args in calls * 2:
        found, expected = memory.run(function, args, {}), function(*args)
        single = isinstance(expected, torch.Tensor)
        assert single or type(found) is type(expected)
        for one, other in zip([found] if single else found, [expected] if single else expected, strict=True):
            assert (one.shape, one.stride(), one.dtype, one.device) == (
                other.shape,
                other.stride(),
                other.dtype,
                other.device,
            )
    assert len(memory._found) == len(calls)
    memory.run(aten.mul_.Tensor, (x, 2.0), {})
    assert memory.run(aten.split.Tensor, (x, 1), {})[0].untyped_storage()._cdata == x.untyped_storage()._cdata
    real = torch.arange(3)
    assert torch.equal(memory.run(aten.add.Tensor, (real, real), {}), 2 * real)
    assert len(memory._found) == len(calls)


def test_what_is_remembered_is_counted_all_the_same():
    x = torch.zeros(8, 8, device="meta")
    with Recorder({}, [x]) as recorder:
        kept = [x @ x for _ in range(3)]
    assert [operation.flops for operation in recorder.record.operations] == [2 * 8**3] * 3
    assert [operation.live for operation in recorder.record.operations] == [256, 512, 768]
    assert len({t.untyped_storage()._cdata for t in kept}) == 3


@pytest.mark.slow
def test_every_model_of_open_clip():
    """MoE-Adapters where the towers have open_clip's blocks, else fine-tuning; half a minute of processor time for the largest."""
    found, slow = {}, {}
    for model in lazy_open_clip.library.list_models():
        for method in ("moe_adapters", "finetune"):
            start = time.process_time()
            try:
                profile = profiled(model, method)
            except ValueError as error:
                found[model] = str(error)
                continue
            assert profile.sides["adapted"].whole.flops_backward > 0, model
            found[model] = method
            if time.process_time() - start > 30:
                slow[model] = time.process_time() - start
            break
    assert slow == {}
    refused = {model: reason for model, reason in found.items() if reason not in ("moe_adapters", "finetune")}
    assert all(HUB in reason for reason in refused.values()), refused
    assert {"ViT-B-16", "ViT-bigG-14", "coca_ViT-L-14"} <= {
        m for m, method in found.items() if method == "moe_adapters"
    }
    assert {"RN50", "ViTamin-XL-384", "EVA02-B-16", "convnext_base"} <= {
        m for m, method in found.items() if method == "finetune"
    }
