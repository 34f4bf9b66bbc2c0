"""Rounding to eight-bit floats in one pass over memory, and the largest magnitude of a tensor in another.

Owns the ops ``megavid::fp8_amax``, ``quantize_fp8`` and ``quantize_fp8_tiles``: schemas, references and shapes; csrc/
has the implementations, which give the bytes and scales of ``megavid.ops.fp8`` bit for bit (of NaN: NaN; torch does not
fix its sign). They have no gradient: what is in eight bits lives inside the products of ``megavid.ops.fp8_linear``,
which have their own.
"""

import torch
from torch import Tensor

from megavid.ops.compiled import declare
from megavid.ops.fp8 import E4M3, E5M2, E8M0, Quantized, amax_of, quantize, quantize_tiles, scale_of_heads

LARGEST_SIDE = 128
"""Most rows and columns of a tile that the ops take."""


def fp8_amax_op(x: Tensor) -> Tensor:
    """``megavid.ops.fp8.amax_of``; compiled where it is built.

    Raises:
        TypeError: the compiled op takes fp32 and bf16.
    """
    found: Tensor = torch.ops.megavid.fp8_amax(x.detach())
    return found


def quantize_fp8_op(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Quantized:
    """``megavid.ops.fp8.quantize``; compiled where it is built. Numbers stay in the order they stand in memory.

    Raises:
        TypeError: the compiled op takes fp32 and bf16, and a scale in fp32.
        ValueError: there is not one scale.
    """
    return Quantized(torch.ops.megavid.quantize_fp8(x.detach(), scale, dtype), scale)


def quantize_fp8_tiles_op(
    x: Tensor, tile: tuple[int, int], dtype: torch.dtype, *, scale_dtype: torch.dtype = torch.float32
) -> Quantized:
    """``megavid.ops.fp8.quantize_tiles``; compiled where it is built.

    A transposed matrix is read as it stands, row after row of what it is the transposed of.

    Raises:
        TypeError: the compiled op takes fp32 and bf16.
        ValueError: the sides of a tile are not powers of two up to ``LARGEST_SIDE``.
    """
    data, scale = torch.ops.megavid.quantize_fp8_tiles(x.detach(), *tile, dtype, scale_dtype)
    return Quantized(data, scale, tile)


def quantize_fp8_heads_op(x_BNTA: Tensor, kv_heads: int, dtype: torch.dtype) -> Quantized:
    """``megavid.ops.fp8.quantize_heads``; scaled in plain torch, cut and cast by the compiled op where it is built.

    The op takes one scale, and scaling by powers of two is exact: what it is given has a scale of 1.

    Raises:
        TypeError: the compiled op takes fp32 and bf16.
    """
    scale = scale_of_heads(x_BNTA, kv_heads, dtype)
    scaled = x_BNTA.detach() * scale.reciprocal().to(x_BNTA.dtype)
    return Quantized(quantize_fp8_op(scaled, torch.ones((), device=x_BNTA.device), dtype).data, scale)


def quantize_fp8_reference(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes of ``x`` with one scale, as ``megavid.ops.fp8.quantize`` says, plain torch."""
    _check_format("quantize_fp8", dtype)
    if scale.numel() != 1:
        raise ValueError(f"quantize_fp8: scale must be one number, got {list(scale.shape)}")
    return quantize(x, scale, dtype).data


def quantize_fp8_tiles_reference(
    x: Tensor, tile_rows: int, tile_columns: int, dtype: torch.dtype, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Bytes and scales of ``x`` with a scale for each tile, as ``megavid.ops.fp8.quantize_tiles`` says, plain torch.

    Args:
        x: [..., rows, columns], fp32, bf16 or fp64.
        tile_rows: of a tile, a power of two up to ``LARGEST_SIDE``.
        tile_columns: likewise.
        dtype: of the bytes.
        scale_dtype: fp32, or ``E8M0``.

    Returns:
        [..., rows, columns], and [..., ceil(rows / tile_rows), ceil(columns / tile_columns)].
    """
    op = "quantize_fp8_tiles"
    _check_format(op, dtype)
    if scale_dtype not in (torch.float32, E8M0):
        raise TypeError(f"{op}: scale_dtype must be torch.float32 or {E8M0}, got {scale_dtype}")
    if x.dim() < 2:
        raise ValueError(f"{op}: x must be [..., rows, columns], got {list(x.shape)}")
    for name, side in (("tile_rows", tile_rows), ("tile_columns", tile_columns)):
        if not 1 <= side <= LARGEST_SIDE or side & (side - 1):
            raise ValueError(f"{op}: {name} must be a power of two from 1 to {LARGEST_SIDE}, got {side}")
    data, scale, _ = quantize_tiles(x, (tile_rows, tile_columns), dtype, scale_dtype=scale_dtype)
    return data.contiguous(), scale.contiguous()


def _check_format(op: str, dtype: torch.dtype) -> None:
    if dtype not in (E4M3, E5M2):
        raise TypeError(f"{op}: dtype must be {E4M3} or {E5M2}, got {dtype}")


def _amax_shape(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def _shape(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _tiles_shapes(
    x: Tensor, tile_rows: int, tile_columns: int, dtype: torch.dtype, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    tiles = ((x.shape[-2] + tile_rows - 1) // tile_rows, (x.shape[-1] + tile_columns - 1) // tile_columns)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-2], *tiles), dtype=scale_dtype)


declare("fp8_amax(Tensor x) -> Tensor", amax_of, _amax_shape)
declare("quantize_fp8(Tensor x, Tensor scale, ScalarType dtype) -> Tensor", quantize_fp8_reference, _shape)
declare(
    "quantize_fp8_tiles(Tensor x, int tile_rows, int tile_columns, ScalarType dtype, ScalarType scale_dtype)"
    " -> (Tensor, Tensor)",
    quantize_fp8_tiles_reference,
    _tiles_shapes,
)
