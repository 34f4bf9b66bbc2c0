"""What a machine at hand reaches, measured by itself: kernels, links, and the numbers that a few timed steps are fitted
with.

Owns the timing of single kernels and collectives, and the arithmetic from seconds to the ``Hardware`` and the
``Calibration`` that the planner reads. The training steps are timed by ``megavid.training.probe_run``.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megavid.config.schema import RunConfig
from megavid.plan.calibration import PROBE_RANGES, Calibration
from megavid.plan.fitting import fit_numbers
from megavid.plan.hardware import Hardware
from megavid.plan.layout import Layout
from megavid.plan.time import step_time
from megavid.plan.workload import Workload

Clock = Callable[[], float]
"""Seconds since any moment."""

PRODUCTS = ((1024, 1024, 1024), (2048, 512, 2048), (512, 2048, 512), (384, 384, 1536))
"""Rows, inner width and columns of the matrix products of which the fastest is the peak."""
COPY_BYTES = 128 << 20
"""Larger than the caches."""
LONG_KEYS, SHORT_KEYS = 4096, 256
HEADS, HEAD_SIZE = 2, 64
"""Of the attention that is timed."""
CHAIN = 200
"""Operators on one number each, forward and backward, that tell what issuing one costs."""
LARGE_BYTES = 1 << 20
"""Of the tensor in a collective that tells a link's rate: what small models send. Far larger ones go faster on gloo."""
BETWEEN_ROWS = 320
"""Rows of the square matrices that are multiplied between two collectives, about a millisecond: ranks that come from
work of their own wait for each other and wake up, which a loop of nothing but collectives hides."""
SLOWEST_LEFT_OUT = 0.1
"""Share of a collective's calls, the slowest, that are taken for interruptions."""
LEAST_REPEATS = 3
EXPECTED = ("matrix_efficiency", "attention_efficiency", "glue_factor", "nvlink_efficiency")
"""Numbers that the fit draws to where they start, what kernels and links reach alone."""
EXPECTED_WEIGHT = 0.1
"""How hard, against 1 for a timed step: enough that no single interrupted step moves a number that it alone tells."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """What one rank's kernels reach alone.

    Attributes:
        product_rate: FLOP/s of the fastest matrix product.
        copy_rate: bytes/s of a copy, read and written ones counted.
        long_attention: FLOP/s of attention's forward pass on ``LONG_KEYS`` keys.
        short_attention: likewise on ``SHORT_KEYS``.
        backward_ratio: FLOP/s of attention's backward pass (2.5 times the products) over the forward's, long keys.
        operator_s: seconds to issue an operator.
    """

    product_rate: float
    copy_rate: float
    long_attention: float
    short_attention: float
    backward_ratio: float
    operator_s: float


@dataclass(frozen=True, slots=True)
class Links:
    """What two ranks of this machine reach between them.

    Attributes:
        rate: bytes/s that one rank sends in large collectives: all of them that a step has, taken together.
        alltoall_ratio: rate of the all-to-all over that, 1 at most.
        latency_s: seconds of one tiny all-reduce between computations.
    """

    rate: float
    alltoall_ratio: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class TimedStep:
    """A training step that was timed.

    Attributes:
        config: of its run.
        layout: of its ranks.
        workload: what its packs hold.
        seconds: median of its steps.
    """

    config: RunConfig
    layout: Layout
    workload: Workload
    seconds: float


# Kernels and links, timed


def median_seconds(run: Callable[[], object], seconds: float, clock: Clock = time.perf_counter) -> float:
    """Median time of one ``run``, repeated for about ``seconds`` and ``LEAST_REPEATS`` times at least; one warms up."""
    run()
    found: list[float] = []
    deadline = clock() + seconds
    while len(found) < LEAST_REPEATS or clock() < deadline:
        began = clock()
        run()
        found.append(clock() - began)
    return statistics.median(found)


def time_kernels(seconds: float = 0.5, clock: Clock = time.perf_counter) -> Kernels:
    """Time the kernels in fp32 on this rank's threads, about ``seconds`` each."""
    share = seconds / len(PRODUCTS)
    rates = [
        2.0 * rows * inner * columns / median_seconds(_product(rows, inner, columns), share, clock)
        for rows, inner, columns in PRODUCTS
    ]
    source, target = torch.ones(COPY_BYTES // 4), torch.empty(COPY_BYTES // 4)
    copy_s = median_seconds(lambda: target.copy_(source), seconds, clock)
    long_forward, long_backward = _time_attention(LONG_KEYS, seconds, clock)
    short_forward, _ = _time_attention(SHORT_KEYS, seconds / 2, clock)
    return Kernels(
        product_rate=max(rates),
        copy_rate=2.0 * COPY_BYTES / copy_s,
        long_attention=_attention_flops(LONG_KEYS) / long_forward,
        short_attention=_attention_flops(SHORT_KEYS) / short_forward,
        backward_ratio=2.5 * long_forward / long_backward,
        operator_s=median_seconds(_chain, seconds / 2, clock) / (2 * CHAIN),
    )


def _product(rows: int, inner: int, columns: int) -> Callable[[], object]:
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    return lambda: left @ right


def _time_attention(keys: int, seconds: float, clock: Clock) -> tuple[float, float]:
    q, k, v = (torch.randn(1, HEADS, keys, HEAD_SIZE, requires_grad=True) for _ in range(3))

    def forward() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    forward_s = median_seconds(forward, seconds, clock)
    out = forward()
    gradient = torch.ones_like(out)
    backward_s = median_seconds(
        lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True), seconds, clock
    )
    return forward_s, backward_s


