"""Sum of the squares of each token's numbers: what RMSNorm across heads adds up between tensor-parallel ranks.

Owns the op ``megavid::sum_of_squares``: schema, reference, shapes and gradient; csrc/ has the implementations.
"""

from typing import Any

import torch
from torch import Tensor

from megavid.ops.compiled import declare, differentiate
from megavid.ops.norm import wide


def sum_of_squares_op(x_Tn: Tensor) -> Tensor:
    """The op, as ``sum_of_squares_reference`` says; compiled where it is built.

    Raises:
        TypeError: the compiled op takes fp32 and bf16.
        ValueError: x is not [T, n] with neighbouring numbers.
    """
    found: Tensor = torch.ops.megavid.sum_of_squares(x_Tn)
    return found


def sum_of_squares_reference(x_Tn: Tensor) -> Tensor:
    """[T] in fp32 (fp64 of fp64), in plain torch."""
    if x_Tn.dim() != 2:
        raise ValueError(f"sum_of_squares: x must be [T, n], got {list(x_Tn.shape)}")
    return wide(x_Tn).square().sum(-1)


def sum_of_squares_backward_reference(grad_T: Tensor, x_Tn: Tensor) -> Tensor:
    """Gradient of x."""
    return (2 * grad_T.unsqueeze(-1) * wide(x_Tn)).type_as(x_Tn)


def _shapes(x: Tensor) -> Tensor:
    return wide(x.new_empty(0)).new_empty(x.shape[0])


def _backward_shapes(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _gradient(ctx: Any, grad: Tensor) -> Tensor:
    found: Tensor = torch.ops.megavid.sum_of_squares_backward(grad, *ctx.saved_tensors)
    return found


declare(
    "sum_of_squares(Tensor x) -> Tensor",
    sum_of_squares_reference,
    _shapes,
)
declare(
    "sum_of_squares_backward(Tensor grad, Tensor x) -> Tensor",
    sum_of_squares_backward_reference,
    _backward_shapes,
)
differentiate("sum_of_squares", _gradient, _keep)
