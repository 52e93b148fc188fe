"""Drawing on batches of 32 x 32 canvases in float32, with operations that round the same way everywhere.

Only ``+ - * / sqrt``, comparisons, ``minimum``, ``maximum`` and ``floor`` touch pixels: IEEE 754 fixes their results to the bit.
No matrix product, no sum over an axis, no libm function, whose last bits depend on the processor.

Screen coordinates run over [-1, 1], x to the right and y downwards; one unit is 16 pixels.
"""

from __future__ import annotations

import numpy as np

SIZE = 32
PIXELS_PER_UNIT = np.float32(16.0)
_CENTRES = (np.arange(SIZE, dtype=np.float32) + np.float32(0.5)) / PIXELS_PER_UNIT - np.float32(1.0)
X = np.broadcast_to(_CENTRES[None, None, :], (1, SIZE, SIZE))
Y = np.broadcast_to(_CENTRES[None, :, None], (1, SIZE, SIZE))


def column(values: np.ndarray) -> np.ndarray:
    """(B,) to (B, 1, 1), so that it broadcasts over pixels."""
    return np.asarray(values, dtype=np.float32)[:, None, None]


def blank(colour: np.ndarray) -> np.ndarray:
    """Canvases (B, 3, 32, 32) filled with one colour each, from (B, 3)."""
    return np.ascontiguousarray(
        np.broadcast_to(colour[:, :, None, None], (len(colour), 3, SIZE, SIZE)), dtype=np.float32
    )


def local(
    cx: np.ndarray, cy: np.ndarray, scale: np.ndarray, turn: np.ndarray, x: np.ndarray = X, y: np.ndarray = Y
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (u, v), each (B, 32, 32), of an object's own frame.

    The frame is centred at (cx, cy), one of its units is ``scale`` screen units, and it is turned by the angle whose half has
    the tangent ``turn``: with t = turn, cos = (1 - t²)/(1 + t²) and sin = 2t/(1 + t²), so no trigonometry is evaluated.
    """
    turn = column(turn)
    square = turn * turn
    cosine = (1.0 - square) / (1.0 + square)
    sine = (turn + turn) / (1.0 + square)
    dx, dy = (x - column(cx)) / column(scale), (y - column(cy)) / column(scale)
    return cosine * dx + sine * dy, cosine * dy - sine * dx


def cover(distance: np.ndarray, softness: np.ndarray | float = 1.0) -> np.ndarray:
    """Opacity of pixels from their signed distance in screen units: clip(1/2 - pixels / softness, 0, 1)."""
    soft = softness if isinstance(softness, float) else column(softness)
    return np.minimum(np.maximum(0.5 - distance * PIXELS_PER_UNIT / soft, 0.0), 1.0)


def paint(canvas: np.ndarray, opacity: np.ndarray, colour: np.ndarray) -> None:
    """Blend a colour, (B, 3) or (B, 3, 32, 32), over the canvas in place: canvas += opacity · (colour - canvas)."""
    if colour.ndim == 2:
        colour = colour[:, :, None, None]
    canvas += opacity[:, None] * (colour - canvas)


def wave(phase: np.ndarray) -> np.ndarray:
    """A smooth wave of period 1 between -1 and 1, made of two parabolas."""
    p = phase - np.floor(phase)
    q = np.minimum(p, np.abs(p - 0.5))
    return np.where(p < 0.5, 1.0, -1.0).astype(np.float32) * 16.0 * q * (0.5 - q)


def triangle_wave(phase: np.ndarray) -> np.ndarray:
    """A zigzag of period 1 between 0 and 1."""
    return np.abs(2.0 * (phase - np.floor(phase)) - 1.0)


def smooth(canvas: np.ndarray, passes: int) -> np.ndarray:
    """Blur (B, C, H, W) with the kernel (1 2 1)/4 along both axes, ``passes`` times, repeating the border."""
    for _ in range(passes):
        for axis in (2, 3):
            padded = np.concatenate([canvas.take([0], axis), canvas, canvas.take([-1], axis)], axis)
            length = canvas.shape[axis]
            before = padded.take(range(length), axis)
            after = padded.take(range(2, length + 2), axis)
            canvas = (before + after) * 0.25 + canvas * 0.5
    return canvas


def shrink(canvas: np.ndarray, factor: int) -> np.ndarray:
    """Means over blocks: (B, C, H, W) to (B, C, H / factor, W / factor), added up in a fixed order."""
    total = np.zeros_like(canvas[:, :, ::factor, ::factor])
    for row in range(factor):
        for col in range(factor):
            total = total + canvas[:, :, row::factor, col::factor]
    return total / np.float32(factor * factor)


def enlarge(small: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Bilinear interpolation of (B, C, h, h) to (B, C, size, size), pixel centres aligned, border repeated."""
    side = small.shape[-1]
    position = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(side / size) - np.float32(0.5)
    position = np.minimum(np.maximum(position, 0.0), side - 1.0)
    first = np.minimum(np.floor(position).astype(np.int64), side - 2)
    weight = (position - first.astype(np.float32)).astype(np.float32)
    rows = small[:, :, first, :] + weight[:, None] * (small[:, :, first + 1, :] - small[:, :, first, :])
    return rows[..., first] + weight * (rows[..., first + 1] - rows[..., first])


def to_bytes(canvas: np.ndarray) -> np.ndarray:
    """uint8 (B, 3, 32, 32): floor(255 · clip(canvas, 0, 1) + 1/2).

    Raises:
        TypeError: the canvas is not float32, so an operation has silently widened it.
    """
    if canvas.dtype != np.float32:
        raise TypeError(f"canvas: expected float32, got {canvas.dtype}")
    return np.floor(np.minimum(np.maximum(canvas, 0.0), 1.0) * 255.0 + 0.5).astype(np.uint8)