def _attention_flops(keys: int) -> float:
    return 4.0 * keys * keys * HEADS * HEAD_SIZE


def _chain() -> None:
    start = torch.zeros(1, requires_grad=True)
    value = start
    for _ in range(CHAIN):
        value = value * 1.0
    value.backward()  # type: ignore[no-untyped-call]


def time_links(seconds: float = 0.25, clock: Clock = time.perf_counter) -> Links:
    """Time collectives between the ranks of the running world, about ``seconds`` each.

    Ranks: collective over the world; rank 0's numbers count.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    numel = LARGE_BYTES // 4
    whole, other, part = torch.ones(numel), torch.empty(numel), torch.empty(numel // ranks)
    tiny = torch.ones(2)

    def passed_on() -> None:
        """To the next rank and from the one before."""
        works = [dist.isend(whole, (rank + 1) % ranks), dist.irecv(other, (rank - 1) % ranks)]
        for work in works:
            if work is not None:
                work.wait()

    away = LARGE_BYTES * (ranks - 1) / ranks  # what a ring sends of a tensor
    operations: dict[str, tuple[Callable[[], object], float]] = {
        "all_reduce": (lambda: dist.all_reduce(whole), 2 * away),
        "all_gather": (lambda: dist.all_gather_into_tensor(whole, part), away),
        "reduce_scatter": (lambda: dist.reduce_scatter_tensor(part, whole), away),
        "all_to_all": (lambda: dist.all_to_all_single(other, whole), away),
        "send": (passed_on, LARGE_BYTES),
    }
    latency_s = _together(lambda: dist.all_reduce(tiny), seconds, clock)
    found = {name: (_together(run, seconds, clock), sent) for name, (run, sent) in operations.items()}
    return links_of(latency_s, found)


def links_of(latency_s: float, found: dict[str, tuple[float, float]]) -> Links:
    """Rates of a link from the latency and (seconds, bytes) of one large call of each operation."""
    moving = {name: max(seconds - latency_s, 0.01 * seconds) for name, (seconds, _) in found.items()}
    rate = sum(sent for _, sent in found.values()) / sum(moving.values())
    # One that takes no longer than a tiny all-reduce tells no rate: on gloo an all-to-all waits less.
    return Links(rate, min(1.0, found["all_to_all"][1] / moving["all_to_all"] / rate), latency_s)


def _together(run: Callable[[], object], seconds: float, clock: Clock) -> float:
    """Mean time that a collective adds to computations around it, interruptions left out.

    Not the time inside the call: the computation after one is slower too, its caches cold and its core just woken.

    Ranks: collective over the world; they agree how often, or one would wait for ever.
    """
    work = _product(BETWEEN_ROWS, BETWEEN_ROWS, BETWEEN_ROWS)

    def both() -> None:
        work()
        run()

    once = torch.tensor(median_seconds(both, 0.0, clock))
    dist.all_reduce(once, op=dist.ReduceOp.MAX)
    count = max(LEAST_REPEATS, min(1000, int(seconds / max(float(once), 1e-7))))
    alone, joined = _seconds_of_each(work, count, clock), _seconds_of_each(both, count, clock)
    return added_seconds(alone, joined)


def _seconds_of_each(run: Callable[[], object], count: int, clock: Clock) -> list[float]:
    found = []
    for _ in range(count):
        began = clock()
        run()
        found.append(clock() - began)
    return found


def added_seconds(alone: Sequence[float], joined: Sequence[float]) -> float:
    """What the second of two computations takes longer; never nothing, since it divides bytes."""
    longer = mean_without_slowest(joined)
    return max(longer - mean_without_slowest(alone), 0.01 * longer)


def mean_without_slowest(found: Sequence[float]) -> float:
    """Mean of what is left when the slowest tenth is taken away: half of the time a rank waits, so no median."""
    kept = sorted(found)[: max(1, math.ceil(len(found) * (1.0 - SLOWEST_LEFT_OUT)))]
    return statistics.fmean(kept)


# From seconds to what the planner reads


def hardware_of(kernels: Kernels, links: Links, name: str) -> Hardware:
    """The machine as the planner knows it: what its kernels and links reach alone are its peaks."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(
        name=name,
        peak={"fp32": kernels.product_rate},
        memory_bytes=memory // cores,
        memory_rate=kernels.copy_rate,
        nvlink_rate=links.rate,
        nvlink_domain=max(cores, 64),
        network_rate=links.rate,
        source={
            "peak": "fastest fp32 matrix product of the probe, one thread",
            "memory_bytes": f"the machine's, over its {cores} cores",
            "memory_rate": f"copy of {COPY_BYTES >> 20} MiB, bytes read and written",
            "nvlink_rate": f"collectives and sends of {LARGE_BYTES >> 20} MiB between two local ranks",
            "nvlink_domain": "every rank of the machine",
            "network_rate": "as nvlink_rate: there is one machine",
        },
    )


