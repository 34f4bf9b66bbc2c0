"""``manifest.json``: the size and hash of every file of a checkpoint; its own hash is in ``manifest.sha256``.

Owns making, reading and checking it. A file that the manifest does not list is never read. SHA-256,
because every machine that trains computes it in hardware (1.4 GiB/s a thread where BLAKE2b gave 0.7) and
``sha256sum`` checks it without us.
"""

import hashlib
import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import megavid
from megavid.checkpoint.files import FileRecord, hash_file, reading
from megavid.checkpoint.format import DIGEST, FORMAT, MANIFEST, VERSION, check_file_name
from megavid.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint is.

    Attributes:
        step: optimizer steps done.
        layout: how the ranks stood when it was saved, as ``Layout.describe`` says it.
        world_size: ranks that wrote it.
        versions: of megavid, torch, megatron-core and Python at that time.
        files: every file but the manifest and its digest, by name.
    """

    step: int
    layout: str
    world_size: int
    versions: dict[str, str]
    files: dict[str, FileRecord]

    def to_bytes(self) -> bytes:
        """The content of ``manifest.json``."""
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "layout": self.layout,
            "world_size": self.world_size,
            "versions": self.versions,
            "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in sorted(self.files.items())},
        }
        return (json.dumps(fields, indent=1) + "\n").encode()


def digest_text(manifest: bytes) -> bytes:
    """The content of ``manifest.sha256``, in the form of ``sha256sum``."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def versions_here() -> dict[str, str]:
    """Versions that a reader of the checkpoint may want to know."""
    try:
        core = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        core = "absent"
    return {
        "megavid": megavid.__version__,
        "torch": str(torch.__version__),
        "megatron-core": core,
        "python": platform.python_version(),
    }


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in ``folder``, checked against its digest.

    Raises:
        CheckpointError: no checkpoint is here, it is of a newer format, or the manifest or its digest is damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give the folder of a checkpoint, step_XXXXXXXX")
    path, beside = folder / MANIFEST, folder / DIGEST
    with reading(path):
        content = path.read_bytes()
    with reading(beside):
        digest = beside.read_bytes()
    if digest != digest_text(content):
        raise CheckpointError(f"{path} does not match {DIGEST}: one of the two is damaged; load another checkpoint")
    fields = decode(content, path)
    if fields.get("format") != FORMAT or fields.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is of format {fields.get('format')} version {fields.get('version')}; this megavid "
            f"reads {FORMAT} version {VERSION}"
        )
    try:
        files = {
            check_file_name(name, path): FileRecord(file["size"], file["sha256"])
            for name, file in fields["files"].items()
        }
        return Manifest(fields["step"], fields["layout"], fields["world_size"], fields["versions"], files)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not what this megavid writes: {type(error).__name__} {error}") from error


def decode(content: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in ``content``, which was read from ``path``.

    Raises:
        CheckpointError: it is no JSON object.
    """
    try:
        fields = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds {type(fields).__name__}, expected an object")
    return fields


def check_file(folder: Path, name: str, manifest: Manifest) -> None:
    """Check the whole of one file against the manifest.

    Raises:
        CheckpointError: missing, of another length, or with other content.
    """
    path, expected = folder / name, manifest.files[name]
    with reading(path):
        size = path.stat().st_size
    _check(path, FileRecord(size, expected.sha256), expected)  # the length costs nothing, so it comes first
    _check(path, hash_file(path), expected)


def read_checked(folder: Path, name: str, manifest: Manifest) -> bytes:
    """The content of a small file, checked against the manifest.

    Raises:
        CheckpointError: not in the manifest, missing or damaged.
    """
    path = folder / name
    if name not in manifest.files:
        raise CheckpointError(f"{folder / MANIFEST} lists no {name}: this is not a checkpoint that megavid wrote")
    with reading(path):
        content = path.read_bytes()
    _check(path, FileRecord(len(content), hashlib.sha256(content).hexdigest()), manifest.files[name])
    return content


def _check(path: Path, got: FileRecord, expected: FileRecord) -> None:
    if got.size != expected.size:
        raise CheckpointError(
            f"{path} has {got.size} bytes, expected {expected.size}: it is damaged; load another checkpoint"
        )
    if got.sha256 != expected.sha256:
        raise CheckpointError(
            f"{path} has SHA-256 {got.sha256[:16]}..., expected {expected.sha256[:16]}...: it is damaged; "
            "load another checkpoint"
        )
