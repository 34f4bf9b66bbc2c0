"""LayerNorm or RMSNorm without affine, then ``* (1 + scale) + shift``, in one pass over memory.

Owns the op ``megavid::modulated_norm``: schema, reference, shapes and gradient; csrc/ has the implementations. The
function that layers call is in ``megavid.ops.block_ops``; ``megavid.ops.norm.modulated_norm`` is its slow twin.
"""

from typing import Any

import torch
from torch import Tensor

from megavid.ops.compiled import declare, differentiate
from megavid.ops.norm import shift_or_gate, wide


def modulated_norm_op(
    x_TD: Tensor, shift_RD: Tensor, scale_RD: Tensor, row_T: Tensor, eps: float, is_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The op, as ``modulated_norm_reference`` says; compiled where it is built.

    Raises:
        TypeError: the compiled op takes x in fp32 or bf16, tables in fp32 and rows in int64.
        ValueError: shapes do not fit, or on CPU a row is outside of the tables.
    """
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.megavid.modulated_norm(
        x_TD, shift_RD, scale_RD, row_T, eps, is_centered
    )
    return found


def check_row_table(op: str, x_TD: Tensor, name: str, table_RD: Tensor, row_name: str, row_T: Tensor) -> None:
    """Check that a table and each token's row of it fit the tokens; errors call them by these names.

    Raises:
        TypeError: the rows are not int64.
        ValueError: shapes do not fit.
    """
    if x_TD.dim() != 2:
        raise ValueError(f"{op}: x must be [T, D], got {list(x_TD.shape)}")
    if table_RD.dim() != 2 or table_RD.shape[1] != x_TD.shape[1]:
        raise ValueError(f"{op}: {name} must be [R, {x_TD.shape[1]}], got {list(table_RD.shape)}")
    if row_T.dtype != torch.int64:
        raise TypeError(f"{op}: {row_name} must be int64, got {row_T.dtype}")
    if row_T.shape != x_TD.shape[:1]:
        raise ValueError(f"{op}: {row_name} must be [{x_TD.shape[0]}], got {list(row_T.shape)}")


def modulated_norm_reference(
    x_TD: Tensor, shift_RD: Tensor, scale_RD: Tensor, row_T: Tensor, eps: float, is_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [T, D], mean [T], 1 / deviation [T]) in plain torch; statistics in fp32 or wider."""
    check_row_table("modulated_norm", x_TD, "shift", shift_RD, "row", row_T)
    check_row_table("modulated_norm", x_TD, "scale", scale_RD, "row", row_T)
    x = wide(x_TD)
    mean = x.mean(-1, keepdim=True) if is_centered else torch.zeros_like(x[:, :1])
    rstd = torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + eps)
    y = (x - mean) * rstd * (1 + shift_or_gate(scale_RD, row_T)) + shift_or_gate(shift_RD, row_T)
    return y.type_as(x_TD), mean.squeeze(-1), rstd.squeeze(-1)


def modulated_norm_backward_reference(
    grad_TD: Tensor, x_TD: Tensor, scale_RD: Tensor, row_T: Tensor, mean_T: Tensor, rstd_T: Tensor, is_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale, written out.

    With n the normed x and g = grad * (1 + scale): grad x = rstd * (g - mean(g) - n * mean(g * n)), without the first
    mean for RMSNorm.
    """
    grad, normed = wide(grad_TD), (wide(x_TD) - mean_T.unsqueeze(-1)) * rstd_T.unsqueeze(-1)
    inner = grad * (1 + shift_or_gate(scale_RD, row_T))
    center = inner.mean(-1, keepdim=True) if is_centered else 0.0
    grad_x = rstd_T.unsqueeze(-1) * (inner - center - normed * (inner * normed).mean(-1, keepdim=True))
    zeros = torch.zeros_like(scale_RD)
    grad_shift = zeros.index_add(0, row_T, grad.to(zeros.dtype))
    grad_scale = zeros.index_add(0, row_T, (grad * normed).to(zeros.dtype))
    return grad_x.type_as(x_TD), grad_shift, grad_scale


def norm_shapes(
    x: Tensor, shift: Tensor, scale: Tensor, row: Tensor, eps: float, is_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty outputs of ``modulated_norm``."""
    per_token = wide(x.new_empty(0)).new_empty(x.shape[0])
    return torch.empty_like(x, memory_format=torch.contiguous_format), per_token, torch.empty_like(per_token)


def _backward_shapes(
    grad: Tensor, x: Tensor, scale: Tensor, row: Tensor, mean: Tensor, rstd: Tensor, is_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    table = torch.empty_like(scale, memory_format=torch.contiguous_format)
    return grad_x, table, torch.empty_like(table)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, scale, row, _, ctx.is_centered = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, row, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _gradient(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, row, mean, rstd = ctx.saved_tensors
    grad_x, grad_shift, grad_scale = torch.ops.megavid.modulated_norm_backward(
        grad_y, x, scale, row, mean, rstd, ctx.is_centered
    )
    return grad_x, grad_shift, grad_scale, None, None, None


declare(
    "modulated_norm(Tensor x, Tensor shift, Tensor scale, Tensor row, float eps, bool is_centered) "
    "-> (Tensor, Tensor, Tensor)",
    modulated_norm_reference,
    norm_shapes,
)
declare(
    "modulated_norm_backward(Tensor grad_y, Tensor x, Tensor scale, Tensor row, Tensor mean, Tensor rstd, "
    "bool is_centered) -> (Tensor, Tensor, Tensor)",
    modulated_norm_backward_reference,
    _backward_shapes,
)
differentiate("modulated_norm", _gradient, _keep)
