"""Four-bit floats of NVIDIA's NVFP4, in their numerics only: e2m1 with a scale in e4m3 for 16 of them, or 16 x 16.

Owns the rounding. Every number of e2m1 is one of e4m3 too, so that tensors stand in eight bits here, and their products
are turned back to wide numbers like those of all tiles (``megavid.ops.fp8``): nothing is smaller or faster.

The scale of a whole tensor, which brings its tiles' scales into the range of e4m3, is a power of two here and any
number there: that moves the range and no digit. Gradients are rounded at random, up or down by how near each is, as
rounding them to the nearest biases their sums. The random numbers follow from the tensor's own bits: the same tensor is
rounded alike in a resumed run and in a recomputed pass, with no state to keep.

Source: NVIDIA, "Pretraining Large Language Models with NVFP4" (arXiv:2509.25149), whose random Hadamard transform is
not here.
"""

import torch
from torch import Tensor

from megavid.ops.fp8 import E4M3, Quantized, amax_of, cut_into_tiles, joined_tiles, scale_of
from megavid.ops.philox import key_of, uniform

NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of e2m1."""
LARGEST_FOUR = 6.0
SQUARE, ROW = (16, 16), (1, 16)
"""Numbers that share a scale: of a matrix, alike along both of its sides; of an input or gradient."""


def quantize_nvfp4(x: Tensor, tile: tuple[int, int], *, is_random: bool = False) -> Quantized:
    """``x`` in NVFP4.

    Args:
        x: [..., rows, columns], fp32, bf16 or fp64.
        tile: ``SQUARE`` or ``ROW``.
        is_random: round at random, right on average; else to the nearest, ties to even.

    Returns:
        Numbers of e2m1 in e4m3, and for each tile a scale in fp32 that is a number of e4m3 times a power of two. A
        tensor that is not finite has scales of NaN.
    """
    tiles = cut_into_tiles(x.float(), tile)
    whole = scale_of(amax_of(x) / LARGEST_FOUR, E4M3)
    scale = (tiles.abs().amax((-3, -1)) / LARGEST_FOUR / whole).to(E4M3).float() * whole
    inverse = torch.where(scale > 0, scale.reciprocal(), 0.0).unsqueeze(-1).unsqueeze(-3)
    draws = cut_into_tiles(_draws(x), tile) if is_random else None
    data = joined_tiles(round_to_e2m1(tiles * inverse, draws), x.shape[-2:])
    return Quantized(data.to(E4M3), scale, tile)


def round_to_e2m1(x: Tensor, draws: Tensor | None = None) -> Tensor:
    """``x``, fp32, as numbers of e2m1: the nearest, ties to even; with ``draws`` from 0 to 1, one of the two beside it.

    What is beyond 6 becomes 6.
    """
    magnitude = x.abs().clamp(max=LARGEST_FOUR)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    steps = magnitude / step
    steps = torch.round(steps) if draws is None else torch.floor(steps + draws)
    return torch.copysign(steps * step, x)


def _draws(x: Tensor) -> Tensor:
    """A number from 0 to 1 for each of ``x``, fp32, from a stream that the bits of ``x`` name; waits for a GPU."""
    bits = x.detach().float().contiguous().view(torch.int32).reshape(-1).to(torch.int64)
    odd = 2 * torch.arange(bits.numel(), device=bits.device) + 1
    key = key_of("nvfp4", int((bits * odd).sum()))  # of whole numbers: one sum in every order
    return uniform(key, 0, x.numel(), x.device).float().view(x.shape)
