"""Rows of a table by index, for code that torch.compile traces: its gradient is summed in one order.

Owns the op of that gradient, which the compiler takes as it is. What it would write itself for ``index_select`` on CPU
adds the tokens of a row from several threads at once, in an order that no second run repeats.
"""

from typing import Any

import torch
from torch import Tensor


def table_rows(table_RD: Tensor, row_T: Tensor) -> Tensor:
    """``table[row]``, [T, D].

    Args:
        table_RD: one row for a clip or a frame.
        row_T: int64.
    """
    found: Tensor = _TableRows.apply(table_RD, row_T)  # type: ignore[no-untyped-call]
    return found


@torch.library.custom_op("megavid::table_rows_backward", mutates_args=())
def _sum_rows(grad_TD: Tensor, row_T: Tensor, rows: int) -> Tensor:
    """Sum of the tokens' gradients for each of the table's rows, as ``index_select`` has it without the compiler."""
    return grad_TD.new_zeros(rows, grad_TD.shape[1]).index_add(0, row_T, grad_TD)


@_sum_rows.register_fake
def _sum_rows_shape(grad_TD: Tensor, row_T: Tensor, rows: int) -> Tensor:
    return grad_TD.new_empty(rows, grad_TD.shape[1])


class _TableRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_RD: Tensor, row_T: Tensor) -> Tensor:
        ctx.save_for_backward(row_T)
        ctx.rows = table_RD.shape[0]
        return table_RD.index_select(0, row_T)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        (row_T,) = ctx.saved_tensors
        return _sum_rows(grad_TD, row_T, ctx.rows), None
