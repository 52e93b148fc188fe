"""Names of the public code of MoE-Adapters (JiazuoYu/MoE-Adapters4CL) as those of ours, both ways.

Its checkpoints hold one model: CLIP under OpenAI's names and in every residual block of both towers the adapters.

===============================================  ==========================================  =======================
there, after ``[visual.]transformer.resblocks.I.``  here, after ``blocks.visual_I.`` / ``text_I.``  shape
===============================================  ==========================================  =======================
``adaptmlp_list.E.down_proj.weight``, ``.bias``  ``down_weight[E]``, ``down_bias[E]``        (R, D), (R,)
``adaptmlp_list.E.up_proj.weight``, ``.bias``    ``up_weight[E]``, ``up_bias[E]``            (D, R), (D,)
``router_list.T``, ``w_noise_list.T``            ``routers.T``, ``noises.T``                 (D, E)
``router1``, ``w_noise`` (one for all tasks)     ``routers.0``, ``noises.0``                 (D, E)
===============================================  ==========================================  =======================

Besides there are the last expert a second time (``adaptmlp.``), a layer norm that is never used (``ln_3.``) and the constants
``mean`` and ``std``. The detector is a file of its own, a list of autoencoders of which number 0 is that of generic data:
``I.encoder.0.*`` and ``I.decoder.0.*`` are our ``generic.`` or ``tasks.(I-1).`` ``encoder.*`` and ``decoder.*``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROUTERS = 11
"""Routers that the public code creates, one per task of MTIL; a router that has learnt nothing is zero."""
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_EXPERT = re.compile(r"adaptmlp_list\.(\d+)\.(down|up)_proj\.(weight|bias)")
_ALIAS = re.compile(r"adaptmlp\.(down|up)_proj\.(weight|bias)")
_ROUTER = re.compile(r"(router|w_noise)_list\.(\d+)")
_SHARED = {"router1": "routers.0", "w_noise": "noises.0"}
_UNUSED = ("ln_3.weight", "ln_3.bias", "mean", "std")
_CODER = re.compile(r"(\d+)\.(encoder|decoder)\.0\.(weight|bias)")
_LISTED = 6


@dataclass(frozen=True)
class PublicModel:
    """A checkpoint of the public code, taken apart.

    Attributes:
        clip: the frozen model, OpenAI's names.
        adapters: tensors of our mounted adapters, by their names.
        settings: what the tensors say of the method's settings: ``experts``, ``bottleneck``, ``text_adapters``, ``routers``.
        tasks: routers that have learnt something.
    """

    clip: dict[str, Tensor]
    adapters: dict[str, Tensor]
    settings: dict[str, Any]
    tasks: int


def recognised(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of a checkpoint of the public code."""
    return any("adaptmlp_list." in name for name in state)


def from_public(state: Mapping[str, Tensor], frozen: Iterable[str] = (), tasks: int | None = None) -> PublicModel:
    """Take a checkpoint's tensors apart.

    Args:
        state: by the names of the public code, ``module.`` taken off.
        frozen: lines of its list of frozen experts; none freezes none.
        tasks: how many routers have learnt; None: up to the last that is not zero.

    Raises:
        ValueError: names are unknown or missing, blocks differ in what they hold, or the second copy of the last expert differs.
    """
    clip: dict[str, Tensor] = {}
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        match = _BLOCK.fullmatch(name)
        part = match[3] if match else ""
        if match and part.startswith(("adaptmlp", "router", "w_noise")):
            blocks.setdefault(f"{'visual' if match[1] else 'text'}_{match[2]}", {})[part] = value
        elif part not in _UNUSED:
            clip[name] = value
    depth = {tower: _count(clip, prefix) for tower, prefix in (("visual", "visual."), ("text", ""))}
    towers = ["visual", *(["text"] if any(place.startswith("text") for place in blocks) else [])]
    missing = [f"{tower}_{i}" for tower in towers for i in range(depth[tower]) if f"{tower}_{i}" not in blocks]
    if missing or not blocks:
        raise ValueError(f"state: expected adapters in every residual block, none are in {_listed(missing) or 'any'}")
    held = {place: _experts_and_routers(place, parts) for place, parts in blocks.items()}
    if len(set(held.values())) > 1:
        raise ValueError(f"state: expected as many experts and routers in every block, got {held}")
    experts, routers, shared = next(iter(held.values()))
    learnt = 1 if shared else _learnt(blocks, routers) if tasks is None else tasks
    if not 0 <= learnt <= routers:
        raise ValueError(f"tasks: expected 0 to {routers}, the routers of the checkpoint, got {tasks}")
    adapters: dict[str, Tensor] = {}
    for tower in towers:
        for index in range(depth[tower]):
            place = f"{tower}_{index}"
            adapters |= {
                f"blocks.{place}.{name}": v for name, v in _ours(blocks[place], experts, learnt, shared).items()
            }
    _freeze(adapters, frozen, experts)
    settings = {
        "experts": experts,
        "bottleneck": adapters["blocks.visual_0.down_weight"].shape[1],
        "text_adapters": "text" in towers,
        "routers": "shared" if shared else "task",
    }
    return PublicModel(clip, adapters, settings, learnt)


