"""Bottleneck adapters of any codebase: down, ReLU, up, scale, residual, in one kernel."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels.drop_in.patch import Patch, Patched
from cl_kernels.drop_in.probe import relative_difference, undisturbed
from cl_kernels.moe_adapter import moe_adapter

_SCALES = ("scale", "scaling", "adapter_scalar")


def patch_adapters(model: nn.Module) -> Patch:
    """Run modules that compute ``[x +] s · (W_up drop(relu(W_down x + b_down)) + b_up)`` through the adapter kernel.

    Recognised are modules with two ``nn.Linear`` (D to R and back, in this order, both with bias), one ReLU, at most one dropout
    (a module, or a number ``dropout``), and a number or parameter called ``scale``, ``scaling`` or ``adapter_scalar``. Each is then
    called once with random weights: what computes anything else is left. LoRA, which has no ReLU, is another form, and its
    products can be merged into the layer: nothing of it is replaced. Dropout masks have the same probability and come from another
    generator.

    Args:
        model: any module; AdaptFormer's adapters in a timm model, for instance, or the single adapters of MoE-Adapters4CL.

    Returns:
        The patch: ``replaced`` names the adapters.

    Raises:
        ValueError: there is no such module.
        TypeError: ``model`` is not a module.

    Source: Houlsby et al., 2019; AdaptFormer (Chen et al., 2022).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module that holds adapters")
    patch = Patch("patch_adapters")
    for name, module in list(model.named_modules()):
        linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
        if module is model or len(linears) != 2 or not any(isinstance(m, nn.ReLU) for m in module.modules()):
            continue
        reason = "already patched" if isinstance(module, Patched) else _replace(patch, name, module)
        if reason is not None:
            patch.left[name] = reason
    return patch.require("modules of two nn.Linear with a ReLU between them")


class _Adapter(Patched):
    """The two layers and the dropout are found by name, so that copies and replicas use their own."""

    _layers: tuple[str, str]
    _dropout: str | None
    _scale: str | None
    _adds_input: bool

    def _adapt(self: Any, x: Tensor, residual: Tensor | None) -> Tensor:
        down, up = (self.get_submodule(name) for name in self._layers)
        dropout: Any = self.get_submodule(self._dropout) if self._dropout is not None else getattr(self, "dropout", 0.0)
        p, active = (dropout.p, dropout.training) if self._dropout is not None else (dropout, self.training)
        scale = 1.0 if self._scale is None else getattr(self, self._scale)
        learnt = isinstance(scale, Tensor)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        chosen = torch.zeros(len(tokens), 1, dtype=torch.int64, device=x.device)
        gates = torch.ones(
            len(tokens), 1, device=x.device, dtype=x.dtype if x.dtype == torch.float64 else torch.float32
        )
        out = moe_adapter(
            tokens,
            chosen,
            gates,
            down.weight[None],
            down.bias[None],
            up.weight[None],
            up.bias[None],
            scale=1.0 if learnt else scale,
            dropout_p=p if active else 0.0,
            residual=None if residual is None or learnt else residual.reshape(tokens.shape),
        ).reshape(x.shape)
        if not learnt:
            return out
        return out * scale if residual is None else out * scale + residual

    def forward(self, x: Tensor) -> Tensor:
        """The adapter's output for ``x`` (…, D)."""
        return self._adapt(x, x if self._adds_input else None)


class _ChoosingAdapter(_Adapter):
    """AdaptFormer's signature: the caller says whether a residual is added, and which."""

    def forward(self, x: Tensor, add_residual: bool = True, residual: Tensor | None = None) -> Tensor:
        """The adapter's output for ``x`` (…, D), with ``residual`` or ``x`` itself added if ``add_residual``."""
        return self._adapt(x, (x if residual is None else residual) if add_residual else None)


def _replace(patch: Patch, name: str, module: Any) -> str | None:
    """Replace one module, or say why not."""
    layers = {key: m for key, m in module.named_modules() if isinstance(m, nn.Linear)}
    (first, down), (second, up) = layers.items()
    if type(down) is not nn.Linear or type(up) is not nn.Linear or down.bias is None or up.bias is None:
        return "its layers are not plain nn.Linear with bias"
    if (down.in_features, down.out_features) != (up.out_features, up.in_features):
        return f"its layers map {down.in_features} -> {down.out_features} and {up.in_features} -> {up.out_features}"
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules() if m is not module):
        return "its layers have hooks, which the kernel would not run"
    drops = [key for key, m in module.named_modules() if isinstance(m, nn.Dropout)]
    scale = next((key for key in _SCALES if isinstance(getattr(module, key, None), float | int | nn.Parameter)), None)
    if len(drops) > 1:
        return "it has several dropouts"
    behaviour = {("x",): _Adapter, ("x", "add_residual", "residual"): _ChoosingAdapter}.get(_parameters(module))
    if behaviour is None:
        return f"its forward takes {', '.join(_parameters(module))}, expected one tensor"
    settings = {"_layers": (first, second), "_dropout": drops[0] if drops else None, "_scale": scale}
    expected, differences = _probe(module), []
    for adds_input in (True, False):
        trial = Patch("")
        trial.change_class(name, module, behaviour, _adds_input=adds_input, **settings)
        differences.append(relative_difference(expected, _probe(module)))
        if differences[-1] < 1e-2:
            patch.adopt(name, trial)
            return None
        trial.undo()
    return f"its forward computes something else: outputs differ by {min(differences):.1e} of the largest"


def _parameters(module: nn.Module) -> tuple[str, ...]:
    names = tuple(inspect.signature(module.forward).parameters)
    return ("x",) if len(names) == 1 else names


def _probe(module: Any) -> Tensor:
    """The output for random tokens and weights; adapters start as zero functions."""
    like = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    width = next(m.in_features for m in module.modules() if isinstance(m, nn.Linear))
    places = [(m._parameters, key, p) for m in module.modules() for key, p in m._parameters.items() if p is not None]
    x = torch.randn(2, 3, width, generator=generator).to(like)
    try:
        for parameters, key, p in places:
            random = 0.3 * torch.randn(p.shape, generator=generator)
            parameters[key] = nn.Parameter(random.to(p), requires_grad=False)
        with undisturbed(module, like):
            return module(x).float()
    finally:
        for parameters, key, p in places:
            parameters[key] = p
