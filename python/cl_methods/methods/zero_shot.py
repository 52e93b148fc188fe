"""The pre-trained model as it is: the row that Transfer is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from cl_methods.methods.base import Batch, Facts, Method


class ZeroShot(Method):
    """Classify with the untouched CLIP model, ``argmax_c s f(x)·w_c``.

    Source: CLIP (Radford et al., 2021), section 3.1.
    """

    name: ClassVar[str] = "zero_shot"
    facts: ClassVar[Facts] = Facts(
        source="Radford et al., ICML 2021",
        trains="nothing",
        carries="nothing",
    )
    trains: ClassVar[bool] = False
    frozen_images: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config:
        """Nothing to set: there is no training."""

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """No parameter."""
        return []

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Never called: ``trains`` is False.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("zero_shot does not train; evaluate it without the training loop")

    def forget_classifiers(self) -> None:
        """Nothing to forget: no weight ever changes."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Other weights, and with them other class embeddings."""
        super().load_state_dict(state)
        self._classifiers.clear()