def to_public(clip: Mapping[str, Tensor], adapters: Mapping[str, Tensor], *, shared: bool = False) -> dict[str, Tensor]:
    """The state dict that the public code loads: CLIP, adapters, and all that its model holds besides.

    Args:
        clip: the frozen model, OpenAI's names.
        adapters: tensors of our mounted adapters, by their names.
        shared: one router for all tasks, as in its class-incremental form.

    Raises:
        ValueError: there are more routers than the public code has.
    """
    found = dict(clip)
    for tower, prefix in (("visual", "visual."), ("text", "")):
        for index in range(_count(clip, prefix)):
            place, base = f"blocks.{tower}_{index}.", f"{prefix}transformer.resblocks.{index}."
            width = clip[f"{base}ln_2.weight"]
            found |= {f"{base}ln_3.weight": torch.ones_like(width), f"{base}ln_3.bias": torch.zeros_like(width)}
            found |= {f"{base}mean": torch.tensor([0.0]), f"{base}std": torch.tensor([1.0])}
            own = {name.removeprefix(place): value for name, value in adapters.items() if name.startswith(place)}
            found |= {f"{base}{name}": value for name, value in _theirs(own, shared).items()}
    return found


def frozen_lines(adapters: Mapping[str, Tensor]) -> list[str]:
    """The public code's list of frozen experts: a line for each of the four tensors of each."""
    lines = []
    for name, value in adapters.items():
        if name.endswith(".frozen"):
            tower, index = name.split(".")[1].split("_")
            base = f"{'visual.' if tower == 'visual' else ''}transformer.resblocks.{index}.adaptmlp_list"
            lines += [
                f"{base}.{expert}.{side}_proj.{kind}"
                for expert in value.nonzero().flatten().tolist()
                for side in ("down", "up")
                for kind in ("weight", "bias")
            ]
    return lines


def detector_from_public(state: Mapping[str, Tensor], tasks: int) -> dict[str, Tensor]:
    """Our detector's tensors from the public code's list of autoencoders.

    Args:
        state: by the names of the public code.
        tasks: how many of them, after the generic one, have learnt; the others hold initial values and are left out.

    Raises:
        ValueError: a name is unknown, or autoencoders are missing.
    """
    unknown = [name for name in state if not _CODER.fullmatch(name)]
    if unknown:
        raise ValueError(f"expected autoencoders as I.encoder.0.weight, unknown are {_listed(unknown)}")
    names = [f"{side}.0.{kind}" for side in ("encoder", "decoder") for kind in ("weight", "bias")]
    wanted = [f"{index}.{name}" for index in range(tasks + 1) for name in names]
    missing = [name for name in wanted if name not in state]
    if missing:
        raise ValueError(f"{tasks} tasks need {tasks + 1} autoencoders, missing are {_listed(missing)}")
    found: dict[str, Tensor] = {}
    for index in range(tasks + 1):
        place = f"tasks.{index - 1}" if index else "generic"
        found |= {f"{place}.{name.replace('.0.', '.')}": state[f"{index}.{name}"] for name in names}
        found[f"{place}.unit"] = torch.ones(())
    width = found["generic.encoder.weight"].shape[1]
    return found | {"shift": torch.zeros(width), "spread": torch.ones(width)}


