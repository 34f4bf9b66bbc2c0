"""A folder of safetensors files as lazy tensors, checked as a whole before any of them is read.

Owns the reading of headers, which is strict (a file that is too short, too long, or has a hole is refused), the index
that says which tensor is in which file, and positioned reads. Nothing is mapped or unpickled.
"""

import json
import math
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavid.checkpoint.convert.lazy import LazyTensor
from megavid.checkpoint.files import reading
from megavid.checkpoint.format import DTYPES, check_file_name
from megavid.checkpoint.manifest import decode
from megavid.errors import CheckpointError

MAX_HEADER = 100 << 20
"""Bytes of a header that are still believed; safetensors' own limit."""
OPEN_FILES = 32
"""Files kept open at a time: a checkpoint may have a thousand."""


class OpenFiles:
    """Files kept open for positioned reads; the one unused for longest is closed for a new one."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of ``path`` from ``start`` on.

        Raises:
            CheckpointError: the file is missing or ends early.
            StorageError: it cannot be read.
        """
        with reading(path):
            descriptor = self.descriptor(path)
            while view:
                count = os.preadv(descriptor, [view], start)
                if count == 0:
                    raise CheckpointError(f"{path} ends {len(view)} bytes early: it was cut off, or is being written")
                view, start = view[count:], start + count

    def tensor(self, path: Path, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """``count`` numbers of ``path`` from byte ``start`` on, 1-D."""
        data = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        self.read(path, start, data.numpy().data)
        return data.view(dtype)

    def descriptor(self, path: Path) -> int:
        """The open file, valid until ``OPEN_FILES`` others were asked for."""
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        if len(self._open) >= OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]


def open_shards(folder: Path, files: OpenFiles) -> dict[str, LazyTensor]:
    """Every tensor of the safetensors files of a folder, by name, in the order of the files.

    Raises:
        CheckpointError: no safetensors files, several that no index joins, a file missing or damaged, or an index that
            says otherwise than the files.
    """
    index = _index(folder)
    names = sorted(set(index.values())) if index is not None else [_only_file(folder).name]
    tensors: dict[str, LazyTensor] = {}
    for name in names:
        for key, tensor in open_file(folder / name, files)[0].items():
            if key in tensors:
                raise CheckpointError(f"{folder}: tensor {key} is in {tensors[key].where} and in {name}")
            tensors[key] = tensor
            if index is not None and index.get(key) != name:
                raise CheckpointError(
                    f"{folder / name} holds tensor {key}, which its index looks for in {index.get(key, 'no file')}; "
                    "index and files are of different models"
                )
    lost = sorted(index.keys() - tensors.keys()) if index is not None else []
    if lost:
        raise CheckpointError(f"{folder}: tensor {lost[0]} is in the index but in no file ({len(lost)} such)")
    return tensors


def _index(folder: Path) -> dict[str, str] | None:
    """File of every tensor, if the folder has an index of them."""
    found = sorted(folder.glob("*.safetensors.index.json"))
    if not found:
        return None
    if len(found) > 1:
        raise CheckpointError(f"{folder} has {len(found)} indices, {found[0].name} and {found[1].name}; leave one")
    with reading(found[0]):
        table = decode(found[0].read_bytes(), found[0]).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{found[0]} has no weight_map: it is no index of safetensors files")
    return {str(key): check_file_name(name, found[0]) for key, name in table.items()}


def _only_file(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder} has {len(found)} safetensors files and no index that joins them "
            f"({found[0].name}, {found[1].name}, ...); add the index, or leave one file"
        )
    pickles = [path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in sorted(folder.glob(pattern))]
    why = f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors" if pickles else ""
    raise CheckpointError(f"{folder} has no safetensors file{why}")


def open_file(path: Path, files: OpenFiles) -> tuple[dict[str, LazyTensor], Mapping[str, Any]]:
    """The tensors of one safetensors file, once its header was found to describe all of its bytes; and its metadata.

    Raises:
        CheckpointError: missing, cut off, too long, or damaged.
    """
    with reading(path):
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(f"{path} has {size} bytes, fewer than its header: it was cut off, or is damaged")
            content = file.read(length)
    header = _decode_header(content, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: its __metadata__ is {metadata!r}: it is damaged or no safetensors file")
    tensors, end, base = {}, 0, 8 + length
    entries = sorted(header.items(), key=lambda item: _offsets(item[0], item[1], path))
    for key, entry in entries:
        start, stop = _offsets(key, entry, path)
        dtype, shape = DTYPES.get(str(entry.get("dtype"))), entry.get("shape")
        if dtype is None or not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise CheckpointError(f"{path}: tensor {key} has dtype {entry.get('dtype')}, shape {shape}: not readable")
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{path}: tensor {key} lies at bytes {start} to {stop}; expected it to begin at {end} and to have "
                f"{math.prod(shape) * dtype.itemsize} bytes: the file is damaged"
            )
        end = stop
        tensors[key] = _tensor(path, files, key, tuple(shape), dtype, base + start)
        if base + stop > size:
            raise CheckpointError(
                f"{path} has {size} bytes and ends within tensor {key}, which needs {base + stop}: it was cut off"
            )
    if base + end != size:
        raise CheckpointError(f"{path} has {size} bytes, its header accounts for {base + end}: it is damaged")
    return tensors, metadata


def _tensor(
    path: Path, files: OpenFiles, key: str, shape: tuple[int, ...], dtype: torch.dtype, first: int
) -> LazyTensor:
    def fetch(start: int, stop: int) -> Tensor:
        return files.tensor(path, first + start * dtype.itemsize, stop - start, dtype)

    return LazyTensor(shape, dtype, fetch, f"{path} ({key})", key)


def _decode_header(content: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(f"{path}: {twice} comes twice in the header; the file is damaged")
        return table

    try:
        header = json.loads(content, object_pairs_hook=once)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its header is not JSON ({error}): it is damaged or no safetensors file"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is no object: it is damaged or no safetensors file")
    return header


def _offsets(key: str, entry: Any, path: Path) -> tuple[int, int]:
    found = entry.get("data_offsets") if isinstance(entry, Mapping) else None
    if not isinstance(found, list) or len(found) != 2 or not all(isinstance(n, int) and n >= 0 for n in found):
        raise CheckpointError(f"{path}: tensor {key} has data_offsets {found}: the file is damaged")
    return found[0], found[1]
