"""How a batch goes through a tower: at once or in parts, whole or in shares of several processes, in 32 bits or in 16."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from cl_methods import ranks
from cl_methods.backbone.micro_batches import Encoder, MicroBatches, Part, encode_in_parts

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class TowerPass:
    """One way of batches through one tower.

    Attributes:
        tower: the module that an encoder runs.
        kind: of the batch.
        model: its name, for errors.
        device_type: where it runs.
        micro_batches: how many samples go through together, to bound memory; None: all.
        precision: where gradients are recorded.
        sharded: whether each process holds some rows of the weights alone (:mod:`cl_methods.sharding`): all processes then encode
            the same number of parts, and in a backward pass, where the weights of one block are whole at a time, only the blocks'
            activations are computed again.
    """

    tower: Any
    kind: Literal["images", "texts"]
    model: str
    device_type: str
    micro_batches: MicroBatches | None
    precision: Precision
    sharded: bool = False

    def encode(self, encode: Encoder, batch: Tensor) -> Tensor:
        """``encode(batch)``: (N, …) -> (N, d), in shares where several processes compute together (:mod:`cl_methods.ranks`).

        Raises:
            ValueError: the batch has to be cut, and its samples are normalised together.
        """
        total = len(batch)
        if self.precision == "bf16" and torch.is_grad_enabled():
            encode = partial(_in_bf16, encode, self.device_type)
        if self.micro_batches is None and ranks.count() == 1:
            return encode(batch)
        self._check_uncoupled("micro_batches" if ranks.count() == 1 else "processes")
        # fewer samples than processes: everyone encodes all of them, and what is counted on the way counts once
        shared = total >= ranks.count() > 1
        rows = ranks.share(total) if shared else range(total)
        place = Part(rows.start, len(rows), total, repeated=not shared and ranks.rank() > 0)
        most, least = (-(-total // ranks.count()), total // ranks.count()) if shared else (total, total)
        own = self._in_parts(encode, batch[rows.start : rows.stop], place, most, least)
        return ranks.gather_rows(own, total) if shared else own

    def _in_parts(self, encode: Encoder, batch: Tensor, place: Part, most: int, least: int) -> Tensor:
        parts = self.micro_batches or MicroBatches()
        transformer = getattr(self.tower, "transformer", None)
        size: int | None = getattr(parts, self.kind if torch.is_grad_enabled() else f"frozen_{self.kind}")
        sizes = None if size is None or not self.sharded else _same_number(len(batch), most, least, size)
        return encode_in_parts(
            encode,
            batch,
            sizes or size,
            blocks=getattr(transformer, "resblocks", ()) if parts.blocks else (),
            keep_last=parts.keep_last,
            again=not self.sharded,
            place=place,
        )

    def _check_uncoupled(self, setting: str) -> None:
        """Refuse to cut a batch whose samples are normalised together."""
        modules = self.tower.modules()
        coupling = next((module for module in modules if isinstance(module, _BatchNorm) and module.training), None)
        if coupling is not None:
            raise ValueError(
                f"{setting}: the {self.kind} of {self.model} are normalised over their batch ({type(coupling).__name__}), "
                "which cannot be cut into parts; expected a model without batch normalisation, or "
                + ("a budget that needs no parts" if setting == "micro_batches" else "one process")
            )


def _same_number(total: int, most: int, least: int, size: int) -> list[int]:
    """Sizes of parts of a share of ``total``, as many as a share of ``most`` has and one of ``least`` can have."""
    parts = min(-(-most // size), least)
    return [total * (number + 1) // parts - total * number // parts for number in range(parts)]


def _in_bf16(encode: Encoder, device_type: str, batch: Tensor) -> Tensor:
    """``encode(batch)`` under autocast, in fp32 again; every call has its own 16-bit copies of the weights."""
    with torch.autocast(device_type, torch.bfloat16):
        features = encode(batch)
    return features.float()
