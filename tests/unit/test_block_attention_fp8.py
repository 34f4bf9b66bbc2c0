"""Attention in FP8: rounding by heads, outputs within the format's bound, exact straight-through gradients, and kernels
that multiply in eight bits, with a stand-in for FlashAttention-3.
"""

import pytest
import torch
from torch import Tensor

from megavid.models.fp8 import Fp8AttentionRounding
from megavid.ops.block_attention import BlockAttention, ReferenceAttention
from megavid.ops.block_attention_aten import CpuFlash
from megavid.ops.block_attention_fp8 import Fp8Attention, has_fp8_forward
from megavid.ops.compiled import why_not_compiled
from megavid.ops.fp8 import ABSOLUTE_ERROR, E4M3, RELATIVE_ERROR, dequantize, quantize_heads, scale_of
from megavid.ops.fp8_ops import COMPILED_FP8, REFERENCE_FP8, Fp8Ops

SHAPES = {
    "mha": ((2, 4, 9, 16), (2, 4, 9, 16)),
    "gqa": ((2, 6, 5, 16), (2, 2, 17, 16)),
    "one token": ((1, 2, 1, 16), (1, 2, 1, 16)),
    "one query": ((1, 2, 1, 16), (1, 2, 40, 16)),
}


def draw(shape: str, dtype: torch.dtype) -> list[Tensor]:
    """Gradient, queries, keys and values, views with tokens first in memory; heads differ by powers of ten."""
    generator = torch.Generator().manual_seed(3)
    queries, keys = SHAPES[shape]

    def tensor(sizes: tuple[int, int, int, int]) -> Tensor:
        batch, heads, tokens, width = sizes
        drawn = torch.randn(tokens, batch, heads, width, generator=generator, dtype=torch.float64)
        return drawn.to(dtype).permute(1, 2, 0, 3)

    grad, q, k, v = tensor(queries), tensor(queries), tensor(keys), tensor(keys)
    v = v * (10.0 ** torch.arange(v.shape[1])).to(dtype).view(1, -1, 1, 1)
    return [grad, q, k, v]


def rounded(inner: BlockAttention, ops: Fp8Ops = REFERENCE_FP8) -> Fp8Attention:
    return Fp8Attention(inner, Fp8AttentionRounding("layer", ops), is_in_eight_bits=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_head_is_rounded_within_the_format_s_bound(shape: str, dtype: torch.dtype) -> None:
    _, q, k, v = draw(shape, dtype)
    kv_heads = k.shape[1]
    for x in (q, k, v):
        found = quantize_heads(x, kv_heads, E4M3)
        assert found.scale.shape == (*x.shape[:2], 1, 1)
        assert found.data.stride(-1) == 1
        became = dequantize(found, torch.float64)
        bound = torch.maximum(RELATIVE_ERROR[E4M3] * x.double().abs(), ABSOLUTE_ERROR[E4M3] * found.scale.double())
        assert ((became - x.double()).abs() <= bound).all()
        # Heads that attend to one key head share the scale of their largest number, packs share none.
        groups = x.reshape(x.shape[0], kv_heads, -1)
        scale = scale_of(groups.abs().amax(-1), E4M3).repeat_interleave(x.shape[1] // kv_heads, 1)
        assert torch.equal(found.scale[:, :, 0, 0], scale)


@pytest.mark.skipif(bool(why_not_compiled()), reason=f"compiled ops: {why_not_compiled()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_ops_round_heads_to_the_same_bytes(dtype: torch.dtype) -> None:
    for x in draw("gqa", dtype)[1:]:
        plain, compiled = (ops.quantize_heads(x, 2, E4M3) for ops in (REFERENCE_FP8, COMPILED_FP8))
        assert torch.equal(plain.data.view(torch.uint8), compiled.data.view(torch.uint8))
        assert torch.equal(plain.scale, compiled.scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounded_attention_is_dense_attention_within_a_bound_of_the_format(shape: str, dtype: torch.dtype) -> None:
    """Scores move by what queries and keys do, weights by a factor of that exponential, outputs by both and values."""
    _, q, k, v = draw(shape, dtype)
    (out, lse), (want, want_lse) = (each.forward(q, k, v) for each in (rounded(CpuFlash()), ReferenceAttention()))
    heads = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(heads, 1) for x in (k, v))
    step = RELATIVE_ERROR[E4M3]
    floors = [ABSOLUTE_ERROR[E4M3] * quantize_heads(x, k.shape[1], E4M3).scale.to(dtype) for x in (q, k)]
    near_q, near_k = (q.abs() * step + floors[0], wide_k.abs() * step + floors[1].repeat_interleave(heads, 1))
    moved = near_q @ wide_k.abs().mT + (q.abs() + near_q) @ near_k.mT
    most = (moved * q.shape[-1] ** -0.5).amax(-1)
    assert ((lse - want_lse).abs() <= most + 1e-5).all()
    weights = (q @ wide_k.mT * q.shape[-1] ** -0.5).softmax(-1)
    factor = (2 * most).exp().unsqueeze(-1)
    bound = (factor * (1 + step) - 1) * (weights @ wide_v.abs()) + step * ABSOLUTE_ERROR[E4M3] * wide_v.abs().amax()
    assert ((out - want).abs() <= bound + 1e-5).all()
    assert (out != want).any()
    assert (out.dtype, lse.dtype) == (dtype, dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_dense_attention_at_the_rounded_operands(shape: str) -> None:
    grad, *inputs = draw(shape, torch.float64)
    kernel = rounded(ReferenceAttention())
    out, lse = kernel.forward(*inputs)
    kv_heads = inputs[1].shape[1]
    leaves = [dequantize(quantize_heads(x, kv_heads, E4M3), x.dtype).requires_grad_() for x in inputs]
    want, _ = ReferenceAttention().forward(*leaves)
    want.backward(grad)
    torch.testing.assert_close(out, want.detach(), rtol=1e-12, atol=1e-12)
    for got, leaf in zip(kernel.backward(grad, *inputs, out, lse), leaves):
        assert leaf.grad is not None
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, leaf.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", range(3))
def test_what_is_not_finite_stays_so(dtype: torch.dtype, broken: float, place: int) -> None:
    """In its pack and head alone, in the output and in a gradient."""
    grad, *inputs = draw("mha", dtype)
    inputs[place] = inputs[place].clone()
    inputs[place][0, 1, 2, 3] = broken
    kernel = rounded(CpuFlash())
    out, lse = kernel.forward(*inputs)
    is_whole = torch.ones(2, 4, dtype=torch.bool)
    is_whole[0, 1] = False
    assert torch.equal(out.isfinite().all(-1).all(-1), is_whole)
    gradients = kernel.backward(grad, *inputs, out, lse)
    assert not all(x[0, 1].isfinite().all() for x in gradients)
    assert all(x[is_whole].isfinite().all() for x in gradients)


def test_an_operand_is_watched() -> None:
    _, q, k, v = draw("gqa", torch.float32)
    rounding = Fp8AttentionRounding("blocks.1.self_attention", REFERENCE_FP8)
    rounding.seen = torch.zeros(3, 5, dtype=torch.float64)
    Fp8Attention(CpuFlash(), rounding, is_in_eight_bits=False).forward(q, k, v)
    for row, x in zip(rounding.seen, (q, k, v)):
        numbers, _, overflow, error, size = row.tolist()
        assert numbers == x.numel()
        assert overflow == 0
        assert 0.01 < (error / size) ** 0.5 < 0.05


def test_kernels_without_eight_bits_are_not_asked() -> None:
    assert not has_fp8_forward(CpuFlash(), torch.device("cpu"), 64)
