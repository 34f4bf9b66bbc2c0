"""Loading: verify, then fill every fragment from the boxes that meet it, by positioned reads of just those bytes.

Owns ``Checkpoint``. Any layout reads what any layout wrote, bitwise: a fragment knows its boxes, the index
knows the file's.
"""

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavid.checkpoint.files import reading
from megavid.checkpoint.format import DTYPES, INDEX, MANIFEST, RUN, STATE
from megavid.checkpoint.index import Index, SavedBox, TensorRecord
from megavid.checkpoint.manifest import Manifest, check_file, decode, read_checked, read_manifest
from megavid.checkpoint.ranks import Ranks, agreed
from megavid.checkpoint.write import check_fragment
from megavid.errors import CheckpointError
from megavid.parallel.fragment import Box, Fragment

READ_BYTES = 16 << 20
"""Bytes read at a time."""
GAP_BYTES = 64 << 10
"""Bytes between two wanted rows that are cheaper to read than to skip."""
THREADS = 4
"""Files hashed or read at a time by one rank: enough to keep network storage busy."""


@dataclass(frozen=True)
class RegionRead:
    """One region of a saved box on its way to ``target``, a view of a fragment's data."""

    saved: SavedBox
    region: Box
    dtype: torch.dtype
    target: Tensor


