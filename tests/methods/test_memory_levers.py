"""Options that save memory: what each computes, beside the same training without it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from counted import Operations, only_new
from shortened import shortened
from tiny_clip import build_backbone
from torch import Tensor, nn
from trained import SHORT, Batches, learn, state, train

from cl_kernels import use_backend
from cl_methods.backbone.micro_batches import MicroBatches
from cl_methods.components.weights import _BUCKET, consolidation_value, fold_consolidation_gradient, sharing
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods import METHODS, ZSCL
from cl_methods.methods.zscl_config import ZSCLConfig
from cl_methods.training.memory.host_optimizer import HostOptimizer
from cl_methods.training.memory.levers import Levers, use_levers
from cl_methods.training.memory.optimizer_state import state_bytes, with_state


@pytest.mark.parametrize("kernel", [pytest.param(True, marks=pytest.mark.native), False])
@pytest.mark.parametrize("weighted", [False, True])
def test_consolidation_is_one_pass(weighted: bool, kernel: bool) -> None:
    """Of 3.3 million scalars in 4 tensors: one operation that allocates nothing; or one subtraction and one addition for each
    bucket, 4 MiB beside the weights, no graph."""
    torch.manual_seed(0)
    shapes = [(1500, 1000), (1 << 20,), (800, 900), (7,)]
    named = [(str(n), nn.Parameter(torch.randn(shape))) for n, shape in enumerate(shapes)]
    anchor = {name: value.detach() + 1e-3 * torch.randn_like(value) for name, value in named}
    importance = {name: torch.rand_like(value) for name, value in named} if weighted else None
    expected = {}
    for name, value in named:
        value.grad = torch.randn_like(value)
        pull = (value.detach().double() - anchor[name].double()) * (1 if importance is None else importance[name])
        expected[name] = value.grad.double() + 2 * 0.7 * pull
    given = [
        *anchor.values(),
        *(importance or {}).values(),
        *(one for _, value in named for one in (value, value.grad)),
    ]
    backend = "cpu" if kernel else "reference"
    with use_backend(backend), Operations() as operations, only_new(given) as memory:
        fold_consolidation_gradient(named, anchor, 0.7, importance)
    buckets = -(-sum(value.numel() for _, value in named) // _BUCKET["cpu"])
    passes = [name for name in operations.names if name.startswith(("_foreach", "cl_kernels"))]
    assert not set(operations.names) - set(passes) - {"detach", "view", "split", "alias", "_unsafe_view"}
    if kernel:
        assert passes == ["cl_kernels::add_difference_"]
        assert memory.peak == 0
    else:
        assert set(passes) == {"_foreach_sub", "_foreach_addcmul_" if weighted else "_foreach_add_"}
        assert len(passes) <= 2 * (buckets + 1)
        assert memory.peak == 4 * _BUCKET["cpu"]
    assert memory.bytes == 0
    for name, value in named:
        torch.testing.assert_close(value.grad.double(), expected[name], rtol=1e-6, atol=1e-7)
    with use_backend(backend), only_new(given) as memory:
        found = consolidation_value(named, anchor, importance)
    assert memory.peak == 4 if kernel else 4 * _BUCKET["cpu"] <= memory.peak < 4 * _BUCKET["cpu"] + 4096
    squares = [
        (
            (value.detach().double() - anchor[name].double()).square() * (1 if importance is None else importance[name])
        ).sum()
        for name, value in named
    ]
    torch.testing.assert_close(found.double(), sum(squares), rtol=1e-6 if kernel else 1e-5, atol=0)


def test_a_small_move_of_a_large_weight_is_not_rounded_away() -> None:
    """Scaled sums of weights and anchor would lose it: 1 + 2⁻²³ against 1, with gradients of 10⁻⁷."""
    value = nn.Parameter(torch.full((4,), 1 + 2.0**-23))
    value.grad = torch.full((4,), 1e-9)
    fold_consolidation_gradient([("a", value)], {"a": torch.ones(4)}, 0.35)
    torch.testing.assert_close(value.grad, torch.full((4,), 1e-9 + 0.7 * 2.0**-23), rtol=1e-6, atol=0)


def test_weights_that_cannot_be_cut_are_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_BUCKET, "cpu", 8)
    value = nn.Parameter(torch.randn(6, 5).T)
    value.grad = torch.zeros(5, 6)
    anchor = torch.randn(5, 6)
    fold_consolidation_gradient([("a", value)], {"a": anchor}, 0.5)
    torch.testing.assert_close(value.grad, value.detach() - anchor)
    torch.testing.assert_close(consolidation_value([("a", value)], {"a": anchor}), value.grad.square().sum())


def zscl(reference: Reference, **switches: Any) -> ZSCL:
    return ZSCL(build_backbone(), ZSCLConfig(**{**SHORT, "average_every": 2, **switches}), reference)


def addresses(tensors: dict[str, Tensor]) -> set[int]:
    return {value.data_ptr() for value in tensors.values()}


def test_equal_copies_share_their_storage(tasks: list[Task], reference: Reference, batches: Batches) -> None:
    """The start of the first task is the zero-shot teacher's; the ensemble begins as the start; later tasks have their own."""
    method = zscl(reference)
    teacher = method.teacher.weights
    method.before_task(0, tasks[0])
    assert addresses(method.weights.start) <= addresses(teacher)
    assert method.averaged_weights() == {}
    before = {name: value.clone() for name, value in teacher.items()}
    train(method, batches(0, 4))
    assert len(method.averaged_weights()) == len(method.weights.start)
    assert not addresses(method.averaged_weights()) & addresses(method.weights.start)
    assert all(torch.equal(value, before[name]) for name, value in teacher.items())
    method.after_task(0, tasks[0])
    method.before_task(1, tasks[1])
    assert not addresses(method.weights.start) & (addresses(teacher) | addresses(dict(method.trainable())))
    previous = zscl(reference, teacher="previous")
    learn(previous, tasks[:1], batches)
    previous.before_task(1, tasks[1])
    assert addresses(previous.weights.start) <= addresses(previous.teacher.weights)
    assert not addresses(previous.weights.start) & addresses(dict(previous.trainable()))


