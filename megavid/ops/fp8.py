"""Eight-bit floats: tensors with their scales, and what they stand for.

Owns the formats and the rounding; which tensor is scaled how is ``megavid.ops.fp8_linear``'s, products are
``megavid.ops.scaled_matmul``'s. All scales are powers of two. So scaling itself is exact, and two ranks that choose
other scales for the same number still round it to the same value, unless it is so small that it leaves the format's
range: that is what law 1 rests on in FP8.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
"""Largest finite number of each format; what is larger is set to it."""
LARGEST_BYTE = {E4M3: 0x7E, E5M2: 0x7B}
"""Its byte, without the sign."""
RELATIVE_ERROR = {E4M3: 2.0**-4, E5M2: 2.0**-3}
"""Largest rounding error of a number in the normal range, relative to itself: half a step of its mantissa."""
ABSOLUTE_ERROR = {E4M3: 2.0**-10, E5M2: 2.0**-17}
"""Largest rounding error of a number below it, in units of its scale: half the smallest number."""
EXPONENT_LIMIT = 126
"""Scales are 2^-126 to 2^126: they and their inverses are normal numbers of fp32."""


class Quantized(NamedTuple):
    """Numbers ``data * scale``; products sum over the last dim.

    Attributes:
        data: [..., rows, columns] in e4m3 or e5m2.
        scale: powers of two: one number, fp32, or one for each head of attention, [B, N, 1, 1], fp32; or one for each
            tile, [..., ceil(rows / tile rows), ceil(columns / tile columns)], fp32 or e8m0.
        tile: rows and columns that share a scale; None for one scale in all, or for each head.
    """

    data: Tensor
    scale: Tensor
    tile: tuple[int, int] | None = None

    @property
    def t(self) -> "Quantized":
        """The transposed matrices; exact, because a tile's scale goes with its numbers."""
        if self.tile is None:
            return Quantized(self.data.transpose(-1, -2), self.scale)
        return Quantized(self.data.transpose(-1, -2), self.scale.transpose(-1, -2), self.tile[::-1])

    def matrix(self, number: int) -> "Quantized":
        """Matrix ``number`` of a stack [e, rows, columns]."""
        return Quantized(self.data[number], self.scale if self.tile is None else self.scale[number], self.tile)

    def rows(self, start: int, stop: int) -> "Quantized":
        """Rows of one matrix; its tiles must be one row high, or none."""
        if self.tile is None:
            return Quantized(self.data[start:stop], self.scale)
        assert self.tile[0] == 1, f"tiles of {self.tile[0]} rows cannot be cut between rows"
        return Quantized(self.data[start:stop], self.scale[start:stop], self.tile)


def scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """Powers of two, fp32, that bring numbers of at most ``amax`` into the range of ``dtype``.

    1 for an amax of 0; NaN where it is not finite, so that a broken tensor stays broken.
    """
    wide = amax.float()
    _, exponent = torch.frexp(wide / LARGEST[dtype])
    exponent = exponent.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).to(torch.int32)
    scale = ((exponent + 127) << 23).view(torch.float32)  # the number's bits: pow() need not be exact
    return torch.where(wide.isfinite(), scale, torch.nan)


def amax_of(x: Tensor) -> Tensor:
    """Largest magnitude in ``x``, fp32, no dims; 0 for none."""
    if x.numel() == 0:
        return torch.zeros((), device=x.device)
    return x.detach().abs().amax().float()


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Quantized:
    """``x`` with one scale in all; what leaves the range becomes the largest number, NaN stays NaN.

    Args:
        x: fp32, bf16 or fp64.
        scale: a power of two, no dims.
        dtype: ``E4M3`` or ``E5M2``.
    """
    return Quantized(_rounded(x * scale.reciprocal().to(x.dtype), dtype), scale)


