"""``x + update * gate`` with each token's row of a table of gates, in one pass over memory.

Owns the op ``megavid::gated_residual``: schema, reference, shapes and gradient; csrc/ has the implementations.
"""

from typing import Any

import torch
from torch import Tensor

from megavid.ops.compiled import declare, differentiate
from megavid.ops.modulated_norm import check_row_table
from megavid.ops.norm import shift_or_gate, wide


def gated_residual_op(x_TD: Tensor, update_TD: Tensor, gate_RD: Tensor, row_T: Tensor) -> Tensor:
    """The op, as ``gated_residual_reference`` says; compiled where it is built.

    Raises:
        TypeError: the compiled op takes x and update in one of fp32 and bf16, the table in fp32 and rows in int64.
        ValueError: shapes do not fit, or on CPU a row is outside of the table.
    """
    found: Tensor = torch.ops.megavid.gated_residual(x_TD, update_TD, gate_RD, row_T)
    return found


def gated_residual_reference(x_TD: Tensor, update_TD: Tensor, gate_RD: Tensor, row_T: Tensor) -> Tensor:
    """``x + update * gate[row]``, [T, D] in the dtype of x, in plain torch."""
    if update_TD.shape != x_TD.shape:
        raise ValueError(f"gated_residual: update must be {list(x_TD.shape)}, got {list(update_TD.shape)}")
    check_row_table("gated_residual", x_TD, "gate", gate_RD, "row", row_T)
    return (wide(x_TD) + wide(update_TD) * shift_or_gate(gate_RD, row_T)).type_as(x_TD)


def gated_residual_backward_reference(
    grad_TD: Tensor, update_TD: Tensor, gate_RD: Tensor, row_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of update and gate; that of x is ``grad_TD``."""
    grad = wide(grad_TD)
    of_gate = (grad * wide(update_TD)).to(gate_RD.dtype)
    grad_gate = torch.zeros_like(gate_RD).index_add(0, row_T, of_gate)
    return (grad * shift_or_gate(gate_RD, row_T)).type_as(update_TD), grad_gate


def _shapes(x: Tensor, update: Tensor, gate: Tensor, row: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_shapes(grad: Tensor, update: Tensor, gate: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(update, memory_format=torch.contiguous_format), torch.empty_like(gate)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_update, grad_gate = torch.ops.megavid.gated_residual_backward(grad, *ctx.saved_tensors)
    return grad, grad_update, grad_gate, None


declare(
    "gated_residual(Tensor x, Tensor update, Tensor gate, Tensor row) -> Tensor",
    gated_residual_reference,
    _shapes,
)
declare(
    "gated_residual_backward(Tensor grad_y, Tensor update, Tensor gate, Tensor row) -> (Tensor, Tensor)",
    gated_residual_backward_reference,
    _backward_shapes,
)
differentiate("gated_residual", _gradient, _keep)
