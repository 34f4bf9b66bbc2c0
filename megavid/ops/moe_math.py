"""The choice of experts, as pure functions of scores on one rank.

Owns selection, gates and per-clip sums; every choice breaks ties by a fixed order (lower expert, earlier token), so
that it depends on nothing but the scores. Knows no parameters and no ranks.
"""

import torch
from torch import Tensor

SMALLEST_SUM = 1e-20
"""Added to sums of scores before they divide."""


def top_experts(selection_TE: Tensor, top_k: int) -> Tensor:
    """Expert numbers of the ``top_k`` highest scores of each token, best first, [T, K] int64; ties to the lower number.

    ``torch.topk`` promises no order among equals, and upcycled routers begin with equal rows.
    """
    order_TE = selection_TE.sort(dim=-1, descending=True, stable=True).indices
    return order_TE[:, :top_k]


def within_top_groups(selection_TE: Tensor, *, num_groups: int, top_groups: int, top_k: int) -> Tensor:
    """Scores with those outside of each token's best groups of experts at minus infinity.

    A group counts with the sum of its best ``top_k / top_groups`` scores.

    Source: DeepSeek-V3 (arXiv:2412.19437), node-limited routing; the same sum as megatron-core's group_limited_topk.
    """
    if num_groups == top_groups:
        return selection_TE
    tokens, experts = selection_TE.shape
    grouped = selection_TE.view(tokens, num_groups, experts // num_groups)
    best = min(max(top_k // top_groups, 1), grouped.shape[-1])
    first, *others = grouped.topk(best, dim=-1).values.unbind(-1)
    group_scores = sum(others, first)  # best first: an order of its own, which a kernel can repeat
    chosen = top_experts(group_scores, top_groups)
    allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, chosen, True)
    return grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).view(tokens, experts)


def choose(scores_TE: Tensor, bias_E: Tensor | None, *, top_k: int, num_groups: int, top_groups: int) -> Tensor:
    """Expert numbers of each token, best first, [T, K] int64; the bias is added for the choice alone."""
    selection_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    within_TE = within_top_groups(selection_TE, num_groups=num_groups, top_groups=top_groups, top_k=top_k)
    return top_experts(within_TE, top_k)


def round_robin(valid_T: Tensor, *, top_k: int, num_experts: int) -> Tensor:
    """Expert numbers that give every expert the same load: the next ``top_k`` for each valid token, [T, K] int64."""
    turn_T = valid_T.cumsum(0) - 1
    return (turn_T.unsqueeze(1) * top_k + torch.arange(top_k, device=valid_T.device)) % num_experts


def gates_of(scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """Scores of the selected experts, normalised to sum 1 over them, [T, K].

    With one expert per token the score itself: a gate that is always 1 would leave the router without a gradient.
    """
    selected_TK = scores_TE.gather(1, ids_TK)
    if ids_TK.shape[1] == 1:
        return selected_TK
    return selected_TK / (selected_TK.sum(-1, keepdim=True) + SMALLEST_SUM)


def gates_and_map(scores_TE: Tensor, ids_TK: Tensor, is_valid_T: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gates times ``scale``, zero where a token does not go, and where each token goes, bool; both [T, E]."""
    map_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, ids_TK, True) & is_valid_T.unsqueeze(1)
    probs_TE = torch.zeros_like(scores_TE).scatter(1, ids_TK, gates_of(scores_TE, ids_TK) * scale)
    return torch.where(map_TE, probs_TE, 0.0), map_TE


def expert_choice(scores_TE: Tensor, clip_T: Tensor, capacity_G: Tensor) -> Tensor:
    """Which tokens each expert takes: the ``capacity_G[g]`` best of every clip g, bool [T, E].

    Args:
        scores_TE: scores of all tokens of whole clips.
        clip_T: clip of each token, int64; -1 for padding, which is never taken.
        capacity_G: tokens that one expert takes of each clip, int64.

    Ties go to the earlier token. Runs without a loop over clips and without waiting for the device.
    """
    num_clips = capacity_G.shape[0]
    clip_T = torch.where(clip_T < 0, num_clips, clip_T)
    by_score_TE = scores_TE.sort(dim=0, descending=True, stable=True).indices
    by_clip_TE = clip_T[by_score_TE].sort(dim=0, stable=True).indices
    order_TE = by_score_TE.gather(0, by_clip_TE)
    size = torch.zeros(num_clips + 1, dtype=torch.int64, device=clip_T.device)
    size.scatter_add_(0, clip_T, torch.ones_like(clip_T))
    begin = size.cumsum(0) - size
    # Every column of order_TE has the clips one after another, so a row's clip is the same in all columns.
    clip_of_row = clip_T[order_TE[:, 0]]
    rank_T = torch.arange(clip_T.shape[0], device=clip_T.device) - begin[clip_of_row]
    capacity = torch.cat([capacity_G, capacity_G.new_zeros(1)])
    taken_T = rank_T < capacity[clip_of_row]
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
    return chosen_TE.scatter_(0, order_TE, taken_T.unsqueeze(1).expand_as(order_TE))


def expert_choice_reference(scores_TE: Tensor, clip_T: Tensor, capacity_G: Tensor) -> Tensor:
    """The slow, obvious twin of ``expert_choice``."""
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
    for clip, capacity in enumerate(capacity_G.tolist()):
        tokens = (clip_T == clip).nonzero().squeeze(1)
        for expert in range(scores_TE.shape[1]):
            order = scores_TE[tokens, expert].sort(descending=True, stable=True).indices
            chosen_TE[tokens[order[:capacity]], expert] = True
    return chosen_TE


def expert_capacity(tokens_of_clip_G: Tensor, *, top_k: int, num_experts: int) -> Tensor:
    """Tokens that one expert takes of each clip: tokens x top_k / experts, rounded up, at most all, int64 [G].

    Source: Expert Choice routing (arXiv:2202.09368), with its capacity factor equal to top_k.
    """
    capacity_G = (tokens_of_clip_G * top_k + num_experts - 1) // num_experts
    return torch.minimum(capacity_G, tokens_of_clip_G)


def count_by_clip(map_TE: Tensor, clip_T: Tensor, num_clips: int) -> Tensor:
    """Tokens of each clip that go to each expert, fp32 [G, E] (exact: whole numbers)."""
    clip_T = torch.where(clip_T < 0, num_clips, clip_T)
    counts = torch.zeros(num_clips + 1, map_TE.shape[1], device=map_TE.device)
    return counts.index_add_(0, clip_T, map_TE.float())[:num_clips]


def balance_loss(scores_TE: Tensor, counts_GE: Tensor, clip_T: Tensor, tokens_of_clip_G: Tensor, top_k: int) -> Tensor:
    """Sum over clips of each clip's load-balancing loss, these tokens' part of it; a scalar.

    loss of clip g = E / K * sum over e of (share of g's tokens that go to e) * (mean score of e over g's tokens); 1
    when balanced. Shares are counts, without gradient, so the loss is a sum over tokens, and ranks that hold different
    tokens of a clip each compute their own part.

    Args:
        scores_TE: scores of these tokens, summing to 1 over experts.
        counts_GE: tokens of the whole clip that go to each expert.
        clip_T: clip of each token, -1 for padding.
        tokens_of_clip_G: tokens of each whole clip.
        top_k: K.

    Source: Switch Transformer (arXiv:2101.03961), eq. 4, per clip.
    """
    tokens_G1 = tokens_of_clip_G.unsqueeze(1).to(scores_TE.dtype)
    factor_GE = counts_GE.to(scores_TE.dtype) / tokens_G1.square() * (scores_TE.shape[1] / top_k)
    return (_of_clip(factor_GE, clip_T) * scores_TE).sum()


def z_loss(logits_TE: Tensor, clip_T: Tensor, tokens_of_clip_G: Tensor) -> Tensor:
    """Sum over clips of the mean squared log-sum-exp of a clip's logits, these tokens' part of it; a scalar.

    Source: ST-MoE (arXiv:2202.08906), eq. 5, per clip.
    """
    weight_G1 = tokens_of_clip_G.unsqueeze(1).to(logits_TE.dtype).reciprocal()
    return (_of_clip(weight_G1, clip_T).squeeze(1) * logits_TE.logsumexp(-1).square()).sum()


def _of_clip(table_Gx: Tensor, clip_T: Tensor) -> Tensor:
    """Row of each token's clip; zero for the padding."""
    padded = torch.cat([table_Gx, table_Gx.new_zeros(1, table_Gx.shape[1])])
    return padded[torch.where(clip_T < 0, table_Gx.shape[0], clip_T)]
