"""Masks as rectangles, layouts as spans, and the blocks that follow: every pair once, and as few as can be."""

import itertools

import pytest
import torch

from megavid.errors import ConfigError
from megavid.ops.packs import Clip, Pack, Span
from megavid.parallel.context.attn_plan import AttnPlan
from megavid.parallel.context.groups import ContextGroups, context_ranks
from megavid.parallel.context.layout import CPLayout
from megavid.parallel.context.schedule import gathered_runs, merged, schedule_of
from megavid.plan.context import ContextPlan
from megavid.plan.layout import Layout
from tests.support.context_world import MASKS, SHARDS, TOKENS, Case, layout_of_case, plan_of_mask, plans_of

PLANS = [plan for world in (1, 2, 3, 8) for plan in plans_of(world) if plan.cp == world]


def layouts(plan: ContextPlan, shards: str) -> list[CPLayout]:
    """The layout as each rank sees it."""
    case = Case(plan, shards, "", "mha")
    return [layout_of_case(case, ContextGroups(plan, rank)) for rank in range(plan.cp)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shards", [*SHARDS, "zigzag"])
@pytest.mark.parametrize("plan", PLANS, ids=ContextPlan.describe)
def test_blocks_of_all_ranks_and_hops_are_the_mask(plan: ContextPlan, shards: str, mask: str) -> None:
    attn = plan_of_mask(mask)
    for first in range(0, plan.cp, plan.ulysses):
        seen = torch.zeros(TOKENS, TOKENS, dtype=torch.int64)
        layout = layouts(plan, shards)[first]
        schedule = schedule_of(layout, (attn,), plan.kind)
        mine = layout.groups.ring_rank
        queries = row_to_token(layout, mine)
        assert len(schedule.hops) == (plan.ring if plan.kind == "ring" else 1)
        for hop, blocks in enumerate(schedule.hops):
            if plan.kind == "ring":
                keys = row_to_token(layout, (mine - hop) % plan.ring)
            else:
                keys = {
                    run.row + i: run.start + i for run in gathered_runs(layout) for i in range(run.stop - run.start)
                }
            for block in blocks:
                pairs = itertools.product(range(block.q_start, block.q_stop), range(block.k_start, block.k_stop))
                for query, key in pairs:
                    seen[queries[query], keys[key]] += 1
        own = torch.tensor(sorted(queries.values()), dtype=torch.int64)
        assert torch.equal(seen[own], attn.mask()[own].long())
        assert int(seen.sum()) == int(seen[own].sum())


def row_to_token(layout: CPLayout, ring_rank: int) -> dict[int, int]:
    ulysses = layout.groups.plan.ulysses
    ranks = range(ring_rank * ulysses, (ring_rank + 1) * ulysses)
    return dict(enumerate(torch.cat([layout.index(rank) for rank in ranks]).tolist()))


@pytest.mark.parametrize("plan", PLANS, ids=ContextPlan.describe)
def test_a_whole_pack_is_one_call_for_each_hop(plan: ContextPlan) -> None:
    for layout in layouts(plan, "equal"):
        schedule = schedule_of(layout, (AttnPlan.bidirectional(TOKENS),) * 3, plan.kind)
        assert [len(hop) for hop in schedule.hops] == [1] * len(schedule.hops)
        assert schedule.hops[0][0][:2] == (0, 3)
        assert schedule.queries_once == (len(schedule.hops) == 1)
        assert schedule.keys_once


def test_packs_with_other_clips_have_blocks_of_their_own() -> None:
    one, other = AttnPlan.packed((20, 28)), AttnPlan.packed((48,))
    schedule = schedule_of(CPLayout.contiguous(TOKENS), (one, one, other, one), "ring")
    assert [block[:4] for block in schedule.hops[0]] == [
        (0, 2, 0, 20), (0, 2, 20, 48), (2, 3, 0, 48), (3, 4, 0, 20), (3, 4, 20, 48),
    ]  # fmt: skip


def test_rectangles_side_by_side_become_one() -> None:
    assert merged([(0, 2, 0, 4), (2, 4, 0, 4), (0, 4, 4, 9)]) == [(0, 4, 0, 9)]
    assert merged([(0, 2, 0, 4), (2, 4, 0, 5)]) == [(0, 2, 0, 4), (2, 4, 0, 5)]


def test_a_block_causal_mask_is_what_its_words_say() -> None:
    frames, tokens, block, window, sink = 7, 3, 2, 3, 1
    mask = AttnPlan.block_causal(frames, tokens, block, window=window, sink=sink).mask()
    for query, key in itertools.product(range(frames * tokens), repeat=2):
        end = min((query // tokens // block + 1) * block, frames)
        frame = key // tokens
        assert mask[query, key] == (frame < end and (frame >= end - window or frame < sink))


def test_a_pack_gives_its_clips_and_leaves_the_padding_out() -> None:
    clips = tuple(Clip(draw=i, sample=i, start=s, grid=g, frame_rate=4.0) for i, s, g in
                  ((0, 0, (1, 2, 3)), (1, 6, (2, 2, 2))))  # fmt: skip
    plan = AttnPlan.packed(Pack(clips, 20))
    assert plan == AttnPlan.packed((6, 8), 20)
    assert plan.area == 36 + 64
    assert not plan.mask()[14:].any()


@pytest.mark.parametrize(("rectangles", "words"), [
    ([(0, 4, 0, 4), (3, 5, 3, 4)], r"\(0, 4, 0, 4\) and \(3, 5, 3, 4\) overlap"),
    ([(0, 4, 0, 11)], "leaves the pack's 10 tokens"),
])  # fmt: skip
def test_rectangles_that_cannot_be_a_mask_are_refused(rectangles: list[tuple[int, ...]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AttnPlan.of_rectangles(10, rectangles)
    assert AttnPlan.of_rectangles(10, [(0, 4, 0, 4), (2, 2, 0, 9), (4, 5, 0, 4)]).area == 20


def test_layouts_that_lose_or_double_tokens_are_refused() -> None:
    two = ContextGroups(ContextPlan(1, 2))
    with pytest.raises(ConfigError, match="token 3 nowhere"):
        CPLayout(((Span(0, 3),), (Span(4, 6),)), two)
    with pytest.raises(ConfigError, match="token 2 twice"):
        CPLayout(((Span(0, 3),), (Span(2, 6),)), two)
    with pytest.raises(ConfigError, match=r"3 shards needs as many ranks, got parallel.context = 2"):
        CPLayout.from_lengths((1, 2, 3), two)
    with pytest.raises(ConfigError, match=r"parallel.context = 2 must divide data.pack_tokens = 9"):
        CPLayout.contiguous(9, two)
    with pytest.raises(ConfigError, match="plan of 8 tokens does not fit the context-parallel layout of 10"):
        schedule_of(CPLayout.contiguous(10, two), (AttnPlan.bidirectional(8),), "ring")


def test_groups_of_a_hybrid_run_along_its_axes() -> None:
    by_ulysses, by_ring = context_ranks(Layout(tp=2, cp=4, dp=1, pp=1, context=ContextPlan(2, 2)))
    assert by_ulysses == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert by_ring == [[0, 4], [2, 6], [1, 5], [3, 7]]
