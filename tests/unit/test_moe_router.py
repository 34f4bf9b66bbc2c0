"""Routers on one rank: what selects, what weighs, what is left out, and losses that belong to clips."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megavid.config.schema import MoEConfig
from megavid.models.moe.router import Router, Routing
from megavid.models.moe.stats import RoutingStats, collapse_alarms, routing_stats, summary, update_expert_bias_
from megavid.models.moe.tokens import NOISE_BUCKETS, TokenInfo, noise_bucket
from megavid.profiling.instrument import forced_balance

WIDTH, EXPERTS = 12, 8


def make_router(kind: str, **keys: Any) -> Router:
    config = MoEConfig(num_experts=EXPERTS, router=kind, **{"top_k": 2, **keys})  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, generator=generator, dtype=torch.float64))
    return Router(config, weight, token_group=None)


def make_info(clip: list[int], aux_scale: float = 1.0) -> TokenInfo:
    clip_T = torch.tensor(clip)
    num_clips = int(clip_T.max()) + 1
    sizes = torch.bincount(clip_T[clip_T >= 0], minlength=num_clips)
    return TokenInfo(clip_T, clip_T.clamp_min(0) % NOISE_BUCKETS, num_clips, sizes, aux_scale)


def make_hidden(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax", "expert_choice"])
def test_padding_goes_nowhere_and_counts_nowhere(kind: str) -> None:
    info = make_info([0, 0, 0, 1, 1, -1, -1, 1])
    routing = make_router(kind)(make_hidden(8), info)
    assert not routing.map_TE[5:7].any()
    assert routing.probs_TE[5:7].abs().sum() == 0
    assert ((routing.probs_TE != 0) == routing.map_TE).all()
    stats = routing_stats(routing, info)
    assert stats.tokens_Q.sum() == 6
    assert stats.counts_QE.sum() == routing.map_TE.sum()


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_gates_of_a_token_sum_to_route_scale(kind: str) -> None:
    scale = 2.5 if kind == "sigmoid" else 1.0
    routing = make_router(kind, route_scale=scale)(make_hidden(6), make_info([0] * 6))
    assert (routing.map_TE.sum(1) == 2).all()
    torch.testing.assert_close(routing.probs_TE.sum(1), torch.full((6,), scale, dtype=torch.float64))


def test_router_bias_changes_selection_but_not_gate_values() -> None:
    router, hidden, info = make_router("sigmoid"), make_hidden(20), make_info([0] * 20)
    before = router(hidden, info)
    assert router.expert_bias is not None
    router.expert_bias += 0.1
    shifted = router(hidden, info)
    assert torch.equal(shifted.map_TE, before.map_TE)
    assert torch.equal(shifted.probs_TE, before.probs_TE)
    router.expert_bias[5] += 10.0
    after = router(hidden, info)
    assert after.map_TE[:, 5].all()
    scores = torch.nn.functional.linear(hidden, router.weight).sigmoid()
    chosen = torch.where(after.map_TE, scores, 0.0)
    torch.testing.assert_close(after.probs_TE, chosen / chosen.sum(1, keepdim=True))


def test_expert_choice_fills_every_expert_of_every_clip() -> None:
    info = make_info([0, 1, 0, 1, 0, 1, 0, 0, -1, 1])
    routing = make_router("expert_choice")(make_hidden(10), info)
    for clip, size in enumerate(info.tokens_of_clip_G.tolist()):
        assert (routing.map_TE[info.clip_T == clip].sum(0) == -(-size * 2 // EXPERTS)).all()
    dropped = routing_stats(routing, info).dropped_Q.sum()
    assert dropped == (~routing.map_TE[info.clip_T >= 0].any(1)).sum()


@pytest.mark.parametrize("kind", ["sigmoid", "softmax", "expert_choice"])
def test_routing_of_a_clip_does_not_depend_on_its_neighbours_in_the_microbatch(kind: str) -> None:
    """Two packs in one microbatch (tokens interleaved), against one pack at a time."""
    keys = {"z_loss_weight": 0.01} | ({"aux_loss_weight": 0.1} if kind == "softmax" else {})
    router, weights = make_router(kind, **keys), make_hidden(24, seed=9)[:, :EXPERTS]
    hidden_TBD = make_hidden(24).view(12, 2, WIDTH)
    clip_TB = torch.tensor([[0, 2]] * 5 + [[1, 2]] * 4 + [[1, -1]] * 3)
    together = router(hidden_TBD.reshape(24, WIDTH), make_info(clip_TB.reshape(-1).tolist(), 1 / 3))
    gradient_together = gradient_of(router, together, weights)
    gradient_apart, losses = torch.zeros_like(gradient_together), torch.zeros(2, dtype=torch.float64)
    for pack, clips in ((0, clip_TB[:, 0]), (1, torch.where(clip_TB[:, 1] < 0, -1, 0))):
        apart = router(hidden_TBD[:, pack], make_info(clips.tolist(), 1 / 3))
        assert torch.equal(apart.map_TE, together.map_TE.view(12, 2, EXPERTS)[:, pack])
        gradient_apart += gradient_of(router, apart, weights.view(12, 2, EXPERTS)[:, pack])
        losses += torch.stack([apart.aux_loss, apart.z_loss])
    torch.testing.assert_close(gradient_together, gradient_apart, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.stack([together.aux_loss, together.z_loss]), losses)
    assert losses[1] > 0
    assert (losses[0] > 0) == (kind == "softmax")


def gradient_of(router: Router, routing: Routing, weights: Tensor) -> Tensor:
    router.weight.grad = None
    (routing.probs_TE * weights).sum().backward()
    assert router.weight.grad is not None
    return router.weight.grad


def test_router_losses_enter_the_gradient_with_their_weights() -> None:
    info, hidden = make_info([0, 0, 0, 1, 1, 1, -1], 0.5), make_hidden(7)
    router = make_router("softmax", aux_loss_weight=0.3, z_loss_weight=0.02)
    attached = gradient_of(router, router(hidden, info), torch.zeros(7, EXPERTS, dtype=torch.float64))
    logits = hidden @ router.weight.T
    scores, chosen, total = logits.softmax(-1), router(hidden, info).map_TE, torch.zeros((), dtype=torch.float64)
    for clip in range(2):
        own = info.clip_T == clip
        share = chosen[own].double().mean(0)
        total = total + 0.5 * 0.3 * EXPERTS / 2 * (share * scores[own].mean(0)).sum()
        total = total + 0.5 * 0.02 * logits[own].logsumexp(-1).square().mean()
    (expected,) = torch.autograd.grad(total, router.weight)
    torch.testing.assert_close(attached, expected, rtol=1e-10, atol=1e-12)


def test_without_scale_router_losses_leave_no_gradient() -> None:
    router = make_router("softmax", aux_loss_weight=0.3, z_loss_weight=0.02)
    routing = router(make_hidden(5), make_info([0] * 5, aux_scale=0.0))
    assert gradient_of(router, routing, torch.zeros(5, EXPERTS, dtype=torch.float64)).abs().max() == 0


def test_bias_moves_towards_balance_and_not_when_the_step_is_skipped() -> None:
    router = make_router("sigmoid")
    counts = torch.tensor([10.0, 0, 5, 5, 5, 5, 9, 1])
    update_expert_bias_(router, counts, torch.zeros(()))
    assert router.expert_bias is not None
    assert router.expert_bias.abs().max() == 0
    update_expert_bias_(router, counts, 0.01)
    expected = torch.tensor([-0.01, 0.01, 0, 0, 0, 0, -0.01, 0.01])
    torch.testing.assert_close(router.expert_bias, expected)
    update_expert_bias_(make_router("softmax"), counts, 0.01)


def test_bias_balances_a_lopsided_router() -> None:
    router, hidden = make_router("sigmoid"), make_hidden(400)
    with torch.no_grad():
        router.weight *= 0.3
        hidden += router.weight[2] * 2
    info = make_info([0] * 400)
    loads = []
    for _ in range(150):
        stats = routing_stats(router(hidden, info), info)
        loads.append(summary(stats)["max_load"])
        update_expert_bias_(router, stats.counts_QE.sum(0), 0.01)
    assert loads[0] > 2.0
    assert loads[-1] < 1.3


def make_stats(counts: list[float], tokens: float) -> RoutingStats:
    counts_QE, tokens_Q = torch.zeros(NOISE_BUCKETS, len(counts)), torch.zeros(NOISE_BUCKETS)
    counts_QE[1], tokens_Q[1] = torch.tensor(counts), tokens
    zero = torch.zeros(())
    return RoutingStats(counts_QE, counts_QE, tokens_Q, tokens_Q, torch.zeros(NOISE_BUCKETS), zero, zero)


def test_figures_and_alarms_of_balanced_and_collapsed_layers() -> None:
    balanced = make_stats([25.0] * 8, 100)
    figures = summary(balanced)
    assert figures["max_load"] == pytest.approx(1)
    assert figures["load_entropy"] == pytest.approx(1)
    assert figures["max_load_noise_1"] == pytest.approx(1)
    assert "max_load_noise_0" not in figures
    assert collapse_alarms(3, balanced) == []
    collapsed = make_stats([100.0, 100, 0, 0, 0, 0, 0, 0], 100)
    share, entropy = collapse_alarms(3, collapsed)
    assert "layer 3: expert 0 gets 100% of the tokens" in share
    assert "entropy" in entropy
    assert collapse_alarms(3, make_stats([0.0] * 8, 0)) == []
    assert collapse_alarms(3, make_stats([100.0, 100], 100)) == []


def test_statistics_fall_into_the_bucket_of_the_noise_level() -> None:
    assert noise_bucket(torch.tensor([0.0, 0.26, 0.99, 1.0])).tolist() == [0, 1, 3, 3]
    info = dataclasses.replace(make_info([0, 0, 1, 1]), bucket_T=torch.tensor([0, 0, 3, 3]))
    stats = routing_stats(make_router("sigmoid")(make_hidden(4), info), info)
    assert stats.tokens_Q.tolist() == [2, 0, 0, 2]
    assert stats.counts_QE.sum(1).tolist() == [4, 0, 0, 4]
    torch.testing.assert_close(stats.prob_QE.sum(1), stats.tokens_Q)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax", "expert_choice"])
def test_forced_balance_gives_every_expert_the_same_load_and_gates_of_the_usual_size(kind: str) -> None:
    router, info = make_router(kind, **({"route_scale": 4.0} if kind == "sigmoid" else {})), make_info([0] * 8 + [-1])
    block = SimpleNamespace(is_moe=True, feed_forward=SimpleNamespace(router=router))
    engine: Any = SimpleNamespace(chunks=[SimpleNamespace(blocks=[block])])
    before = router(make_hidden(9), info)
    with forced_balance(engine):
        forced = router(make_hidden(9), info)
    assert forced.map_TE.sum(0).tolist() == [2] * EXPERTS
    assert not forced.map_TE[8:].any()
    assert ((forced.probs_TE != 0) == forced.map_TE).all()
    if kind != "expert_choice":
        assert forced.probs_TE[:8].sum(-1).tolist() == pytest.approx(before.probs_TE[:8].sum(-1).tolist())
    after = router(make_hidden(9), info)
    assert torch.equal(after.probs_TE, before.probs_TE)
