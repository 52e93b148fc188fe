"""The reference against an independent evaluation of the definition, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from adapter_cases import make, naive

import cl_kernels as clk
from cl_kernels.moe_adapter import dropout

SHAPES = [
    (3, 5, 8, 4, 4, 2),  # batch, length, width, rank, experts, k
    (2, 1, 7, 3, 2, 1),
    (6, None, 8, 5, 3, 3),
    (1, 9, 16, 2, 22, 2),
]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_definition(shape, residual):
    case = make(*shape, dtype=torch.float64, residual=residual)
    arguments, expected = case.arguments(True), case.arguments(True)
    out = clk.moe_adapter(**arguments, scale=case.scale, backend="reference")
    wanted = naive(**expected, scale=case.scale)
    torch.testing.assert_close(out, wanted)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    wanted.backward(upstream)
    for name in arguments:
        if name != "expert_ids":
            torch.testing.assert_close(arguments[name].grad, expected[name].grad, msg=name)


def test_dropout_mask_is_philox_of_the_row():
    case = make(3, 4, 6, 5, 3, 2, dtype=torch.float64)
    torch.manual_seed(5)
    out = clk.moe_adapter(**case.tensors, scale=case.scale, dropout_p=0.4, backend="reference")
    torch.manual_seed(5)
    keep = dropout.keep(dropout.draw_seed(), torch.arange(3 * 2 * 4).view(3, 2, 4), 5, 0.4)
    assert 0 < keep.sum() < keep.numel()
    torch.testing.assert_close(out, naive(**case.tensors, scale=case.scale, keep=keep, dropout_p=0.4))


def test_philox_known_answers():
    # Random123's published vector for philox4x32-10 with zero counter and key.
    words = torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
    expected = torch.where(words < 2**31, words, 2**32 - 1 - words).float() * 4.6566127342e-10
    assert torch.equal(dropout.uniform(torch.tensor(0), torch.tensor([0])), expected[None])


def test_rows_of_the_mask_use_all_words_and_no_counter_twice():
    seed = torch.tensor(9)
    for rank in (3, 4, 6):
        groups = (rank + 3) // 4
        kept = dropout.keep(seed, torch.arange(5), rank, 0.5)
        drawn = dropout.uniform(seed, torch.arange(5 * groups)).view(5, groups * 4)[:, :rank]
        assert torch.equal(kept, drawn >= 0.5)


def test_uniform_matches_an_integer_implementation():
    def philox(seed, offset):
        c, k = [offset & 0xFFFFFFFF, offset >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    seeds, offsets = (0, 1, 2**31, 2**62 + 12345), (0, 1, 2**31 + 3, 2**32 - 1, 2**32, 2**40 + 7)
    for seed, offset in itertools.product(seeds, offsets):
        words = torch.tensor(philox(seed, offset))
        expected = torch.where(words < 2**31, words, 2**32 - 1 - words).float() * 4.6566127342e-10
        assert torch.equal(dropout.uniform(torch.tensor(seed), torch.tensor([offset])), expected[None])


def test_no_dropout_draws_nothing():
    case = make(2, 3, 4, 2, 2, 1)
    before = torch.get_rng_state()
    clk.moe_adapter(**case.tensors, dropout_p=0.0, backend="reference")
    assert torch.equal(before, torch.get_rng_state())
    clk.moe_adapter(**case.tensors, dropout_p=0.1, backend="reference")
    assert not torch.equal(before, torch.get_rng_state())


def test_ids_out_of_range_contribute_nothing():
    case = make(3, 4, 6, 5, 3, 2, dtype=torch.float64)
    case.tensors["expert_ids"] = torch.tensor([[0, -1], [3, 2], [99, -5]])
    arguments = case.arguments(True)
    out = clk.moe_adapter(**arguments, scale=case.scale, backend="reference")
    torch.testing.assert_close(out, naive(**case.tensors, scale=case.scale))
    torch.testing.assert_close(out[2], case.tensors["residual"][2])
    out.sum().backward()
    assert torch.equal(arguments["gates"].grad != 0, torch.tensor([[True, False], [False, True], [False, False]]))


def test_unused_experts_get_zero_gradients():
    case = make(3, 4, 6, 5, 8, 2)
    case.tensors["expert_ids"] = torch.tensor([[1, 2]]).expand(3, 2)
    arguments = case.arguments(True)
    clk.moe_adapter(**arguments, backend="reference").square().sum().backward()
    for name in ("down_weight", "down_bias", "up_weight", "up_bias"):
        used = arguments[name].grad.flatten(1).abs().sum(1) > 0
        assert used.tolist() == [e in (1, 2) for e in range(8)], name


def test_gradcheck():
    case = make(2, 3, 4, 3, 3, 2, dtype=torch.float64)
    arguments = case.arguments(True)
    names = [name for name in arguments if name != "expert_ids"]

    def call(*tensors):
        named = dict(zip(names, tensors, strict=True))
        return clk.moe_adapter(**named, expert_ids=case.tensors["expert_ids"], scale=0.7, backend="reference")

    assert torch.autograd.gradcheck(call, [arguments[name] for name in names])
