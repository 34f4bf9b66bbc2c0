"""Which bytes of which file hold which box of which tensor, and the arithmetic of boxes that meet.

Owns ``index.json``: its form, how the ranks' parts become one, the check that the boxes of each tensor
cover it exactly once, and the search for the boxes that meet a given one. Pure: reads and writes no file,
knows no rank.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavid.checkpoint.format import DTYPES, FORMAT, VERSION, check_file_name
from megavid.errors import CheckpointError
from megavid.parallel.fragment import Box

COLUMNS = ("file", "byte_offset", "offset", "shape")
"""What the four fields of a box in ``index.json`` are; ``file`` counts in ``files``."""


@dataclass(frozen=True, slots=True)
class SavedBox:
    """One box on disk.

    Attributes:
        file: name of the file in the checkpoint's folder.
        start: first byte of the box in that file; it lies there row-major and without gaps.
        box: where it stands in the tensor.
    """

    file: str
    start: int
    box: Box


class TensorRecord:
    """One tensor of a checkpoint, ready to be searched.

    Attributes:
        code: safetensors' name of its number format.
        shape: in model space.
        boxes: sorted by their offset on ``dim``, the dim that tells most of them apart.
    """

    def __init__(self, code: str, shape: tuple[int, ...], boxes: Iterable[SavedBox]) -> None:
        self.code, self.shape = code, shape
        found = list(boxes)
        self.dim = _telling_dim(len(shape), [saved.box for saved in found])
        self.boxes = sorted(found, key=lambda saved: saved.box.offset[self.dim : self.dim + 1])
        self._offsets = [saved.box.offset[self.dim] for saved in self.boxes] if shape else []
        self._reach = max((saved.box.shape[self.dim] for saved in self.boxes), default=0) if shape else 0

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of the tensor on disk."""
        return self.numel * DTYPES[self.code].itemsize

    def meeting(self, box: Box) -> Iterator[tuple[SavedBox, Box]]:
        """Every saved box that meets ``box``, with what they share; two binary searches, then only neighbours."""
        if not self.shape:
            yield from ((saved, box) for saved in self.boxes)
            return
        start, stop = box.offset[self.dim], box.offset[self.dim] + box.shape[self.dim]
        first = bisect_right(self._offsets, start - self._reach)
        for saved in self.boxes[first : bisect_left(self._offsets, stop)]:
            shared = intersection(saved.box, box)
            if shared is not None:
                yield saved, shared


def _telling_dim(dims: int, boxes: list[Box]) -> int:
    return max(range(dims), key=lambda dim: len({box.offset[dim] for box in boxes}), default=0)


def intersection(one: Box, other: Box) -> Box | None:
    """What two boxes share; None where they share nothing."""
    offset = tuple(map(max, one.offset, other.offset))
    shape = tuple(
        min(a + m, b + n) - low for a, m, b, n, low in zip(one.offset, one.shape, other.offset, other.shape, offset)
    )
    return Box(offset, shape) if all(extent > 0 for extent in shape) else None


def check_cover(name: str, record: TensorRecord) -> None:
    """Check that the boxes of a tensor cover each of its elements exactly once.

    Raises:
        CheckpointError: two boxes share elements, one reaches outside, or elements are in none. At saving, this is a
            mistake in ``Fragment.is_owner`` or ``Fragment.boxes``.
    """
    covered, open_boxes, dim = 0, list[Box](), record.dim
    for saved in record.boxes:
        box = saved.box
        inside = all(
            low >= 0 and low + extent <= full for low, extent, full in zip(box.offset, box.shape, record.shape)
        )
        if len(box.offset) != len(record.shape) or len(box.shape) != len(record.shape) or not inside:
            raise CheckpointError(f"tensor {name}: {_text(box)} reaches outside of shape {list(record.shape)}")
        if record.shape:
            open_boxes = [b for b in open_boxes if b.offset[dim] + b.shape[dim] > box.offset[dim]]
        clash = next((b for b in open_boxes if intersection(b, box) is not None), None)
        if clash is not None:
            raise CheckpointError(f"tensor {name}: {_text(box)} and {_text(clash)} are both saved but share elements")
        open_boxes.append(box)
        covered += box.numel
    if covered != record.numel:
        raise CheckpointError(
            f"tensor {name}: {covered} elements are saved, expected {record.numel}; no rank owns the others"
        )


def _text(box: Box) -> str:
    return f"box offset {list(box.offset)} shape {list(box.shape)}"


@dataclass(frozen=True)
class Index:
    """All tensors of a checkpoint; each is decoded when asked for, as a rank wants few of them.

    Attributes:
        files: names of the tensor files.
        tensors: by name, in the form of ``index.json``.
    """

    files: list[str]
    tensors: dict[str, Any]

    @staticmethod
    def of_boxes(tensors: dict[str, tuple[str, tuple[int, ...], list[SavedBox]]]) -> "Index":
        """The index of dtype code, shape and boxes by name."""
        numbers: dict[str, int] = {}
        rows: dict[str, Any] = {}
        for name, (code, shape, boxes) in tensors.items():
            found = [
                [numbers.setdefault(b.file, len(numbers)), b.start, list(b.box.offset), list(b.box.shape)]
                for b in boxes
            ]
            rows[name] = {"dtype": code, "shape": list(shape), "boxes": found}
        return Index(list(numbers), rows)

    @staticmethod
    def merge(parts: Iterable["Index"]) -> "Index":
        """One index of the ranks' parts.

        Raises:
            CheckpointError: ranks differ on a tensor's dtype or shape.
        """
        files: list[str] = []
        tensors: dict[str, Any] = {}
        for part in parts:
            first = len(files)
            files += part.files
            for name, row in part.tensors.items():
                whole = tensors.setdefault(name, {"dtype": row["dtype"], "shape": row["shape"], "boxes": []})
                got, known = (row["dtype"], row["shape"]), (whole["dtype"], whole["shape"])
                if got != known:
                    raise CheckpointError(f"tensor {name}: one rank saves {got}, another {known}")
                whole["boxes"] += [[first + file, *rest] for file, *rest in row["boxes"]]
        return Index(files, dict(sorted(tensors.items())))

    def to_json(self) -> dict[str, Any]:
        """The content of ``index.json``."""
        about = {"format": FORMAT, "version": VERSION, "columns": COLUMNS}
        return {**about, "files": self.files, "tensors": self.tensors}

    @staticmethod
    def from_json(fields: dict[str, Any], where: Path) -> "Index":
        """The index that ``to_json`` gave; ``where`` is its file, for messages."""
        return Index([check_file_name(name, where) for name in fields["files"]], dict(fields["tensors"]))

    def record(self, name: str) -> TensorRecord | None:
        """The tensor called ``name``; None where the checkpoint has none."""
        row = self.tensors.get(name)
        if row is None:
            return None
        boxes = [
            SavedBox(self.files[file], start, Box(tuple(offset), tuple(shape)))
            for file, start, offset, shape in row["boxes"]
        ]
        return TensorRecord(row["dtype"], tuple(row["shape"]), boxes)
