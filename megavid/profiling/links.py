"""What collectives cost between the ranks of a machine at hand, timed between computations as a training step has them.

Owns the timing of collectives and of the slowdown that ranks cause each other by computing at once. Kernels of one
rank are ``probe``'s.

A collective alone in a loop is not what a step pays. Ranks that wait are asleep, the longer the computation before it
the deeper (on virtual machines a core that idles is given away); those that come late are waited for; and what is
computed after one finds cold caches. So each kind is put between the segments of a small training computation of
several milliseconds, and its cost is what it adds to them. Each is timed twice: waited for at once, and beside the next
product, as the engine overlaps it. All kinds take turns, round by round, so that a slow second of the machine falls on
no one of them; the median over rounds counts.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megavid.plan.calibration import BESIDE, CallCost

Clock = Callable[[], float]
"""Seconds since any moment."""

SMALL_BYTES, LARGE_BYTES = 2 << 10, 2 << 20
"""Of the whole tensor of a collective: one that is all latency, and one as large as small models send."""
WAITED = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
OVERLAPPED = ("all_reduce", "all_gather", "reduce_scatter", "send")
"""Kinds that the engine runs beside computation."""
SEGMENTS = 5
"""Computations, and so calls of one collective, that are timed at once."""
LEAST_ROUNDS = 1
PLAIN_EVERY = 4
"""Chains with a collective, after which one without is timed again: every cost is a difference to it."""
ROWS, WIDTH, HIDDEN = 96, 256, 768
"""Of the two products of a segment: about 4 ms forward and backward on one core."""


@dataclass(frozen=True)
class Links:
    """What the ranks of this machine reach between them.

    Attributes:
        calls: cost of one call by its name (``name_of``), for two ranks.
        crowding: seconds of a computation that all ranks run at once over those of one rank that runs it alone.
    """

    calls: Mapping[str, CallCost]
    crowding: float = 1.0

    @property
    def rate(self) -> float:
        """Bytes/s that one rank sends in large collectives: all kinds taken together."""
        return len(WAITED) / sum(1.0 / self.calls[name].rate for name in WAITED)

    @property
    def alltoall_ratio(self) -> float:
        """Rate of the all-to-all over that, 1 at most."""
        return min(1.0, self.calls["all_to_all"].rate / self.rate)

    @property
    def latency_s(self) -> float:
        """Seconds of a tiny all-reduce of two ranks."""
        return self.calls["all_reduce"].latency_s


Start = Callable[[], Callable[[], object]]
"""Starts a collective; what it returns waits for it."""


class Segment:
    """Forward and backward pass of a norm and two products: the computation between collectives."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens_TD, self.up_DF, self.down_FD = (
            torch.randn(shape, generator=generator, requires_grad=True)
            for shape in ((ROWS, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
        )
        self.gradient_TD = torch.ones(ROWS, WIDTH)

    def __call__(self, start: Start | None = None, *, is_beside: bool = False) -> None:
        """Compute, and have a collective at the beginning: waited for at once, or ``is_beside`` the first product."""
        wait = start() if start is not None else None
        if wait is not None and not is_beside:
            wait()
        hidden_TF = torch.nn.functional.gelu(torch.nn.functional.layer_norm(self.tokens_TD, (WIDTH,)) @ self.up_DF)
        if wait is not None and is_beside:
            wait()
        out_TD = hidden_TF @ self.down_FD
        torch.autograd.grad(out_TD, (self.tokens_TD, self.up_DF, self.down_FD), self.gradient_TD)


def time_links(seconds: float, clock: Clock = time.perf_counter) -> Links:
    """Time every kind of collective between the ranks of the running world, for about ``seconds`` in all.

    Ranks: collective over the world; all of them get the same numbers.
    """
    began, segment = clock(), Segment()
    names = [(kind, size, is_beside) for is_beside, kinds in ((False, WAITED), (True, OVERLAPPED))
             for kind in kinds for size in (SMALL_BYTES, LARGE_BYTES)]  # fmt: skip
    starts = [(_start_of(kind, size), is_beside) for kind, size, is_beside in names]
    for start, is_beside in starts:
        segment(start, is_beside=is_beside)
    rounds: list[list[float]] = []
    latest = torch.zeros(1, dtype=torch.float64)
    while len(rounds) < LEAST_ROUNDS or float(latest) < seconds:
        rounds.append(_one_round(segment, starts, clock))
        latest.fill_(clock() - began)
        dist.all_reduce(latest, op=dist.ReduceOp.MAX)  # the ranks agree how often: each sees its own clock
    found = torch.tensor(rounds, dtype=torch.float64)
    dist.all_reduce(found)
    found[:, 1:] /= dist.get_world_size()  # what one rank runs alone, the others count as nothing
    return links_of(found.tolist(), names, dist.get_world_size())


def _one_round(segment: Segment, starts: Sequence[tuple[Start, bool]], clock: Clock) -> list[float]:
    """Seconds of a chain of rank 0 alone, of one without a collective, and of one with each of ``starts``."""
    alone, plain, joined = [], [], []
    for place, (start, is_beside) in enumerate(starts):
        if place % PLAIN_EVERY == 0:
            alone.append(_time_alone(segment, clock))
            plain.append(_time_chain(segment, None, False, clock))
        joined.append(_time_chain(segment, start, is_beside, clock))
    return [statistics.fmean(alone), statistics.fmean(plain), *joined]


def _time_alone(segment: Segment, clock: Clock) -> float:
    """Seconds of a chain that rank 0 computes while the others sleep; 0 on those."""
    dist.barrier()
    seconds = 0.0
    if dist.get_rank() == 0:
        began = clock()
        for _ in range(SEGMENTS):
            segment()
        seconds = clock() - began
    dist.barrier()
    return seconds


def _time_chain(segment: Segment, start: Start | None, is_beside: bool, clock: Clock) -> float:
    """Seconds of a chain that all ranks compute, with a collective in each segment."""
    dist.barrier()
    began = clock()
    for _ in range(SEGMENTS):
        segment(start, is_beside=is_beside)
    return clock() - began


def _start_of(kind: str, size: int) -> Start:
    """How to start a collective of ``kind`` on whole tensors of ``size`` bytes."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    numel = max(size // 4 // ranks, 1) * ranks
    whole, part = torch.ones(numel), torch.ones(numel // ranks)
    if kind == "send":
        return partial(_start_passing, whole, (rank + 1) % ranks, (rank - 1) % ranks)
    # Results are new tensors, as the engine's are.
    calls: dict[str, Callable[[], dist.Work | None]] = {
        "all_reduce": lambda: dist.all_reduce(whole, async_op=True),
        "all_gather": lambda: dist.all_gather_into_tensor(torch.empty(numel), part, async_op=True),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(torch.empty(numel // ranks), whole, async_op=True),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty(numel), whole, async_op=True),
    }

    def start() -> Callable[[], object]:
        work = calls[kind]()
        return work.wait if work is not None else _no_wait

    return start


def _no_wait() -> None:
    """Of a call in which this rank takes no part."""


def _start_passing(whole: Tensor, following: int, before: int) -> Callable[[], object]:
    """To the next rank and from the one before."""
    works = [dist.isend(whole, following), dist.irecv(torch.empty_like(whole), before)]
    return lambda: [work.wait() for work in works if work is not None]


def name_of(kind: str, *, is_beside: bool) -> str:
    """Name of a call's cost in a calibration."""
    return kind + BESIDE if is_beside else kind


def sent_bytes(kind: str, size: int, ranks: int) -> float:
    """What a rank sends in a collective on a whole tensor of ``size`` bytes, as ``megavid.plan.traffic`` counts."""
    if kind == "send":
        return float(size)
    return size * (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1)


def links_of(rounds: Sequence[Sequence[float]], names: Sequence[tuple[str, int, bool]], ranks: int) -> Links:
    """Costs from the seconds of chains.

    Args:
        rounds: of each round: the chain of one rank alone, that of all ranks without a collective, and one for each
            of ``names``.
        names: kind, bytes of the whole tensor, and whether it ran beside a product.
        ranks: of the world.
    """
    crowding = statistics.median(together / alone for alone, together, *_ in rounds)
    plain_s = statistics.median(together for _, together, *_ in rounds)
    added = {
        name: (statistics.median(times[2 + place] for times in rounds) - plain_s) / SEGMENTS
        for place, name in enumerate(names)
    }
    calls = {}
    for kind, size, is_beside in names:
        if size == SMALL_BYTES:
            both = added[kind, SMALL_BYTES, is_beside], added[kind, LARGE_BYTES, is_beside]
            calls[name_of(kind, is_beside=is_beside)] = cost_of(kind, *both, ranks)
    return Links(calls, max(1.0, crowding))


def cost_of(kind: str, small_s: float, large_s: float, ranks: int) -> CallCost:
    """The cost that gives both seconds; what is hidden or drowns in noise costs little and never less than nothing."""
    small_s = max(small_s, 0.0)
    moving_s = max(large_s - small_s, 0.02 * large_s, 1e-6)
    sent = sent_bytes(kind, LARGE_BYTES, ranks) - sent_bytes(kind, SMALL_BYTES, ranks)
    return CallCost(latency_s=small_s / max(math.log2(ranks), 1.0), rate=sent / moving_s)
