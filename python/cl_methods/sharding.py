"""Weights of which each of several processes holds its rows (FSDP2): parameters, gradients and optimiser state divide by N.

:func:`shard` lets ``fully_shard`` cut every parameter of a backbone by rows. A residual block is whole while it computes, and only
then. What works element by element on weights (averages, consolidation, the optimiser) works on :func:`local` rows and exchanges
nothing; what needs a whole model, an evaluation or a teacher, gets a copy (:func:`gathered`). Without :func:`shard` everything here
hands back what it was given.

Backbones and methods are taken as they come (``Any``): both of them know this module.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cl_methods import ranks


class ShardedModel:
    """A model whose parameters are sharded, and how it is made whole.

    Attributes:
        model: the module, sharded in place.
        encode_texts: the backbone's text encoder, (N, L) -> (N, d), around which the model's parts are gathered.
    """

    def __init__(self, backbone: Any) -> None:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        self.model = model = backbone.model
        self._skeleton = _without_weights(model)
        # DTensor remembers meshes for ever, and takes those of one name and size for the same: the shards get a group of their own,
        # so that the default one, over which the last words go, ends with the run.
        group = dist.new_group()
        mesh = DeviceMesh.from_group(
            group, backbone.device.type, mesh_dim_names=(f"shards of group {group.group_name}",)
        )
        scalars = {value for value in model.parameters() if value.ndim == 0}  # which have no rows
        for part in (
            *_blocks(model.visual),
            model.visual,
            *_blocks(backbone.text_tower),
            *_embeddings(backbone),
            model,
        ):
            # The outermost module too is freed after each forward, so that weights are rows wherever a method looks at them.
            sharded = fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
            sharded.set_force_sum_reduction_for_comms(backbone.device.type == "cpu")  # gloo has no mean
        model.encode_trimmed_texts = backbone._text_features
        for method in ("encode_image", "encode_trimmed_texts"):
            register_fsdp_forward_method(model, method)
        self.encode_texts = model.encode_trimmed_texts

    @torch.no_grad()
    def whole(self) -> nn.Module:
        """A plain copy with whole weights of its own; all processes ask for it together."""
        plain = copy.deepcopy(self._skeleton)
        held = self.model.state_dict()
        state = {name: _whole(value) if is_sharded(value) else value.clone() for name, value in held.items()}
        plain.load_state_dict(state, assign=True)
        return plain.train(self.model.training)


def shard(backbone: Any) -> None:
    """Cut the weights of ``backbone`` by rows, one part for each process; where there is one process, nothing happens.

    From then on all processes encode together, and the same number of times. Copies that were made before stay whole.
    """
    if ranks.joined_count() > 1:
        backbone.sharded = ShardedModel(backbone)


@contextmanager
def gathered(backbone: Any) -> Iterator[None]:
    """Inside, ``backbone.model`` is a whole copy, so that each process may encode what and as often as it likes.

    Changes of its weights are lost.
    """
    sharded: ShardedModel | None = getattr(backbone, "sharded", None)
    if sharded is None:
        yield
        return
    backbone.sharded, backbone.model = None, sharded.whole()
    try:
        yield
    finally:
        backbone.sharded, backbone.model = sharded, sharded.model
        gc.collect()  # blocks refer to themselves, and the copy of a large tower must not wait until somebody notices


def is_sharded(value: Tensor) -> bool:
    """Whether this process holds only some rows of ``value`` (any shape)."""
    return hasattr(value, "device_mesh")


def local(value: Any) -> Tensor:
    """The rows of ``value`` that this process holds, sharing its memory; all of them if it is not sharded."""
    whole: Tensor = value
    if not is_sharded(value):
        return whole
    with torch.no_grad():
        return whole.to_local()  # type: ignore[attr-defined, no-any-return]  # DTensor's


def aligned(value: Tensor, like: Tensor) -> Tensor:
    """``value`` in the rows in which this process holds ``like``: for arithmetic between the two, element by element.

    Args:
        value: of the shape of ``like``, sharded or not.
        like: sharded or not. If it is not and ``value`` is, all processes ask together.
    """
    if not is_sharded(like):
        return _whole(value)
    return local(value) if is_sharded(value) else _own_rows(value, like)


def whole_state(state: Any) -> Any:
    """Nested mappings and lists with every sharded tensor whole, on the CPU of the first process; empty in the others.

    One tensor after the other is gathered, so a GPU needs room for the largest. All processes ask together.
    """
    if isinstance(state, Mapping):
        return {key: whole_state(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole_state(value) for value in state)
    if not isinstance(state, Tensor) or not is_sharded(state):
        return state
    value = _whole(state.detach())
    return value.cpu() if ranks.first() else value.new_empty(0)


def load_method_state(method: Any, state: Mapping[str, Tensor]) -> None:
    """``method.load_state_dict`` of whole tensors, whose rows go where the method holds sharded ones.

    Raises:
        RuntimeError: names or shapes do not fit.
    """
    if getattr(method.backbone, "sharded", None) is None:
        method.load_state_dict(dict(state))
        return
    held = method.state_dict()
    method.load_state_dict({name: _placed(value, held.get(name)) for name, value in state.items()})


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict`` of whole tensors, likewise: what has the shape of its parameter is sharded as that is."""
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    if not any(is_sharded(value) for value in parameters):
        optimizer.load_state_dict(state)
        return
    placed = {
        index: {name: _placed(value, parameters[index]) for name, value in entries.items()}
        for index, entries in state.get("state", {}).items()
    }
    optimizer.load_state_dict({**state, "state": placed} if "state" in state else state)


def _placed(value: Any, like: Tensor | None) -> Any:
    if like is None or not isinstance(value, Tensor) or not is_sharded(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    rows = _own_rows(value, like).to(like.device, copy=True)
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def _own_rows(value: Tensor, like: Any) -> Tensor:
    """The part that ``fully_shard`` gives this process: as many rows to each as to the first, fewer to the last ones."""
    most = -(-len(value) // like.device_mesh.size())
    start = min(like.device_mesh.get_local_rank() * most, len(value))
    return value[start : start + most]


def _whole(value: Any) -> Tensor:
    with torch.no_grad():
        whole: Tensor = value.full_tensor() if is_sharded(value) else value
    return whole


def _blocks(tower: Any) -> tuple[nn.Module, ...]:
    return tuple(getattr(getattr(tower, "transformer", None), "resblocks", ()))


def _embeddings(backbone: Any) -> tuple[nn.Module, ...]:
    """The table of token embeddings, a quarter of a ViT-B/16, which images have no use for."""
    table = getattr(backbone.text_tower, "token_embedding", None)
    return (table,) if isinstance(table, nn.Module) else ()


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters have no memory; buffers, of which a state dict lacks some, are there."""
    memo: dict[int, Any] = {
        id(value): nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=value.requires_grad)
        for value in model.parameters()
    }
    return copy.deepcopy(model, memo)
