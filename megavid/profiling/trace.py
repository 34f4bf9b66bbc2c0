"""Reading the trace that torch.profiler wrote: what ran, when, on which thread, with which of autograd's numbers.

Owns the format (the profiler's Chrome trace, plain or gzip). Whose time it was is ``megavid.profiling.attribution``'s.
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megavid.errors import StorageError

KERNELS = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
"""Categories of what runs on a GPU."""


class Slice(NamedTuple):
    """Something that ran from ``start_ns`` to ``stop_ns`` on one thread, or on one stream of a GPU.

    Attributes:
        start_ns: since an origin that all slices of a trace share.
        stop_ns: likewise.
        name: of the operator, region or kernel.
        thread: of the process; a stream's number for a kernel.
        sequence: autograd's number: of the node that the operator makes, or of the node that runs; -1 for neither.
        external: number that a kernel shares with the operator that launched it; -1 for none.
    """

    start_ns: int
    stop_ns: int
    name: str
    thread: int
    sequence: int = -1
    external: int = -1


class Allocation(NamedTuple):
    """Bytes in tensors after one was made or freed."""

    at_ns: int
    total_bytes: int
    device: int


@dataclass(frozen=True)
class Trace:
    """One rank's trace.

    Attributes:
        slices: what ran on the host: operators, autograd nodes, regions.
        kernels: what ran on the GPU.
        allocations: in order of time; the host's (device -1) count from the beginning of the trace.
    """

    slices: Sequence[Slice]
    kernels: Sequence[Slice]
    allocations: Sequence[Allocation]


def read_trace(file: Path) -> Trace:
    """Read the trace of one rank.

    Raises:
        StorageError: there is no such file, or it is cut off.
    """
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        events = json.loads(raw)["traceEvents"]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise StorageError(f"cannot read the trace {file}: {error}") from error
    return trace_of(events)


def trace_of(events: Sequence[dict[str, Any]]) -> Trace:
    """The trace in the ``traceEvents`` of a Chrome trace."""
    slices, kernels, allocations = [], [], []
    for event in events:
        category = event.get("cat")
        if event.get("ph") == "X":
            if category in ("cpu_op", "user_annotation"):
                slices.append(_slice(event))
            elif category in KERNELS:
                kernels.append(_slice(event))
        elif event.get("name") == "[memory]":
            args = event["args"]
            allocations.append(Allocation(_ns(event["ts"]), int(args["Total Allocated"]), int(args["Device Id"])))
    allocations.sort()
    return Trace(slices, kernels, allocations)


def _slice(event: dict[str, Any]) -> Slice:
    args, start = event.get("args", {}), _ns(event["ts"])
    return Slice(
        start_ns=start,
        stop_ns=start + _ns(event.get("dur", 0.0)),
        name=event["name"],
        thread=int(event["tid"]),
        sequence=int(args.get("Sequence number", -1)),
        external=int(args.get("External id", -1)),
    )


def _ns(microseconds: float) -> int:
    return round(microseconds * 1000)
