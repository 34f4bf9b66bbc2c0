"""Writing shards: aside, then renamed; a shard that is complete is never written again.

Owns the order in which files appear: tar, index, then the shard's entry (``NAME.json``), which says that it
is complete. Shards are independent, so ranks or Slurm array tasks write theirs and one of them gathers the
entries into dataset.json at the end.
"""

import io
import os
import re
import tarfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from megavid.data.sample import ConditionSpec, Sample, TextSpec, TokenizerSpec, to_bytes
from megavid.data.shard_format import (
    CONDITIONED_RECORD,
    DATASET_FILE,
    KEY_BYTES,
    MEMBERS,
    PLAIN_MEMBERS,
    RECORD,
    DatasetInfo,
    ShardInfo,
    hash_of,
    pack_index,
    read_json,
    to_json_bytes,
    write_aside,
)
from megavid.errors import DataError, StorageError

_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{KEY_BYTES}}}")
_BLOCK = tarfile.BLOCKSIZE


def shard_name(number: int) -> str:
    """Name of shard ``number`` (from 0)."""
    return f"shard_{number:05d}"


def finished_shard(folder: Path, name: str) -> ShardInfo | None:
    """The entry of a shard that is complete, else None: then it has to be written."""
    entry = folder / f"{name}.json"
    if not entry.exists():
        return None
    info = ShardInfo.from_json(read_json(entry), entry)
    tar, index = folder / f"{name}.tar", folder / f"{name}.idx"
    sizes = tuple(file.stat().st_size if file.exists() else -1 for file in (tar, index))
    return info if sizes == (info.tar_bytes, info.index_bytes) else None


