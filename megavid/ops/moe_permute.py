"""Tokens to rows sorted by expert, and rows back to tokens.

Owns the ops ``megavid::moe_permute`` and ``megavid::moe_unpermute``: schemas, references, shapes and gradients; csrc/
has the implementations. Each is the other's gradient, so both directions read and write memory once, and every sum over
the rows of a token runs from its lowest expert to its highest, in fp32, the same in every run.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megavid.ops.compiled import declare, differentiate
from megavid.ops.norm import wide


class Rows(NamedTuple):
    """Rows sorted by expert, and within an expert by token; each expert's filled up to a multiple of the alignment.

    Attributes:
        x_SD: the token of each row; zeros where a row only fills up.
        probability_S: its gate, fp32 or wider; zero likewise.
        token_S: which token, int64; -1 likewise.
        first_T1: where each token's own rows begin in ``row_S``, int64; token t has ``first[t]`` to ``first[t + 1]``.
        row_S: numbers of the rows of token after token, lowest expert first, int64; -1 after the last one.
        rows_of_expert_E: rows of each expert, int64, those that fill up counted.
    """

    x_SD: Tensor
    probability_S: Tensor
    token_S: Tensor
    first_T1: Tensor
    row_S: Tensor
    rows_of_expert_E: Tensor


def moe_permute_op(x_TD: Tensor, probability_TE: Tensor, map_TE: Tensor, num_rows: int, alignment: int = 1) -> Rows:
    """The op, as ``moe_permute_reference`` says; compiled where it is built.

    Raises:
        TypeError: the compiled op takes tokens in fp32 or bf16, probabilities in fp32, the map in bool.
        ValueError: shapes do not fit, or on CPU the rows are more than ``num_rows``.
    """
    return Rows(*torch.ops.megavid.moe_permute(x_TD, probability_TE, map_TE, num_rows, alignment))


def moe_unpermute_op(x_SD: Tensor, weight_S: Tensor | None, token_S: Tensor, first_T1: Tensor, row_S: Tensor) -> Tensor:
    """The op, as ``moe_unpermute_reference`` says; compiled where it is built.

    Raises:
        TypeError: the compiled op takes rows in fp32 or bf16, weights in fp32.
        ValueError: shapes do not fit.
    """
    found: Tensor = torch.ops.megavid.moe_unpermute(x_SD, weight_S, token_S, first_T1, row_S)
    return found


def moe_permute_reference(
    x_TD: Tensor, probability_TE: Tensor, map_TE: Tensor, num_rows: int, alignment: int
) -> tuple[Tensor, ...]:
    """The fields of ``Rows``, in plain torch.

    Args:
        x_TD: tokens.
        probability_TE: gate of each token and expert, fp32 or wider.
        map_TE: which token goes to which expert, bool.
        num_rows: S, at least what the map and the alignment need; on the host, so that nothing waits for the device.
        alignment: rows of each expert are filled up to a multiple of this.
    """
    _check_permute(x_TD, probability_TE, map_TE, num_rows, alignment)
    rows_E = -(-map_TE.sum(0) // alignment) * alignment
    if int(rows_E.sum()) > num_rows:
        raise ValueError(f"moe_permute: num_rows must be at least {int(rows_E.sum())}, got {num_rows}")
    begin_E = rows_E.cumsum(0) - rows_E
    expert_R, token_R = map_TE.t().nonzero().unbind(1)  # by expert, then by token
    row_TE = torch.where(map_TE, begin_E + map_TE.cumsum(0) - 1, -1)
    place_R = row_TE[token_R, expert_R]
    token_S = token_R.new_full((num_rows,), -1).index_copy(0, place_R, token_R)
    first_T1 = torch.cat([map_TE.new_zeros(1, dtype=torch.int64), map_TE.sum(1).cumsum(0)])
    row_S = token_R.new_full((num_rows,), -1)
    row_S[: place_R.shape[0]] = row_TE[map_TE]
    probability_S = probability_TE.new_zeros(num_rows).index_copy(0, place_R, probability_TE[token_R, expert_R])
    x_SD = x_TD.new_zeros(num_rows, x_TD.shape[1]).index_copy(0, place_R, x_TD[token_R])
    return x_SD, probability_S, token_S, first_T1, row_S, rows_E


def moe_permute_backward_reference(
    grad_SD: Tensor, grad_S: Tensor, token_S: Tensor, first_T1: Tensor, row_S: Tensor, rows_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of tokens and probabilities: the sum of each token's rows, and each row's own number."""
    grad_TD = moe_unpermute_reference(grad_SD, None, token_S, first_T1, row_S)
    grad_TE = grad_S.new_zeros(first_T1.shape[0] - 1, rows_E.shape[0])
    expert_R = torch.repeat_interleave(torch.arange(rows_E.shape[0], device=rows_E.device), rows_E)
    is_own = token_S[: expert_R.shape[0]] >= 0
    grad_TE[token_S[: expert_R.shape[0]][is_own], expert_R[is_own]] = grad_S[: expert_R.shape[0]][is_own]
    return grad_TD, grad_TE