def quantize_tiles(
    x: Tensor, tile: tuple[int, int], dtype: torch.dtype, *, scale_dtype: torch.dtype = torch.float32
) -> Quantized:
    """``x`` with a scale for each tile, chosen from the tile's largest number; tiles at the edges may be cut.

    Args:
        x: [..., rows, columns], fp32, bf16 or fp64.
        tile: its rows and columns.
        dtype: ``E4M3`` or ``E5M2``.
        scale_dtype: fp32, or ``E8M0``, which holds a power of two in a byte.
    """
    tiles = cut_into_tiles(x, tile)
    scale = scale_of(tiles.abs().amax((-3, -1)), dtype)
    inverse = scale.reciprocal().to(x.dtype).unsqueeze(-1).unsqueeze(-3)
    return Quantized(joined_tiles(_rounded(tiles * inverse, dtype), x.shape[-2:]), scale.to(scale_dtype), tile)


def quantize_heads(x_BNTA: Tensor, kv_heads: int, dtype: torch.dtype) -> Quantized:
    """Queries, keys or values with a scale for each batch row and head; see ``scale_of_heads``."""
    return quantize(x_BNTA, scale_of_heads(x_BNTA, kv_heads, dtype), dtype)


def scale_of_heads(x_BNTA: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Scales [B, N, 1, 1] of queries, keys or values of at least one token, from their largest magnitudes.

    Args:
        x_BNTA: fp32, bf16, fp16 or fp64.
        kv_heads: heads of the keys; the N / n queries that attend to one of them share a scale, as kernels want it.
        dtype: ``E4M3`` or ``E5M2``.
    """
    shared = x_BNTA.shape[1] // kv_heads
    amax_BN = x_BNTA.detach().abs().amax((2, 3))
    scale_BN = scale_of(amax_BN.view(-1, kv_heads, shared).amax(-1), dtype).repeat_interleave(shared, dim=1)
    return scale_BN.unsqueeze(-1).unsqueeze(-1)


def cut_into_tiles(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """[..., rows, columns] as [..., tiles down, tile rows, tiles across, tile columns], zeros behind the edges."""
    rows, columns = x.shape[-2:]
    padded = torch.nn.functional.pad(x, (0, -columns % tile[1], 0, -rows % tile[0]))
    down, across = padded.shape[-2] // tile[0], padded.shape[-1] // tile[1]
    return padded.reshape(*x.shape[:-2], down, tile[0], across, tile[1])


def joined_tiles(tiles: Tensor, size: Sequence[int]) -> Tensor:
    """The reverse of ``cut_into_tiles``, of a tensor of ``size`` = (rows, columns)."""
    return tiles.flatten(-2).flatten(-3, -2)[..., : size[0], : size[1]]


def dequantize(x: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that ``x`` stands for, in ``dtype``; exact in bf16 and wider."""
    data = _widened(x.data).to(dtype)
    if x.tile is None:
        return data * x.scale.to(dtype)
    rows, columns = x.data.shape[-2:]
    scale = x.scale.to(dtype).repeat_interleave(x.tile[0], -2)[..., :rows, :]
    return data * scale.repeat_interleave(x.tile[1], -1)[..., :columns]


def scaled_matmul_reference(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """``a @ b.T``, the slow, obvious way: wide numbers, multiplied in fp32. For [M, K] and [N, K] with any scales."""
    return (dequantize(a) @ dequantize(b).t()).to(dtype)


def _widened(data: Tensor) -> Tensor:
    """Eight-bit floats in fp32. On CPU torch's own cast of e4m3 is a slow loop, so 256 numbers are looked up."""
    if data.device.type != "cpu":
        return data.float()
    table = torch.arange(256, dtype=torch.uint8).view(data.dtype).float()
    return table.index_select(0, data.view(torch.uint8).to(torch.int32).reshape(-1)).view(data.shape)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    # e5m2 has infinities, and torch's cast to e4m3 need not saturate on every device.
    return x.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)
