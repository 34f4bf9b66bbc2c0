"""``residual = x + update * gate`` and its modulated norm, both from one pass over memory.

Owns the op ``megavid::gated_residual_norm``: schema, reference, shapes and gradient; csrc/ has the implementations.
"""

from typing import Any

import torch
from torch import Tensor

from megavid.ops.compiled import declare, differentiate
from megavid.ops.modulated_norm import (
    check_row_table,
    modulated_norm_backward_reference,
    modulated_norm_reference,
    norm_shapes,
)
from megavid.ops.norm import shift_or_gate, wide


def gated_residual_norm_op(
    x_TD: Tensor,
    update_TD: Tensor,
    gate_GD: Tensor | None,
    gate_row_T: Tensor,
    shift_RD: Tensor,
    scale_RD: Tensor,
    row_T: Tensor,
    eps: float,
    is_centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op, as ``gated_residual_norm_reference`` says; compiled where it is built.

    Raises:
        TypeError: the compiled op takes x and update in one of fp32 and bf16, tables in fp32 and rows in int64.
        ValueError: shapes do not fit, or on CPU a row is outside of its table.
    """
    found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.megavid.gated_residual_norm(
        x_TD, update_TD, gate_GD, gate_row_T, shift_RD, scale_RD, row_T, eps, is_centered
    )
    return found


def gated_residual_norm_reference(
    x_TD: Tensor,
    update_TD: Tensor,
    gate_GD: Tensor | None,
    gate_row_T: Tensor,
    shift_RD: Tensor,
    scale_RD: Tensor,
    row_T: Tensor,
    eps: float,
    is_centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(residual [T, D], its modulated norm [T, D], mean [T], 1 / deviation [T]) in plain torch.

    Args:
        x_TD: residual stream.
        update_TD: what a branch adds to it.
        gate_GD: factor of the update, a row for each clip or frame, fp32; None for 1.
        gate_row_T: row of every token in ``gate_GD``.
        shift_RD: of the norm, fp32.
        scale_RD: likewise; the factor is 1 + scale.
        row_T: row of every token in both.
        eps: added to the variance.
        is_centered: LayerNorm; else RMSNorm.
    """
    if update_TD.shape != x_TD.shape:
        raise ValueError(f"gated_residual_norm: update must be {list(x_TD.shape)}, got {list(update_TD.shape)}")
    gated = wide(update_TD)
    if gate_GD is not None:
        check_row_table("gated_residual_norm", x_TD, "gate", gate_GD, "gate_row", gate_row_T)
        gated = gated * shift_or_gate(gate_GD, gate_row_T)
    residual = (wide(x_TD) + gated).type_as(x_TD)
    return (residual, *modulated_norm_reference(residual, shift_RD, scale_RD, row_T, eps, is_centered))


def gated_residual_norm_backward_reference(
    grad_residual_TD: Tensor,
    grad_TD: Tensor,
    residual_TD: Tensor,
    update_TD: Tensor,
    gate_GD: Tensor | None,
    gate_row_T: Tensor,
    scale_RD: Tensor,
    row_T: Tensor,
    mean_T: Tensor,
    rstd_T: Tensor,
    is_centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, update, gate, shift and scale; those of update and gate are empty without a gate, where update
    has the gradient of x."""
    of_norm, grad_shift, grad_scale = modulated_norm_backward_reference(
        wide(grad_TD), wide(residual_TD), scale_RD, row_T, mean_T, rstd_T, is_centered
    )
    grad = wide(grad_residual_TD) + of_norm
    if gate_GD is None:
        empty = grad_TD.new_empty(0), scale_RD.new_empty(0)
        return grad.type_as(residual_TD), *empty, grad_shift, grad_scale
    grad_update = (grad * shift_or_gate(gate_GD, gate_row_T)).type_as(update_TD)
    of_gate = (grad * wide(update_TD)).to(gate_GD.dtype)
    grad_gate = torch.zeros_like(gate_GD).index_add(0, gate_row_T, of_gate)
    return grad.type_as(residual_TD), grad_update, grad_gate, grad_shift, grad_scale


def _shapes(
    x: Tensor,
    update: Tensor,
    gate: Tensor | None,
    gate_row: Tensor,
    shift: Tensor,
    scale: Tensor,
    row: Tensor,
    eps: float,
    is_centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual = torch.empty_like(x, memory_format=torch.contiguous_format)
    return (residual, *norm_shapes(x, shift, scale, row, eps, is_centered))


def _backward_shapes(
    grad_residual: Tensor,
    grad: Tensor,
    residual: Tensor,
    update: Tensor,
    gate: Tensor | None,
    gate_row: Tensor,
    scale: Tensor,
    row: Tensor,
    mean: Tensor,
    rstd: Tensor,
    is_centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x, table = torch.empty_like(residual), torch.empty_like(scale)
    if gate is None:
        return grad_x, residual.new_empty(0), scale.new_empty(0), table, torch.empty_like(table)
    return grad_x, torch.empty_like(grad_x), torch.empty_like(gate), table, torch.empty_like(table)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, update, gate, gate_row, _, scale, row, _, ctx.is_centered = inputs
    residual, _, mean, rstd = output
    ctx.save_for_backward(residual, update if gate is not None else residual, gate, gate_row, scale, row, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _gradient(ctx: Any, grad_residual: Tensor, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    residual, update, gate, gate_row, scale, row, mean, rstd = ctx.saved_tensors
    grad_x, grad_update, grad_gate, grad_shift, grad_scale = torch.ops.megavid.gated_residual_norm_backward(
        grad_residual, grad_y, residual, update, gate, gate_row, scale, row, mean, rstd, ctx.is_centered
    )
    if gate is None:
        return grad_x, grad_x, None, None, grad_shift, grad_scale, None, None, None
    return grad_x, grad_update, grad_gate, None, grad_shift, grad_scale, None, None, None


declare(
    "gated_residual_norm(Tensor x, Tensor update, Tensor? gate, Tensor gate_row, Tensor shift, Tensor scale, "
    "Tensor row, float eps, bool is_centered) -> (Tensor, Tensor, Tensor, Tensor)",
    gated_residual_norm_reference,
    _shapes,
)
declare(
    "gated_residual_norm_backward(Tensor grad_residual, Tensor grad_y, Tensor residual, Tensor update, Tensor? gate, "
    "Tensor gate_row, Tensor scale, Tensor row, Tensor mean, Tensor rstd, bool is_centered) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    gated_residual_norm_backward_reference,
    _backward_shapes,
)
differentiate("gated_residual_norm", _gradient, _keep)
