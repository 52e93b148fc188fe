"""MoE-Adapters4CL (github.com/JiazuoYu/MoE-Adapters4CL): blocks of its MTIL and CIL models."""

from __future__ import annotations

from typing import Any

from torch import nn

from cl_kernels.drop_in.moe_block import MoEBlock, Router, patch_blocks
from cl_kernels.drop_in.patch import Patch


def patch_moe_adapters4cl(model: nn.Module) -> Patch:
    """Run the adapters of a MoE-Adapters4CL model through one kernel per block, in training and evaluation.

    Parameters, state dict, router of the active task, activation counts and the noise of the gates stay as they are; experts that
    nobody chose keep ``grad = None``, and frozen ones take no gradient. The load-balancing loss, which the published code computes
    and throws away, is not computed. Dropout masks have the same probability and come from another generator.

    Args:
        model: the CLIP of ``mtil/clip/model.py`` or ``cil/clip/model.py``, or any module that holds such blocks.

    Returns:
        The patch: ``replaced`` names the blocks.

    Raises:
        ValueError: there is no such block, or none can be replaced.
        TypeError: ``model`` is not a module.

    Source: MoE-Adapters4CL (Yu et al., CVPR 2024), section 3.2 and its public code.
    """
    return patch_model(model, "patch_moe_adapters4cl")


def patch_model(model: nn.Module, title: str) -> Patch:
    """Patch the blocks of both variants: MTIL's, which know their settings, and CIL's, which read a global task.

    Raises:
        ValueError: there is no such block, or none can be replaced.
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module that holds {_BLOCKS}")
    return patch_blocks(Patch(title), model, _variant).require(_BLOCKS)


_BLOCKS = "residual attention blocks with adaptmlp_list and router_list"


def _variant(block: Any, variables: dict[str, Any]) -> type[MoEBlock] | str:
    if len(getattr(block, "router_list", ())) == 0 and not hasattr(block, "router1"):
        return "it has neither router_list nor router1: no mixture"
    if "global_taskid" in variables and hasattr(block, "router_list"):
        return _ClassIncrementalBlock
    return _MultiDomainBlock


def _counter(block: Any) -> str | None:
    name = "choose_map_text" if getattr(block, "text_or_image", None) == "text" else "choose_map_image"
    return name if name in vars(block) else None


class _ClassIncrementalBlock(MoEBlock):
    def _router(self: Any) -> Router | None:
        task = self._globals["global_taskid"]
        if task is None:
            return None
        return self.router_list[task], self.w_noise_list[task], _counter(self)


class _MultiDomainBlock(MoEBlock):
    def _router(self: Any) -> Router | None:
        parallel = getattr(self, "ffn_option", "parallel") == "parallel"
        if not (parallel and all(getattr(self, flag, True) for flag in ("ffn_adapt", "adapter_flag", "apply_moe"))):
            return None
        default = getattr(self, "task_id", 0)
        if default <= -1:
            return self.router1, self.w_noise, None
        task = self._globals.get("val_task_id") if getattr(self, "autorouter", False) else None
        if task == -1:
            return None
        task = default if task is None else task
        return self.router_list[task], self.w_noise_list[task], _counter(self)
