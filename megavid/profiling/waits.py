"""Seconds that this process spends in torch.distributed, by axis: in the calls, and in waiting for what they started.

Owns the clock. It stands where torch hands over to a process group, so it sees megatron-core's calls and megavid's
own alike; groups of one rank, in which nothing travels, are left out. On CPU ranks these seconds are the exposed
communication. On CUDA a call returns before anything has travelled, so there they say nothing and are not read.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from megavid.ops.regions import mark

COMMUNICATION = "communication/"
"""What the name of a region of a collective begins with; then comes the axis."""

_CALLS = (
    "allreduce", "allreduce_coalesced", "allgather", "allgather_coalesced", "_allgather_base",
    "allgather_into_tensor_coalesced", "all_gather_single", "all_gather_single_coalesced", "reduce_scatter",
    "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "reduce_scatter_single",
    "reduce_scatter_single_coalesced", "all_to_all_single", "alltoall_base", "alltoall", "broadcast", "reduce",
    "gather", "scatter", "send", "recv", "recv_anysource", "barrier", "monitored_barrier", "_end_coalescing",
)  # fmt: skip


class WaitClock:
    """Adds up the seconds of collectives while it is entered.

    Args:
        names: axis of a group by torch's ``group_name``, as ``megavid.profiling.collectives.names_of`` gives them;
            other groups are "other".
        is_marking: name every call in the profiler's trace too.
    """

    def __init__(self, names: Mapping[str, str], *, is_marking: bool = False) -> None:
        self.names, self.is_marking = names, is_marking
        self.seconds: dict[str, float] = defaultdict(float)
        self._originals: dict[tuple[Any, str], Any] = {}
        self._axis_of_work: dict[int, tuple[Any, str]] = {}

    @property
    def total_s(self) -> float:
        """Seconds on all axes."""
        return sum(self.seconds.values())

    def __enter__(self) -> Self:
        for name in _CALLS:
            if name in vars(dist.ProcessGroup):  # versions of torch name the same thing differently
                self._replace(dist.ProcessGroup, name, self._call)
        self._replace(dist.Work, "wait", self._wait)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for (owner, name), original in self._originals.items():
            setattr(owner, name, original)
        self._originals.clear()
        self._axis_of_work.clear()

    def _replace(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._originals[owner, name] = original = vars(owner)[name]
        setattr(owner, name, wrap(original))

    def _call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            if group.size() == 1:
                return original(group, *args, **kwargs)
            axis = self.names.get(group.group_name, "other")
            with _Timed(self, axis):
                work = original(group, *args, **kwargs)
            if work is not None:
                self._axis_of_work[id(work)] = (work, axis)  # kept, so that no other work takes its id
            return work

        return call

    def _wait(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            found = self._axis_of_work.pop(id(work), None)
            if found is None:
                return original(work, *args, **kwargs)
            with _Timed(self, found[1]):
                return original(work, *args, **kwargs)

        return wait


class _Timed:
    """One call: adds its seconds to the clock, and marks it in the trace where the clock does."""

    def __init__(self, clock: WaitClock, axis: str) -> None:
        self.clock, self.axis = clock, axis
        self.mark: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        if self.clock.is_marking:
            self.mark = mark(COMMUNICATION + self.axis)
            self.mark.__enter__()
        self.began = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        self.clock.seconds[self.axis] += time.perf_counter() - self.began
        if self.mark is not None:
            self.mark.__exit__(*error)
