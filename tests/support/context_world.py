"""Cases of context-parallel attention, a dense oracle, and the job that runs many of them in one world of ranks."""

import itertools
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavid.ops.block_attention_aten import CpuFlash
from megavid.ops.packs import Span
from megavid.parallel.context.attention import ContextParallelAttention
from megavid.parallel.context.attn_plan import AttnPlan
from megavid.parallel.context.groups import ContextGroups, open_context_groups
from megavid.parallel.context.layout import CPLayout
from megavid.plan.context import ContextPlan
from megavid.plan.layout import Layout

TOKENS, HEAD_SIZE = 48, 8
SHARDS = ("equal", "uneven", "tiny", "empty")
MASKS = ("bidirectional", "packed", "block-causal aligned", "block-causal misaligned", "window and sink")
HEADS = ("mha", "gqa")


@dataclass(frozen=True)
class Case:
    """One point of the matrix; its world is that of ``plan``."""

    plan: ContextPlan
    shards: str
    mask: str
    heads: str
    dtype: torch.dtype = torch.float64
    kv_grad_dtype: torch.dtype = torch.float32
    is_sleepy: bool = False
    head_size: int = HEAD_SIZE

    @property
    def name(self) -> str:
        return f"{self.plan.describe()}, {self.shards} shards, {self.mask}, {self.heads}, {self.dtype}"


