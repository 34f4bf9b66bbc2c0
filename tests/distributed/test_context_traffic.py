"""What context-parallel attention sends, counted at the process groups, against the formulas of ``plan.context``."""

from dataclasses import asdict, dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megavid.parallel.context.attention import ContextParallelAttention
from megavid.parallel.context.layout import CPLayout
from megavid.parallel.context.recompute import keep_attention
from megavid.plan.context import ContextPlan, ExchangeBytes, exchange_bytes
from megavid.profiling.collectives import Call, CollectiveRecorder
from tests.support import context_world
from tests.support.context_world import HEAD_SIZE, TOKENS, Case
from tests.support.ranks import RankPool

PLANS = [plan for world in (2, 3, 4, 8) for plan in context_world.plans_of(world)]
NUMBERS = {torch.float64: (8, 8), torch.float32: (4, 4), torch.bfloat16: (2, 4)}  # activations, travelling gradients


@dataclass
class Count:
    """Calls and bytes sent in one direction of one rank; a hop is one call, its send."""

    a2a: int = 0
    a2a_calls: int = 0
    ring: int = 0
    ring_calls: int = 0

    @classmethod
    def of(cls, calls: list[Call]) -> "Count":
        count, rank = cls(), dist.get_rank()
        for call in calls:
            if call.operation == "all_to_all":
                count.a2a, count.a2a_calls = count.a2a + round(call.sent_by(rank)), count.a2a_calls + 1
            elif call.operation != "recv":
                assert call.operation in ("send", "all_gather", "reduce_scatter")
                count.ring, count.ring_calls = count.ring + round(call.sent_by(rank)), count.ring_calls + 1
        return count


def expected(case: Case, layout: CPLayout, rank: int) -> ExchangeBytes:
    """The formulas for two packs."""
    heads, kv_heads = context_world.head_counts(case)
    number, gradient = NUMBERS[case.dtype]
    return exchange_bytes(
        case.plan, tokens=TOKENS, hidden_per_tp=heads * HEAD_SIZE, kv_hidden_per_tp=kv_heads * HEAD_SIZE, batch=2,
        bytes_per_number=number, kv_grad_bytes=gradient, lengths=layout.lengths, rank=rank,
    )  # fmt: skip


def count_cases(cases: list[Case]) -> list[tuple[Count, Count, ExchangeBytes]]:
    """Job: what each case sends forward and backward, and what it should."""
    results = []
    for case in cases:
        with context_world.groups_of(case.plan) as groups:
            layout = context_world.layout_of_case(case, groups)
            inputs = context_world.draw(case).inputs
            leaves = [x[layout.index()].requires_grad_() for x in inputs]
            attention = ContextParallelAttention(layout, case.plan.kind)
            with CollectiveRecorder() as forward:
                out = attention(leaves[0], leaves[1], leaves[2], context_world.plans_of_case(case))
            with CollectiveRecorder() as backward:
                out.backward(torch.ones_like(out))
            counts = Count.of(forward.calls), Count.of(backward.calls)
            results.append((*counts, expected(case, layout, dist.get_rank())))
    return results


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_bytes_and_calls_are_those_of_the_formulas(pool: RankPool, world: int) -> None:
    cases = [
        Case(plan, shards, "window and sink", heads, dtype)
        for plan in context_world.plans_of(world)
        for shards, heads, dtype in (
            ("equal", "mha", torch.float64), ("equal", "gqa", torch.bfloat16), ("uneven", "gqa", torch.float32),
            ("empty", "mha", torch.bfloat16),
        )
    ]  # fmt: skip
    for rank, results in enumerate(pool.run(world, count_cases, cases)):
        for case, (forward, backward, want) in zip(cases, results):
            where = f"rank {rank}, {case.name}"
            assert (forward.a2a, forward.ring) == (want.forward_a2a, want.forward_ring), where
            assert (backward.a2a, backward.ring) == (want.backward_a2a, want.backward_ring), where
            assert forward.a2a_calls + forward.ring_calls == want.forward_calls, where
            assert backward.a2a_calls + backward.ring_calls == want.backward_calls, where


