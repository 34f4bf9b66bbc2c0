"""What a data set of shards is on disk.

::

    DIR/dataset.json          tokenizer, text encoder, and every shard with its sizes, counts and index hash
    DIR/shard_00000.tar       USTAR, as WebDataset reads it: KEY.latent, KEY.json and, where text was encoded
                              ahead, KEY.text of each sample; where frames are known, KEY.condition, their latents,
                              and where pictures were encoded, KEY.image
    DIR/shard_00000.idx       fixed-width records: offset, length, shape and hash of every member
    DIR/shard_00000.json      the shard's entry of dataset.json; its presence says that the shard is complete

All but KEY.json are raw little-endian bf16; their shapes are in KEY.json. Records of an index lie by
(latent shape, place in the tar), so a bucket is one run of neighbours in each shard and needs no list of
samples. A data set without known frames is of version 1, the only one that the first megavid knew; one with
them is of version 2, whose records have two members more.

Owns the layout of these files and their reading as records; ``shard_writer`` writes them, ``shards`` reads samples.
"""

import errno
import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from megavid.data.sample import ConditionSpec, Shape, TextSpec, TokenizerSpec
from megavid.errors import DataError, StorageError

DATASET_FILE = "dataset.json"
FORMAT = "megavid-shards"
PLAIN_VERSION, CONDITIONED_VERSION = 1, 2
KEY_BYTES = 64

HEADER = np.dtype([("magic", "S8"), ("record_bytes", "<u4"), ("crc", "<u4"), ("count", "<u8"), ("tar_bytes", "<u8")])
MEMBERS = ("latent", "json", "text", "condition", "image")
PLAIN_MEMBERS = 3
"""Members that records of version 1 know."""


def _record(members: int) -> "np.dtype[np.void]":
    return np.dtype(
        [
            ("key", f"S{KEY_BYTES}"),
            ("offset", "<u8", (members,)),  # of the payload in the tar; in the order of MEMBERS; 0 where there is none
            ("length", "<u8", (members,)),
            ("shape", "<u4", (4,)),
            ("crc", "<u4", (members,)),  # zlib.crc32 of each payload: checked on every read
            ("reserved", "<u4"),
            ("digest", "u1", (16,)),  # BLAKE2b of the payloads one after another: checked at rest
        ]
    )


RECORD, CONDITIONED_RECORD = _record(PLAIN_MEMBERS), _record(len(MEMBERS))
"""Records of version 1 and 2."""
_MAGIC = {RECORD: b"MVIDIDX1", CONDITIONED_RECORD: b"MVIDIDX2"}


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
    condition: ConditionSpec = field(default_factory=ConditionSpec)

    @property
    def samples(self) -> int:
        """Clips in all."""
        return sum(shard.samples for shard in self.shards)

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        values: dict[str, object] = {
            "format": FORMAT,
            "version": CONDITIONED_VERSION if self.condition.known else PLAIN_VERSION,
            "samples": self.samples,
            "tokenizer": asdict(self.tokenizer),
            "text": asdict(self.text),
            "shards": [shard.to_json() for shard in self.shards],
        }
        return values | ({"condition": asdict(self.condition)} if self.condition.known else {})


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
    if values.get("format") != FORMAT or values.get("version") not in (PLAIN_VERSION, CONDITIONED_VERSION):
        raise DataError(
            f"{file} is of format {values.get('format')!r} version {values.get('version')!r}; "
            f"this megavid reads {FORMAT!r} versions {PLAIN_VERSION} and {CONDITIONED_VERSION}"
        )
    condition = _condition(values, file)
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
                condition,
            )
            if info.samples == samples:
                return info
    raise DataError(f"{file} is damaged: a field is missing or the counts do not add up; run `megavid prepare` again")


def _condition(values: Mapping[str, object], file: Path) -> ConditionSpec:
    """What dataset.json says of known frames; version 1 has none."""
    if values["version"] == PLAIN_VERSION:
        return ConditionSpec()
    match values.get("condition"):
        case {
            "known": str(known), "image": str(image), "version": str(version), "width": int(width),
            "length": int(length), "file": str(folder),
        }:  # fmt: skip
            return ConditionSpec(known, image, version, width, length, folder)
    raise DataError(f"{file} is damaged: it does not say which frames are known; run `megavid prepare` again")


def pack_index(records: np.ndarray, tar_bytes: int) -> bytes:
    """An index file: header and records (already in order)."""
    body = records.tobytes()
    magic, size = _MAGIC[records.dtype], records.dtype.itemsize
    header = np.array([(magic, size, zlib.crc32(body), len(records), tar_bytes)], HEADER)
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
    known = [kind for kind, magic in _MAGIC.items() if header["magic"] == magic]
    if not known or header["record_bytes"] != known[0].itemsize or header["count"] != shard.samples:
        raise DataError(f"{file} is not an index of this megavid, or not of {shard.samples} samples")
    return np.frombuffer(mapped, known[0], count=shard.samples, offset=HEADER.itemsize)


def hash_of(*payloads: bytes | mmap.mmap) -> str:
    """BLAKE2b of payloads one after another, 128 bits, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for payload in payloads:
        digest.update(payload)
    return digest.hexdigest()


def write_aside(file: Path, content: bytes) -> None:
    """Write a small file whole or not at all, and return once it is on the disk; other processes may do the same.

    Raises:
        StorageError: storage failed.
    """
    partial = file.with_name(f"{file.name}.{os.uname().nodename}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # FUSE and CIFS cannot fsync a folder
                raise
        finally:
            os.close(folder)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"cannot write {file}: {error.strerror or error}; free space or change --out") from error


def to_json_bytes(values: Mapping[str, object]) -> bytes:
    """JSON in UTF-8 with sorted keys: the same bytes for the same values."""
    return json.dumps(values, sort_keys=True, ensure_ascii=False).encode()
