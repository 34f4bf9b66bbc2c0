"""Weights in eight bits: e4m3 with one scale for each row of a matrix; activations stay as they are.

Owns the format and the layer that holds it; the rounding is ``megavid.ops.fp8``'s. A scale is a power of two, so that
turning a weight back is exact in bf16 and fp32, and what is lost is the rounding to e4m3 alone: 2^-4 of the weight at
most, or 2^-10 of the row's scale where the weight is tiny. The bits are kept as uint8, which no ``.to(dtype)`` of a
whole model turns into something else.
"""

import torch
from torch import Tensor, nn

from megavid.ops.fp8 import E4M3, quantize_tiles


def quantize_rows(weight_xI: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix, or a stack of them, in eight bits.

    Args:
        weight_xI: any float dtype; the last dim is a row.

    Returns:
        Bits of e4m3, uint8, same shape; and the scale of each row, a power of two, fp32.
    """
    rounded = quantize_tiles(weight_xI.float(), (1, weight_xI.shape[-1]), E4M3)
    return rounded.data.view(torch.uint8), rounded.scale.squeeze(-1)


def dequantize_rows(bits_xI: Tensor, scale_x: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights that the bits stand for, in ``dtype``; exact in bf16 and wider."""
    return bits_xI.view(E4M3).to(dtype) * scale_x.to(dtype).unsqueeze(-1)


class Fp8Linear(nn.Module):
    """``torch.nn.Linear`` with its matrix in eight bits; the matrix in full lives as long as its product."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        bits, scale = quantize_rows(linear.weight.detach())
        self.weight_fp8 = nn.Parameter(bits, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias`` in the dtype of x."""
        weight = dequantize_rows(self.weight_fp8, self.weight_scale, x.dtype)
        return torch.nn.functional.linear(x, weight, self.bias)