@pytest.mark.parametrize("plan", PLANS, ids=ContextPlan.describe)
def test_formulas_are_those_that_are_published(plan: ContextPlan) -> None:
    tokens, wide, narrow, batch, number, gradient = 960, 768, 384, 3, 2, 4
    s, u, r = tokens // plan.cp * batch, plan.ulysses, plan.ring
    got = exchange_bytes(
        plan, tokens=tokens, hidden_per_tp=wide, kv_hidden_per_tp=narrow, batch=batch, bytes_per_number=number,
        kv_grad_bytes=gradient,
    )  # fmt: skip
    alltoall = (2 * wide + 2 * narrow) * s * number * (u - 1) // u
    hop = 2 * s * narrow * number * (r - 1)
    home = 0 if r == 1 else 2 * s * narrow * gradient * (r if plan.kind == "ring" else r - 1)
    assert asdict(got) | {"forward_calls": 0, "backward_calls": 0} == {
        "forward_a2a": alltoall, "forward_ring": hop, "backward_a2a": alltoall, "backward_ring": hop + home,
        "forward_calls": 0, "backward_calls": 0, "recompute_a2a": alltoall,
    }  # fmt: skip


def count_recompute(plan: ContextPlan, how: str) -> tuple[Count, Count, list[Tensor]]:
    """Job: forward and backward of projections around the attention, by ``how`` of recomputation."""
    case = Case(plan, "equal", "packed", "mha")
    with context_world.groups_of(plan) as groups:
        layout = context_world.layout_of_case(case, groups)
        attention = ContextParallelAttention(layout, plan.kind)
        heads, _ = context_world.head_counts(case)
        width = heads * HEAD_SIZE
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(width, size, generator=generator, dtype=torch.float64) for size in (3 * width, width)]
        x_tBD = torch.randn(TOKENS, 2, width, generator=generator, dtype=torch.float64)[layout.index()]
        leaves = [tensor.requires_grad_() for tensor in (x_tBD, *weights)]

        def part(x: Tensor, into: Tensor, out: Tensor) -> Tensor:
            q, k, v = (each.unflatten(-1, (heads, HEAD_SIZE)) for each in (x @ into).chunk(3, dim=-1))
            return attention(q, k, v, context_world.plans_of_case(case)).flatten(-2) @ out

        options = {"context_fn": keep_attention} if how == "keep attention" else {}
        with CollectiveRecorder() as forward:
            result = part(*leaves) if how == "none" else checkpoint(part, *leaves, use_reentrant=False, **options)
        with CollectiveRecorder() as backward:
            result.square().sum().backward()
        return (
            Count.of(forward.calls),
            Count.of(backward.calls),
            [leaf.grad for leaf in leaves if leaf.grad is not None],
        )


@pytest.mark.parametrize(
    "plan",
    [ContextPlan(1, 3), ContextPlan(1, 4, "allgather"), ContextPlan(4, 1), ContextPlan(2, 2)],
    ids=ContextPlan.describe,
)
def test_recomputation_that_keeps_attention_runs_the_ring_once(pool: RankPool, plan: ContextPlan) -> None:
    runs = {how: pool.run(plan.cp, count_recompute, plan, how)[0] for how in ("none", "keep attention", "all")}
    (forward, backward, want), (_, kept, got), (_, again, _) = runs["none"], runs["keep attention"], runs["all"]
    assert len(want) == 3
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert (kept.ring, kept.ring_calls) == (backward.ring, backward.ring_calls)
    # The all-to-alls around it are repeated, which the plan says.
    assert kept.a2a == backward.a2a + forward.a2a
    assert kept.a2a_calls == backward.a2a_calls + forward.a2a_calls
    # Negative control: without keeping it, the ring is repeated too.
    assert again.ring_calls == backward.ring_calls + forward.ring_calls
