"""Bytes of tensors that live on the CPU, as the allocator counts them: peaks that no resident size can tell.

Owns the meter only. Sees all memory of tensors that torch allocates in this process while it is entered, inside
operators and in the backward pass too; not what libraries take by themselves. GPUs have
``torch.cuda.max_memory_allocated``.
"""

from types import TracebackType
from typing import Any

from torch.profiler import ProfilerActivity, profile


class AllocationMeter:
    """Counts allocations: ``with AllocationMeter() as meter: ...`` and then ``meter.peak_bytes``."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._profile: Any = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> "AllocationMeter":
        self._profile.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._profile.__exit__(kind, error, at)
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        self.sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once of those allocated inside; what was alive before does not count."""
        live = peak = 0
        for size in self.sizes:
            live += size
            peak = max(peak, live)
        return peak
