"""Which experts each token goes to, with which gates, and how many tokens each expert gets, in one pass.

Owns the op ``megavid::router_topk``: schema, reference, shapes and gradient; csrc/ has the implementations. Scores come
in and are not computed here: they decide, so both kinds of ops have to be given the same numbers, and torch's sigmoid
and softmax are not ours to repeat bit by bit. Comparisons and one addition (the bias) are, so the choice is the same,
ties included.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megavid.ops import moe_math
from megavid.ops.compiled import declare, differentiate


class Choice(NamedTuple):
    """What a router chose.

    Attributes:
        probs_TE: gates, zero where a token does not go; dtype of the scores.
        map_TE: where each token goes, bool.
        counts_QE: tokens of each noise bucket that go to each expert, fp32 (exact: whole numbers).
    """

    probs_TE: Tensor
    map_TE: Tensor
    counts_QE: Tensor


def router_topk_op(
    scores_TE: Tensor,
    bias_E: Tensor | None,
    bucket_T: Tensor,
    *,
    num_buckets: int,
    top_k: int,
    num_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
) -> Choice:
    """The op, as ``router_topk_reference`` says; compiled where it is built.

    Raises:
        TypeError: the compiled op takes scores and bias in fp32 and buckets in int64.
        ValueError: shapes do not fit, fewer experts than ``top_k``, or on CPU a bucket out of range.
    """
    return Choice(
        *torch.ops.megavid.router_topk(scores_TE, bias_E, bucket_T, num_buckets, top_k, num_groups, top_groups, scale)
    )


def router_topk_reference(
    scores_TE: Tensor,
    bias_E: Tensor | None,
    bucket_T: Tensor,
    num_buckets: int,
    top_k: int,
    num_groups: int,
    top_groups: int,
    scale: float,
) -> Choice:
    """What the scores choose, from ``megavid.ops.moe_math`` in plain torch.

    Args:
        scores_TE: scores of each token, all finite.
        bias_E: added to the scores for the choice alone; None: nothing.
        bucket_T: noise bucket of each token, int64; -1 for padding, which goes nowhere.
        num_buckets: Q.
        top_k: experts of a token.
        num_groups: groups that the experts stand in, side by side.
        top_groups: of these, those that a token may choose from.
        scale: factor on the gates.
    """
    _check(scores_TE, bias_E, bucket_T, num_buckets, top_k, num_groups, top_groups)
    ids_TK = moe_math.choose(scores_TE, bias_E, top_k=top_k, num_groups=num_groups, top_groups=top_groups)
    probs_TE, map_TE = moe_math.gates_and_map(scores_TE, ids_TK, bucket_T >= 0, scale)
    belongs_QT = (bucket_T == torch.arange(num_buckets, device=bucket_T.device).unsqueeze(1)).float()
    return Choice(probs_TE, map_TE, belongs_QT @ map_TE.float())


def router_topk_backward_reference(
    grad_TE: Tensor, scores_TE: Tensor, map_TE: Tensor, top_k: int, scale: float
) -> Tensor:
    """Gradient of the scores: of the selected ones, through their sum; zero elsewhere."""
    grad = torch.where(map_TE, grad_TE, 0.0) * scale
    if top_k == 1:
        return grad
    selected = torch.where(map_TE, scores_TE, 0.0)
    total_T1 = selected.sum(-1, keepdim=True) + moe_math.SMALLEST_SUM
    mean_T1 = (grad * selected).sum(-1, keepdim=True) / total_T1
    return torch.where(map_TE, (grad - mean_T1) / total_T1, 0.0)


def _check(
    scores: Tensor, bias: Tensor | None, bucket: Tensor, num_buckets: int, top_k: int, num_groups: int, top_groups: int
) -> None:
    op = "router_topk"
    if scores.dim() != 2:
        raise ValueError(f"{op}: scores must be [T, E], got {list(scores.shape)}")
    experts = scores.shape[1]
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"{op}: bias must be [{experts}], got {list(bias.shape)}")
    if bucket.shape != scores.shape[:1]:
        raise ValueError(f"{op}: bucket must be [{scores.shape[0]}], got {list(bucket.shape)}")
    if bucket.dtype != torch.int64:
        raise TypeError(f"{op}: bucket must be int64, got {bucket.dtype}")
    if num_buckets < 1:
        raise ValueError(f"{op}: num_buckets must be at least 1, got {num_buckets}")
    if num_groups < 1 or experts % num_groups or not 1 <= top_groups <= num_groups:
        raise ValueError(f"{op}: {top_groups} of {num_groups} groups do not fit {experts} experts")
    if not 1 <= top_k <= experts // num_groups * top_groups:
        raise ValueError(f"{op}: top_k must be 1 to {experts // num_groups * top_groups}, got {top_k}")


def _shapes(
    scores: Tensor,
    bias: Tensor | None,
    bucket: Tensor,
    num_buckets: int,
    top_k: int,
    num_groups: int,
    top_groups: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    probs = torch.empty_like(scores, memory_format=torch.contiguous_format)
    counts = scores.new_empty(num_buckets, scores.shape[1], dtype=torch.float32)
    return probs, torch.empty_like(probs, dtype=torch.bool), counts


def _backward_shapes(grad: Tensor, scores: Tensor, routing: Tensor, top_k: int, scale: float) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scores, _, _, _, ctx.top_k, _, _, ctx.scale = inputs
    _, routing, counts = output
    ctx.save_for_backward(scores, routing)
    ctx.mark_non_differentiable(routing, counts)


def _gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    scores, routing = ctx.saved_tensors
    found = torch.ops.megavid.router_topk_backward(grad, scores, routing, ctx.top_k, ctx.scale)
    return (found, *[None] * 7)


declare(
    "router_topk(Tensor scores, Tensor? bias, Tensor bucket, int num_buckets, int top_k, int num_groups, "
    "int top_groups, float scale) -> (Tensor, Tensor, Tensor)",
    router_topk_reference,
    _shapes,
)
declare(
    "router_topk_backward(Tensor grad, Tensor scores, Tensor map, int top_k, float scale) -> Tensor",
    router_topk_backward_reference,
    _backward_shapes,
)
differentiate("router_topk", _gradient, _keep)
