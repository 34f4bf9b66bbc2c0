"""Routers: which experts each token goes to, with which gates, and the losses that keep the experts in balance.

Owns the router's weight, the balancing bias and the router losses. The choice itself is ``megavid.ops.moe_math``'s.
Every figure is per clip, over the whole clip, so nothing here depends on the micro-batch or on how tokens are sharded:
what a rank does not hold of a clip it asks of the ranks that share the pack's tokens, without gradient.

Three kinds (``model.moe.router``):

- ``sigmoid``: scores = sigmoid(logits); the top-k of score + bias; gates = the selected scores, normalised, times
  ``route_scale``. The bias only selects, and moves after each step (``megavid.models.moe.stats.update_expert_bias_``).
  Source: DeepSeek-V3 (arXiv:2412.19437), section 2.1.2.
- ``softmax``: scores = softmax(logits); top-k; gates normalised over the selected; a balancing loss.
- ``expert_choice``: scores = softmax(logits); each expert takes its best tokens of each clip; the score is the gate.
  Source: arXiv:2202.09368. Legal because a video transformer that is not causal may let tokens compete.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megavid.config.schema import MoEConfig
from megavid.models.moe.tokens import NOISE_BUCKETS, TokenInfo
from megavid.ops import moe_math
from megavid.ops.moe_ops import REFERENCE_MOE, MoEOps

OnChoice = Callable[[Tensor, TokenInfo], Tensor]
"""Sees what a router chose, experts [T, K] or with expert choice the map [T, E], and gives what it is to choose."""


class Routing(NamedTuple):
    """What a router decided for this rank's tokens.

    Attributes:
        probs_TE: gates, zero where a token does not go; fp32. Its backward pass carries the router losses too.
        map_TE: where each token goes, bool; padding goes nowhere.
        shares_TE: scores normalised to sum 1 over experts, without gradient, for statistics.
        counts_QE: tokens of each noise bucket that go to each expert, fp32; None where they are still to be counted.
        aux_loss: this rank's part of the mean balancing loss over the clips of the global batch; unweighted, detached.
        z_loss: likewise of the squared log-sum-exp of the logits.
    """

    probs_TE: Tensor
    map_TE: Tensor
    shares_TE: Tensor
    counts_QE: Tensor | None
    aux_loss: Tensor
    z_loss: Tensor


Chosen = tuple[Tensor, Tensor, Tensor | None]
"""Gates, map and counts of ``Routing``."""


class Router(nn.Module):
    """A linear router in fp32; ``build_router`` chooses its kind and places its weight.

    Args:
        moe: the experts' config.
        weight: [E, D], fp32 or wider.
        token_group: the ranks that share the tokens of a pack, in token order; None where a rank holds them all.
        ops: what chooses the experts of each token.
    """

    expert_bias: Tensor | None

    def __init__(self, moe: MoEConfig, weight: nn.Parameter, token_group: Any, ops: MoEOps = REFERENCE_MOE) -> None:
        super().__init__()
        self.moe, self.weight, self.ops = moe, weight, ops
        self.token_group = token_group if token_group is not None and token_group.size() > 1 else None
        self.route: Callable[[Tensor, TokenInfo], tuple[Chosen, Tensor]] = {
            "sigmoid": self._sigmoid,
            "softmax": self._softmax,
            "expert_choice": self._expert_choice,
        }[moe.router]
        # Megatron-core's own expert bias is off: this one moves after the decision whether a step counts.
        bias = torch.zeros(moe.num_experts, dtype=torch.float32, device=weight.device)
        self.register_buffer("expert_bias", bias if moe.router == "sigmoid" else None)
        self.on_choice: OnChoice | None = None
        """Told of every choice, and may replace it: a run records its routing, a replay forces what was recorded, and a
        profile forces balance.
        """

    def forward(self, hidden_TD: Tensor, info: TokenInfo) -> Routing:
        """Route this rank's tokens.

        Ranks:
            Expert choice gathers the scores, and the balancing loss sums its counts, over ``token_group``.
        """
        logits_TE = torch.nn.functional.linear(hidden_TD.to(self.weight.dtype), self.weight)
        (probs_TE, map_TE, counts_QE), scores_TE = self.route(logits_TE, info)
        aux, z = self._losses(logits_TE, scores_TE, map_TE, info)
        if torch.is_grad_enabled() and (aux.requires_grad or z.requires_grad):
            loss = self.moe.aux_loss_weight * aux + self.moe.z_loss_weight * z
            probs_TE = _AttachLoss.apply(probs_TE, loss * info.loss_scale)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            shares_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
        return Routing(probs_TE, map_TE, shares_TE, counts_QE, aux.detach(), z.detach())

    def _sigmoid(self, logits_TE: Tensor, info: TokenInfo) -> tuple[Chosen, Tensor]:
        scores_TE = logits_TE.sigmoid()
        return self._token_choice(scores_TE, self.expert_bias, info, self.moe.route_scale), scores_TE

    def _softmax(self, logits_TE: Tensor, info: TokenInfo) -> tuple[Chosen, Tensor]:
        scores_TE = logits_TE.softmax(-1)
        return self._token_choice(scores_TE, None, info, 1.0), scores_TE

    def _token_choice(self, scores_TE: Tensor, bias_E: Tensor | None, info: TokenInfo, scale: float) -> Chosen:
        moe = self.moe
        rule = {"top_k": moe.top_k, "num_groups": moe.num_groups, "top_groups": moe.top_groups}
        if self.on_choice is not None:
            chosen_TK = moe_math.choose(scores_TE, bias_E, **rule)
            told_TK = self.on_choice(chosen_TK, info)
            if told_TK is not chosen_TK:
                return *moe_math.gates_and_map(scores_TE, told_TK, info.is_valid, scale), None
        bucket_T = torch.where(info.is_valid, info.bucket_T, -1)
        return self.ops.router_topk(scores_TE, bias_E, bucket_T, num_buckets=NOISE_BUCKETS, **rule, scale=scale)

    def _expert_choice(self, logits_TE: Tensor, info: TokenInfo) -> tuple[Chosen, Tensor]:
        scores_TE = logits_TE.softmax(-1)
        capacity_G = moe_math.expert_capacity(
            info.tokens_of_clip_G, top_k=self.moe.top_k, num_experts=self.moe.num_experts
        )
        all_scores, all_clips = self._of_all_tokens(scores_TE.detach()), self._of_all_tokens(info.clip_T)
        chosen = moe_math.expert_choice(all_scores, all_clips, capacity_G)
        if self.token_group is not None:
            chosen = chosen.chunk(self.token_group.size())[self.token_group.rank()]
        if self.on_choice is not None:
            chosen = self.on_choice(chosen, info)
        map_TE = chosen & info.is_valid.unsqueeze(1)
        return (torch.where(map_TE, scores_TE, 0.0), map_TE, None), scores_TE

    def _of_all_tokens(self, x_Tx: Tensor) -> Tensor:
        """``x`` of every token of the packs, in token order, without gradient."""
        if self.token_group is None:
            return x_Tx
        whole = x_Tx.new_empty(x_Tx.shape[0] * self.token_group.size(), *x_Tx.shape[1:])
        dist.all_gather_into_tensor(whole, x_Tx.contiguous(), group=self.token_group)
        return whole

    def _losses(self, logits_TE: Tensor, scores_TE: Tensor, map_TE: Tensor, info: TokenInfo) -> tuple[Tensor, Tensor]:
        """Balancing loss and z-loss, these tokens' part of the mean over the clips of the global batch."""
        aux = z = torch.zeros((), dtype=logits_TE.dtype, device=logits_TE.device)
        if self.moe.aux_loss_weight > 0:
            counts_GE = moe_math.count_by_clip(map_TE, info.clip_T, info.num_clips)
            if self.token_group is not None:
                dist.all_reduce(counts_GE, group=self.token_group)
            sizes_G, top_k = info.tokens_of_clip_G, self.moe.top_k
            aux = moe_math.balance_loss(scores_TE, counts_GE, info.clip_T, sizes_G, top_k) * info.aux_scale
        if self.moe.z_loss_weight > 0:
            z = moe_math.z_loss(logits_TE, info.clip_T, info.tokens_of_clip_G) * info.aux_scale
        return aux, z


class _AttachLoss(torch.autograd.Function):
    """The identity of ``carrier``, whose backward pass also starts that of ``loss`` with gradient 1.

    A pipeline stage in the middle has no loss to add a router's to; this way every stage's router losses are there when
    the backward pass comes by, once, with recomputation too.
    """

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:
        ctx.like = (loss.dtype, loss.device)
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return grad, torch.ones((), dtype=dtype, device=device)
