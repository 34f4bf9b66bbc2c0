"""Reading shards: any sample by position, through the index.

Owns ``ShardSource``. Everything that can be checked without reading samples is checked when it is opened;
one damaged sample later is ``BadSample``, which the caller may quarantine; failing storage is
``StorageError``, which is never taken for a damaged sample.
"""

import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megavid.data.sample import (
    BadSample,
    Bucket,
    ConditionSpec,
    Sample,
    Shape,
    TextSpec,
    TokenizerSpec,
    buckets_of_runs,
    from_bytes,
)
from megavid.data.shard_format import DATASET_FILE, MEMBERS, PLAIN_MEMBERS, hash_of, open_index, read_dataset
from megavid.errors import DataError, StorageError

_OPEN_SHARDS = 64


class ShardSource:
    """The samples of a folder of shards.

    Sample indices run over the shards in the order of dataset.json and over each index. Memory: the table
    of shards and runs; indices are memory-mapped, checked and opened when first used. Not for several
    threads at once.

    Args:
        folder: what ``megavid prepare`` wrote.
        reads_known: read what samples carry of known frames too, where they do.

    Raises:
        DataError: dataset.json, a shard or an index is missing, or has another size than it had when it was written.
    """

    def __init__(self, folder: Path, *, reads_known: bool = True) -> None:
        self.folder, self.reads_known = folder, reads_known
        self.info = read_dataset(folder)
        for shard in self.info.shards:
            for file, size in (
                (folder / f"{shard.name}.tar", shard.tar_bytes),
                (folder / f"{shard.name}.idx", shard.index_bytes),
            ):
                _require_size(file, size, folder)
        self._ends = np.cumsum([shard.samples for shard in self.info.shards], dtype=np.int64)
        self._runs = [run for shard in self.info.shards for run in shard.buckets]
        self._run_ends = np.cumsum([count for _, count in self._runs], dtype=np.int64)
        self._buckets = buckets_of_runs(self._runs)
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.folder)

    @property
    def tokenizer(self) -> TokenizerSpec:
        """Who made the latents."""
        return self.info.tokenizer

    @property
    def text(self) -> TextSpec:
        """The text encoder that goes with the captions."""
        return self.info.text

    @property
    def condition(self) -> ConditionSpec:
        """What samples carry of known frames."""
        return self.info.condition

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Every sample once, by shape."""
        return self._buckets

    def __len__(self) -> int:
        return int(self._ends[-1])

    def shape(self, index: int) -> Shape:
        """Latent shape of a sample, from dataset.json."""
        return self._runs[int(np.searchsorted(self._run_ends, index, side="right"))][0]

    def sample_name(self, index: int) -> str:
        """``SHARD.tar:KEY``."""
        shard, row = self._locate(index)
        return f"{self.info.shards[shard].name}.tar:{self._shard(shard)[1][row]['key'].decode()}"

    def read(self, index: int) -> Sample:
        """Read and check one sample.

        Raises:
            BadSample: a member is cut off, or is not what the index says.
            StorageError: storage failed.
        """
        shard, row = self._locate(index)
        record = self._shard(shard)[1][row]
        name = f"{self.info.shards[shard].name}.tar:{record['key'].decode()}"
        latent, description, text = (self._member(shard, record, member, name) for member in range(PLAIN_MEMBERS))
        shape = tuple(int(extent) for extent in record["shape"])
        if shape != self.shape(index) or len(latent) != 2 * int(np.prod(shape, dtype=np.int64)):
            raise BadSample(name, f"{len(latent)} bytes are not bf16 latents of shape {self.shape(index)}")
        try:
            values = json.loads(description)
            caption, frame_rate = str(values.pop("caption")), float(values.pop("frame_rate"))
            text_shape = values.pop("text_shape")
            text_LD: Tensor | None = None if text_shape is None else from_bytes(text, text_shape)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise BadSample(name, f"its description cannot be read ({error})") from error
        sample = Sample(record["key"].decode(), from_bytes(latent, shape), caption, frame_rate, text_LD, values)
        return self._with_known(sample, shard, record, name) if self.reads_known and self.condition.known else sample

    def _with_known(self, sample: Sample, shard: int, record: np.void, name: str) -> Sample:
        """The same sample with what it carries of known frames."""
        condition, image = (self._member(shard, record, member, name) for member in range(PLAIN_MEMBERS, len(MEMBERS)))
        values: dict[str, Any] = dict(sample.meta)
        try:
            known, image_shape = tuple(int(frame) for frame in values.pop("known")), values.pop("image_shape")
            return replace(
                sample, meta=values, known=known, condition_CFHW=from_bytes(condition, sample.shape),
                image_LI=None if image_shape is None else from_bytes(image, image_shape),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise BadSample(name, f"what it carries of known frames cannot be read ({error})") from error

    def captions(self) -> Iterator[str]:
        """Captions of all good samples, by reading only their descriptions."""
        for index in range(len(self)):
            shard, row = self._locate(index)
            record = self._shard(shard)[1][row]
            try:
                yield str(json.loads(self._member(shard, record, 1, self.sample_name(index)))["caption"])
            except BadSample:
                continue

    def verify(self) -> Iterator[BadSample]:
        """Read every sample against its strong hash and give the damaged ones."""
        return (error for index in range(len(self)) if (error := self.verify_sample(index)) is not None)

    def verify_sample(self, index: int) -> BadSample | None:
        """Read one sample against its strong hash; what is wrong with it, if anything is.

        Raises:
            StorageError: storage failed.
        """
        try:
            self.read(index)
            shard, row = self._locate(index)
            record = self._shard(shard)[1][row]
            name = self.sample_name(index)
            payloads = [self._member(shard, record, member, name) for member in range(len(record["offset"]))]
            if hash_of(*payloads) != record["digest"].tobytes().hex():
                return BadSample(name, "its hash differs from the index")
        except BadSample as error:
            return error
        return None

    def close(self) -> None:
        """Close open files."""
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def _shard(self, number: int) -> tuple[int, np.ndarray]:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.info.shards[number]
        records = open_index(self.folder, shard)
        try:
            descriptor = os.open(self.folder / f"{shard.name}.tar", os.O_RDONLY)
        except OSError as error:
            raise StorageError(f"cannot open {self.folder / shard.name}.tar: {error.strerror or error}") from error
        self._open[number] = descriptor, records
        if len(self._open) > _OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][0])
        return self._open[number]

    def _member(self, shard: int, record: np.void, member: int, name: str) -> bytes:
        offset, length = int(record["offset"][member]), int(record["length"][member])
        try:
            payload = _read_exactly(self._shard(shard)[0], length, offset)
        except OSError as error:
            raise StorageError(f"cannot read {self.folder / name}: {error.strerror or error}") from error
        if len(payload) != length:
            raise BadSample(name, f"{MEMBERS[member]} is cut off: {len(payload)} of {length} bytes")
        if zlib.crc32(payload) != record["crc"][member]:
            raise BadSample(name, f"{MEMBERS[member]} at byte {offset} differs from its hash in the index")
        return payload


def _read_exactly(descriptor: int, length: int, offset: int) -> bytes:
    # One call reads 2 GiB at most, and a network file system may return less than asked for.
    payload = os.pread(descriptor, length, offset)
    while len(payload) < length:
        more = os.pread(descriptor, length - len(payload), offset + len(payload))
        if not more:
            break
        payload += more
    return payload


def _require_size(file: Path, size: int, folder: Path) -> None:
    try:
        found = file.stat().st_size
    except FileNotFoundError as error:
        raise DataError(
            f"{file} is missing, but {folder / DATASET_FILE} lists it; copy it there or prepare it again"
        ) from error
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror or error}") from error
    if found != size:
        raise DataError(
            f"{file} has {found} bytes, {folder / DATASET_FILE} says {size}: it is truncated or not the same file; "
            "copy it again or prepare it again"
        )
