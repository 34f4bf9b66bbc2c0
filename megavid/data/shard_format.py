"""What a data set of shards is on disk.

::

    DIR/dataset.json          tokenizer, text encoder, and every shard with its sizes, counts and index hash
    DIR/shard_00000.tar       USTAR, as WebDataset reads it: KEY.latent, KEY.json and, where text was encoded
                              ahead, KEY.text of each sample
    DIR/shard_00000.idx       fixed-width records: offset, length, shape and hash of every member
    DIR/shard_00000.json      the shard's entry of dataset.json; its presence says that the shard is complete

KEY.latent and KEY.text are raw little-endian bf16; their shapes are in KEY.json. Records of an index lie by
(latent shape, place in the tar), so a bucket is one run of neighbours in each shard and needs no list of
samples.

Owns the layout of these files and their reading as records; ``shard_writer`` writes them, ``shards`` reads samples.
"""

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megavid.data.sample import Shape, TextSpec, TokenizerSpec
from megavid.errors import DataError, StorageError

DATASET_FILE = "dataset.json"
FORMAT = "megavid-shards"
FORMAT_VERSION = 1
MAGIC = b"MVIDIDX1"
KEY_BYTES = 64

HEADER = np.dtype([("magic", "S8"), ("record_bytes", "<u4"), ("crc", "<u4"), ("count", "<u8"), ("tar_bytes", "<u8")])
MEMBERS = ("latent", "json", "text")
RECORD = np.dtype(
    [
        ("key", f"S{KEY_BYTES}"),
        ("offset", "<u8", (3,)),  # of the payload in the tar; in the order of MEMBERS; text: 0 where there is none
        ("length", "<u8", (3,)),
        ("shape", "<u4", (4,)),
        ("crc", "<u4", (3,)),  # zlib.crc32 of each payload: checked on every read
        ("reserved", "<u4"),
        ("digest", "u1", (16,)),  # BLAKE2b of the payloads one after another: checked at rest
    ]
)


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard, as dataset.json lists it."""

    name: str
    samples: int
    tar_bytes: int
    index_bytes: int
    index_hash: str
    """BLAKE2b of the index file."""
    buckets: tuple[tuple[Shape, int], ...]
    """Runs of the index: latent shape, count."""

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: object, file: Path) -> "ShardInfo":
        """Read back.

        Raises:
            DataError: it is not a shard's entry.
        """
        match values:
            case {
                "name": str(name),
                "samples": int(samples),
                "tar_bytes": int(tar_bytes),
                "index_bytes": int(index_bytes),
                "index_hash": str(index_hash),
                "buckets": [*runs],
            } if "/" not in name:
                buckets = []
                for run in runs:
                    match run:
                        case [[int(c), int(f), int(h), int(w)], int(count)] if count > 0:
                            buckets.append(((c, f, h, w), count))
                if len(buckets) == len(runs) and sum(count for _, count in buckets) == samples:
                    return cls(name, samples, tar_bytes, index_bytes, index_hash, tuple(buckets))
        raise DataError(f"{file}: an entry of a shard is damaged; run `megavid prepare` again")


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """dataset.json."""

    tokenizer: TokenizerSpec
    text: TextSpec
    shards: tuple[ShardInfo, ...]

    @property
    def samples(self) -> int:
        """Clips in all."""
        return sum(shard.samples for shard in self.shards)

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "samples": self.samples,
            "tokenizer": asdict(self.tokenizer),
            "text": asdict(self.text),
            "shards": [shard.to_json() for shard in self.shards],
        }


def read_json(file: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        DataError: it is missing or not a JSON object.
        StorageError: it cannot be read.
    """
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing") from error
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error}") from error
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}); it is damaged") from error
    if not isinstance(values, dict):
        raise DataError(f"{file} is not a JSON object; it is damaged")
    return values


def read_dataset(folder: Path) -> DatasetInfo:
    """Read dataset.json.

    Raises:
        DataError: it is missing, damaged, or of a version that this megavid does not read.
    """
    file = folder / DATASET_FILE
    if not file.exists():
        raise DataError(
            f"{file} is missing: {folder} is not a folder of shards; "
            f"write one with `megavid prepare SOURCE --out {folder}`"
        )
    values = read_json(file)
    if (values.get("format"), values.get("version")) != (FORMAT, FORMAT_VERSION):
        raise DataError(
            f"{file} is of format {values.get('format')!r} version {values.get('version')!r}; "
            f"this megavid reads {FORMAT!r} version {FORMAT_VERSION}"
        )
    match values:
        case {
            "samples": int(samples),
            "tokenizer": {
                "name": str(name),
                "version": str(version),
                "channels": int(channels),
                "spatial": int(spatial),
                "temporal": int(temporal),
                "scaling": str(scaling),
            },
            "text": {
                "name": str(text),
                "version": str(text_version),
                "width": int(width),
                "length": int(length),
                "file": str(text_file),
            },
            "shards": [*shards],
        } if shards:
            info = DatasetInfo(
                TokenizerSpec(name, version, channels, spatial, temporal, scaling),
                TextSpec(text, text_version, width, length, text_file),
                tuple(ShardInfo.from_json(shard, file) for shard in shards),
            )
            if info.samples == samples:
                return info
    raise DataError(f"{file} is damaged: a field is missing or the counts do not add up; run `megavid prepare` again")


def pack_index(records: np.ndarray, tar_bytes: int) -> bytes:
    """An index file: header and records (already in order)."""
    body = records.tobytes()
    header = np.array([(MAGIC, RECORD.itemsize, zlib.crc32(body), len(records), tar_bytes)], HEADER)
    return header.tobytes() + body


def open_index(folder: Path, shard: ShardInfo) -> np.ndarray:
    """Memory-map the records of a shard after checking them against dataset.json; ranks of a node share the pages.

    Raises:
        DataError: the file is not the index that dataset.json speaks of.
        StorageError: it cannot be read.
    """
    file = folder / f"{shard.name}.idx"
    try:
        with file.open("rb") as handle:
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing") from error
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {file}: {error}") from error
    if len(mapped) != shard.index_bytes or hash_of(mapped) != shard.index_hash:
        raise DataError(f"{file} is damaged: it is not the index that {folder / DATASET_FILE} lists")
    header = np.frombuffer(mapped, HEADER, count=1)[0]
    if header["magic"] != MAGIC or header["record_bytes"] != RECORD.itemsize or header["count"] != shard.samples:
        raise DataError(f"{file} is not an index of this megavid, or not of {shard.samples} samples")
    return np.frombuffer(mapped, RECORD, count=shard.samples, offset=HEADER.itemsize)


def hash_of(*payloads: bytes | mmap.mmap) -> str:
    """BLAKE2b of payloads one after another, 128 bits, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for payload in payloads:
        digest.update(payload)
    return digest.hexdigest()


def write_aside(file: Path, content: bytes) -> None:
    """Write a small file whole or not at all.

    Raises:
        StorageError: storage failed.
    """
    partial = file.with_name(file.name + ".partial")
    try:
        with partial.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(file)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error.strerror or error}; free space or change --out") from error


def to_json_bytes(values: Mapping[str, object]) -> bytes:
    """JSON in UTF-8 with sorted keys: the same bytes for the same values."""
    return json.dumps(values, sort_keys=True, ensure_ascii=False).encode()
