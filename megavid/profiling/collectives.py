"""What this process says to other ranks: every collective, send and receive of torch.distributed, in order.

Owns the recorder and the record of one call. It stands where torch's functions hand over to a process group, so it sees
gloo, NCCL and fake groups alike, calls inside custom operators, and calls on autograd's threads, and costs nothing
between them; what a compiled graph or C++ calls by itself it does not see. Says nothing about time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavid.parallel.mesh import Mesh

ALONE = "alone"
"""Name of every group of one rank: megatron-core shares them between axes, and nothing travels in them."""


@dataclass(frozen=True, slots=True)
class Call:
    """One collective, send or receive, as this rank called it.

    Attributes:
        operation: "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce", "gather",
            "scatter", "send", "recv" or "barrier".
        group: name of the process group: the axis where the recorder knows the mesh.
        ranks: global ranks of the group, in its order.
        shape: of the tensor that this rank puts in; of the one that it gets where it puts in none (``recv``).
        dtype: of its numbers, as "float32".
        bytes: of that tensor.
        peer: global rank of the other side of a send or receive, or the root of a broadcast, reduce, gather or scatter.
        splits: of an all-to-all: rows of dim 0 to each rank and from each rank; None where they are even.
        reduction: of reductions: "SUM", "MAX" and so on; "" for the others.
        is_async: the caller waits later.
        batch: calls that were issued as one have the same number, counted from 0 for each recorder.
    """

    operation: str
    group: str
    ranks: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    peer: int | None
    splits: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    reduction: str = ""
    is_async: bool = False
    batch: int = 0

    def sent_by(self, rank: int) -> float:
        """Bytes that ``rank`` of the group sends in this call, by the algorithm that moves the fewest: a ring.

        A part that stays on the rank is not counted. Broadcast: the root's bytes, whatever the tree.
        """
        size, place = len(self.ranks), self.ranks.index(rank)
        match self.operation:
            case "send":
                return float(self.bytes)
            case "all_gather":
                return float(self.bytes * (size - 1))
            case "all_reduce":
                return 2.0 * self.bytes * (size - 1) / size
            case "reduce_scatter":
                return self.bytes * (size - 1) / size
            case "all_to_all" if self.splits is not None:
                rows = sum(self.splits[0])
                return self.bytes * (rows - self.splits[0][place]) / rows if rows else 0.0
            case "all_to_all":
                return self.bytes * (size - 1) / size
            case "broadcast" | "scatter":
                return float(self.bytes if self.peer == rank and size > 1 else 0)
            case "reduce" | "gather":
                return float(self.bytes if self.peer != rank else 0)
        return 0.0


class CollectiveRecorder:
    """Records the calls of this process while it is entered.

    Use as ``with CollectiveRecorder(names_of(mesh)) as recorder: ...`` and read ``recorder.calls``.

    Args:
        names: name of a group by torch's ``group_name``; others get the description that they were created with.
    """

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self.names = dict(names or {})
        self.calls: list[Call] = []
        self._batch = 0
        self._is_open = False  # inside a batch that the caller delimits
        self._originals: dict[str, Any] = {}

    def __enter__(self) -> "CollectiveRecorder":
        for name in (*_READERS, "_start_coalescing", "_end_coalescing"):
            # Older and newer versions of torch name the same thing differently.
            if name in vars(dist.ProcessGroup):
                self._originals[name] = vars(dist.ProcessGroup)[name]
                setattr(dist.ProcessGroup, name, self._wrapped(name, self._originals[name]))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name, original in self._originals.items():
            setattr(dist.ProcessGroup, name, original)
        self._originals = {}

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        if name not in _READERS:
            starts = name == "_start_coalescing"

            def delimit(group: Any, *args: Any, **kwargs: Any) -> Any:
                self._is_open, self._batch = starts, self._batch + (not starts)
                return original(group, *args, **kwargs)

            return delimit

        def record(group: Any, *args: Any, **kwargs: Any) -> Any:
            self._record(name, group, [*args, *kwargs.values()])
            return original(group, *args, **kwargs)

        return record

    def _record(self, name: str, group: Any, args: Sequence[Any]) -> None:
        operation, read = _READERS[name]
        ranks = tuple(dist.get_process_group_ranks(group))
        options = next((arg for arg in args if type(arg).__name__.endswith("Options")), None)
        for found in read(args):
            tensor = found.tensor
            self.calls.append(
                Call(
                    operation=operation,
                    group=ALONE if len(ranks) == 1 else self.names.get(group.group_name, group.group_desc),
                    ranks=ranks,
                    shape=tuple(tensor.shape) if tensor is not None else (),
                    dtype=str(tensor.dtype).removeprefix("torch.") if tensor is not None else "",
                    bytes=tensor.numel() * tensor.element_size() if tensor is not None else 0,
                    peer=None if found.peer is None else ranks[found.peer],
                    splits=found.splits,
                    reduction=_reduction_of(options),
                    is_async=operation in ("send", "recv") or bool(options is not None and options.asyncOp),
                    batch=self._batch,
                )
            )
        if not self._is_open:
            self._batch += 1


def names_of(mesh: Mesh) -> dict[str, str]:
    """Axis of every process group of a mesh, by torch's name of the group.

    Axes whose ranks are the same have groups of their own; only those that are the same group share a name.
    """
    short = {"expt_tp": "etp", "expt_dp": "edp"}
    first = ("tp", "cp", "dp", "pp", "ep", "expt_tp", "expt_dp", "dp_cp", "tp_cp", "tp_dp_cp", "tp_ep")
    names: dict[str, str] = {mesh.group("world").group_name: "world"}
    fields = {name: group for name, group in vars(mesh.groups).items() if isinstance(group, dist.ProcessGroup)}
    for field in sorted(fields, key=lambda name: (first.index(name) if name in first else len(first), name)):
        names.setdefault(fields[field].group_name, short.get(field, field))
    for name, group in (("ulysses", mesh.context.ulysses_group), ("ring", mesh.context.ring_group)):
        if group is not None:
            names.setdefault(group.group_name, name)  # "cp" where it is all of them
    return names


@dataclass(frozen=True, slots=True)
class _Found:
    """A tensor in the arguments of a call, with who else is named there."""

    tensor: Tensor | None
    peer: int | None = None
    splits: tuple[tuple[int, ...], tuple[int, ...]] | None = None


def _reduction_of(options: Any) -> str:
    if "reduceOp" not in dir(options):
        return ""
    # The options hold a number of C++, which compares with the names but does not tell its own.
    return next((name for name in _REDUCTIONS if options.reduceOp == vars(dist.ReduceOp)[name]), "other")


_REDUCTIONS = ("SUM", "AVG", "MAX", "MIN", "PRODUCT", "BAND", "BOR", "BXOR")


def _each(args: Sequence[Any]) -> Iterator[_Found]:
    """(tensors, options)."""
    return (_Found(tensor) for tensor in _flat(args[0]))


def _second(args: Sequence[Any]) -> Iterator[_Found]:
    """(outputs, inputs, options)."""
    return (_Found(tensor) for tensor in _flat(args[1]))


def _peer(args: Sequence[Any]) -> Iterator[_Found]:
    """(tensors, rank in the group, tag)."""
    return (_Found(tensor, peer=int(args[1])) for tensor in _flat(args[0]))


def _rooted(args: Sequence[Any]) -> Iterator[_Found]:
    """(tensors, options with a root)."""
    return (_Found(tensor, peer=args[1].rootRank) for tensor in _flat(args[0]))


def _rooted_second(args: Sequence[Any]) -> Iterator[_Found]:
    """(outputs, inputs, options with a root); only one side may have tensors on each list."""
    tensors = _flat(args[1]) or _flat(args[0])[:1]
    return (_Found(tensor, peer=args[2].rootRank) for tensor in tensors[:1])


def _split(args: Sequence[Any]) -> Iterator[_Found]:
    """(output, input, rows from each rank, rows to each rank, options)."""
    received, sent = (tuple(int(rows) for rows in sizes) for sizes in args[2:4])
    yield _Found(args[1], splits=(sent, received) if sent or received else None)


def _lists(args: Sequence[Any]) -> Iterator[_Found]:
    """(outputs, inputs, options) of an all-to-all of lists, one tensor for each rank."""
    outputs, inputs = args[:2]
    if not inputs:
        return
    # A tensor of any shape to each rank is reported as so many numbers.
    sizes = tuple(tuple(tensor.numel() for tensor in tensors) for tensors in (inputs, outputs))
    whole = torch.empty(sum(sizes[0]), dtype=inputs[0].dtype, device="meta")
    yield _Found(whole, splits=(sizes[0], sizes[1]))


def _nothing(args: Sequence[Any]) -> Iterator[_Found]:
    """Options only."""
    yield _Found(None)


def _flat(tensors: Any) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    return [tensor for item in tensors for tensor in _flat(item)]


def _whole(args: Sequence[Any]) -> Iterator[_Found]:
    """(outputs, lists of one input for each rank, options): the inputs of a call are one tensor to the others."""
    for parts in args[1]:
        yield _Found(torch.empty((len(parts), *parts[0].shape), dtype=parts[0].dtype, device="meta"))


_READERS: dict[str, tuple[str, Callable[[Sequence[Any]], Iterator[_Found]]]] = {
    "allreduce": ("all_reduce", _each),
    "allreduce_coalesced": ("all_reduce", _each),
    "allgather": ("all_gather", _second),
    "allgather_coalesced": ("all_gather", _second),
    "_allgather_base": ("all_gather", _second),
    "allgather_into_tensor_coalesced": ("all_gather", _second),
    "all_gather_single": ("all_gather", _second),
    "all_gather_single_coalesced": ("all_gather", _second),
    "reduce_scatter": ("reduce_scatter", _whole),
    "_reduce_scatter_base": ("reduce_scatter", _second),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", _second),
    "reduce_scatter_single": ("reduce_scatter", _second),
    "reduce_scatter_single_coalesced": ("reduce_scatter", _second),
    "all_to_all_single": ("all_to_all", _split),
    "alltoall_base": ("all_to_all", _split),
    "alltoall": ("all_to_all", _lists),
    "broadcast": ("broadcast", _rooted),
    "reduce": ("reduce", _rooted),
    "gather": ("gather", _rooted_second),
    "scatter": ("scatter", _rooted_second),
    "send": ("send", _peer),
    "recv": ("recv", _peer),
    "barrier": ("barrier", _nothing),
}
"""What each method of a process group does, and where its arguments name the tensors."""

OPERATIONS = {name: operation for name, (operation, _) in _READERS.items()}
"""What each method of a process group does, by its name."""
