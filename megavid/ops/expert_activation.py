"""An expert's activation between its matrices, biases and router probability with it, in one pass over memory.

Owns the op ``megavid::expert_activation``: schema, reference, shapes and gradient; csrc/ has the implementations. The
matrix products on both sides are ``megavid.ops.grouped_experts``'s.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from megavid.ops.compiled import declare, differentiate
from megavid.ops.norm import wide

ROOT, CUBIC = 0.7978845608028654, 0.044715
"""sqrt(2 / pi) and the weight of the cube in the tanh form of GELU."""


def expert_activation_op(
    up_SM: Tensor,
    gate_SM: Tensor | None,
    up_bias_eM: Tensor | None,
    gate_bias_eM: Tensor | None,
    expert_S: Tensor,
    probability_S: Tensor,
) -> Tensor:
    """The op, as ``expert_activation_reference`` says; compiled where it is built.

    Raises:
        TypeError: the compiled op takes rows and biases in one of fp32 and bf16, probabilities in fp32, experts in
            int64.
        ValueError: shapes do not fit, or on CPU an expert has no bias.
    """
    found: Tensor = torch.ops.megavid.expert_activation(
        up_SM, gate_SM, up_bias_eM, gate_bias_eM, expert_S, probability_S
    )
    return found


def expert_activation_reference(
    up_SM: Tensor,
    gate_SM: Tensor | None,
    up_bias_eM: Tensor | None,
    gate_bias_eM: Tensor | None,
    expert_S: Tensor,
    probability_S: Tensor,
) -> Tensor:
    """GELU-tanh of up + bias, or SiLU of gate + bias times up + bias, times the probability; plain torch.

    Args:
        up_SM: product of each row with its expert's first matrix.
        gate_SM: likewise with the gate's matrix (SwiGLU); None: GELU-tanh.
        up_bias_eM: biases, of which each row takes its expert's; or None.
        gate_bias_eM: likewise.
        expert_S: expert of each row, int64; fast where the rows of an expert stand together.
        probability_S: factor of each row, fp32 or wider.

    Returns:
        [S, M] in the dtype of ``up_SM``.
    """
    _check(up_SM, gate_SM, up_bias_eM, gate_bias_eM, expert_S, probability_S)
    up = _biased(up_SM, up_bias_eM, expert_S)
    hidden = gelu(up, approximate="tanh") if gate_SM is None else silu(_biased(gate_SM, gate_bias_eM, expert_S)) * up
    return (hidden * probability_S.unsqueeze(-1)).to(up_SM.dtype)


def expert_activation_backward_reference(
    grad_SM: Tensor,
    up_SM: Tensor,
    gate_SM: Tensor | None,
    up_bias_eM: Tensor | None,
    gate_bias_eM: Tensor | None,
    expert_S: Tensor,
    probability_S: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of up, gate, the two biases and the probability, written out; empty where there is no such argument.

    GELU-tanh(u) = u s with s = sigmoid(2 z), z = sqrt(2 / pi) (u + 0.044715 u^3), so its slope is
    s + 2 u s (1 - s) z'; that of SiLU(g) = g s with s = sigmoid(g) is s (1 + g (1 - s)).
    """
    factor = wide(probability_S).unsqueeze(-1)
    grad = wide(grad_SM)
    up = wide(_biased(up_SM, up_bias_eM, expert_S))
    empty = up_SM.new_empty(0)
    if gate_SM is None:
        s = torch.sigmoid(2 * ROOT * (up + CUBIC * up**3))
        hidden, grad_gate = up * s, empty
        slope = s + 2 * up * s * (1 - s) * ROOT * (1 + 3 * CUBIC * up.square())
        grad_up = grad * factor * slope
    else:
        gate = wide(_biased(gate_SM, gate_bias_eM, expert_S))
        s = torch.sigmoid(gate)
        hidden = gate * s * up
        grad_up = grad * factor * gate * s
        grad_gate = grad * factor * up * s * (1 + gate * (1 - s))
    return (
        grad_up.type_as(up_SM),
        grad_gate.type_as(up_SM),
        empty if up_bias_eM is None else _sum_of_experts(grad_up, up_bias_eM, expert_S),
        empty if gate_bias_eM is None else _sum_of_experts(grad_gate, gate_bias_eM, expert_S),
        (grad * hidden).sum(-1).to(probability_S.dtype),
    )


def _biased(x_SM: Tensor, bias_eM: Tensor | None, expert_S: Tensor) -> Tensor:
    return x_SM if bias_eM is None else x_SM + bias_eM.index_select(0, expert_S)


def _sum_of_experts(grad_SM: Tensor, bias_eM: Tensor, expert_S: Tensor) -> Tensor:
    zeros = wide(torch.zeros_like(bias_eM))
    return zeros.index_add(0, expert_S, grad_SM.to(zeros.dtype)).type_as(bias_eM)


def _check(
    up: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    expert: Tensor,
    probability: Tensor,
) -> None:
    op = "expert_activation"
    if up.dim() != 2:
        raise ValueError(f"{op}: up must be [S, M], got {list(up.shape)}")
    if gate is not None and gate.shape != up.shape:
        raise ValueError(f"{op}: gate must be {list(up.shape)}, got {list(gate.shape)}")
    if gate is None and gate_bias is not None:
        raise ValueError(f"{op}: gate_bias is given, and no gate")
    for name, bias in (("up_bias", up_bias), ("gate_bias", gate_bias)):
        if bias is not None and (bias.dim() != 2 or bias.shape[1] != up.shape[1]):
            raise ValueError(f"{op}: {name} must be [e, {up.shape[1]}], got {list(bias.shape)}")
    if expert.dtype != torch.int64:
        raise TypeError(f"{op}: expert must be int64, got {expert.dtype}")
    for name, each in (("expert", expert), ("probability", probability)):
        if each.shape != up.shape[:1]:
            raise ValueError(f"{op}: {name} must be [{up.shape[0]}], got {list(each.shape)}")


def _shapes(
    up: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    expert: Tensor,
    probability: Tensor,
) -> Tensor:
    return torch.empty_like(up, memory_format=torch.contiguous_format)


def _backward_shapes(
    grad: Tensor,
    up: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    expert: Tensor,
    probability: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(
        up.new_empty(0) if like is None else torch.empty_like(like, memory_format=torch.contiguous_format)
        for like in (up, gate, up_bias, gate_bias, probability)
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    given = ctx.saved_tensors
    found = torch.ops.megavid.expert_activation_backward(grad, *given)
    up, gate, up_bias, gate_bias = (None if x is None else g for x, g in zip(given[:4], found[:4], strict=True))
    return up, gate, up_bias, gate_bias, None, found[4]


ARGUMENTS = "Tensor up, Tensor? gate, Tensor? up_bias, Tensor? gate_bias, Tensor expert, Tensor probability"
declare(f"expert_activation({ARGUMENTS}) -> Tensor", expert_activation_reference, _shapes)
declare(
    f"expert_activation_backward(Tensor grad_y, {ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    expert_activation_backward_reference,
    _backward_shapes,
)
differentiate("expert_activation", _gradient, _keep)
