"""One adapted layer on the same tensors in plain PyTorch, compiled, and with our kernels: time, operations and error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels import dispatch
from cl_kernels.profile.recorder import Recorder
from cl_kernels.profile.timing import Spread, interleaved
from cl_kernels.profile.waiting import tensors_in
from cl_kernels.profile.workload import Workload, plain_pytorch

Call = Callable[..., Any]


@dataclass(frozen=True)
class Variant:
    """One way to compute the layer's forward and backward pass.

    Attributes:
        name: ``eager``, ``compiled`` or ``fused``.
        operations: dispatched, forward and backward; None for compiled code, which does not dispatch them one by one.
        seconds: forward and backward; None if it does not run.
        output_error, gradient_error: largest absolute difference of the outputs, and of the gradients, from the reference with
            the same random numbers, over the largest absolute value of each; None where that cannot be said.
        reason: why it does not run, or why nothing is said of its error; empty otherwise.
    """

    name: str
    operations: int | None = None
    seconds: Spread | None = None
    output_error: float | None = None
    gradient_error: float | None = None
    reason: str = ""


class _Found(Exception):  # noqa: N818
    """Ends the step once the layer has been seen."""


def compare_layer(work: Workload, layer: str, repeats: int, *, compiled: bool = True) -> list[Variant]:
    """The variants of module ``layer``, run where a step of ``work`` calls it, on the tensors it is called with.

    What is mounted on a model often starts as zero, where every implementation agrees: meanwhile, trainable parameters that are
    zero everywhere hold small random numbers.

    Args:
        work: a step that calls the layer.
        layer: a name in ``work.modules``.
        repeats: of each variant's timing.
        compiled: whether to try ``torch.compile``, which takes a while.

    Raises:
        ValueError: the step never calls the layer.
    """
    module = work.modules[layer]
    trained = [parameter for parameter in work.parameters() if parameter.requires_grad]
    found: list[Variant] = []

    def hook(called: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        handle.remove()  # the calls below are not to come back here
        with _not_zero(trained):
            found.extend(_compare(called, args, kwargs, trained, work.device, repeats, compiled))
        raise _Found

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        work.run()
    except _Found:
        return found
    finally:
        handle.remove()
    raise ValueError(f"layer: the step never calls {layer!r}")


def _compare(
    module: nn.Module,
    args: Any,
    kwargs: Any,
    weights: list[nn.Parameter],
    device: torch.device,
    repeats: int,
    compiled: bool,
) -> list[Variant]:
    args, kwargs = _detached(args), _detached(kwargs)
    inputs = [tensor for tensor in tensors_in((args, kwargs)) if tensor.requires_grad]
    contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {"eager": plain_pytorch, "fused": nullcontext}
    calls: dict[str, Call] = {"eager": module, "fused": module}

    def run(name: str, context: Callable[[], AbstractContextManager[Any]]) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(0)
        with context():
            outputs = [t for t in tensors_in(calls[name](*args, **kwargs)) if t.is_floating_point()]
            wanted = [*inputs, *weights]
            if not wanted or not any(output.requires_grad for output in outputs):
                return outputs, []
            scalar = torch.stack([(output * output).mean() for output in outputs]).sum()
            gradients = torch.autograd.grad(scalar, wanted, allow_unused=True)
        return [output.detach() for output in outputs], [g for g in gradients if g is not None]

    reasons: dict[str, str] = {}
    if compiled:
        calls["compiled"], contexts["compiled"] = torch.compile(module), _eager_random_numbers
        reason = _fails(lambda: run("compiled", _eager_random_numbers))
        if reason:
            reasons["compiled"] = reason
            del calls["compiled"]
    else:
        reasons["compiled"] = "not asked for"
    times = interleaved({name: lambda n=name: run(n, contexts[n]) for name in calls}, repeats, device)  # type: ignore[misc]
    reference = run("eager", lambda: dispatch.use_backend("reference"))
    variants = []
    for name in ("eager", "compiled", "fused"):
        if name in reasons:
            variants.append(Variant(name, reason=reasons[name]))
        elif name == "compiled":
            errors = _errors(run(name, contexts[name]), run("eager", plain_pytorch))
            variants.append(Variant(name, None, times[name], *errors))
        else:
            count = _operations(lambda n=name: run(n, contexts[n]), [*inputs, *weights])  # type: ignore[misc]
            errors = (0.0, 0.0) if name == "eager" else _errors(run("fused", nullcontext), reference)
            variants.append(Variant(name, count, times[name], *errors))
    return variants


@contextmanager
def _not_zero(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    zero = [parameter for parameter in parameters if not bool(parameter.detach().any())]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in zero:
            values = torch.rand(parameter.shape, generator=generator) - 0.5
            parameter.copy_(values * (parameter.shape[-1] if parameter.dim() else 1) ** -0.5)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zero:
                parameter.zero_()


@contextmanager
def _eager_random_numbers() -> Iterator[None]:
    """Plain PyTorch, whose compiled code draws the random numbers that uncompiled code would draw."""
    from torch._inductor import config

    with plain_pytorch(), config.patch(fallback_random=True):
        yield


def _operations(run: Call, given: Sequence[Tensor]) -> int:
    recorder = Recorder({}, given)
    with recorder:
        run()
    return len(recorder.record.operations)


def _fails(run: Call) -> str:
    try:
        run()
    except Exception as error:  # noqa: BLE001 - whatever a compiler does not support is a line of the report
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return ""


def _detached(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.detach().requires_grad_(values.requires_grad)
    if isinstance(values, dict):
        return {name: _detached(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)) and not hasattr(values, "_fields"):
        return type(values)(_detached(value) for value in values)
    return values


Tensors = tuple[list[Tensor], list[Tensor]]


def _errors(found: Tensors, expected: Tensors) -> tuple[float, float]:
    return _error(found[0], expected[0]), _error(found[1], expected[1])


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest over pairs of tensors of the same shapes."""
    worst = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        if theirs.numel():
            largest = float(theirs.detach().abs().max())
            worst = max(worst, float((mine.detach() - theirs.detach()).abs().max()) / (largest or 1.0))
    return worst
