"""One rank's share of a save: which boxes go where, the copy to host memory, and the files.

Owns the plan of a rank's files, the staging buffers, and the part that tells rank 0 what was written.
Knows nothing of other ranks.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavid.checkpoint.files import FileRecord, storage_errors, sync_folder, write_file
from megavid.checkpoint.format import code_of, entry_name, header, part_file, tensor_file
from megavid.checkpoint.index import Index, SavedBox
from megavid.errors import CheckpointError
from megavid.parallel.fragment import Fragment

FILE_BYTES = 4 << 30
"""A rank's tensors go on in a new file beyond this, so that many ranks can verify what few have written."""


@dataclass(frozen=True)
class FilePlan:
    """One tensor file to be.

    Attributes:
        name: of the file.
        head: the bytes before the data.
        size: bytes of the data.
        fragments: where each begins in the data.
    """

    name: str
    head: bytes
    size: int
    fragments: tuple[tuple[int, Fragment], ...]


@dataclass(frozen=True)
class Plan:
    """What one rank writes: its files, and its part of the index."""

    files: tuple[FilePlan, ...]
    index: Index


def check_fragment(fragment: Fragment) -> None:
    """Check that a fragment's data is what its boxes say.

    Raises:
        CheckpointError: other than 1-D and contiguous, or of another length.
    """
    expected = sum(box.numel for box in fragment.boxes)
    if fragment.data.dim() != 1 or not fragment.data.is_contiguous() or fragment.data.numel() != expected:
        raise CheckpointError(
            f"tensor {fragment.name}: its data has shape {list(fragment.data.shape)}, expected "
            f"[{expected}], contiguous, for its boxes"
        )


def plan_files(fragments: Sequence[Fragment], *, rank: int, step: int, file_bytes: int = FILE_BYTES) -> Plan:
    """Decide where each box goes that this rank owns; a fragment's boxes lie one after another, as in its data.

    Raises:
        CheckpointError: a fragment contradicts itself or another one of its name.
    """
    owned = [fragment for fragment in fragments if fragment.is_owner and fragment.data.numel()]
    for fragment in owned:
        check_fragment(fragment)
    # Wide number formats first, so that every entry is aligned; Python's sort keeps the order otherwise.
    owned.sort(key=lambda fragment: -fragment.data.element_size())
    groups: list[list[Fragment]] = []
    room = 0
    for fragment in owned:
        size = fragment.data.numel() * fragment.data.element_size()
        if not groups or size > room:
            groups.append([])
            room = file_bytes
        groups[-1].append(fragment)
        room -= size
    tensors: dict[str, tuple[str, tuple[int, ...], list[SavedBox]]] = {}
    files = tuple(_plan_file(tensor_file(rank, n), group, step, tensors) for n, group in enumerate(groups))
    return Plan(files, Index.of_boxes(tensors))


def _plan_file(
    name: str,
    fragments: list[Fragment],
    step: int,
    tensors: dict[str, tuple[str, tuple[int, ...], list[SavedBox]]],
) -> FilePlan:
    """Lay out one file, and add its boxes to ``tensors``."""
    entries, starts, at = [], [], 0
    for fragment in fragments:
        code, width = code_of(fragment.data.dtype, fragment.name), fragment.data.element_size()
        starts.append(at)
        for box in fragment.boxes:
            stop = at + box.numel * width
            entries.append((entry_name(fragment.name, box), code, box.shape, at, stop))
            at = stop
    head = header(entries, step)
    for start, fragment in zip(starts, fragments):
        code, width = code_of(fragment.data.dtype, fragment.name), fragment.data.element_size()
        known = tensors.setdefault(fragment.name, (code, fragment.global_shape, []))
        if known[:2] != (code, fragment.global_shape):
            raise CheckpointError(f"tensor {fragment.name} has fragments of two dtypes or global shapes on one rank")
        place = len(head) + start
        for box in fragment.boxes:
            known[2].append(SavedBox(name, place, box))
            place += box.numel * width
    return FilePlan(name, head, at, tuple(zip(starts, fragments)))


class Staging:
    """Host memory that a save is copied to, kept from save to save: a file's data to be, byte for byte.

    Pinned where the fragments are on a GPU. As large as all that this rank owns, and never freed while the
    run saves.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def copy(self, plan: Plan) -> list[memoryview]:
        """Copy the plan's fragments, which may change afterwards, and return the data of each file.

        The views are valid until the next call.
        """
        is_cuda = any(fragment.data.is_cuda for file in plan.files for _, fragment in file.fragments)
        views = []
        for number, file in enumerate(plan.files):
            if number == len(self._buffers):
                self._buffers.append(torch.empty(0, dtype=torch.uint8))
            if self._buffers[number].numel() < file.size:
                self._buffers[number] = torch.empty(file.size, dtype=torch.uint8, pin_memory=is_cuda)
            buffer = self._buffers[number]
            for start, fragment in file.fragments:
                data = fragment.data.detach().view(torch.uint8)
                buffer[start : start + data.numel()].copy_(data, non_blocking=is_cuda)
            views.append(buffer.numpy().data[: file.size])
        if is_cuda:
            torch.cuda.synchronize()
        return views


@dataclass(frozen=True)
class Part:
    """What one rank wrote."""

    files: dict[str, FileRecord]
    index: Index

    def to_bytes(self) -> bytes:
        """The content of the rank's part file."""
        fields: dict[str, Any] = {
            "written": {name: [file.size, file.sha256] for name, file in self.files.items()},
            **self.index.to_json(),
        }
        return json.dumps(fields, separators=(",", ":")).encode()

    @staticmethod
    def from_json(fields: dict[str, Any], where: Path) -> "Part":
        """The part that ``to_bytes`` gave."""
        files = {name: FileRecord(size, digest) for name, (size, digest) in fields["written"].items()}
        return Part(files, Index.from_json(fields, where))


def write_part(
    folder: Path,
    plan: Plan,
    views: list[memoryview],
    *,
    rank: int,
    beat: Callable[[], None],
    reread: bool,
) -> None:
    """Write a rank's tensor files and then, atomically, its part: whoever sees the part can rely on the files.

    Raises:
        StorageError: they could not be written.
    """
    files = {}
    for file, view in zip(plan.files, views):
        files[file.name] = write_file(folder / file.name, [file.head, view], beat=beat, reread=reread)
    path = folder / part_file(rank)
    aside = path.with_suffix(".new")
    write_file(aside, [Part(files, plan.index).to_bytes()])
    with storage_errors("rename", aside):
        sync_folder(folder)
        aside.rename(path)
        sync_folder(folder)
