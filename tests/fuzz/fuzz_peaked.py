"""Distillation where one entry has nearly all the probability: the loss is a small difference of large numbers there.

How close is close enough follows from the problem. Logits that are rounded to fp32 change the loss by ``Σ (p_s − p_t) dz`` and a
probability by ``p (dz − Σ p dz)``; beside that a sum or an exponential may be off by some units in the last place of what it is of.
Nothing of this grows with the logits where student and teacher agree, so that an implementation which subtracts sums as large as
the logits from each other is seen.
"""

from __future__ import annotations

import torch
from random_tensors import DEVICE, Draw
from torch import Tensor

import cl_kernels as clk

UNIT = 2.0**-24
"""Largest relative error of a number that is rounded to fp32."""

UNITS = 16.0
"""Of them that may all point in one direction on the way to a term of the loss or to a probability."""


def peaked_logits(draw: Draw, backend: str) -> None:
    """Softmax along either dimension, student and teacher alike or not, logits within the bounds of the short way and beyond."""
    shape = (draw.size(40, 1), draw.size(300, 2))
    dim = 1 if shape[0] == 1 else draw.choice((0, 1))
    temperature, kl = draw.choice((1.0, 2.0, 0.7)), draw.chance(0.5)
    largest = draw.choice((20.0, 55.0, 90.0, 400.0)) * temperature
    student, teacher = _alike(draw, shape, largest / 3)
    student, teacher = (t.clamp(-largest, largest) for t in (student, teacher))
    target = "kl" if kl else "cross_entropy"

    def run(dtype: torch.dtype, backend: str, device: str) -> tuple[Tensor, Tensor]:
        leaf = student.to(device, dtype).requires_grad_()
        other, options = teacher.to(device, dtype), {"dim": dim, "target": target, "reduction": "none"}
        loss = clk.distill_kl(leaf, other, temperature=temperature, backend=backend, **options)
        return loss.detach().cpu().double(), torch.autograd.grad(loss.sum(), leaf)[0].cpu().double()

    found, expected = run(torch.float32, backend, DEVICE), run(torch.float64, "reference", "cpu")
    z_s, z_t = student.double() / temperature, teacher.double() / temperature
    # Divided by the temperature, whose reciprocal is rounded too, and subtracted from the largest.
    dz_s, dz_t = (UNIT * (2 * z.abs() + (z - z.amax(dim, keepdim=True)).abs()) for z in (z_s, z_t))
    loss, gradient = _allowed(z_s, z_t, dz_s, dz_t, dim, kl)
    _check("loss", found[0], expected[0], temperature**2 * loss)
    _check("gradient of student_logits", found[1], expected[1], temperature * gradient)


def peaked_features(draw: Draw, backend: str) -> None:
    """The same from features of norm 1 with a scale of up to 180, in one direction or both."""
    N, M, d = draw.size(80, 1), draw.size(200, 1), draw.size(40, 2)
    temperature, kl = draw.choice((1.0, 2.0)), draw.chance(0.5)
    scale = draw.choice((20.0, 40.0, 60.0, 90.0)) * temperature
    factors = draw.choice(((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)))
    student, teacher = (torch.nn.functional.normalize(t, dim=1) for t in _alike(draw, (N, d), 1.0))
    anchors = torch.nn.functional.normalize(draw.normal((M, d), torch.float32).clone(), dim=1)
    if draw.chance(0.5):  # images whose caption is among the anchors
        anchors[: min(N, M)] = teacher[: min(N, M)]
    options = {"logit_scale": scale, "temperature": temperature, "target": "kl" if kl else "cross_entropy"}
    directions = dict(zip(("rows", "columns"), factors, strict=True))

    def run(dtype: torch.dtype, backend: str, device: str) -> tuple[Tensor, Tensor]:
        leaf, *others = (t.to(device, dtype) for t in (student, teacher, anchors))
        leaf.requires_grad_()
        loss = clk.feature_distill_kl(leaf, *others, **options, **directions, backend=backend)
        return loss.detach().cpu().double(), torch.autograd.grad(loss, leaf)[0].cpu().double()

    found, expected = run(torch.float32, backend, DEVICE), run(torch.float64, "reference", "cpu")
    f_s, f_t, a = student.double(), teacher.double(), anchors.double()
    z_s, z_t = (scale / temperature * f @ a.T for f in (f_s, f_t))
    dz = torch.full_like(z_s, UNIT * scale / temperature * (4 + d**0.5))
    loss, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(z_s)
    for factor, dim in zip(factors, (1, 0), strict=True):
        of_loss, of_gradient = _allowed(z_s, z_t, dz, dz, dim, kl)
        loss += factor * temperature**2 * of_loss.mean()
        gradient += factor * temperature * of_gradient / z_s.shape[1 - dim]
    _check("loss", found[0], expected[0], loss)
    # Products and sums over all anchors come on top, for any implementation.
    _check("gradient of student", found[1], expected[1], 10 * scale * gradient @ a.abs())


def _alike(draw: Draw, shape: tuple[int, int], spread: float) -> tuple[Tensor, Tensor]:
    """Two tensors of random numbers: the same, nearly the same or different."""
    one = draw.normal(shape, torch.float32, spread).clone()
    other = draw.normal(shape, torch.float32, spread).clone()
    distance = draw.choice((0.0, 1e-3, 0.05, 1.0))
    return one, one + distance * (other - one)


def _allowed(z_s: Tensor, z_t: Tensor, dz_s: Tensor, dz_t: Tensor, dim: int, kl: bool) -> tuple[Tensor, Tensor]:
    """Largest error of the loss of every slice along ``dim`` and of ``p_s − p_t``, from those of the logits."""

    def softmax(z: Tensor, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p = z.log_softmax(dim)
        p = log_p.exp()
        # p (dz − Σ p dz), written so that the share of the entry itself drops out where it has all the probability.
        others = (p * dz).sum(dim, keepdim=True) - p * dz
        return p, log_p, p * ((1 - p) * dz + others)

    p_s, log_s, dp_s = softmax(z_s, dz_s)
    p_t, log_t, dp_t = softmax(z_t, dz_t)
    away = (log_s - log_t if kl else log_s).abs()
    size = (p_t * (log_s.abs() + (log_t.abs() if kl else 0))).sum(dim)
    loss = ((p_s - p_t).abs() * dz_s + dp_t * away).sum(dim) + UNITS * UNIT * (1 + size)
    return loss, dp_s + dp_t + UNITS * UNIT * (p_s + p_t)


def _check(name: str, found: Tensor, expected: Tensor, allowed: Tensor) -> None:
    share = ((found - expected).abs() / (allowed + 1e-30)).detach().max().item()  # smaller numbers underflow
    assert share <= 1, f"{name}: error {share:.2f} times as large as rounded logits explain"
