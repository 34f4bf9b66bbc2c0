"""Attention in FP8: rounding by heads, outputs within the format's bound, exact straight-through gradients, and kernels
that multiply in eight bits, with a stand-in for FlashAttention-3.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megavid.models.fp8 import Fp8AttentionRounding
from megavid.ops.block_attention import BlockAttention, ReferenceAttention
from megavid.ops.block_attention_aten import CpuFlash
from megavid.ops.block_attention_fp8 import Fp8Attention, has_fp8_forward
from megavid.ops.compiled import why_not_compiled
from megavid.ops.fp8 import ABSOLUTE_ERROR, E4M3, RELATIVE_ERROR, Quantized, dequantize, quantize_heads, scale_of
from megavid.ops.fp8_ops import COMPILED_FP8, REFERENCE_FP8, Fp8Ops
from megavid.parallel.context.attention import ContextParallelAttention
from megavid.parallel.context.attn_plan import AttnPlan
from megavid.parallel.context.layout import CPLayout
from tests.support.flash3 import Stand, stand_in

SHAPES = {
    "mha": ((2, 4, 9, 16), (2, 4, 9, 16)),
    "gqa": ((2, 6, 5, 16), (2, 2, 17, 16)),
    "one token": ((1, 2, 1, 16), (1, 2, 1, 16)),
    "one query": ((1, 2, 1, 16), (1, 2, 40, 16)),
}
CPU = torch.device("cpu")


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
    assert not has_fp8_forward(CpuFlash(), CPU, 64)


@pytest.fixture
def flash3() -> Iterator[tuple[Any, Stand]]:
    with stand_in() as found:
        yield found


@pytest.mark.parametrize("shape", SHAPES)
def test_flash_attention_3_is_called_as_its_interface_wants(flash3: tuple[Any, Stand], shape: str) -> None:
    kernel, stand = flash3
    grad, q, k, v = draw(shape, torch.bfloat16)
    out, lse = kernel.forward(q, k, v)
    want, want_lse = ReferenceAttention().forward(q, k, v)
    limits = {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(out, want, **limits)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    gradients = kernel.backward(grad, q, k, v, out, lse)
    for got, wanted in zip(gradients, ReferenceAttention().backward(grad, q, k, v, out, lse)):
        assert torch.equal(got, wanted)
    assert stand.calls == ["wide", "backward"]
    assert stand.deterministic == [torch.are_deterministic_algorithms_enabled()]


@pytest.mark.parametrize("shape", SHAPES)
def test_flash_attention_3_is_given_bytes_and_scales(flash3: tuple[Any, Stand], shape: str) -> None:
    """Weights are within e4m3's error of those of the turned-back operands, and the log-sum-exp is theirs."""
    kernel, stand = flash3
    grad, *inputs = draw(shape, torch.bfloat16)
    rounding, kv_heads = Fp8AttentionRounding("layer", REFERENCE_FP8), inputs[1].shape[1]
    attention = Fp8Attention(kernel, rounding, is_in_eight_bits=True)
    out, lse = attention.forward(*inputs)
    q, k, v = (dequantize(quantize_heads(x, kv_heads, E4M3)) for x in inputs)
    want, want_lse = ReferenceAttention().forward(q, k, v)
    magnitudes, _ = ReferenceAttention().forward(q, k, v.abs())
    assert ((out - want).abs() <= (RELATIVE_ERROR[E4M3] + 2.0**-8) * magnitudes).all()
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    assert (out.dtype, out.shape) == (torch.bfloat16, inputs[0].shape)
    gradients = attention.backward(grad, *inputs, out, lse)
    narrow = [x.to(torch.bfloat16) for x in (q, k, v)]
    for got, wanted in zip(gradients, ReferenceAttention().backward(grad, *narrow, out, lse)):
        assert torch.equal(got, wanted)
    assert stand.calls == ["fp8", "backward"]


def test_weights_in_eight_bits_move_the_gradient_of_queries_along_the_mean_key(flash3: tuple[Any, Stand]) -> None:
    """Its weights are exact and its output is of rounded ones, so that rows of the scores' gradient have a sum. Across
    that key, and in keys' and values' gradients, little is left."""
    generator = torch.Generator().manual_seed(9)
    sizes = ((40, 4), (40, 4), (300, 2), (300, 2))
    grad, *inputs = (
        torch.randn(tokens, 2, heads, 32, generator=generator).permute(1, 2, 0, 3) for tokens, heads in sizes
    )
    inputs[1] = inputs[1] + torch.randn(2, 2, 1, 32, generator=generator)
    grad, *inputs = (x.to(torch.bfloat16) for x in (grad, *inputs))
    attention = Fp8Attention(flash3[0], Fp8AttentionRounding("layer", REFERENCE_FP8), is_in_eight_bits=True)
    gradients = attention.backward(grad, *inputs, *attention.forward(*inputs))
    q, k, v = (dequantize(quantize_heads(x, 2, E4M3)) for x in inputs)
    truths = ReferenceAttention().backward(grad.float(), q, k, v, *ReferenceAttention().forward(q, k, v))
    offs = [got.float() - truth for got, truth in zip(gradients, truths)]
    errors = [float(off.norm() / truth.norm()) for off, truth in zip(offs, truths)]
    mean = k.mean(2, keepdim=True).repeat_interleave(2, 1)
    mean = mean / mean.norm(dim=-1, keepdim=True)
    across = offs[0] - (offs[0] * mean).sum(-1, keepdim=True) * mean
    assert 0.015 < errors[0] < 0.05
    assert float(across.norm() / truths[0].norm()) < 0.01
    assert max(errors[1:]) < 0.01


