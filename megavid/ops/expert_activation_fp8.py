"""An expert's activation rounded to FP8 as it is made, for a second product in FP8 that asks for nothing wide.

Owns the op ``megavid::expert_activation_fp8``: schema, reference and shapes; csrc/ has the implementations. It has no
gradient: a backward pass needs the activation along the tokens too, so it is for passes without one.
"""

import torch
from torch import Tensor

from megavid.ops.compiled import declare
from megavid.ops.expert_activation import ARGUMENTS, expert_activation_reference
from megavid.ops.fp8 import E4M3, Quantized
from megavid.ops.quantize_fp8 import quantize_fp8_tiles_reference

ROW_TILES = (32, 64, 128)
"""Numbers of a row that may share a scale."""


def expert_activation_fp8_op(
    up_SM: Tensor,
    gate_SM: Tensor | None,
    up_bias_eM: Tensor | None,
    gate_bias_eM: Tensor | None,
    expert_S: Tensor,
    probability_S: Tensor,
    tile: int,
    scale_dtype: torch.dtype,
) -> Quantized:
    """``megavid::expert_activation`` in e4m3, bit for bit what ``quantize_tiles`` makes of that op's output.

    The arguments are ``expert_activation_reference``'s and ``expert_activation_fp8_reference``'s.

    Raises:
        TypeError: the compiled op takes rows and biases in one of fp32 and bf16, probabilities in fp32, experts in
            int64, and scales in fp32 or e8m0.
        ValueError: shapes do not fit, the tile is none of ``ROW_TILES``, or on CPU an expert has no bias.
    """
    data, scale = torch.ops.megavid.expert_activation_fp8(
        up_SM, gate_SM, up_bias_eM, gate_bias_eM, expert_S, probability_S, tile, scale_dtype
    )
    return Quantized(data, scale, (1, tile))


def expert_activation_fp8_reference(
    up_SM: Tensor,
    gate_SM: Tensor | None,
    up_bias_eM: Tensor | None,
    gate_bias_eM: Tensor | None,
    expert_S: Tensor,
    probability_S: Tensor,
    tile: int,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The activation in the dtype of ``up_SM``, and then that in e4m3: rounded twice, as two steps would.

    Args:
        up_SM: as the other arguments that are not named here, of ``expert_activation_reference``.
        gate_SM: likewise.
        up_bias_eM: likewise.
        gate_bias_eM: likewise.
        expert_S: likewise.
        probability_S: likewise.
        tile: numbers of a row that share a scale, one of ``ROW_TILES``.
        scale_dtype: fp32, or e8m0.

    Returns:
        Bytes [S, M] and scales [S, ceil(M / tile)].
    """
    if tile not in ROW_TILES:
        raise ValueError(f"expert_activation_fp8: tile must be 32, 64 or 128, got {tile}")
    wide = expert_activation_reference(up_SM, gate_SM, up_bias_eM, gate_bias_eM, expert_S, probability_S)
    return quantize_fp8_tiles_reference(wide, 1, tile, E4M3, scale_dtype)


def _shapes(
    up: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    expert: Tensor,
    probability: Tensor,
    tile: int,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    scales = (up.shape[0], (up.shape[1] + tile - 1) // tile)
    return up.new_empty(up.shape, dtype=E4M3), up.new_empty(scales, dtype=scale_dtype)


declare(
    f"expert_activation_fp8({ARGUMENTS}, int tile, ScalarType scale_dtype) -> (Tensor, Tensor)",
    expert_activation_fp8_reference,
    _shapes,
)