def moe_unpermute_reference(
    x_SD: Tensor, weight_S: Tensor | None, token_S: Tensor, first_T1: Tensor, row_S: Tensor
) -> Tensor:
    """Sum of each token's rows times their weights, [T, D] in the dtype of the rows, in plain torch; sums in fp32.

    Args:
        x_SD: rows, as ``moe_permute`` sorts them.
        weight_S: factor of each row, fp32 or wider; None: 1.
        token_S: see ``Rows``.
        first_T1: see ``Rows``.
        row_S: see ``Rows``.
    """
    _check_unpermute(x_SD, weight_S, token_S, first_T1, row_S)
    weighted = wide(x_SD) if weight_S is None else wide(x_SD) * weight_S.unsqueeze(-1)
    total = wide(x_SD.new_zeros(first_T1.shape[0] - 1, x_SD.shape[1])).to(weighted.dtype)
    is_own = token_S >= 0
    return total.index_add(0, token_S[is_own], weighted[is_own]).type_as(x_SD)


def moe_unpermute_backward_reference(
    grad_TD: Tensor, x_SD: Tensor | None, weight_S: Tensor | None, token_S: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and, where there are any, weights (else empty)."""
    is_own = (token_S >= 0).unsqueeze(-1)
    grad = wide(grad_TD).index_select(0, token_S.clamp(min=0)) * is_own
    if weight_S is None or x_SD is None:
        return grad.type_as(grad_TD), grad_TD.new_empty(0)
    return (grad * weight_S.unsqueeze(-1)).type_as(grad_TD), (grad * wide(x_SD)).sum(-1).to(weight_S.dtype)


def _check_permute(x: Tensor, probability: Tensor, routing: Tensor, num_rows: int, alignment: int) -> None:
    op = "moe_permute"
    if x.dim() != 2:
        raise ValueError(f"{op}: x must be [T, D], got {list(x.shape)}")
    if routing.dtype != torch.bool:
        raise TypeError(f"{op}: map must be bool, got {routing.dtype}")
    if routing.dim() != 2 or routing.shape[0] != x.shape[0]:
        raise ValueError(f"{op}: map must be [{x.shape[0]}, E], got {list(routing.shape)}")
    if probability.shape != routing.shape:
        raise ValueError(f"{op}: probability must be {list(routing.shape)}, got {list(probability.shape)}")
    if num_rows < 0:
        raise ValueError(f"{op}: num_rows must be at least 0, got {num_rows}")
    if alignment < 1:
        raise ValueError(f"{op}: alignment must be at least 1, got {alignment}")


def _check_unpermute(x: Tensor, weight: Tensor | None, token: Tensor, first: Tensor, row: Tensor) -> None:
    op = "moe_unpermute"
    if x.dim() != 2:
        raise ValueError(f"{op}: x must be [S, D], got {list(x.shape)}")
    for name, each in (("weight", weight), ("token", token), ("row", row)):
        if each is not None and each.shape != x.shape[:1]:
            raise ValueError(f"{op}: {name} must be [{x.shape[0]}], got {list(each.shape)}")
    if first.dim() != 1 or first.shape[0] < 1:
        raise ValueError(f"{op}: first must be [T + 1], got {list(first.shape)}")
    for name, each in (("token", token), ("first", first), ("row", row)):
        if each.dtype != torch.int64:
            raise TypeError(f"{op}: {name} must be int64, got {each.dtype}")


def _permute_shapes(x: Tensor, probability: Tensor, routing: Tensor, num_rows: int, alignment: int) -> Any:
    index = x.new_empty(num_rows, dtype=torch.int64)
    return (
        x.new_empty(num_rows, x.shape[1]),
        probability.new_empty(num_rows),
        index,
        x.new_empty(x.shape[0] + 1, dtype=torch.int64),
        torch.empty_like(index),
        x.new_empty(routing.shape[1], dtype=torch.int64),
    )


def _permute_backward_shapes(
    grad: Tensor, grad_probability: Tensor, token: Tensor, first: Tensor, row: Tensor, rows_of_expert: Tensor
) -> tuple[Tensor, Tensor]:
    tokens = first.shape[0] - 1
    return grad.new_empty(tokens, grad.shape[1]), grad_probability.new_empty(tokens, rows_of_expert.shape[0])


def _unpermute_shapes(x: Tensor, weight: Tensor | None, token: Tensor, first: Tensor, row: Tensor) -> Tensor:
    return x.new_empty(first.shape[0] - 1, x.shape[1])


def _unpermute_backward_shapes(
    grad: Tensor, x: Tensor | None, weight: Tensor | None, token: Tensor
) -> tuple[Tensor, Tensor]:
    grad_weight = grad.new_empty(0) if weight is None else torch.empty_like(weight)
    return grad.new_empty(token.shape[0], grad.shape[1]), grad_weight


def _keep_permute(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    indices = output[2:]
    ctx.save_for_backward(*indices)
    ctx.mark_non_differentiable(*indices)


def _permute_gradient(ctx: Any, grad: Tensor, grad_probability: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.megavid.moe_permute_backward(grad, grad_probability, *ctx.saved_tensors)
    return (*found, None, None, None)


def _keep_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, token, _, _ = inputs
    # The rows themselves are kept for the gradient of the weights alone.
    ctx.save_for_backward(None if weight is None else x, weight, token)


def _unpermute_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, token = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.megavid.moe_unpermute_backward(grad, x, weight, token)
    return grad_x, None if weight is None else grad_weight, None, None, None


declare(
    "moe_permute(Tensor x, Tensor probability, Tensor map, SymInt num_rows, int alignment) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    moe_permute_reference,
    _permute_shapes,
)
declare(
    "moe_permute_backward(Tensor grad_x, Tensor grad_probability, Tensor token, Tensor first, Tensor row, "
    "Tensor rows_of_expert) -> (Tensor, Tensor)",
    moe_permute_backward_reference,
    _permute_backward_shapes,
)
declare(
    "moe_unpermute(Tensor x, Tensor? weight, Tensor token, Tensor first, Tensor row) -> Tensor",
    moe_unpermute_reference,
    _unpermute_shapes,
)
declare(
    "moe_unpermute_backward(Tensor grad, Tensor? x, Tensor? weight, Tensor token) -> (Tensor, Tensor)",
    moe_unpermute_backward_reference,
    _unpermute_backward_shapes,
)
differentiate("moe_permute", _permute_gradient, _keep_permute)
differentiate("moe_unpermute", _unpermute_gradient, _keep_unpermute)
