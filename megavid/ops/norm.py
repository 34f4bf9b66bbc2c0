"""Norms and modulation: the memory-bound glue of a diffusion transformer, as slow obvious references.

Statistics are fp32 (fp64 stays fp64) whatever the input, as in Wan; the result has the input's dtype. A row of the
modulation table belongs to a clip, or to a frame of one; tokens pick their row by index, so that packed clips each have
their own.
"""

import torch
from torch import Tensor

from megavid.ops.regions import in_region
from megavid.ops.table_rows import table_rows


def wide(x: Tensor) -> Tensor:
    """``x`` in at least fp32."""
    return x if x.dtype == torch.float64 else x.float()


@in_region("norms")
def layer_norm(x_tBD: Tensor, eps: float, weight_D: Tensor | None = None, bias_D: Tensor | None = None) -> Tensor:
    """LayerNorm over the width with fp32 statistics; affine where weight and bias are given."""
    weight = None if weight_D is None else wide(weight_D)
    bias = None if bias_D is None else wide(bias_D)
    return torch.nn.functional.layer_norm(wide(x_tBD), x_tBD.shape[-1:], weight, bias, eps).type_as(x_tBD)


@in_region("norms")
def modulated_norm(x_tBD: Tensor, shift_RD: Tensor, scale_RD: Tensor, row_tB: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine, then ``normed * (1 + scale) + shift`` with each token's row of the table.

    Args:
        x_tBD: residual stream.
        shift_RD: fp32.
        scale_RD: fp32.
        row_tB: int64 row of every token.
        eps: added to the variance.

    Returns:
        Same shape and dtype as x.

    Source: Wan 2.1 (arXiv:2503.20314), its block's adaptive norm.
    """
    normed = torch.nn.functional.layer_norm(wide(x_tBD), x_tBD.shape[-1:], eps=eps)
    return (normed * (1 + shift_or_gate(scale_RD, row_tB)) + shift_or_gate(shift_RD, row_tB)).type_as(x_tBD)


@in_region("residuals")
def gated_residual(x_tBD: Tensor, update_tBD: Tensor, gate_RD: Tensor, row_tB: Tensor) -> Tensor:
    """``x + update * gate`` in fp32 with each token's row of the table; the dtype of x."""
    return (wide(x_tBD) + wide(update_tBD) * shift_or_gate(gate_RD, row_tB)).type_as(x_tBD)


@in_region("residuals")
def residual(x_tBD: Tensor, update_tBD: Tensor) -> Tensor:
    """``x + update``: a residual connection without a gate."""
    return x_tBD + update_tBD


def shift_or_gate(table_RD: Tensor, row_tB: Tensor) -> Tensor:
    """Rows of the table for every token, [t, B, D]."""
    row_T = row_tB.reshape(-1)
    rows_TD = table_rows(table_RD, row_T) if torch.compiler.is_compiling() else table_RD.index_select(0, row_T)
    return rows_TD.view(*row_tB.shape, table_RD.shape[1])


def rms_norm_of_sum(x_tBn: Tensor, sum_of_squares_tB1: Tensor, width: int, weight_n: Tensor, eps: float) -> Tensor:
    """RMSNorm over ``width`` numbers of which this rank holds the last dim, given the sum of squares of all of them.

    The sum is an argument so that tensor parallelism can reduce it between ranks: Wan normalises q and k across all
    heads, which stand on different ranks.
    """
    scale_tB1 = torch.rsqrt(sum_of_squares_tB1 / width + eps)
    return (wide(x_tBn) * scale_tB1 * wide(weight_n)).type_as(x_tBn)