def half_keys(long_rate: float, short_rate: float) -> float:
    """Keys at which rate(keys) = best x keys / (keys + half) is half of its best, from the rates at two lengths."""
    ratio = min(max(long_rate / short_rate, 1.0), 0.9 * LONG_KEYS / SHORT_KEYS)
    return LONG_KEYS * (ratio - 1.0) / (LONG_KEYS / SHORT_KEYS - ratio)


def start_of(kernels: Kernels, links: Links, name: str) -> Calibration:
    """The calibration before steps are fitted: kernels alone, everything else at the peak."""
    half = half_keys(kernels.long_attention, kernels.short_attention)
    best_attention = kernels.long_attention * (LONG_KEYS + half) / LONG_KEYS
    measured, given = "measured by the probe", "1.0: the machine's rate is itself measured"
    return Calibration(
        name=name,
        matrix_efficiency=1.0,
        attention_efficiency=best_attention / kernels.product_rate,
        attention_backward_ratio=kernels.backward_ratio,
        attention_half_keys=half,
        ring_efficiency=1.0,
        memory_efficiency=1.0,
        glue_factor=1.0,
        estimated_glue_factor=1.0,
        nvlink_efficiency=1.0,
        network_efficiency=1.0,
        alltoall_efficiency=links.alltoall_ratio,
        nvlink_latency_s=links.latency_s,
        network_latency_s=links.latency_s,
        operator_s=kernels.operator_s,
        stall_s=0.0,
        step_s=0.0,
        expert_overlap=0.0,
        routing_imbalance=1.0,
        is_asynchronous=False,
        source={
            "attention_backward_ratio": measured, "attention_half_keys": measured, "alltoall_efficiency": measured,
            "nvlink_latency_s": measured, "network_latency_s": measured, "memory_efficiency": given,
            "network_efficiency": given, "ring_efficiency": "1.0: timed in no probe",
            "estimated_glue_factor": "1.0: bytes are counted, not estimated", "stall_s": "0: operators run in order",
            "expert_overlap": "0: nothing runs beside computation", "routing_imbalance": "1.0: in no probe",
        },
    )  # fmt: skip


def predicted_seconds(steps: Sequence[TimedStep], machine: Hardware, calibration: Calibration) -> list[float]:
    """What the planner says that each of ``steps`` takes."""
    return [step_time(step.config, step.layout, step.workload, machine, calibration).total for step in steps]


def fit_to_steps(
    machine: Hardware, start: Calibration, steps: Sequence[TimedStep], expected_weight: float = EXPECTED_WEIGHT
) -> Calibration:
    """The calibration whose numbers of ``PROBE_RANGES`` fit the timed steps best; the others are those of ``start``.

    Args:
        machine: that the steps ran on.
        start: where to start, and what ``EXPECTED`` numbers are drawn to.
        steps: that were timed.
        expected_weight: how hard; 0 to fit to the steps alone.
    """
    expected = start.numbers()

    def seconds_of(tried: Calibration) -> list[float]:
        return [*predicted_seconds(steps, machine, tried), *(tried.numbers()[name] for name in EXPECTED)]

    measured = [*(step.seconds for step in steps), *(expected[name] for name in EXPECTED)]
    weights = [1.0] * len(steps) + [expected_weight] * len(EXPECTED)
    found = fit_numbers(seconds_of, measured, start, PROBE_RANGES, weights=weights)
    fitted = f"fitted to {len(steps)} timed steps of small models"
    source = {**found.source, **dict.fromkeys(PROBE_RANGES, fitted)}
    return Calibration(**{**vars(found), "source": source})


def worst_misfit(machine: Hardware, calibration: Calibration, steps: Sequence[TimedStep]) -> float:
    """Largest |log(predicted / timed)| of the steps that were fitted."""
    predicted = predicted_seconds(steps, machine, calibration)
    return max(abs(math.log(ours / step.seconds)) for ours, step in zip(predicted, steps, strict=True))
