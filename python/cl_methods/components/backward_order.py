"""In which order a backward pass frees what forward passes have saved."""

from __future__ import annotations

from torch import Tensor


def differentiate_last(tensor: Tensor) -> None:
    """Let the backward pass go through all else that is ready before what ``tensor`` was computed from.

    autograd goes first where an operation ran last. A tower of texts that ran after one of images has little to free and as many
    gradients to allocate: they are held beside the images' activations unless those go first. Gradients are the same, to the bit.

    Args:
        tensor: any shape; without a graph nothing happens.
    """
    if tensor.grad_fn is not None:
        tensor.grad_fn._set_sequence_nr(0)  # type: ignore[attr-defined]