def test_only_equal_tensors_are_shared() -> None:
    one, other = {"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(2)}, {"a": torch.ones(3), "b": torch.zeros(3)}
    found = sharing(one, other)
    assert [found[name].data_ptr() for name in "abc"] == [
        one_of.data_ptr() for one_of in (other["a"], one["b"], one["c"])
    ]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("zscl", {"average_every": 1}),
        ("zscl", {"average_every": 2, "ensemble": "wise"}),
        ("weight_ensemble", {"average_every": 1}),
        ("mulki", {"average_every": 2}),
        ("clipood", {}),
    ],
)
def test_averages_in_host_memory_are_the_same(
    name: str, settings: dict[str, Any], tasks: list[Task], reference: Reference, batches: Batches
) -> None:
    """To the bit where the model is on the host too; also in the middle of a task, and after going on from there."""
    ends = []
    for offloaded in (False, True):
        config = dataclasses.replace(shortened(METHODS[name].default_config("mini")), iterations=3, **settings)
        method = METHODS[name](build_backbone(), config, reference)
        method.offload_averages = offloaded
        learn(method, tasks[:1], lambda index, steps: indexed(batches(index, steps)))
        method.before_task(1, tasks[1])
        optimizer = train(method, indexed(batches(1, 2)))
        averages = method.averaged_weights()
        assert averages
        assert all(value.device.type == "cpu" for value in averages.values())
        middle = state(method)
        method.load_state_dict(middle)
        train(method, indexed(batches(1, 4))[2:], 2, optimizer)
        method.after_task(1, tasks[1])
        ends.append(state(method))
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key


def indexed(batches: list[Any]) -> list[Any]:
    return [dataclasses.replace(one, indices=torch.arange(6 * one.step, 6 * one.step + 6) % 24) for one in batches]


@pytest.mark.parametrize("name", ["zscl", "mulki", "moe_adapters", "clap4clip", "diki", "proof"])
def test_towers_in_16_bits_give_gradients_in_32(
    name: str, tasks: list[Task], reference: Reference, batches: Batches
) -> None:
    """Losses and gradients within 16 bits' rounding of fp32's, the same in parts; weights and what has no gradient stay in fp32."""
    batch, found = indexed(batches(0, 1))[0], []
    for precision, parts in (("fp32", None), ("bf16", None), ("bf16", MicroBatches(4, 2, 3, 300, blocks=True))):
        torch.manual_seed(0)
        config = shortened(METHODS[name].default_config("mini"))
        if name == "moe_adapters":  # noise is drawn in the precision of the tower, and may choose other experts
            config = dataclasses.replace(config, gating_noise=False)
        method = METHODS[name](build_backbone(), config, reference)
        use_levers(method, Levers(precision=precision))  # type: ignore[arg-type]
        method.backbone.micro_batches = parts
        method.before_task(0, tasks[0])
        method.stage = method.stages(tasks[0])[0]
        method.before_stage(method.stage)
        torch.manual_seed(1)
        loss = method.loss(batch)["loss"]
        loss.backward()
        gradients = [value.grad for _, value in method.trainable() if value.grad is not None]
        assert {one.dtype for one in gradients} == {torch.float32}
        assert {value.dtype for value in method.backbone.model.parameters()} == {torch.float32}
        with torch.no_grad():
            shown = method.backbone.encode_images(batch.images)
        found.append((loss.item(), torch.cat([one.flatten() for one in gradients]), shown))
    (plain, exact, frozen), *others = found
    for loss, gradients, shown in others:
        assert loss == pytest.approx(plain, rel=2e-2)
        assert torch.nn.functional.cosine_similarity(gradients, exact, dim=0) > 0.99
        torch.testing.assert_close(shown, frozen, rtol=1e-5, atol=1e-6)
    if name not in ("clap4clip", "proof"):  # which train beside towers that are frozen
        assert not torch.equal(others[0][1], exact)


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(shape)) for shape in ((96, 128), (64, 80), (7,), (4096,))]