@pytest.mark.parametrize("place", range(3))
def test_what_is_not_finite_stays_so_in_bytes(flash3: tuple[Any, Stand], place: int) -> None:
    _, *inputs = draw("gqa", torch.bfloat16)
    inputs[place] = inputs[place].clone()
    inputs[place][1, 0, 2, 3] = torch.inf
    rounding = Fp8AttentionRounding("layer", REFERENCE_FP8)
    out, _ = Fp8Attention(flash3[0], rounding, is_in_eight_bits=True).forward(*inputs)
    is_whole = torch.ones(2, 6, dtype=torch.bool)
    is_whole[1, :3] = False  # the queries of key head 0
    assert torch.equal(out.isfinite().all(-1).all(-1), is_whole)


def test_a_kernel_in_eight_bits_is_tried_once(flash3: tuple[Any, Stand], caplog: pytest.LogCaptureFixture) -> None:
    kernel, stand = flash3
    assert has_fp8_forward(kernel, CPU, 128)
    assert has_fp8_forward(kernel, CPU, 128)
    assert stand.calls == ["fp8"]
    assert not has_fp8_forward(kernel, CPU, 72)
    assert stand.calls == ["fp8"]
    assert "multiplies heads in eight bits whose width is a multiple of 16, got 72" in caplog.text


def swapped(kernel: Any) -> Any:
    """A kernel that takes the keys' scales for the queries'."""

    class Swapped:
        fp8_head_multiple = 16
        forward, backward = kernel.forward, kernel.backward

        def forward_fp8(self, q: Quantized, k: Quantized, v: Quantized, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            scale = k.scale.repeat_interleave(q.data.shape[1] // k.data.shape[1], 1)
            found: tuple[Tensor, Tensor] = kernel.forward_fp8(q._replace(scale=scale), k, v, dtype)
            return found

    return Swapped()


def first_alone(kernel: Any) -> Any:
    """A kernel that reads the scales of the first head for all, of queries and of keys."""

    class FirstAlone:
        fp8_head_multiple = 16
        forward, backward = kernel.forward, kernel.backward

        def forward_fp8(self, q: Quantized, k: Quantized, v: Quantized, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            q, k = (x._replace(scale=x.scale[:, :1].expand_as(x.scale)) for x in (q, k))
            found: tuple[Tensor, Tensor] = kernel.forward_fp8(q, k, v, dtype)
            return found

    return FirstAlone()


def broken(kernel: Any) -> Any:
    """A kernel of a build without FP8."""

    class Broken:
        fp8_head_multiple = 16
        forward, backward = kernel.forward, kernel.backward

        def forward_fp8(self, q: Quantized, k: Quantized, v: Quantized, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            raise RuntimeError("This flash attention build does not support FP8.")

    return Broken()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (swapped, "differs from its twin on cpu"),
        (first_alone, "differs from its twin on cpu"),
        (broken, "build does not support FP8"),
    ],
)
def test_a_kernel_that_is_wrong_is_turned_back(
    flash3: tuple[Any, Stand], make: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert not has_fp8_forward(make(flash3[0]), CPU, 64)
    assert words in caplog.text


def test_a_layer_in_fp8_gives_its_kernel_bytes_and_the_others_wide_numbers(flash3: tuple[Any, Stand]) -> None:
    """By the attention that models call; its layers share a plan."""
    kernel, stand = flash3
    tokens, plans = 24, (AttnPlan.packed((10, 9), 24),)
    attention = ContextParallelAttention(CPLayout.contiguous(tokens), "ring", kernel)
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(tokens, 1, 2, 16, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    rounding = Fp8AttentionRounding("layer", REFERENCE_FP8)
    wide, narrow = attention(*leaves, plans), attention(*leaves, plans, rounding)
    assert stand.calls == ["wide"] * 2 + ["fp8"] * 3  # two clips, and the trial
    stand.calls.clear()
    assert 0 < (wide - narrow).norm() / wide.norm() < 0.1
    (narrow.sum() + attention(*leaves, plans, rounding).sum()).backward()
    assert stand.calls == ["fp8"] * 2 + ["backward"] * 4
