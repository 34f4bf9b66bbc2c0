"""RMSNorm of queries or keys, given their sum of squares, and rotation by 3D RoPE's angles, in one pass over memory.

Owns the op ``megavid::norm_rope``: schema, reference, shapes and gradient; csrc/ has the implementations. The sum is an
argument, with a gradient of its own, because tensor parallelism adds it up between ranks: Wan normalises across all
heads, and a norm of each head takes its own sum.
"""

from typing import Any

import torch
from torch import Tensor

from megavid.ops.compiled import declare, differentiate
from megavid.ops.norm import wide


def norm_rope_op(
    x_Tn: Tensor, sums_T: Tensor, weight_n: Tensor, cosine_Th: Tensor, sine_Th: Tensor, norm_width: int, eps: float
) -> Tensor:
    """The op, as ``norm_rope_reference`` says; compiled where it is built.

    Raises:
        TypeError: the compiled op takes x in fp32 or bf16 and everything else in fp32.
        ValueError: shapes do not fit.
    """
    found: Tensor = torch.ops.megavid.norm_rope(x_Tn, sums_T, weight_n, cosine_Th, sine_Th, norm_width, eps)
    return found


def _check(x_Tn: Tensor, sums_T: Tensor, weight_n: Tensor, cosine_Th: Tensor, sine_Th: Tensor) -> None:
    if x_Tn.dim() != 2:
        raise ValueError(f"norm_rope: x must be [T, n], got {list(x_Tn.shape)}")
    tokens, width = x_Tn.shape
    for name, tensor, shape in (("sums", sums_T, (tokens,)), ("weight", weight_n, (width,))):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"norm_rope: {name} must be {list(shape)}, got {list(tensor.shape)}")
    if cosine_Th.dim() != 2 or cosine_Th.shape[0] != tokens or cosine_Th.shape != sine_Th.shape:
        got = f"{list(cosine_Th.shape)} and {list(sine_Th.shape)}"
        raise ValueError(f"norm_rope: cosine and sine must be [{tokens}, A / 2], got {got}")
    if width % (2 * cosine_Th.shape[1]):
        raise ValueError(f"norm_rope: heads of {2 * cosine_Th.shape[1]} numbers must divide the width {width}")


def norm_rope_reference(
    x_Tn: Tensor,
    sums_T: Tensor,
    weight_n: Tensor,
    cosine_Th: Tensor,
    sine_Th: Tensor,
    norm_width: int,
    eps: float,
) -> Tensor:
    """Normed and rotated, [T, n] in the dtype of x, in plain torch.

    Args:
        x_Tn: queries or keys of this rank's heads, side by side; neighbouring pairs of a head are rotated.
        sums_T: sum of squares over all numbers of the norm, fp32.
        weight_n: of the norm, fp32.
        cosine_Th: cosines of every token's angles; h is half a head.
        sine_Th: sines, likewise.
        norm_width: how many numbers the sum is over.
        eps: added to the mean square.
    """
    _check(x_Tn, sums_T, weight_n, cosine_Th, sine_Th)
    scale_T1 = torch.rsqrt(sums_T.unsqueeze(-1) / norm_width + eps)
    return _rotated(wide(x_Tn) * scale_T1 * weight_n, cosine_Th, sine_Th).type_as(x_Tn)


def _rotated(x_Tn: Tensor, cosine_Th: Tensor, sine_Th: Tensor) -> Tensor:
    even, odd = torch.unflatten(x_Tn, -1, (-1, cosine_Th.shape[-1], 2)).unbind(-1)
    cosine, sine = cosine_Th.unsqueeze(1), sine_Th.unsqueeze(1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(1)


def norm_rope_backward_reference(
    grad_Tn: Tensor,
    x_Tn: Tensor,
    sums_T: Tensor,
    weight_n: Tensor,
    cosine_Th: Tensor,
    sine_Th: Tensor,
    norm_width: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, the sums and the weight, written out."""
    mean_T1 = sums_T.unsqueeze(-1) / norm_width + eps
    scale_T1 = torch.rsqrt(mean_T1)
    back = _rotated(wide(grad_Tn), cosine_Th, -sine_Th)
    inner, x = back * weight_n, wide(x_Tn)
    grad_scale = (inner * x).sum(-1)
    grad_sums = grad_scale * (-0.5 * scale_T1**3 / norm_width).squeeze(-1)
    return (inner * scale_T1).type_as(x_Tn), grad_sums, (back * x * scale_T1).sum(0)


def _shapes(
    x: Tensor, sums: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, norm_width: int, eps: float
) -> Tensor:
    return x.new_empty(x.shape)


def _backward_shapes(
    grad: Tensor, x: Tensor, sums: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, norm_width: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(sums), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.norm_width, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_sums, grad_weight = torch.ops.megavid.norm_rope_backward(
        grad, *ctx.saved_tensors, ctx.norm_width, ctx.eps
    )
    return grad_x, grad_sums, grad_weight, None, None, None, None


declare(
    "norm_rope(Tensor x, Tensor sums, Tensor weight, Tensor cosine, Tensor sine, int norm_width, float eps) -> Tensor",
    norm_rope_reference,
    _shapes,
)
declare(
    "norm_rope_backward(Tensor grad_y, Tensor x, Tensor sums, Tensor weight, Tensor cosine, Tensor sine, "
    "int norm_width, float eps) -> (Tensor, Tensor, Tensor)",
    norm_rope_backward_reference,
    _backward_shapes,
)
differentiate("norm_rope", _gradient, _keep)
