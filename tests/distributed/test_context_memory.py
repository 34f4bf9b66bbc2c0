"""Bytes that one block of 8 narrow heads at 8192 tokens allocates on a rank: they fall as 1 / CP."""

import pytest
import torch

from megavid.plan.context import ContextPlan
from megavid.profiling.allocations import AllocationMeter
from megavid.profiling.context_memory import ContextMemory, measure_context_memory
from tests.support.ranks import RankPool

WITHIN = 0.15
SEEN: dict[ContextPlan, ContextMemory] = {}


def peak(pool: RankPool, plan: ContextPlan) -> ContextMemory:
    """Of the rank with the most; measured once."""
    if plan not in SEEN:
        ranks = pool.run(plan.cp, measure_context_memory, plan)
        SEEN[plan] = max(ranks, key=lambda memory: memory.layer)
    return SEEN[plan]


@pytest.mark.parametrize(
    "plan",
    [
        *(ContextPlan(1, n) for n in (2, 4, 8)),
        *(ContextPlan(n, 1) for n in (2, 4, 8)),
        *(ContextPlan(u, r) for u, r in ((2, 2), (2, 4), (4, 2))),
    ],
    ids=ContextPlan.describe,
)
def test_a_layer_takes_one_over_cp_of_its_memory(pool: RankPool, plan: ContextPlan) -> None:
    share = peak(pool, plan).layer * plan.cp / peak(pool, ContextPlan()).layer
    assert abs(share - 1) <= WITHIN, f"{share:.2f} of 1 / CP"


def test_extra_memory_of_a_ring_does_not_grow_with_its_ranks(pool: RankPool) -> None:
    two, four, eight = (peak(pool, ContextPlan(1, n)) for n in (2, 4, 8))
    # In tensors of a rank's own tokens; with two ranks no third shard is ever under way.
    assert eight.attention / eight.shard == pytest.approx(four.attention / four.shard, rel=0.01)
    assert two.attention / two.shard < four.attention / four.shard


def test_an_all_gather_holds_all_keys_and_values(pool: RankPool) -> None:
    gathered = peak(pool, ContextPlan(1, 8, "allgather"))
    whole = 8 * gathered.shard
    assert gathered.attention > 4 * whole  # keys, values and the gradients of both
    assert gathered.layer * 8 / peak(pool, ContextPlan()).layer > 1 + WITHIN


def test_the_meter_sees_what_is_alive_at_once() -> None:
    with AllocationMeter() as meter:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(1 << 21, dtype=torch.uint8)
        del first
        third = torch.empty(1 << 19, dtype=torch.uint8)
    assert meter.peak_bytes == 3 << 20
    assert second.numel() > third.numel()
