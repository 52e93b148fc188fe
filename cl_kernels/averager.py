"""An average of a model's weights over time: running, exponential or Beta-weighted, beside the model or in host memory."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels.host_copy import HostCopy
from cl_kernels.weight_average import average_, blend_

_STRIDE = 0x9E3779B97F4A7C15  # odd: the seeds of 2⁶³ calls differ


@dataclass(frozen=True)
class BetaWeights:
    """Weights of snapshots by the density of Beta(β, β): ``w_k ∝ (x (1 − x))^(β − 1)`` at ``x = (k + ½) / snapshots``.

    With β < 1 the first and the last snapshots count most, with β = 1 all the same.

    Attributes:
        beta: β > 0.
        snapshots: how many there will be, the first model included.

    Raises:
        ValueError: an attribute is out of range.

    Source: CLIPood (Shu et al., ICML 2023), Beta moving average.
    """

    beta: float
    snapshots: int

    def __post_init__(self) -> None:
        if not self.beta > 0 or self.snapshots < 1:
            raise ValueError(f"beta, snapshots: got {self.beta}, {self.snapshots}, expected both above 0")

    def weight(self, k: int) -> float:
        """Of snapshot ``k`` (0 is the first model), up to a common factor.

        Raises:
            ValueError: there are not as many.
        """
        if not 0 <= k < self.snapshots:
            raise ValueError(f"k: got {k}, expected 0 to {self.snapshots - 1}: every snapshot of this average is taken")
        x = (k + 0.5) / self.snapshots
        return (4 * x * (1 - x)) ** (self.beta - 1)


class WeightAverager:
    """An average of a model's weights over time, ``a ← a + w · (θ − a)`` in place.

    Starts as a copy of the model, which counts as the first snapshot. :meth:`update` uses ``w = 1/(snapshots + 1)`` (so the
    average is the plain mean of all snapshots), ``w = 1 − decay``, or what makes it the mean with Beta weights;
    :meth:`interpolate` any ``w``. Floating-point parameters and buffers are averaged, all others copied from the latest model.
    Parameters that are tied appear once.

    A 16-bit average (``dtype=None`` for a 16-bit model) loses small updates unless ``rounding`` is stochastic; the default keeps
    it in float32 beside the model.

    With ``on_host`` the averages cost no device memory: :meth:`update` enqueues copies to pinned memory and returns; a thread of
    the host adds them to the average while training goes on. Whatever reads the average waits for it.

    Attributes:
        snapshots: models in the average, the first included; a Python number, so no device is asked for it.
        tensors: the averages by their state-dict names.

    Args:
        model: the start of the average, or its tensors by name; later models must have the same names and shapes.
        decay: of an exponential average, in [0, 1); None for the running mean.
        beta: weights of a Beta moving average, instead of a decay.
        dtype: of the floating-point averages; float32 keeps those of 16-bit models from standing still, None is the model's own.
        rounding: of 16-bit averages, ``"nearest"`` or ``"stochastic"``.
        seed: of stochastic rounding; with the same one, a resumed average goes on bit by bit.
        on_host: keep the averages in host memory.

    Raises:
        ValueError: decay is out of range, or there is a beta too.

    Source: Izmailov et al., 2018 (running mean); ZSCL (Zheng et al., 2023), section 3.3; Wortsman et al., 2022 (interpolation);
    CLIPood (Shu et al., 2023; Beta weights).
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        *,
        decay: float | None = None,
        beta: BetaWeights | None = None,
        dtype: torch.dtype | None = torch.float32,
        rounding: str = "nearest",
        seed: int = 0,
        on_host: bool = False,
    ) -> None:
        if decay is not None and not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: got {decay}, expected a number in [0, 1) or None for the running mean")
        if decay is not None and beta is not None:
            raise ValueError(f"decay and beta: got {decay} and {beta}, expected one of them at most")
        self.decay, self.beta, self.rounding, self.seed = decay, beta, rounding, seed
        self.snapshots = 1
        self._mass = beta.weight(0) if beta else 1.0  # the sum of the Beta weights so far
        self._moves = 0
        named = _named_tensors(model)
        self._tensors = {name: _start(tensor, dtype, on_host) for name, tensor in named.items()}
        self._floating = [name for name, tensor in self._tensors.items() if tensor.is_floating_point()]
        self._counts = [name for name in named if name not in self._floating]  # integers: the latest model's
        self._host_copy: HostCopy | None = None  # of the models that come: the first one may lie elsewhere
        self._worker = ThreadPoolExecutor(1, "weight-averager") if on_host else None
        self._pending: Future[None] | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The averages by their state-dict names, with every update in them. Not copies."""
        self._settle()
        return self._tensors

    def update(
        self,
        model: nn.Module | Mapping[str, Tensor],
        *,
        towards: nn.Module | Mapping[str, Tensor] | None = None,
        pull: float = 0.0,
    ) -> None:
        """Take the model's weights in as the next snapshot; then, in the same pass, pull the average to a third model.

        Args:
            model: the snapshot, or its tensors by name.
            towards: a model, or tensors by name, that the average is pulled to (ZSCL's ensemble with WiSE). Tensors that lie
                beside the average are read in place: with ``on_host`` they may not change before the average has been read.
            pull: the share of ``towards`` in the result.

        Raises:
            ValueError: names or shapes of a model differ from the first one's, there is a pull to nothing, or the Beta average
                has all of its snapshots.
        """
        if (towards is None) != (pull == 0.0):
            raise ValueError(f"towards and pull: got {type(towards).__name__} and {pull}, expected both or neither")
        weight, mass = self._next_weight()
        self._move(model, weight, towards, pull)
        self.snapshots += 1
        self._mass = mass

    def interpolate(self, model: nn.Module | Mapping[str, Tensor], weight: float) -> None:
        """Move the average by ``weight`` of the way to the model, without counting a snapshot (WiSE-FT).

        Args:
            model: where to.
            weight: share of the model in the result.

        Raises:
            ValueError: the model's names or shapes differ from the first one's.
        """
        self._move(model, weight, None, 0.0)

    @torch.no_grad()
    def copy_to(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        """Write the average into the model's parameters and buffers, in their dtypes.

        Raises:
            ValueError: the model's names or shapes differ from the first one's.
        """
        for name, tensor in self._matching(_named_tensors(model), "model").items():
            tensor.copy_(self.tensors[name])

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and the averages under ``"tensors"``; loadable with ``weights_only=True``. Not copies."""
        return {
            "snapshots": self.snapshots,
            "decay": self.decay,
            "beta": asdict(self.beta) if self.beta else None,
            "mass": self._mass,
            "moves": self._moves,
            "tensors": dict(self.tensors),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, in this average's dtypes and on its devices.

        Raises:
            ValueError: names, shapes, the decay or the Beta weights differ.
        """
        if state["decay"] != self.decay:
            raise ValueError(f"decay: the state was made with {state['decay']}, this average has {self.decay}")
        if state["beta"] != (asdict(self.beta) if self.beta else None):
            raise ValueError(f"beta: the state was made with {state['beta']}, this average has {self.beta}")
        self._matching(state["tensors"], "state")
        for name, tensor in self.tensors.items():
            tensor.copy_(state["tensors"][name])
        self.snapshots, self._mass, self._moves = int(state["snapshots"]), float(state["mass"]), int(state["moves"])

    def _next_weight(self) -> tuple[float, float]:
        """Share of the next snapshot, and the mass with it."""
        if self.beta is not None:
            weight = self.beta.weight(self.snapshots)
            return weight / (self._mass + weight), self._mass + weight
        return (1 / (self.snapshots + 1) if self.decay is None else 1 - self.decay), self._mass

    @torch.no_grad()
    def _move(
        self,
        model: nn.Module | Mapping[str, Tensor],
        weight: float,
        towards: nn.Module | Mapping[str, Tensor] | None,
        pull: float,
    ) -> None:
        values = self._matching(_named_tensors(model), "model")
        others = None
        if towards is not None:
            named = _named_tensors(towards)
            self._matching(named, "towards")
            others = [named[name].detach().to(self._tensors[name].device) for name in self._floating]
        options: dict[str, Any] = {"rounding": self.rounding}
        if self.rounding == "stochastic":
            options["seed"] = (self.seed + self._moves * _STRIDE) % 2**63
        self._settle()
        if self._worker is None:
            self._add(values, weight, others, pull, options)
        else:
            self._host_copy = self._host_copy or HostCopy(values)
            self._host_copy.start(values)
            self._pending = self._worker.submit(self._add_host_copy, self._host_copy, weight, others, pull, options)
        self._moves += 1

    @torch.no_grad()
    def _add_host_copy(
        self, copy: HostCopy, weight: float, others: list[Tensor] | None, pull: float, options: dict[str, Any]
    ) -> None:
        copy.wait()
        self._add(copy.tensors, weight, others, pull, options)

    def _add(
        self,
        values: Mapping[str, Tensor],
        weight: float,
        others: list[Tensor] | None,
        pull: float,
        options: dict[str, Any],
    ) -> None:
        averages = [self._tensors[name] for name in self._floating]
        floating = [values[name] for name in self._floating]
        if others is None:
            average_(averages, floating, weight, **options)
        else:
            blend_(averages, floating, others, (1 - pull) * weight, pull, **options)
        for name in self._counts:
            self._tensors[name].copy_(values[name])

    def _settle(self) -> None:
        """Wait for the update that is under way; an error in it comes out here."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _matching(self, given: Mapping[str, Tensor], what: str) -> Mapping[str, Tensor]:
        different = sorted(given.keys() ^ self._tensors.keys())
        if different:
            raise ValueError(f"{what}: its tensors are not those of the average; first difference: {different[0]}")
        for name, tensor in self._tensors.items():
            if given[name].shape != tensor.shape:
                raise ValueError(f"{what}: {name} is {tuple(given[name].shape)}, expected {tuple(tensor.shape)}")
        return given


def _named_tensors(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(model, nn.Module):
        return dict(model)
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _start(tensor: Tensor, dtype: torch.dtype | None, on_host: bool) -> Tensor:
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu" if on_host else tensor.device, wanted, copy=True)
