"""How numbers are rounded to eight bits, in plain torch or by compiled ops: chosen with BlockOps.

Owns the record of functions that recipes are given. The plain ones are ``megavid.ops.fp8``'s, the compiled ones
``megavid.ops.quantize_fp8``'s; both give the same bytes and scales, so the choice moves no loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megavid.ops.fp8 import Quantized, amax_of, quantize, quantize_heads, quantize_tiles
from megavid.ops.quantize_fp8 import fp8_amax_op, quantize_fp8_heads_op, quantize_fp8_op, quantize_fp8_tiles_op


class QuantizeTiles(Protocol):
    """See ``megavid.ops.fp8.quantize_tiles``."""

    def __call__(
        self, x: Tensor, tile: tuple[int, int], dtype: torch.dtype, *, scale_dtype: torch.dtype = torch.float32
    ) -> Quantized:
        """``x`` with a scale for each tile."""
        ...


@dataclass(frozen=True)
class Fp8Ops:
    """Rounding to eight bits.

    Attributes:
        amax: x to its largest magnitude, fp32.
        quantize: (x, scale, dtype) to x with one scale.
        quantize_tiles: x with a scale for each tile.
        quantize_heads: (x [B, N, T, A], key heads, dtype) to x with a scale for each batch row and head.
    """

    amax: Callable[[Tensor], Tensor]
    quantize: Callable[[Tensor, Tensor, torch.dtype], Quantized]
    quantize_tiles: QuantizeTiles
    quantize_heads: Callable[[Tensor, int, torch.dtype], Quantized]


REFERENCE_FP8 = Fp8Ops(amax_of, quantize, quantize_tiles, quantize_heads)
COMPILED_FP8 = Fp8Ops(fp8_amax_op, quantize_fp8_op, quantize_fp8_tiles_op, quantize_fp8_heads_op)
