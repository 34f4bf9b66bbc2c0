"""Attention of one rectangle in FP8: queries, keys and values in e4m3, multiplied in eight bits where a kernel does.

Owns the block attention that rounds around another one, and the trial of kernels that multiply in eight bits. Each
batch row and key head of a rectangle has one scale for its queries, one for its keys and one for its values: a scale
never reaches over clips or heads, so that neither tensor-parallel nor all-to-all ranks move it. Forward: of the rounded
numbers, from their bytes where the kernel takes those, and else turned back to wide ones. Backward: the wide kernel's,
of the numbers turned back, which are rounded again from the same wide tensors in the same rectangles instead of being
kept. So it is the gradient of attention at the rounded operands, handed on to the wide ones as it is: exactly where the
forward pass turned them back. A kernel in eight bits has rounded the weights in its output besides, of which the wide
backward pass knows nothing; that adds a multiple of the mean key to the gradient of each query.
"""

import logging
from functools import lru_cache
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from megavid.ops.block_attention import BlockAttention, BlockGradients, ReferenceAttention
from megavid.ops.fp8 import E4M3, Quantized, dequantize, quantize_heads
from megavid.ops.fp8_ops import Fp8Ops

Operand = Literal["q", "k", "v"]
OPERANDS: tuple[Operand, ...] = ("q", "k", "v")
"""What is rounded, in the order of everything that is kept for each of them."""
TRIAL_SHAPE = (2, 6, 2, 141, 333)
"""Packs, heads, key heads, queries and keys of the trial; tokens do not fill a kernel's tiles."""
TRIAL_ERROR = 2.0**-3
"""What an output may be off its twin in the trial, of the sum of magnitudes: twice what e4m3 rounds, as kernels round
the weights of the values too. Scales that are read in a wrong place put it off by factors."""
TRIAL_LSE_ERROR = 0.05
"""The same of the log-sum-exp, absolute: the scores are sums of exact products."""

logger = logging.getLogger(__name__)


class AttentionRounding(Protocol):
    """How a layer's operands are rounded, and who watches."""

    ops: Fp8Ops

    def watch(self, operand: Operand, x: Tensor, rounded: Quantized) -> None:
        """See ``x`` and what became of it."""