class Checkpoint:
    """One checkpoint on disk. Making it reads and checks the manifest only; the rest is checked when it is used."""

    def __init__(self, folder: Path) -> None:
        """Raise ``CheckpointError`` where ``folder`` is no whole checkpoint."""
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self._is_verified = False

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step

    @cached_property
    def state(self) -> dict[str, Any]:
        """What was given to ``save`` as its state, with ``step``."""
        return decode(read_checked(self.folder, STATE, self.manifest), self.folder / STATE)

    @cached_property
    def run_toml(self) -> str:
        """The resolved config of the run that saved it."""
        return read_checked(self.folder, RUN, self.manifest).decode()

    def read(self, name: str) -> bytes:
        """The content of one of the ``extra`` files that it was saved with, checked."""
        return read_checked(self.folder, name, self.manifest)

    @cached_property
    def index(self) -> Index:
        """Where every box is."""
        path = self.folder / INDEX
        index = Index.from_json(decode(read_checked(self.folder, INDEX, self.manifest), path), path)
        for name in index.files:
            if name not in self.manifest.files:
                raise CheckpointError(f"{path} names {name}, which {MANIFEST} does not list")
        return index

    def verify(self, ranks: Ranks) -> None:
        """Check every file against the manifest, each rank its share of them, once.

        Raises:
            CheckpointError: on every rank, naming the file that is missing or damaged.
            StorageError: on every rank, a file cannot be read.

        Ranks: collective. Every rank hashing everything would read the checkpoint as many times as there
        are ranks.
        """
        if self._is_verified:
            return
        with agreed(ranks):
            by_size = sorted(self.manifest.files, key=lambda name: (-self.manifest.files[name].size, name))
            share = by_size[ranks.rank :: ranks.world_size]
            with ThreadPoolExecutor(THREADS) as pool:
                for _ in pool.map(lambda name: check_file(self.folder, name, self.manifest), share):
                    pass
        self._is_verified = True

    def fill(self, fragments: Sequence[Fragment], ranks: Ranks, *, allow_unread: tuple[str, ...] = ()) -> None:
        """Verify, then write into the data of every fragment, owned or not, in place.

        Args:
            fragments: what this rank holds; floating-point data of another dtype is converted.
            ranks: all that load, with or without fragments.
            allow_unread: beginnings of names that the checkpoint may have and nobody asks for, such as ``"exp_avg/"``;
                ``("",)`` for any.

        Raises:
            CheckpointError: on every rank: a file is damaged; a tensor is missing, of another shape or kind of number,
                not covered, or there is one that nobody asks for. Data changes only after all of this was checked.

        Ranks: collective.
        """
        self.verify(ranks)
        with agreed(ranks):
            reads = self._plan(fragments)
        self._check_all_read(fragments, ranks, allow_unread)
        with agreed(ranks), ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(lambda name: self._read_file(name, reads[name]), sorted(reads)):
                pass

    def _plan(self, fragments: Sequence[Fragment]) -> dict[str, list[RegionRead]]:
        """What to read, by file."""
        missing = sorted({fragment.name for fragment in fragments} - self.index.tensors.keys())
        if missing:
            names = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
            raise CheckpointError(
                f"{self.folder} has no tensor {names} ({len(missing)} missing); "
                "it is of another model, or of a run without this optimizer or EMA"
            )
        reads: dict[str, list[RegionRead]] = defaultdict(list)
        for fragment in fragments:
            record = self.index.record(fragment.name)
            assert record is not None
            self._check_tensor(fragment, record)
            start = 0
            for box in fragment.boxes:
                whole = fragment.data.detach()[start : start + box.numel].view(box.shape)
                start += box.numel
                found = 0
                for saved, region in record.meeting(box):
                    found += region.numel
                    target = whole[slices(region, box)]
                    reads[saved.file].append(RegionRead(saved, region, DTYPES[record.code], target))
                if found != box.numel:
                    raise CheckpointError(
                        f"{self.folder}: tensor {fragment.name} offset {list(box.offset)} shape {list(box.shape)} "
                        f"has {found} saved elements, expected {box.numel}"
                    )
        return reads

    def _check_tensor(self, fragment: Fragment, record: TensorRecord) -> None:
        check_fragment(fragment)
        if record.shape != fragment.global_shape:
            raise CheckpointError(
                f"{self.folder}: tensor {fragment.name} has shape {list(record.shape)}, expected "
                f"{list(fragment.global_shape)}; it is of another model"
            )
        got, wanted = DTYPES[record.code], fragment.data.dtype
        if got != wanted and not (got.is_floating_point and wanted.is_floating_point):
            raise CheckpointError(f"{self.folder}: tensor {fragment.name} has dtype {got}, expected {wanted}")

    def _check_all_read(self, fragments: Sequence[Fragment], ranks: Ranks, allow_unread: tuple[str, ...]) -> None:
        """Nothing is left in the checkpoint that nobody asked for.

        Counting owned elements is enough in a run that resumes; names, which are long, are gathered only
        where the counts differ.
        """
        expected = [name for name in self.index.tensors if not name.startswith(allow_unread)]
        total = sum(math.prod(self.index.tensors[name]["shape"]) for name in expected)
        mine = [fragment for fragment in fragments if not fragment.name.startswith(allow_unread)]
        counts = ranks.all_gather_object(sum(f.data.numel() for f in mine if f.is_owner))
        if sum(counts) == total:
            return
        asked = set[str]().union(*ranks.all_gather_object(sorted({fragment.name for fragment in mine})))
        unread = [name for name in expected if name not in asked]
        if unread:
            raise CheckpointError(
                f"{self.folder} holds {len(unread)} tensors that this model does not have, the first "
                f"{', '.join(unread[:3])}; it is of another model, or of a run with another optimizer or EMA"
            )

    @torch.no_grad()
    def _read_file(self, name: str, reads: list[RegionRead]) -> None:
        path = self.folder / name
        with reading(path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                for read in sorted(reads, key=lambda read: read.saved.start):
                    read_region(descriptor, path, read)
            finally:
                os.close(descriptor)


def slices(region: Box, within: Box) -> tuple[slice, ...]:
    """Where ``region`` lies in a tensor that holds the box ``within``."""
    return tuple(
        slice(low - base, low - base + extent) for low, extent, base in zip(region.offset, region.shape, within.offset)
    )


def read_region(descriptor: int, path: Path, read: RegionRead) -> None:
    """Read one region, in pieces of at most ``READ_BYTES``, and copy each to its place."""
    strides, width = _strides(read.saved.box.shape), read.dtype.itemsize
    for piece in _pieces(read.region, strides, width):
        first = sum((low - base) * s for low, base, s in zip(piece.offset, read.saved.box.offset, strides))
        content = bytearray(_span(piece, strides) * width)
        _read_exactly(descriptor, content, read.saved.start + first * width, path)
        source = torch.frombuffer(content, dtype=read.dtype).as_strided(piece.shape, strides)
        read.target[slices(piece, read.region)].copy_(source)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


def _span(region: Box, strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a region, those between its rows counted."""
    return 1 + sum((extent - 1) * stride for extent, stride in zip(region.shape, strides))


def _pieces(region: Box, strides: tuple[int, ...], width: int) -> Iterator[Box]:
    """Cut a region into pieces that are worth one read each: not too long, and with no long gap."""
    # Of the dims so far, from the last one up: elements from first to last, and the longest run not wanted.
    span, gap = 1, 0
    for extent, stride in zip(reversed(region.shape), reversed(strides)):
        if extent > 1:
            gap = max(gap, stride - span)
        span += (extent - 1) * stride
    if (span * width <= READ_BYTES and gap * width <= GAP_BYTES) or span == 1:
        yield region
        return
    dim = next(dim for dim, extent in enumerate(region.shape) if extent > 1)
    half = region.shape[dim] // 2
    low, shape = list(region.offset), list(region.shape)
    shape[dim] = half
    yield from _pieces(Box(region.offset, tuple(shape)), strides, width)
    low[dim] += half
    shape[dim] = region.shape[dim] - half
    yield from _pieces(Box(tuple(low), tuple(shape)), strides, width)


def _read_exactly(descriptor: int, content: bytearray, offset: int, path: Path) -> None:
    view = memoryview(content)
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise CheckpointError(f"{path} ends {len(view)} bytes early: it is damaged; load another checkpoint")
        view, offset = view[count:], offset + count


def verify(folder: Path, ranks: Ranks) -> None:
    """Check every file of a checkpoint, each rank its share; raises as ``Checkpoint.verify``. Collective."""
    _open(folder, ranks).verify(ranks)


def load(
    folder: Path, fragments: Sequence[Fragment], ranks: Ranks, *, allow_unread: tuple[str, ...] = ()
) -> Checkpoint:
    """Verify a checkpoint, fill the fragments from it, and return it for its ``state``.

    Collective; raises as ``Checkpoint.fill``.
    """
    checkpoint = _open(folder, ranks)
    checkpoint.fill(fragments, ranks, allow_unread=allow_unread)
    return checkpoint


def _open(folder: Path, ranks: Ranks) -> Checkpoint:
    with agreed(ranks):
        checkpoint = Checkpoint(folder)
    return checkpoint
