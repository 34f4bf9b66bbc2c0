"""The names and bytes of a checkpoint on disk: pure, no files are touched here.

One folder per step::

    step_00000100/
        rank_00000.safetensors      the boxes that rank 0 owned; rank_00000_01.safetensors, ... where they are many
        index.json                  every tensor: dtype, shape, and its boxes with file and byte offset
        state.json, run.toml        step, data position, random state; the resolved config
        manifest.json               size and SHA-256 of every file above, step, layout, versions
        manifest.sha256             the digest of manifest.json (``sha256sum -c manifest.sha256`` checks it)
    latest                          beside the steps: a text file with the name of one of them

Why not ``torch.distributed.checkpoint``: who writes and reads what follows from each fragment's boxes by
arithmetic, so its gathered plans are not needed, and its index is a pickle. What is left of it would be a
payload format (``torch.save`` in a zip) and private interfaces. safetensors files are read by everybody,
by positioned reads, and cannot run code.
"""

import json
import re
from pathlib import Path

import torch

from megavid.errors import CheckpointError
from megavid.parallel.fragment import Box

FORMAT = "megavid.checkpoint"
VERSION = 1

INDEX = "index.json"
STATE = "state.json"
RUN = "run.toml"
MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
LATEST = "latest"

PARTIAL = ".partial"  # a save that is not finished
REPLACED = ".replaced"  # the former checkpoint of a step, while the step is saved again
REMOVED = ".removed"  # a checkpoint that retention is deleting

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the number formats."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_STEP = re.compile(r"step_(\d{8,})")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def code_of(dtype: torch.dtype, name: str) -> str:
    """safetensors' name of ``dtype``; ``name`` is the tensor, for the message.

    Raises:
        CheckpointError: safetensors has no such number format.
    """
    if dtype not in _CODES:
        raise CheckpointError(
            f"tensor {name} has dtype {dtype}, which a checkpoint cannot hold; one of {', '.join(DTYPES)}"
        )
    return _CODES[dtype]


def step_name(step: int) -> str:
    """Folder of the checkpoint of ``step``."""
    return f"step_{step:08d}"


def partial_name(step: int, token: str) -> str:
    """Folder in which the start with ``token`` writes the checkpoint of ``step``."""
    return f"{step_name(step)}{token and '.'}{token}{PARTIAL}"


def step_of(name: str) -> int | None:
    """The step whose folder is called ``name``; None where it is no such name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


def tensor_file(rank: int, number: int) -> str:
    """File ``number`` (from 0) of the tensors that ``rank`` owns."""
    return f"rank_{rank:05d}.safetensors" if number == 0 else f"rank_{rank:05d}_{number:02d}.safetensors"


def part_file(rank: int) -> str:
    """What ``rank`` wrote, with sizes and hashes; it appears whole, when all of the rank's files are on
    disk."""
    return f"part_{rank:05d}.json"


def failed_file(rank: int) -> str:
    """Says that ``rank`` could not write its part; empty."""
    return f"failed_{rank:05d}.json"


def check_file_name(name: object, where: Path) -> str:
    """``name`` if it can only be a file of this very folder: an index must not reach outside of it."""
    if not isinstance(name, str) or not _FILE.fullmatch(name):
        raise CheckpointError(f"{where} names a file {name!r}, which cannot be in a checkpoint")
    return name


def entry_name(name: str, box: Box) -> str:
    """Name of one box in a safetensors file: ``kind/name@offset,offset``."""
    return f"{name}@{','.join(map(str, box.offset))}"


def header(entries: list[tuple[str, str, tuple[int, ...], int, int]], step: int) -> bytes:
    """The bytes before the data of a safetensors file.

    Args:
        entries: name, dtype code, shape, and first and last (exclusive) byte in the data, in order and
            without gaps.
        step: goes into the metadata, so that a file that got lost says where it belongs.
    """
    fields: dict[str, object] = {"__metadata__": {"format": FORMAT, "step": str(step)}}
    for name, code, shape, start, stop in entries:
        fields[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of 8 bytes, as the format asks
    return len(text).to_bytes(8, "little") + text
