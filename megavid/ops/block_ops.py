"""The memory-bound glue of a block, in plain torch and as compiled ops.

Owns the record of functions that layers are given; ``megavid.ops.choose`` chooses one. The plain ones are
``megavid.ops.norm`` and ``megavid.ops.rope``; the compiled ones are one op each, in one pass over memory. Both compute
the same numbers but for rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megavid.ops.expert_activation import expert_activation_op
from megavid.ops.fp8_ops import COMPILED_FP8, REFERENCE_FP8, Fp8Ops
from megavid.ops.gated_residual import gated_residual_op
from megavid.ops.gated_residual_norm import gated_residual_norm_op
from megavid.ops.modulated_norm import modulated_norm_op
from megavid.ops.moe_ops import COMPILED_MOE, REFERENCE_MOE, MoEOps
from megavid.ops.norm import gated_residual, layer_norm, modulated_norm, residual, rms_norm_of_sum, wide
from megavid.ops.norm_rope import norm_rope_op
from megavid.ops.regions import in_region
from megavid.ops.rope import rotate
from megavid.ops.sum_of_squares import sum_of_squares_op


@dataclass(frozen=True)
class BlockOps:
    """What a block computes between its matrix products and its attention.

    Attributes:
        name: what these are.
        modulated_norm: (x_tBD, shift_RD, scale_RD, row_tB, eps) to the modulated LayerNorm of x.
        residual_affine_norm: (x_tBD, update_tBD, gate_RD, row_tB, weight_D, bias_D, eps) to x + update * gate and its
            affine LayerNorm.
        residual_modulated_norm: (x_tBD, update_tBD, shift_RD, scale_RD, row_tB, eps) to x + update and its modulated
            LayerNorm.
        gated_residual: (x_tBD, update_tBD, gate_RD, row_tB) to x + update * gate.
        sum_of_squares: x_TBn to [T, B, 1], fp32.
        rms_norm: (x_TBn, sum_of_squares_TB1, width, weight_n, eps) to x normed over ``width`` numbers.
        norm_rope: (x_TBn, sum_of_squares_TB1, weight_n, cos_TB1h, sin_TB1h, width, eps) to queries or keys, normed
            over ``width`` numbers and rotated, [T, B, N, A].
        bias_gelu: (x_tBM, bias_M or None) to GELU-tanh of x + bias, between the matrices of a dense feed-forward.
        moe: what an expert layer computes.
        fp8: how operands of products in FP8 are rounded.
    """

    name: Literal["reference", "compiled"]
    modulated_norm: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    residual_affine_norm: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    residual_modulated_norm: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    gated_residual: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    sum_of_squares: Callable[[Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor, int, Tensor, float], Tensor]
    norm_rope: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, float], Tensor]
    bias_gelu: Callable[[Tensor, Tensor | None], Tensor]
    moe: MoEOps
    fp8: Fp8Ops


# The references


def _residual_affine_norm(
    x_tBD: Tensor, update_tBD: Tensor, gate_RD: Tensor, row_tB: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x_tBD = gated_residual(x_tBD, update_tBD, gate_RD, row_tB)
    return x_tBD, layer_norm(x_tBD, eps, weight_D, bias_D)


def _residual_modulated_norm(
    x_tBD: Tensor, update_tBD: Tensor, shift_RD: Tensor, scale_RD: Tensor, row_tB: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x_tBD = residual(x_tBD, update_tBD)
    return x_tBD, modulated_norm(x_tBD, shift_RD, scale_RD, row_tB, eps)


def _sum_of_squares(x_TBn: Tensor) -> Tensor:
    return wide(x_TBn).square().sum(-1, keepdim=True)


def _norm_rope(
    x_TBn: Tensor, sum_TB1: Tensor, weight_n: Tensor, cos_TB1h: Tensor, sin_TB1h: Tensor, width: int, eps: float
) -> Tensor:
    normed = rms_norm_of_sum(x_TBn, sum_TB1, width, weight_n, eps)
    return rotate(torch.unflatten(normed, -1, (-1, 2 * cos_TB1h.shape[-1])), cos_TB1h, sin_TB1h)


def _bias_gelu(x_tBM: Tensor, bias_M: Tensor | None) -> Tensor:
    return torch.nn.functional.gelu(x_tBM if bias_M is None else x_tBM + bias_M, approximate="tanh")


REFERENCE = BlockOps(
    "reference",
    modulated_norm,
    _residual_affine_norm,
    _residual_modulated_norm,
    gated_residual,
    _sum_of_squares,
    rms_norm_of_sum,
    _norm_rope,
    _bias_gelu,
    REFERENCE_MOE,
    REFERENCE_FP8,
)


# The compiled ops: tokens of all packs in one dim


@in_region("norms")
def _compiled_modulated_norm(x_tBD: Tensor, shift_RD: Tensor, scale_RD: Tensor, row_tB: Tensor, eps: float) -> Tensor:
    y_TD, _, _ = modulated_norm_op(x_tBD.flatten(0, 1), shift_RD, scale_RD, row_tB.reshape(-1), eps, True)
    return y_TD.view(x_tBD.shape)


@in_region("norms")
def _compiled_residual_affine_norm(
    x_tBD: Tensor, update_tBD: Tensor, gate_RD: Tensor, row_tB: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    row_T = row_tB.reshape(-1)
    x_TD, y_TD, _, _ = gated_residual_norm_op(
        x_tBD.flatten(0, 1), update_tBD.flatten(0, 1), gate_RD, row_T,
        bias_D.unsqueeze(0), weight_D.unsqueeze(0) - 1, torch.zeros_like(row_T), eps, True,
    )  # fmt: skip
    return x_TD.view(x_tBD.shape), y_TD.view(x_tBD.shape)


@in_region("norms")
def _compiled_residual_modulated_norm(
    x_tBD: Tensor, update_tBD: Tensor, shift_RD: Tensor, scale_RD: Tensor, row_tB: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    row_T = row_tB.reshape(-1)
    x_TD, y_TD, _, _ = gated_residual_norm_op(
        x_tBD.flatten(0, 1), update_tBD.flatten(0, 1), None, row_T, shift_RD, scale_RD, row_T, eps, True
    )
    return x_TD.view(x_tBD.shape), y_TD.view(x_tBD.shape)


@in_region("residuals")
def _compiled_gated_residual(x_tBD: Tensor, update_tBD: Tensor, gate_RD: Tensor, row_tB: Tensor) -> Tensor:
    y_TD = gated_residual_op(x_tBD.flatten(0, 1), update_tBD.flatten(0, 1), gate_RD, row_tB.reshape(-1))
    return y_TD.view(x_tBD.shape)


def _compiled_sum_of_squares(x_TBn: Tensor) -> Tensor:
    return sum_of_squares_op(x_TBn.flatten(0, 1)).view(*x_TBn.shape[:2], 1)


@in_region("rotary")
def _compiled_norm_rope(
    x_TBn: Tensor, sum_TB1: Tensor, weight_n: Tensor, cos_TB1h: Tensor, sin_TB1h: Tensor, width: int, eps: float
) -> Tensor:
    tokens, batch, _ = x_TBn.shape
    y_Tn = norm_rope_op(
        x_TBn.flatten(0, 1), sum_TB1.reshape(-1), weight_n, cos_TB1h.flatten(0, 2), sin_TB1h.flatten(0, 2), width, eps
    )
    return y_Tn.view(tokens, batch, -1, 2 * cos_TB1h.shape[-1])


def _compiled_bias_gelu(x_tBM: Tensor, bias_M: Tensor | None) -> Tensor:
    """An expert's activation, of tokens that all go to one expert, with probability 1."""
    x_TM = x_tBM.flatten(0, 1)
    expert_T = torch.zeros(x_TM.shape[0], dtype=torch.int64, device=x_TM.device)
    bias_eM = None if bias_M is None else bias_M.unsqueeze(0)
    y_TM = expert_activation_op(x_TM, None, bias_eM, None, expert_T, torch.ones_like(expert_T, dtype=torch.float32))
    return y_TM.view(x_tBM.shape)


COMPILED = BlockOps(
    "compiled",
    _compiled_modulated_norm,
    _compiled_residual_affine_norm,
    _compiled_residual_modulated_norm,
    _compiled_gated_residual,
    _compiled_sum_of_squares,
    rms_norm_of_sum,
    _compiled_norm_rope,
    _compiled_bias_gelu,
    COMPILED_MOE,
    COMPILED_FP8,
)