@runtime_checkable
class Fp8Kernel(BlockAttention, Protocol):
    """A kernel that can multiply in eight bits in its forward pass."""

    fp8_head_multiple: int
    """What a head's width must be a multiple of for it."""

    def forward_fp8(
        self, q_BNTA: Quantized, k_BNTA: Quantized, v_BNTA: Quantized, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Output in ``dtype`` and log-sum-exp, as ``forward``; scales are ``megavid.ops.fp8.scale_of_heads``'."""
        ...


class Fp8Attention:
    """A block attention of rounded queries, keys and values.

    Args:
        inner: what attends; its backward pass is taken.
        rounding: of the layer.
        is_in_eight_bits: ``inner`` multiplies bytes, see ``has_fp8_forward``.
    """

    def __init__(self, inner: BlockAttention, rounding: AttentionRounding, *, is_in_eight_bits: bool) -> None:
        self.inner, self.rounding = inner, rounding
        self.kernel: Fp8Kernel | None = None
        if is_in_eight_bits:
            assert isinstance(inner, Fp8Kernel), inner
            self.kernel = inner

    def forward(self, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor) -> tuple[Tensor, Tensor]:
        """See ``BlockAttention``."""
        given = (q_BNTA, k_BNTA, v_BNTA)
        q, k, v = self._rounded(*given)
        for operand, x, rounded in zip(OPERANDS, given, (q, k, v)):
            self.rounding.watch(operand, x, rounded)
        if self.kernel is not None:
            return self.kernel.forward_fp8(q, k, v, q_BNTA.dtype)
        return self.inner.forward(*(dequantize(x, q_BNTA.dtype) for x in (q, k, v)))

    def backward(
        self, grad_BNTA: Tensor, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor, out_BNTA: Tensor, lse_BNT: Tensor
    ) -> BlockGradients:
        """See ``BlockAttention``."""
        q, k, v = (dequantize(x, q_BNTA.dtype) for x in self._rounded(q_BNTA, k_BNTA, v_BNTA))
        return self.inner.backward(grad_BNTA, q, k, v, out_BNTA, lse_BNT)

    def _rounded(self, *given_BNTA: Tensor) -> tuple[Quantized, Quantized, Quantized]:
        """Queries, keys and values in eight bits; a head of which one is not finite has values that are not."""
        kv_heads = given_BNTA[1].shape[1]
        q, k, v = (self.rounding.ops.quantize_heads(x, kv_heads, E4M3) for x in given_BNTA)
        # A row of scores that are all NaN some kernels take for one without keys, and give 0; none loses values' NaN.
        shared = q.data.shape[1] // kv_heads
        return q, k, v._replace(scale=v.scale + 0.0 * (q.scale[:, ::shared] + k.scale))


def has_fp8_forward(kernel: BlockAttention, device: torch.device, head_size: int) -> bool:
    """Whether ``kernel`` multiplies heads of this width in eight bits on ``device``, and is right.

    It is tried once in a process, on a small example against the slow twin, and left out with a line in the log where
    it fails or differs; the first call waits for the GPU.
    """
    has_forward: bool = isinstance(kernel, Fp8Kernel) and _is_right(kernel, device, head_size)  # type: ignore[arg-type]
    return has_forward


@lru_cache
def _is_right(kernel: Fp8Kernel, device: torch.device, head_size: int) -> bool:
    if head_size % kernel.fp8_head_multiple:
        logger.warning(
            "attention in FP8 is turned back to wide numbers: the kernel multiplies heads in eight bits whose width is "
            "a multiple of %d, got %d",
            kernel.fp8_head_multiple,
            head_size,
        )
        return False
    return agrees(kernel, device, head_size)


@torch.no_grad()
def agrees(kernel: Fp8Kernel, device: torch.device, head_size: int) -> bool:
    """Whether ``kernel`` runs in eight bits and gives what its slow twin does; says so where not.

    Raises:
        torch.OutOfMemoryError: there was no room to try.
    """
    q, k, v = example(device, head_size)
    try:
        out, lse = (x.float() for x in kernel.forward_fp8(q, k, v, torch.bfloat16))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:  # the package's build or version has no such product
        logger.warning("attention in FP8 is turned back to wide numbers: %s", " ".join(str(error).split())[:200])
        return False
    twin, (q_BNTA, k_BNTA, v_BNTA) = ReferenceAttention(), (dequantize(x) for x in (q, k, v))
    wanted, wanted_lse = twin.forward(q_BNTA, k_BNTA, v_BNTA)
    magnitudes, _ = twin.forward(q_BNTA, k_BNTA, v_BNTA.abs())
    is_near = out.shape == wanted.shape and bool(((out - wanted).abs() <= TRIAL_ERROR * magnitudes).all())
    if not (is_near and lse.shape == wanted_lse.shape and bool(((lse - wanted_lse).abs() <= TRIAL_LSE_ERROR).all())):
        logger.warning(
            "attention in FP8 is turned back to wide numbers: the kernel differs from its twin on %s; please report it",
            out.device,
        )
        return False
    return True


def example(device: torch.device, head_size: int) -> list[Quantized]:
    """Queries, keys and values whose heads and packs have scales of many magnitudes, tokens first in memory.

    What a query's head is larger its keys are smaller, so that scores stay moderate, and not by as much, so that no two
    heads or packs have the same product of scales; values do not cancel.
    """
    packs, heads, kv_heads, queries, keys = TRIAL_SHAPE
    generator = torch.Generator().manual_seed(0)
    scores, values = (2.0 ** torch.randint(-6, 7, (packs, kv_heads, 1, 1), generator=generator) for _ in range(2))
    spread = 2.0 ** torch.arange(-1, packs * kv_heads - 1).view(packs, kv_heads, 1, 1)

    def normal(tokens: int, count: int) -> Tensor:
        return torch.randn(tokens, packs, count, head_size, generator=generator).permute(1, 2, 0, 3)

    q = normal(queries, heads) * scores.repeat_interleave(heads // kv_heads, 1)
    k, v = normal(keys, kv_heads) * spread / scores, (1.0 + normal(keys, kv_heads) / 2) * values
    return [quantize_heads(x.to(device, torch.bfloat16), kv_heads, E4M3) for x in (q, k, v)]
