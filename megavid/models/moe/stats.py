"""Routing statistics of one expert layer, what they say, and the balancing bias that follows from them.

Owns the record that a layer returns with its output (returned, not kept: activation recomputation runs a layer twice),
its figures, and the alarms for a collapsed router. Sums, so that microbatches and ranks add up; who adds them up is the
engine's business.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megavid.models.moe.router import Router, Routing
from megavid.models.moe.tokens import NOISE_BUCKETS, TokenInfo

MAX_SHARE = 0.9
"""Alarm: one expert is among the choices of more than this share of all tokens."""
MIN_LOAD_ENTROPY = 0.5
"""Alarm: entropy of the load over experts, as a fraction of the balanced load's, under this."""


class RoutingStats(NamedTuple):
    """Sums over this rank's tokens of one layer, by noise bucket; fp32, no gradient; padding left out.

    Attributes:
        counts_QE: tokens that go to each expert.
        prob_QE: scores normalised over experts, summed over tokens.
        entropy_Q: entropy of those scores in nats, summed over tokens.
        tokens_Q: tokens.
        dropped_Q: tokens that go to no expert (expert choice only).
        aux_loss: balancing loss, unweighted; summed over ranks and microbatches it is the mean over clips.
        z_loss: likewise the squared log-sum-exp of the logits.
    """

    counts_QE: Tensor
    prob_QE: Tensor
    entropy_Q: Tensor
    tokens_Q: Tensor
    dropped_Q: Tensor
    aux_loss: Tensor
    z_loss: Tensor


@torch.no_grad()
def routing_stats(routing: Routing, info: TokenInfo) -> RoutingStats:
    """Statistics of one call of a router."""
    shares_TE = routing.shares_TE.float()
    buckets = torch.arange(NOISE_BUCKETS, device=info.bucket_T.device)
    # Sums by a product with 0 and 1: the same order every time, and exact for counts.
    belongs_QT = ((info.bucket_T == buckets.unsqueeze(1)) & info.is_valid).float()
    entropy_T = torch.special.entr(shares_TE).sum(-1)
    return RoutingStats(
        counts_QE=belongs_QT @ routing.map_TE.float() if routing.counts_QE is None else routing.counts_QE,
        prob_QE=belongs_QT @ shares_TE,
        entropy_Q=belongs_QT @ entropy_T,
        tokens_Q=belongs_QT.sum(1),
        dropped_Q=belongs_QT @ (~routing.map_TE.any(1)).float(),
        aux_loss=routing.aux_loss.float(),
        z_loss=routing.z_loss.float(),
    )


def summary(stats: RoutingStats) -> dict[str, float]:
    """Figures of one layer for the metrics of a step, from sums over all ranks and microbatches.

    Keys: ``max_load`` (busiest expert / mean, 1 is balanced), ``load_entropy`` (of the load over experts, 1 is
    balanced), ``score_entropy`` (mean per token, 1 is indifferent), ``dropped`` (share of tokens), ``aux_loss``,
    ``z_loss``, and ``max_load_noise_Q`` for each noise bucket that has tokens.
    """
    counts_QE, tokens_Q = stats.counts_QE.double(), stats.tokens_Q.double()
    tokens, experts = max(float(tokens_Q.sum()), 1.0), counts_QE.shape[1]
    largest_entropy = math.log(experts) if experts > 1 else 1.0
    figures = {
        "max_load": _max_load(counts_QE.sum(0)),
        "load_entropy": _load_entropy(counts_QE.sum(0)),
        "score_entropy": float(stats.entropy_Q.sum()) / tokens / largest_entropy,
        "dropped": float(stats.dropped_Q.sum()) / tokens,
        "aux_loss": float(stats.aux_loss),
        "z_loss": float(stats.z_loss),
    }
    for bucket, count in enumerate(tokens_Q.tolist()):
        if count > 0:
            figures[f"max_load_noise_{bucket}"] = _max_load(counts_QE[bucket])
    return figures


def collapse_alarms(layer: int, stats: RoutingStats) -> list[str]:
    """One sentence for each sign that the router of ``layer`` has collapsed, from sums over all ranks; [] if none.

    Source: the failure published in arXiv:2605.19378, a third of the layers on one expert.
    """
    counts_E, tokens = stats.counts_QE.double().sum(0), float(stats.tokens_Q.sum())
    if tokens == 0 or counts_E.numel() < 2:
        return []
    alarms = []
    share, entropy = float(counts_E.max()) / tokens, _load_entropy(counts_E)
    # A choice of nearly all experts gives every expert nearly all tokens.
    if share > MAX_SHARE and float(counts_E.sum()) / tokens < counts_E.numel() * MAX_SHARE:
        expert = int(counts_E.argmax())
        alarms.append(f"layer {layer}: expert {expert} gets {share:.0%} of the tokens (alarm above {MAX_SHARE:.0%})")
    if entropy < MIN_LOAD_ENTROPY:
        alarms.append(
            f"layer {layer}: entropy of the load is {entropy:.2f} of the balanced one (alarm under {MIN_LOAD_ENTROPY})"
        )
    return alarms


@torch.no_grad()
def update_expert_bias_(router: Router, counts_E: Tensor, rate: float | Tensor) -> None:
    """Move the balancing bias one step: up for experts under the mean load, down for those over it.

    Args:
        router: one with a bias (sigmoid); others are left alone.
        counts_E: tokens of each expert over the whole global batch, the same on every rank.
        rate: size of the step; a tensor 0 leaves the bias as it is (a skipped step), without waiting for the device.

    Source: auxiliary-loss-free balancing (arXiv:2408.15664), algorithm 1.
    """
    if router.expert_bias is None:
        return
    counts_E = counts_E.to(router.expert_bias.dtype)
    router.expert_bias += rate * torch.sign(counts_E.mean() - counts_E)


def _max_load(counts_E: Tensor) -> float:
    return float(counts_E.max() / counts_E.mean().clamp_min(1e-20))


def _load_entropy(counts_E: Tensor) -> float:
    shares = counts_E / counts_E.sum().clamp_min(1.0)
    return float(torch.special.entr(shares).sum()) / math.log(max(counts_E.numel(), 2))
