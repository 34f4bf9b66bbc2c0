"""Rotary position embedding over time, height and width.

Pairs of neighbouring numbers of a head are rotated; the first pairs by time, then height, then width, split as in Wan:
height and width take 2 * (head // 6) numbers each, time the rest.
"""

import torch
from torch import Tensor

from megavid.ops.norm import wide
from megavid.ops.regions import in_region


def axis_widths(head_size: int) -> tuple[int, int, int]:
    """Numbers of a head that turn with time, height and width; each even."""
    side = 2 * (head_size // 6)
    return head_size - 2 * side, side, side


def rope_angles(place_TB3: Tensor, head_size: int, theta: float = 10000.0) -> Tensor:
    """Angles of every token, [T, B, A / 2] fp64.

    Args:
        place_TB3: place of each token on the axes time, row, column (``megavid.ops.packs.positions``).
        head_size: width of one head (A), even.
        theta: base of the wavelengths.

    Source: Su et al. 2021 (arXiv:2104.09864), on three axes as in Wan 2.1 (arXiv:2503.20314).
    """
    angles = []
    for axis, width in enumerate(axis_widths(head_size)):
        index = torch.arange(0, width, 2, dtype=torch.float64, device=place_TB3.device)
        frequency = theta ** (-index / max(width, 1))
        angles.append(place_TB3[..., axis, None].double() * frequency)
    return torch.cat(angles, dim=-1)


def place_code(place_TB3: Tensor, width: int) -> Tensor:
    """Cosines and sines of every token's time, row and column, side by side: [T, B, width] fp64.

    The numbers and wavelengths are those of ``rope_angles`` for one head of this width (even).

    Source: Vaswani et al. 2017 (arXiv:1706.03762), on three axes.
    """
    angles = rope_angles(place_TB3, width)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(-2)


@in_region("rotary")
def rotate(x_TBNA: Tensor, cos_TB1h: Tensor, sin_TB1h: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last dim by angles whose cosines and sines are [T, B, 1, A / 2].

    Computed in fp32 (fp64 stays fp64); the dtype of x.
    """
    even, odd = torch.unflatten(wide(x_TBNA), -1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos_TB1h - odd * sin_TB1h, even * sin_TB1h + odd * cos_TB1h), dim=-1)
    return turned.flatten(-2).type_as(x_TBNA)
