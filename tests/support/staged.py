"""Collectives of ranks that share one GPU: NCCL wants a GPU for each rank, so tensors travel over the host, by gloo.

Owns the process group and the world of such ranks. Every tensor is copied to the host, CPU tensors too, so that CPU
ranks take the same path; results are copied back when somebody waits for them. Slow, and for tests only.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NAME = "staged"
TIMEOUT = timedelta(seconds=120)


def on_host(x: Tensor) -> Tensor:
    """A copy on the host; waits for what computes ``x``."""
    return x.detach().to("cpu", copy=True).contiguous()


class StagedWork(dist.Work):
    """A collective on the host; whoever waits for it gets the results copied back."""

    def __init__(self, work: Any, results: Sequence[tuple[Tensor, Tensor]], sent: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.work, self.results, self.sent = work, tuple(results), tuple(sent)

    def wait(self, timeout: Any = None) -> bool:
        """Wait for the collective, once, and copy."""
        self.work.wait()
        with torch.no_grad():
            for here, host in self.results:
                here.copy_(host)
        self.results = self.sent = ()
        return True

    def is_completed(self) -> bool:
        """Whether waiting would only copy."""
        completed: bool = self.work.is_completed()
        return completed


class StagedGroup(dist.ProcessGroup):
    """gloo on copies. Its methods are what functions of ``torch.distributed`` call, named as in torch 2.8 to 2.13."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.host = dist.ProcessGroupGloo(store, rank, size, timeout)
        self.named = self.described = ""

    def _in_place(self, call: Any, tensors: list[Tensor], *args: Any) -> StagedWork:
        copies = [on_host(x) for x in tensors]
        return StagedWork(call(copies, *args), list(zip(tensors, copies)))

    def allreduce(self, tensors: list[Tensor], opts: Any) -> StagedWork:
        return self._in_place(self.host.allreduce, tensors, opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any) -> StagedWork:
        return self._in_place(self.host.allreduce_coalesced, tensors, opts)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> StagedWork:
        return self._in_place(self.host.broadcast, tensors, opts)

    def reduce(self, tensors: list[Tensor], opts: Any) -> StagedWork:
        return self._in_place(self.host.reduce, tensors, opts)

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> StagedWork:
        copies = [on_host(x) for x in tensors]
        return StagedWork(self.host.send(copies, peer, tag), (), copies)

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> StagedWork:
        return self._in_place(self.host.recv, tensors, peer, tag)

    def barrier(self, opts: Any) -> StagedWork:
        return StagedWork(self.host.barrier(opts), ())

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> StagedWork:
        copies, sent = [[on_host(x) for x in row] for row in outputs], [on_host(x) for x in inputs]
        pairs = [pair for row in zip(outputs, copies) for pair in zip(*row)]
        return StagedWork(self.host.allgather(copies, sent, opts), pairs, sent)

    def all_gather_single(self, output: Tensor, given: Tensor, opts: Any) -> StagedWork:
        copy, sent = on_host(output), on_host(given)
        return StagedWork(self.host._allgather_base(copy, sent, opts), [(output, copy)], [sent])

    def reduce_scatter_single(self, output: Tensor, given: Tensor, opts: Any) -> StagedWork:
        copy, sent = on_host(output), on_host(given)
        return StagedWork(self.host._reduce_scatter_base(copy, sent, opts), [(output, copy)], [sent])

    def all_to_all_single(
        self, output: Tensor, given: Tensor, output_sizes: list[int], input_sizes: list[int], opts: Any
    ) -> StagedWork:
        copy, sent = on_host(output), on_host(given)
        work = self.host.alltoall_base(copy, sent, output_sizes, input_sizes, opts)
        return StagedWork(work, [(output, copy)], [sent])

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> StagedWork:
        return self._one_by_one(self.all_gather_single, outputs, inputs, opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> StagedWork:
        return self._one_by_one(self.reduce_scatter_single, outputs, inputs, opts)

    def _one_by_one(self, call: Any, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> StagedWork:
        *others, last = [call(output, given, opts) for output, given in zip(outputs, inputs, strict=True)]
        for work in others:
            work.wait()
        work: StagedWork = last
        return work

    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    # torch asks these of the group's own backends, and this one has none.

    @property
    def group_name(self) -> str:
        return self.named

    def _set_group_name(self, name: str) -> None:
        self.named = name

    @property
    def group_desc(self) -> str:
        return self.described

    def _set_group_desc(self, words: str) -> None:
        self.described = words

    def name(self) -> str:
        return NAME

    def shutdown(self) -> None:
        self.host.shutdown()


@contextmanager
def staged_world(rank: int, size: int, meeting: Path) -> Iterator[None]:
    """The world of ranks that share a device, whose groups are all staged.

    Args:
        rank: of this process.
        size: ranks in all.
        meeting: a file that does not exist yet, where they meet.

    Ranks: collective over the world.
    """
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, StagedGroup, devices=["cpu", "cuda"])
    store = dist.FileStore(str(meeting), size)
    dist.init_process_group(NAME, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()
