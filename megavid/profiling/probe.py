"""What a machine at hand reaches, measured by itself: kernels, and the numbers that a few timed steps are fitted with.

Owns the timing of single kernels, and the arithmetic from seconds to the ``Hardware`` and the ``Calibration`` that the
planner reads. Collectives are timed by ``megavid.profiling.links``, training steps by ``megavid.training.probe_run``.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megavid.config.schema import RunConfig
from megavid.plan.calibration import PROBE_RANGES, Calibration
from megavid.plan.fitting import fit_numbers
from megavid.plan.hardware import Hardware
from megavid.plan.layout import Layout
from megavid.plan.time import step_time
from megavid.plan.workload import Workload
from megavid.profiling.links import LARGE_BYTES, Links

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
LEAST_REPEATS = 3
EXPECTED = ("matrix_efficiency", "attention_efficiency", "glue_factor")
"""Numbers that the fit draws to where they start, what kernels reach alone."""
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


# Kernels, timed


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
            "nvlink_rate": f"collectives and sends of {LARGE_BYTES >> 20} MiB between local ranks",
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
        fp8_matrix_ratio=1.0,
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
        crowding=links.crowding,
        is_asynchronous=False,
        calls=links.calls,
        source={
            "attention_backward_ratio": measured, "attention_half_keys": measured, "alltoall_efficiency": measured,
            "nvlink_latency_s": measured, "network_latency_s": measured, "memory_efficiency": given,
            "network_efficiency": given, "nvlink_efficiency": given, "crowding": measured, "calls": measured,
            "ring_efficiency": "1.0: timed in no probe", "fp8_matrix_ratio": "1.0: timed in no probe",
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