def detector_to_public(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The public code's list of autoencoders from our detector's tensors.

    Raises:
        ValueError: it has none for generic data, which is number 0 there.
    """
    if not any(name.startswith("generic.") for name in state):
        raise ValueError(
            "detector: the public code needs an autoencoder of generic data, this run had no reference images"
        )
    found = {}
    for name, value in state.items():
        place, _, rest = name.removeprefix("tasks.").partition(".")
        if rest.startswith(("encoder.", "decoder.")):
            index = 0 if place == "generic" else int(place) + 1
            side, _, kind = rest.partition(".")
            found[f"{index}.{side}.0.{kind}"] = value
    return found


def _count(clip: Mapping[str, Tensor], prefix: str) -> int:
    """Residual blocks of a tower."""
    start = f"{prefix}transformer.resblocks."
    return 1 + max((int(name[len(start) :].split(".")[0]) for name in clip if name.startswith(start)), default=-1)


def _experts_and_routers(place: str, parts: Mapping[str, Tensor]) -> tuple[int, int, bool]:
    """(experts, routers, whether the router is shared) of a block, after checking that nothing is unknown or missing."""
    experts = 1 + max((int(m[1]) for name in parts if (m := _EXPERT.fullmatch(name))), default=-1)
    routers = 1 + max((int(m[2]) for name in parts if (m := _ROUTER.fullmatch(name))), default=-1)
    shared = routers == 0
    sides = [f"{side}_proj.{kind}" for side in ("down", "up") for kind in ("weight", "bias")]
    wanted = {f"adaptmlp_list.{expert}.{side}" for expert in range(experts) for side in sides}
    wanted |= set(_SHARED) if shared else {f"{kind}_list.{i}" for kind in ("router", "w_noise") for i in range(routers)}
    unknown = [name for name in parts if name not in wanted and not _ALIAS.fullmatch(name)]
    missing = sorted(wanted - parts.keys())
    if unknown or missing or not experts:
        raise ValueError(
            f"state: block {place} is not one of MoE-Adapters4CL; unknown: {_listed(unknown) or 'nothing'}; "
            f"missing: {_listed(missing) or 'nothing'}"
        )
    for name, value in parts.items():
        if _ALIAS.fullmatch(name) and not torch.equal(
            value, parts[name.replace("adaptmlp", f"adaptmlp_list.{experts - 1}")]
        ):
            raise ValueError(
                f"state: block {place} holds its last expert twice, with different {name.split('.', 1)[1]}"
            )
    return experts, max(routers, 1), shared


def _learnt(blocks: Mapping[str, Mapping[str, Tensor]], routers: int) -> int:
    """Routers up to the last one that is not zero in every block."""
    return max(
        (t + 1 for t in range(routers) if any(bool(parts[f"router_list.{t}"].any()) for parts in blocks.values())),
        default=0,
    )


def _ours(parts: Mapping[str, Tensor], experts: int, routers: int, shared: bool) -> dict[str, Tensor]:
    found = {
        f"{side}_{kind}": torch.stack([parts[f"adaptmlp_list.{e}.{side}_proj.{kind}"] for e in range(experts)])
        for side in ("down", "up")
        for kind in ("weight", "bias")
    }
    for kind, name, alone in (("routers", "router_list", "router1"), ("noises", "w_noise_list", "w_noise")):
        found |= {f"{kind}.{index}": parts[alone if shared else f"{name}.{index}"] for index in range(routers)}
    counts = {name: torch.zeros(experts, dtype=torch.int64) for name in ("usage", "step_usage")}
    return found | counts | {"frozen": torch.zeros(experts, dtype=torch.bool)}


def _theirs(own: Mapping[str, Tensor], shared: bool) -> dict[str, Tensor]:
    if not own:
        return {}
    found: dict[str, Tensor] = {}
    experts = len(own["down_weight"])
    for side in ("down", "up"):
        for kind in ("weight", "bias"):
            for expert, value in enumerate(own[f"{side}_{kind}"]):
                found[f"adaptmlp_list.{expert}.{side}_proj.{kind}"] = value.clone()
            found[f"adaptmlp.{side}_proj.{kind}"] = found[f"adaptmlp_list.{experts - 1}.{side}_proj.{kind}"]
    routers = sum(name.startswith("routers.") for name in own)
    if routers > (1 if shared else ROUTERS):
        raise ValueError(f"adapters: the public code has {1 if shared else ROUTERS} routers, this run learnt {routers}")
    zero = own["down_weight"].new_zeros(own["down_weight"].shape[2], experts)
    if shared:
        return found | {there: own.get(here, zero) for there, here in _SHARED.items()}
    for there, here in (("router_list", "routers"), ("w_noise_list", "noises")):
        found |= {f"{there}.{index}": own.get(f"{here}.{index}", zero).clone() for index in range(ROUTERS)}
    return found


def _freeze(adapters: dict[str, Tensor], frozen: Iterable[str], experts: int) -> None:
    for line in filter(None, (line.strip() for line in frozen)):
        match = _BLOCK.fullmatch(line)
        expert = _EXPERT.fullmatch(match[3]) if match else None
        place = f"blocks.{'visual' if match and match[1] else 'text'}_{match[2] if match else ''}.frozen"
        if expert is None or place not in adapters or int(expert[1]) >= experts:
            raise ValueError(f"frozen: {line!r} is no tensor of an expert of this checkpoint")
        adapters[place][int(expert[1])] = True


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