def steps(optimizer: torch.optim.Optimizer, values: list[nn.Parameter], first: int = 0, count: int = 4) -> None:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1) * group.get("lr_scale", 1.0)
        optimizer.zero_grad(set_to_none=True)
        for value in values[: 3 if step == 1 else 4]:  # the last one does not take part in one of them
            value.grad = torch.randn(value.shape, generator=generator)
        optimizer.step()
        with torch.no_grad():
            values[1].mul_(0.9)  # as averaging does between steps


def adamw(values: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [{"params": values[:2]}, {"params": values[2:], "weight_decay": 0.3, "lr_scale": 2.0}]
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.95), weight_decay=0.1)


def test_steps_on_the_host_are_those_of_the_optimiser() -> None:
    """Weights move as with AdamW beside them; state dicts fit both ways."""
    plain, ours = parameters(), parameters()
    one, other = adamw(plain), HostOptimizer(adamw(ours))
    assert with_state(one, "host") is one  # on a CPU there is nothing to move
    steps(one, plain)
    steps(other, ours)
    for value, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    crossed = HostOptimizer(adamw(ours)), adamw(plain)
    crossed[0].load_state_dict(one.state_dict())
    crossed[1].load_state_dict(other.state_dict())
    steps(crossed[0], ours, 4, 2)
    steps(crossed[1], plain, 4, 2)
    for value, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"closure: not supported"):
        other.step(lambda: 0.0)


@pytest.mark.torchao
def test_8_bit_moments_are_those_of_torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces the same bits as whole; their bytes are those of the plan; a stored state goes on where it was."""
    from torchao.optim import AdamW8bit

    monkeypatch.setattr("cl_methods.training.memory.eight_bit_optimizer._PIECE", 8192)
    plain, ours = parameters(), parameters()
    rates = [{**group, "lr": torch.tensor(1.0)} for group in adamw(plain).param_groups]
    names = ("params", "lr", "betas", "eps", "weight_decay", "lr_scale")
    whole = AdamW8bit([{name: group[name] for name in names if name in group} for group in rates])
    cut = with_state(adamw(ours), "8bit")
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for group, own in zip(whole.param_groups, cut.param_groups, strict=True):
            own["lr"] = 1e-3 * (step + 1)
            group["lr"].fill_(own["lr"])
        for value, twin in zip(plain, ours, strict=True):
            value.grad = torch.randn(value.shape, generator=generator)
            twin.grad = value.grad.clone()
        with torch.compiler.set_stance("force_eager"):
            whole.step()
        cut.step()
    for value, expected in zip(ours, plain, strict=True):
        assert torch.equal(value, expected)
    held = [value for entry in cut._inner.state.values() for value in entry.values()]
    parts = [
        part
        for value in held
        for part in ((value.codes, value.scale, value.qmap) if hasattr(value, "codes") else (value,))
    ]
    assert sum(part.nbytes for part in parts) == state_bytes((value.numel() for value in ours), "8bit")
    torch.save(cut.state_dict(), tmp_path / "state.pt")
    twins = [nn.Parameter(value.detach().clone()) for value in ours]
    again = with_state(adamw(twins), "8bit")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(again, twins, 4, 2)
    steps(cut, ours, 4, 2)
    assert all(torch.equal(value, twin) for value, twin in zip(ours, twins, strict=True))


def test_fp32_state_has_the_bytes_of_the_plan() -> None:
    values = parameters()
    optimizer = adamw(values)
    steps(optimizer, values)
    held = sum(value.nbytes for entry in optimizer.state.values() for value in entry.values())
    assert held == state_bytes((value.numel() for value in values), "fp32")
    assert state_bytes([5, 10**6], "host") == 0


@pytest.mark.parametrize(
    ("kind", "optimizer", "message"),
    [
        (
            "8bit",
            torch.optim.SGD,
            "optimizer_state: 8bit is for AdamW, this method's optimiser is SGD; expected fp32 or host",
        ),
        (
            "host",
            torch.optim.Adagrad,
            "optimizer_state: host is for AdamW, Adam, SGD, this method's optimiser is Adagrad",
        ),
    ],
)
def test_other_optimisers_are_refused(kind: Any, optimizer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_state(optimizer(parameters(), lr=0.1), kind)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl_methods.training.memory.optimizer_state.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"optimizer_state: 8bit takes its optimiser from the package torchao, which is not"
    ):
        with_state(adamw(parameters()), "8bit")
