"""What ranks measure and tell rank 0, and what all of them were asked to measure.

Owns the records only; they travel between ranks as they are.
"""

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from megavid.ops.regions import PREFIX
from megavid.profiling.attribution import SCHEDULE, STEP_PARTS, Split
from megavid.profiling.trace import Slice, Trace

GIB = 1 << 30
TIMELINE_POINTS = 400
"""Points of a memory timeline in a report: the highest of each stretch is kept."""

TRACE_WARMUP = 1
"""Steps that the profiler throws away: the first one under it takes several times as long."""

RoutingKind = Literal["real", "forced"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        steps: measured steps, from which times and rates come.
        warmup: steps before them that count for nothing.
        traced: steps after them under torch.profiler, from which the split comes.
        routings: one run each, in this order.
        traces: ranks whose traces are kept.
        has_snapshot: keep CUDA's memory snapshot of the traced steps.
    """

    steps: int
    warmup: int = 3
    traced: int = 2
    routings: tuple[RoutingKind, ...] = ("real",)
    traces: Literal["none", "one", "all"] = "one"
    has_snapshot: bool = False

    @property
    def all_steps(self) -> int:
        """Steps that are taken in all."""
        return len(self.routings) * (self.warmup + self.steps + TRACE_WARMUP + self.traced)


class Phase(NamedTuple):
    """A stretch of a traced step, in milliseconds since it began."""

    name: str
    start_ms: float
    stop_ms: float


@dataclass(frozen=True, kw_only=True)
class MemoryTimeline:
    """Bytes in tensors over the first traced step of a rank.

    Attributes:
        at_ms: since the step began.
        total_bytes: at these moments; on a CPU of tensors that were made since the trace began.
        phases: what the step did meanwhile.
        is_absolute: whether tensors from before the trace are counted in.
    """

    at_ms: Sequence[float]
    total_bytes: Sequence[int]
    phases: Sequence[Phase]
    is_absolute: bool


@dataclass(kw_only=True)
class RankRecord:
    """One rank's part of one run.

    Attributes:
        rank: which one.
        host: its machine.
        coordinates: its place on every axis.
        step_s: seconds of each measured step.
        data_wait_s: of them in waiting for data.
        clip_tokens: tokens of each clip of each measured step, of this data-parallel rank.
        wait_s: seconds in collectives over all measured steps, by axis; None where they were not measured (CUDA).
        memory_peak_bytes: resident memory (CPU) or memory that torch reserved (CUDA), at its highest so far.
        held_bytes: bytes of weights, gradients and optimizer state on this rank.
        splits: the traced steps.
        memory: of the first traced step.
    """

    rank: int
    host: str
    coordinates: dict[str, int]
    step_s: list[float]
    data_wait_s: list[float]
    clip_tokens: list[list[int]]
    wait_s: dict[str, float] | None
    memory_peak_bytes: int = 0
    held_bytes: dict[str, int] = field(default_factory=dict)
    splits: list[Split] = field(default_factory=list)
    memory: MemoryTimeline | None = None

    @property
    def is_first_of_replica(self) -> bool:
        """Whether this rank speaks for its data-parallel replica."""
        return all(self.coordinates[axis] == 0 for axis in ("tp", "cp", "pp"))

    @property
    def traced_s(self) -> float:
        """Seconds of a traced step."""
        return sum(split.seconds for split in self.splits) / len(self.splits)

    @property
    def busy_s(self) -> float:
        """Seconds of a traced step in which this rank did not wait for other ranks.

        Ranks wait for each other in every step, so that steps take the same time on all of them; who is slow shows in
        who waits least.
        """
        return self.traced_s - sum(split.of(phase="communication") for split in self.splits) / len(self.splits)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: reserved by torch on a GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_timeline(trace: Trace, device: torch.device) -> MemoryTimeline | None:
    """The timeline of the first traced step; None where the trace has none."""
    step = min((piece for piece in trace.slices if piece.name == f"{PREFIX}step"), default=None)
    if step is None:
        return None
    is_cuda = device.type == "cuda"
    wanted = (device.index or 0) if is_cuda else -1
    inside = [a for a in trace.allocations if a.device == wanted and step.start_ns <= a.at_ns <= step.stop_ns]
    kept = []
    size = max(1, -(-len(inside) // TIMELINE_POINTS))
    for first in range(0, len(inside), size):
        kept.append(max(inside[first : first + size], key=lambda allocation: allocation.total_bytes))
    return MemoryTimeline(
        at_ms=[(allocation.at_ns - step.start_ns) / 1e6 for allocation in kept],
        total_bytes=[allocation.total_bytes for allocation in kept],
        phases=_phases(trace.slices, step),
        is_absolute=is_cuda,
    )


def _phases(slices: Sequence[Slice], step: Slice) -> list[Phase]:
    """Regions of the step itself that take long enough to be seen."""
    names = {f"{PREFIX}{part}" for part in (*STEP_PARTS, SCHEDULE, "noise")}
    found = []
    for piece in sorted(slices):
        is_inside = piece.thread == step.thread and step.start_ns <= piece.start_ns <= step.stop_ns
        if is_inside and piece.name in names and piece.stop_ns - piece.start_ns > (step.stop_ns - step.start_ns) / 200:
            start, stop = ((at - step.start_ns) / 1e6 for at in (piece.start_ns, piece.stop_ns))
            found.append(Phase(piece.name.removeprefix(PREFIX), start, stop))
    return found
