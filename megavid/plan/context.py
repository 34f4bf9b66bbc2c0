"""Context parallelism on paper: which Ulysses and ring degrees are legal, which to take, and the bytes that they move.

Owns the choice that ``parallel.context_strategy`` names and the volumes that the collectives of
``megavid.parallel.context`` are counted against. Pure arithmetic: the layout, the planner and the attention itself
ask the same functions.

Context-parallel ranks form a grid, Ulysses fastest: ``cp_rank = ring_rank * ulysses + ulysses_rank``. A Ulysses group
exchanges tokens for heads by an all-to-all; a ring group passes (``ring``) or gathers (``allgather``) keys and values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Literal

from megavid.config.schema import require

Kind = Literal["ring", "allgather"]
Strategy = Literal["auto", "ulysses", "ring", "allgather", "hybrid"]

# An all-to-all may leave the fast domain where it costs at most this part of the attention.
EXPOSED_FOR_WIDE_ULYSSES = 0.08


@dataclass(frozen=True, slots=True)
class ContextPlan:
    """How attention crosses ``ulysses * ring`` context-parallel ranks; ``ring == 1`` is pure Ulysses."""

    ulysses: int = 1
    ring: int = 1
    kind: Kind = "ring"

    @property
    def cp(self) -> int:
        """Context-parallel ranks."""
        return self.ulysses * self.ring

    def describe(self) -> str:
        """One short word: ``ulysses4``, ``ring8``, ``ulysses4 x allgather2``."""
        parts = [f"ulysses{self.ulysses}"] if self.ulysses > 1 else []
        parts += [f"{self.kind}{self.ring}"] if self.ring > 1 else []
        return " x ".join(parts) or "none"


def ulysses_degrees(*, cp: int, heads_per_tp: int, kv_heads_per_tp: int | None = None) -> tuple[int, ...]:
    """Every legal Ulysses degree, ascending: divisors of the ranks, of the query heads and of the key heads."""
    common = gcd(cp, heads_per_tp, kv_heads_per_tp or heads_per_tp)
    return tuple(degree for degree in range(1, common + 1) if common % degree == 0)


def context_plan(
    strategy: Strategy,
    *,
    heads_per_tp: int,
    cp: int,
    tokens: int,
    attention_rate: float | None = None,
    inner_rate: float | None = None,
    outer_rate: float | None = None,
    domain: int = 8,
    kv_heads_per_tp: int | None = None,
    bytes_per_number: int = 2,
) -> ContextPlan:
    """The degrees that a strategy means on ``cp`` ranks.

    Args:
        strategy: ``parallel.context_strategy``.
        heads_per_tp: query heads of one tensor-parallel rank.
        cp: context-parallel ranks.
        tokens: of the longest attention, over all ranks (the longest clip; a pack's tokens bound it).
        attention_rate: FLOP/s that one rank's attention kernel reaches; None if unknown.
        inner_rate: bytes/s, one way, between ranks of one fast domain; None if unknown.
        outer_rate: bytes/s, one way, between domains; None if unknown.
        domain: context-parallel ranks that one fast domain holds (its GPUs / tensor-parallel ranks).
        kv_heads_per_tp: key and value heads of one tensor-parallel rank; None for as many as query heads.
        bytes_per_number: of activations.

    Raises:
        ConfigError: the heads cannot be cut as the strategy asks.
    """
    degrees = ulysses_degrees(cp=cp, heads_per_tp=heads_per_tp, kv_heads_per_tp=kv_heads_per_tp)
    heads = f"heads per tensor-parallel rank = {min(heads_per_tp, kv_heads_per_tp or heads_per_tp)}"
    if strategy == "ulysses":
        require(
            cp in degrees,
            f"parallel.context_strategy = 'ulysses' needs parallel.context = {cp} to divide {heads}; "
            "set parallel.context_strategy = 'hybrid', 'ring' or 'allgather', or change parallel.context",
        )
        return ContextPlan(ulysses=cp)
    if strategy in ("ring", "allgather"):
        return ContextPlan(ring=cp, kind="ring" if strategy == "ring" else "allgather")
    rates = _Rates(attention_rate, inner_rate, outer_rate, max(domain, 1), bytes_per_number)
    shape = _Shape(tokens, cp, (kv_heads_per_tp or heads_per_tp) / heads_per_tp)
    if strategy == "auto":
        return _best(degrees, shape, rates)
    inner = tuple(degree for degree in degrees if 1 < degree < cp)
    require(
        bool(inner),
        f"parallel.context_strategy = 'hybrid' needs a divisor of parallel.context = {cp} between 1 and {cp} that "
        f"divides {heads}; set parallel.context_strategy = 'ulysses', 'ring' or 'allgather'",
    )
    plan = _best(inner, shape, rates)
    return ContextPlan(plan.ulysses, plan.ring, "ring")


@dataclass(frozen=True, slots=True)
class _Rates:
    attention: float | None
    inner: float | None
    outer: float | None
    domain: int
    bytes_per_number: int


@dataclass(frozen=True, slots=True)
class _Shape:
    tokens: int
    cp: int
    kv_share: float  # key heads / query heads


def _best(degrees: Sequence[int], shape: _Shape, rates: _Rates) -> ContextPlan:
    """The most heads that the fast domain, or the length of the video, allows: few hops, large kernels."""
    widest = max(degrees)
    if rates.attention is None or rates.outer is None:
        is_wide = False  # only rates can tell that crossing domains is cheap
    else:
        part = exposed_fraction(
            widest, tokens=shape.tokens, attention_rate=rates.attention, rate=rates.outer, kv_share=shape.kv_share,
            bytes_per_number=rates.bytes_per_number,
        )  # fmt: skip
        is_wide = part <= EXPOSED_FOR_WIDE_ULYSSES
    near = [degree for degree in degrees if degree <= rates.domain]
    ulysses = widest if is_wide or not near else max(near)
    ring = shape.cp // ulysses
    rate = rates.inner if shape.cp <= rates.domain else rates.outer
    if ring == 1 or rates.attention is None or rate is None:
        return ContextPlan(ulysses, ring)
    hides = tokens_that_hide_a_hop(
        rates.attention, rate, kv_share=shape.kv_share, bytes_per_number=rates.bytes_per_number
    )
    return ContextPlan(ulysses, ring, "ring" if shape.tokens / ring >= hides else "allgather")


def exposed_fraction(
    ulysses: int,
    *,
    tokens: int,
    attention_rate: float,
    rate: float,
    kv_share: float = 1.0,
    bytes_per_number: int = 2,
) -> float:
    """Seconds of the forward pass's all-to-alls over those of its attention; nothing hides them.

    b F / (S B) (U - 1) / U where keys are as wide as queries, whatever the number of ranks.
    """
    return (1 + kv_share) / 2 * bytes_per_number * attention_rate / (tokens * rate) * (ulysses - 1) / ulysses


def tokens_that_hide_a_hop(
    attention_rate: float, rate: float, *, kv_share: float = 1.0, bytes_per_number: int = 2
) -> float:
    """Tokens of one ring shard (all its Ulysses ranks) from which a hop is hidden behind its block's attention.

    4 (U s)^2 (h / U) / F >= 2 s h_kv b / B; the width cancels: U s >= F b (h_kv / h) / (2 B).
    """
    return attention_rate * bytes_per_number * kv_share / (2 * rate)


@dataclass(frozen=True, slots=True)
class ExchangeBytes:
    """Bytes that one rank sends in one layer's self-attention, and the calls that it makes.

    Attributes:
        forward_a2a: all-to-alls of q, k, v in and the output back.
        forward_ring: keys and values, by hops or by the all-gather.
        backward_a2a: the output's gradient in, and those of q, k, v back.
        backward_ring: keys and values again, and their gradients: by hops and one more home, or by the reduce-scatter.
        forward_calls: collectives, one hop counted as one.
        backward_calls: likewise.
        recompute_a2a: all-to-alls that selective recomputation repeats (as forward_a2a); the ring is never repeated.
    """

    forward_a2a: int
    forward_ring: int
    backward_a2a: int
    backward_ring: int
    forward_calls: int
    backward_calls: int
    recompute_a2a: int = 0

    @property
    def total(self) -> int:
        """Bytes of the forward and the backward pass, without recomputation."""
        return self.forward_a2a + self.forward_ring + self.backward_a2a + self.backward_ring


def exchange_bytes(
    plan: ContextPlan,
    *,
    tokens: int,
    hidden_per_tp: int,
    batch: int,
    bytes_per_number: int,
    kv_grad_bytes: int,
    kv_hidden_per_tp: int | None = None,
    lengths: Sequence[int] | None = None,
    rank: int = 0,
) -> ExchangeBytes:
    """Bytes that rank ``rank`` of ``plan.cp`` sends in one layer.

    With s = tokens / cp, U and R the degrees, h and h_kv the widths and b, b_acc the bytes of numbers and of travelling
    gradients: all-to-alls (2 h + 2 h_kv) s b (U - 1) / U each way; the ring 2 s h_kv b (R - 1) forward, the same again
    backward and 2 s h_kv b_acc R (all-gather: R - 1) for the gradients.

    Args:
        plan: the degrees.
        tokens: of one pack, over all ranks.
        hidden_per_tp: width of q on one tensor-parallel rank.
        batch: packs.
        bytes_per_number: of activations.
        kv_grad_bytes: of the gradients of keys and values while they travel.
        kv_hidden_per_tp: width of k; None for that of q.
        lengths: tokens of each context-parallel rank where they differ; the all-gather pads its ring shards to the
            longest.
        rank: whose bytes, where they differ.
    """
    ulysses, ring = plan.ulysses, plan.ring
    each = tuple(lengths) if lengths is not None else (tokens // plan.cp,) * plan.cp
    shards = [sum(each[start : start + ulysses]) for start in range(0, plan.cp, ulysses)]
    wide = hidden_per_tp // ulysses * batch * bytes_per_number
    narrow = (kv_hidden_per_tp or hidden_per_tp) // ulysses * batch
    to_heads = each[rank] * (ulysses - 1)  # rows of this rank, to each of the others its heads
    to_tokens = shards[rank // ulysses] - each[rank]  # rows of the others, this rank's heads of them
    qkv = wide + 2 * narrow * bytes_per_number
    forward_rows, gradient_rows = _rows_sent(shards, rank // ulysses, plan.kind)
    forward_ring = forward_rows * 2 * narrow * bytes_per_number
    hops = ring - 1 if plan.kind == "ring" else min(ring - 1, 1)
    gradient_hops = 0 if ring == 1 else ring if plan.kind == "ring" else 1
    alltoalls = 2 if ulysses > 1 else 0
    return ExchangeBytes(
        forward_a2a=to_heads * qkv + to_tokens * wide,
        forward_ring=forward_ring,
        backward_a2a=to_heads * wide + to_tokens * qkv,
        backward_ring=forward_ring + gradient_rows * 2 * narrow * kv_grad_bytes,
        forward_calls=alltoalls + hops,
        backward_calls=alltoalls + hops + gradient_hops,
        recompute_a2a=to_heads * qkv + to_tokens * wide,
    )


def _rows_sent(shards: Sequence[int], ring_rank: int, kind: Kind) -> tuple[int, int]:
    """Token rows of keys (and as many of values) that a rank sends: forward, and of gradients."""
    ring = len(shards)
    if ring == 1:
        return 0, 0
    if kind == "allgather":
        return max(shards) * (ring - 1), max(shards) * (ring - 1)
    # A rank passes on its own shard and those of the ranks before it, all but the one that it gets last.
    return sum(shards[(ring_rank - hop) % ring] for hop in range(ring - 1)), sum(shards)