class ShardWriter:
    """One shard.

    Use as a context manager: it is finished when the block ends, and left undone when the block raises.

    Args:
        folder: the data set's folder; created.
        name: such as ``shard_name(0)``.
        tokenizer: who made the latents; goes into every KEY.json too, so that a tar alone says what it is.
        has_known: samples carry latents of known frames, and image features where they have an image.
    """

    def __init__(self, folder: Path, name: str, tokenizer: TokenizerSpec, *, has_known: bool = False) -> None:
        self.folder, self.name, self.tokenizer, self.has_known = folder, name, tokenizer, has_known
        self._records: list[tuple[object, ...]] = []
        self._keys: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: io.BufferedWriter = self._partial.open("wb")
        except OSError as error:
            raise self._storage_error(error) from error

    @property
    def _partial(self) -> Path:
        return self.folder / f"{self.name}.tar.partial"

    def _storage_error(self, error: OSError) -> StorageError:
        reason = error.strerror or error
        return StorageError(f"cannot write {self.folder / self.name}.tar: {reason}; free space or change --out")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            # Flushing what is buffered may fail as well (a full disk); the first error is the one to report.
            self._file.raw.close()
            self._partial.unlink(missing_ok=True)

    def add(self, sample: Sample) -> None:
        """Append a sample.

        Raises:
            DataError: its key cannot be a WebDataset key or is there already, or its latents are not the
                tokenizer's or not finite.
            StorageError: storage failed.
        """
        self._check(sample)
        latent = to_bytes(sample.latents_CFHW)
        optional = (sample.text_LD, sample.condition_CFHW, sample.image_LI)
        text, condition, image = (b"" if tensor is None else to_bytes(tensor) for tensor in optional)
        values = {
            **sample.meta,
            "key": sample.key,
            "caption": sample.caption,
            "frame_rate": sample.frame_rate,
            "shape": list(sample.shape),
            "text_shape": None if sample.text_LD is None else list(sample.text_LD.shape),
            "dtype": "bfloat16",
            "hash": hash_of(latent),
            "tokenizer": {"name": self.tokenizer.name, "version": self.tokenizer.version},
        }
        if self.has_known:
            values["known"] = list(sample.known)
            values["image_shape"] = None if sample.image_LI is None else list(sample.image_LI.shape)
        all_payloads = (latent, to_json_bytes(values), text, condition, image)
        payloads = all_payloads if self.has_known else all_payloads[:PLAIN_MEMBERS]
        offsets = [
            self._member(f"{sample.key}.{member}", payload) if payload else 0
            for member, payload in zip(MEMBERS, payloads, strict=False)
        ]
        self._keys.add(sample.key)
        self._records.append(
            (
                sample.key.encode(),
                offsets,
                [len(payload) for payload in payloads],
                sample.shape,
                [zlib.crc32(payload) for payload in payloads],
                0,
                list(bytes.fromhex(hash_of(*payloads))),
            )
        )

    def _check(self, sample: Sample) -> None:
        """Raise ``DataError`` for a sample that cannot be in this shard."""
        if not _KEY.fullmatch(sample.key) or sample.key in self._keys:
            raise DataError(
                f"{self.name}: sample key {sample.key!r} must be new and 1 to {KEY_BYTES} letters, digits, '_' or '-'"
            )
        if sample.shape[0] != self.tokenizer.channels:
            raise DataError(
                f"{self.name}: sample {sample.key} has {sample.shape[0]} channels, its tokenizer "
                f"{self.tokenizer.name} has {self.tokenizer.channels}"
            )
        for tensor in (sample.latents_CFHW, sample.text_LD, sample.condition_CFHW, sample.image_LI):
            if tensor is not None and not bool(tensor.isfinite().all()):
                raise DataError(f"{self.name}: sample {sample.key} has latents or features that are not finite")
        condition_CFHW = sample.condition_CFHW
        if (condition_CFHW is not None) != self.has_known or (
            condition_CFHW is not None and condition_CFHW.shape != sample.latents_CFHW.shape
        ):
            raise DataError(
                f"{self.name}: sample {sample.key} must carry latents of its known frames, of the shape of its own, "
                "if the others of its shard do"
            )

    def _member(self, name: str, payload: bytes) -> int:
        header = tarfile.TarInfo(name)
        header.size = len(payload)
        header.mode = 0o644
        try:
            self._file.write(header.tobuf(tarfile.USTAR_FORMAT))
            offset = self._file.tell()
            self._file.write(payload)
            self._file.write(bytes(-len(payload) % _BLOCK))
        except OSError as error:
            raise self._storage_error(error) from error
        return offset

    def finish(self) -> ShardInfo:
        """Write the index and make the shard appear.

        Raises:
            DataError: it has no sample.
            StorageError: storage failed.
        """
        if not self._records:
            self._file.close()
            self._partial.unlink(missing_ok=True)
            raise DataError(f"{self.folder / self.name}: a shard needs at least one sample")
        records = np.array(self._records, CONDITIONED_RECORD if self.has_known else RECORD)
        shapes = records["shape"]
        order = np.lexsort((records["offset"][:, 0], *(shapes[:, axis] for axis in (3, 2, 1, 0))))
        records = records[order]
        try:
            self._file.write(bytes(2 * _BLOCK))
            self._file.write(bytes(-self._file.tell() % tarfile.RECORDSIZE))
            tar_bytes = self._file.tell()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self.folder / f"{self.name}.tar")
        except OSError as error:
            raise self._storage_error(error) from error
        index = pack_index(records, tar_bytes)
        runs, counts = np.unique(records["shape"], axis=0, return_counts=True)
        info = ShardInfo(
            self.name,
            len(records),
            tar_bytes,
            len(index),
            hash_of(index),
            tuple(
                ((int(shape[0]), int(shape[1]), int(shape[2]), int(shape[3])), int(count))
                for shape, count in zip(runs, counts, strict=True)
            ),
        )
        write_aside(self.folder / f"{self.name}.idx", index)
        write_aside(self.folder / f"{self.name}.json", to_json_bytes(info.to_json()))
        return info


def write_dataset(
    folder: Path, tokenizer: TokenizerSpec, text: TextSpec, names: list[str], condition: ConditionSpec | None = None
) -> DatasetInfo:
    """Gather finished shards into dataset.json.

    Raises:
        DataError: there is none, or one is not finished.
        StorageError: storage failed.
    """
    shards = []
    for name in names:
        info = finished_shard(folder, name)
        if info is None:
            raise DataError(f"{folder / name}.tar is not finished; run `megavid prepare` again")
        shards.append(info)
    if not shards:
        raise DataError(f"{folder}: no shard was written: the source gave no clip")
    dataset = DatasetInfo(tokenizer, text, tuple(shards), condition or ConditionSpec())
    write_aside(folder / DATASET_FILE, to_json_bytes(dataset.to_json()))
    return dataset
