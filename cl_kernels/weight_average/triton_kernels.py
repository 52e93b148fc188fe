"""Weight averaging in Triton: one launch for all tensors of one combination of dtypes, through a table of addresses."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 4096
CHUNK = 8 * BLOCK
"""Elements of one program: 16 fp32 elements a thread and pass, and a table of 180 KB for the 150 million weights of ViT-B/16."""


def block_of(stochastic: bool) -> int:
    """Elements that a program holds at a time: half as many where random bits for them take registers too."""
    return BLOCK // 2 if stochastic else BLOCK


@triton.jit
def random_bits(seed, counter, BLOCK: tl.constexpr):
    """[BLOCK] int32 below 2¹⁶: the halves of the Philox words of ``counter`` and those behind it, eight to a counter."""
    counters = counter + tl.arange(0, BLOCK // 8)  # [BLOCK / 8] int64
    low = counters.to(tl.uint32)
    high = (counters >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK / 8, 2, 2]: word 2 i + j at [:, i, j]
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [BLOCK]).to(tl.int32)


@triton.jit
def round_stochastically(exact, random, DST: tl.constexpr):
    """[BLOCK] fp32 to a 16-bit type: up with the probability of the share of the way. NaN and infinities stay."""
    bits = exact.to(tl.int32, bitcast=True)
    if DST == tl.bfloat16:  # noqa: SIM300
        # Adding below the last digit that is kept and cutting off carries with the right probability.
        rounded = ((bits + random) & -65536).to(tl.float32, bitcast=True)
    else:
        magnitude = tl.abs(exact)
        normal = ((magnitude.to(tl.int32, bitcast=True) + (random >> 3)) & -8192).to(tl.float32, bitcast=True)
        # Below 2⁻¹⁴ the digits of a half are multiples of 2⁻²⁴.
        small = magnitude < 6.103515625e-05
        scaled = tl.where(small, magnitude, 0.0) * 16777216.0 + random.to(tl.float32) * 1.52587890625e-05
        subnormal = scaled.to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
        rounded = tl.where(small, subnormal, normal)
        rounded = tl.where(bits < 0, -rounded, rounded)
    return tl.where(exact == exact, rounded, exact).to(DST)


@triton.jit
def average_block(
    dst,  # [n]
    src,  # [n]
    other,  # [n]
    offset,  # [BLOCK]
    inside,  # [BLOCK], or None for a full block
    share,
    other_share,
    seed,
    counter,
    DST: tl.constexpr,
    COMPUTE: tl.constexpr,
    OTHER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``a + share (v − a) + other_share (o − a)`` for the elements at ``offset``, in place."""
    a = tl.load(dst + offset, mask=inside).to(COMPUTE)
    v = tl.load(src + offset, mask=inside).to(COMPUTE)
    result = a + share * (v - a)
    if OTHER is not None:
        o = tl.load(other + offset, mask=inside).to(COMPUTE)
        result += other_share * (o - a)
    stored = round_stochastically(result, random_bits(seed, counter, BLOCK), DST) if STOCHASTIC else result.to(DST)
    tl.store(dst + offset, stored, mask=inside)


@triton.jit(do_not_specialize=["seed"])  # else one seed in sixteen would compile a kernel of its own
def average_kernel(
    table_ptr,  # [programs, 5] int64: addresses of the average, the value and the other, number of elements, first counter
    weight: tl.float64,
    other_weight: tl.float64,
    seed: tl.int64,
    DST: tl.constexpr,
    SRC: tl.constexpr,
    OTHER: tl.constexpr,  # None where two models are averaged
    COMPUTE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of the table per program. Full blocks are read without a mask, 16 bytes at a time where addresses allow it."""
    row = table_ptr + tl.program_id(0) * 5
    dst = tl.load(row).to(tl.pointer_type(DST))  # [n]
    src = tl.load(row + 1).to(tl.pointer_type(SRC))  # [n]
    other = src
    n = tl.load(row + 3).to(tl.int32)
    counter = tl.load(row + 4)
    if OTHER is not None:
        other = tl.load(row + 2).to(tl.pointer_type(OTHER))  # [n]
    if ALIGNED:
        dst = tl.multiple_of(dst, 16)
        src = tl.multiple_of(src, 16)
        other = tl.multiple_of(other, 16)
    share = (tl.zeros((), tl.float64) + weight).to(COMPUTE)
    other_share = (tl.zeros((), tl.float64) + other_weight).to(COMPUTE)
    full = n // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        offset = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)  # [BLOCK]
        average_block(
            dst, src, other, offset, None, share, other_share,
            seed, counter + start // 8, DST, COMPUTE, OTHER, STOCHASTIC, BLOCK,
        )  # fmt: skip
    if full < n:
        offset = full + tl.arange(0, BLOCK)
        average_block(
            dst, src, other, offset, offset < n, share, other_share,
            seed, counter + full // 8, DST, COMPUTE, OTHER, STOCHASTIC, BLOCK,
        )  # fmt: skip