def plans_of(world: int) -> list[ContextPlan]:
    """Every strategy that is legal on ``world`` ranks: ring, all-gather, Ulysses and all hybrids."""
    plans = [ContextPlan(1, world, "ring"), ContextPlan(1, world, "allgather"), ContextPlan(world, 1)]
    for ulysses in range(2, world):
        if world % ulysses == 0:
            plans += [ContextPlan(ulysses, world // ulysses, kind) for kind in ("ring", "allgather")]
    return plans


def matrix(world: int) -> list[Case]:
    """The whole matrix of one world."""
    return [Case(*point) for point in itertools.product(plans_of(world), SHARDS, MASKS, HEADS)]


def layout_of_case(case: Case, groups: ContextGroups) -> CPLayout:
    cp = case.plan.cp
    if case.shards == "equal":
        return CPLayout.contiguous(TOKENS, groups)
    if case.shards == "zigzag":
        half = TOKENS // (2 * cp)
        pairs = [(rank, 2 * cp - 1 - rank) for rank in range(cp)]
        return CPLayout(tuple(tuple(Span(i * half, (i + 1) * half) for i in pair) for pair in pairs), groups)
    lengths = {
        "uneven": [1 + 2 * rank for rank in range(cp)],
        "tiny": [1 if rank == cp // 2 else 6 for rank in range(cp)],
        "empty": [0 if rank % 3 == 1 else 5 for rank in range(cp)],
    }[case.shards]
    lengths = [length * TOKENS // sum(lengths) if length > 1 else length for length in lengths]
    lengths[-1 if lengths[-1] > 1 else 0] += TOKENS - sum(lengths)
    return CPLayout.from_lengths(lengths, groups)


def plan_of_mask(mask: str) -> AttnPlan:
    if mask == "bidirectional":
        return AttnPlan.bidirectional(TOKENS)
    if mask == "packed":
        return AttnPlan.packed((7, 20, 1, 13), TOKENS)
    if mask == "block-causal aligned":  # a frame of 2 tokens divides every equal shard
        return AttnPlan.block_causal(TOKENS // 2, 2, 3)
    if mask == "block-causal misaligned":
        return AttnPlan.block_causal(9, 5, 2, num_tokens=TOKENS)
    assert mask == "window and sink"
    return AttnPlan.block_causal(15, 3, 2, window=5, sink=1, num_tokens=TOKENS)


@dataclass(frozen=True)
class Tensors:
    """Global inputs of a case and what the dense oracle makes of them; gradients of the inputs."""

    inputs: tuple[Tensor, ...]
    weight: Tensor
    out: Tensor
    lse: Tensor
    grads: tuple[Tensor, ...]


def plans_of_case(case: Case) -> tuple[AttnPlan, ...]:
    """Two packs: the case's mask, and another."""
    return (plan_of_mask(case.mask), plan_of_mask("packed"))


def head_counts(case: Case) -> tuple[int, int]:
    """Query and key heads; the world divides both."""
    heads = 6 if case.plan.cp == 3 else 8
    return (2 * heads, heads) if case.heads == "gqa" else (heads, heads)


def draw(case: Case) -> Tensors:
    """Numbers of the case's dtype, and the dense attention of them in fp64."""
    plans, (heads, kv_heads) = plans_of_case(case), head_counts(case)
    generator = torch.Generator().manual_seed(7)

    def tensor(count: int) -> Tensor:
        shape = (plans[0].num_tokens, len(plans), count, case.head_size)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)

    inputs = (tensor(heads), tensor(kv_heads), tensor(kv_heads))
    weight = tensor(heads)
    leaves = [x.detach().double().clone().requires_grad_() for x in inputs]
    out, lse = dense(leaves[0], leaves[1], leaves[2], plans)
    out.backward(weight.double())
    return Tensors(inputs, weight, out.detach(), lse.detach(), tuple(leaf.grad for leaf in leaves))  # type: ignore[misc]


def dense(q_TBNA: Tensor, k_TBNA: Tensor, v_TBNA: Tensor, plans: tuple[AttnPlan, ...]) -> tuple[Tensor, Tensor]:
    """Attention written out with masks, (out [T, B, N, A], lse [B, N, T]); a query without keys gives 0 and -inf."""
    groups = q_TBNA.shape[2] // k_TBNA.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k_TBNA, v_TBNA))
    mask_BTT = torch.stack([plan.mask() for plan in plans]).unsqueeze(1)
    scores = torch.einsum("qbna,kbna->bnqk", q_TBNA, k) * q_TBNA.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask_BTT, -torch.inf)
    lse = scores.logsumexp(-1)
    weight = torch.where(mask_BTT, (scores - lse.masked_fill(lse.isinf(), 0.0).unsqueeze(-1)).exp(), 0.0)
    return torch.einsum("bnqk,kbna->qbna", weight, v), lse


@dataclass(frozen=True)
class Gap:
    """Largest absolute difference to the oracle on one rank, of outputs, log-sum-exp and gradients."""

    case: Case
    gaps: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.gaps.values())


@contextmanager
def groups_of(plan: ContextPlan) -> Iterator[ContextGroups]:
    """The groups of a world of ``plan.cp`` ranks."""
    groups = open_context_groups(Layout(cp=plan.cp, context=plan), dist.get_rank(), dist.group.WORLD, 600.0)
    try:
        yield groups
    finally:
        groups.close()


def run_cases(cases: list[Case]) -> list[Gap]:
    """Job: every case on the ranks of this world, and its distance to the oracle on this rank."""
    gaps: list[Gap] = []
    oracle: dict[Any, Tensors] = {}
    for plan, group in itertools.groupby(cases, key=lambda case: case.plan):
        with groups_of(plan) as groups:
            for case in group:
                key = (case.mask, case.heads, case.dtype)
                if key not in oracle:
                    oracle[key] = draw(case)
                gaps.append(compare(case, layout_of_case(case, groups), oracle[key]))
    return gaps


def compare(case: Case, layout: CPLayout, want: Tensors) -> Gap:
    """Run one case, forward and backward."""
    index = layout.index()
    leaves = [x[index].requires_grad_() for x in want.inputs]
    backend = SleepyAttention(dist.get_rank()) if case.is_sleepy else "aten"
    attention = ContextParallelAttention(layout, case.plan.kind, backend, case.kv_grad_dtype)
    out = attention(leaves[0], leaves[1], leaves[2], plans_of_case(case))
    lse_BnT = saved_lse(out)
    out.backward(want.weight[index])
    got = {"out": out.detach(), **{name: leaf.grad for name, leaf in zip(("dq", "dk", "dv"), leaves)}}
    truth = {"out": want.out, **dict(zip(("dq", "dk", "dv"), want.grads))}
    gaps = {"lse": lse_gap(layout, lse_BnT, want.lse)}
    for name, tensor in got.items():
        assert tensor is not None, (case.name, name)
        assert tensor.dtype == case.dtype
        gaps[name] = gap_of(tensor, truth[name][index])
    return Gap(case, gaps)


def gap_of(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference, infinite where something is not a number; 0 of nothing."""
    difference = (got.double() - want).abs()
    return difference.nan_to_num(torch.inf).max().item() if difference.numel() else 0.0


def saved_lse(out: Tensor) -> Tensor:
    """The log-sum-exp that the attention behind ``out`` keeps for its backward pass."""
    node = out.grad_fn
    while node is not None and len(node.saved_tensors) < 4:  # type: ignore[attr-defined]
        node = node.next_functions[0][0]
    assert node is not None
    lse: Tensor = node.saved_tensors[2]  # type: ignore[attr-defined]
    return lse


def lse_gap(layout: CPLayout, lse_BnT: Tensor, want_BNT: Tensor) -> float:
    """Distance of this rank's log-sum-exp, of its ring shard's tokens and its share of the heads, from the oracle's."""
    groups = layout.groups
    first = groups.ring_rank * groups.plan.ulysses
    index = torch.cat([layout.index(rank) for rank in range(first, first + groups.plan.ulysses)])
    share = want_BNT.chunk(groups.plan.ulysses, dim=1)[groups.ulysses_rank][..., index]
    assert torch.equal(lse_BnT.isinf(), share.isinf())  # dead queries: -inf in both
    return gap_of(lse_BnT.nan_to_num(neginf=0.0), share.nan_to_num(neginf=0.0))


class SleepyAttention(CpuFlash):
    """The CPU's kernel after a nap of up to 2 ms, another on every rank and at every block."""

    def __init__(self, rank: int) -> None:
        self.naps = random.Random(rank)

    def forward(self, *args: Any) -> Any:
        time.sleep(self.naps.random() * 2e-3)
        return super().forward(*args)

    def backward(self, *args: Any) -> Any:
        time.sleep(self.naps.random() * 2e-3)
        return super().backward(*args)
