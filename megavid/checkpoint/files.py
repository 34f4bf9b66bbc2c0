"""Writing files so that they are on the disk, and reading them with every failure as one line.

Owns fsync, atomic replacement, hashing and the translation of ``OSError``; knows nothing of what files mean.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megavid.errors import CheckpointError, StorageError

BLOCK = 8 << 20
"""Bytes hashed or written at a time: long enough that threads spend their time outside of Python."""

ASIDE = ".new"  # what is written beside a file before it takes its name

_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP}  # FUSE and CIFS cannot fsync a folder


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must be.

    Attributes:
        size: bytes.
        sha256: hexadecimal digest.
    """

    size: int
    sha256: str


def nothing() -> None:
    """A ``beat`` for callers that nobody watches."""


@contextmanager
def storage_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the body into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot {doing} {error.filename or path}: {error.strerror or error}; {_way_out(error)}"
        ) from error


def _way_out(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free space or raise the limit; earlier checkpoints are intact"
    if error.errno == errno.ENOENT:
        return "every rank must see the same folder of checkpoints; earlier checkpoints are intact"
    return "check the storage; earlier checkpoints are intact"


def write_file(
    path: Path,
    blocks: Iterable[bytes | memoryview],
    *,
    beat: Callable[[], None] = nothing,
    reread: bool = False,
) -> FileRecord:
    """Write a new file, hashed on the way, and return once it is on the disk.

    Args:
        path: must not exist.
        blocks: the content, one block after another.
        beat: called after each block; shows that the writer lives, and may raise to stop it.
        reread: read the file back past the page cache and compare.

    Raises:
        StorageError: full, failing or over a limit.
    """
    digest, size = hashlib.sha256(), 0
    with storage_errors("write", path), open(path, "xb", buffering=0) as file:
        for block in blocks:
            view = memoryview(block)
            for start in range(0, len(view), BLOCK):
                piece = view[start : start + BLOCK]
                digest.update(piece)
                while piece:  # a raw write may take less than it was given
                    piece = piece[file.write(piece) :]
                size += len(view[start : start + BLOCK])
                beat()
        os.fsync(file.fileno())
        if reread:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    record = FileRecord(size, digest.hexdigest())
    if reread and hash_file(path, beat=beat) != record:
        raise StorageError(
            f"{path} reads back other than it was written; check the storage; earlier checkpoints are intact"
        )
    return record


def hash_file(path: Path, *, beat: Callable[[], None] = nothing) -> FileRecord:
    """Size and digest of a file as it is.

    Raises:
        CheckpointError: it is missing.
        StorageError: it cannot be read.
    """
    digest, size, block = hashlib.sha256(), 0, bytearray(BLOCK)
    with reading(path), open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
            size += count
            beat()
    return FileRecord(size, digest.hexdigest())


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the body into a ``CheckpointError`` (no such file) or a ``StorageError``."""
    try:
        yield
    except OSError as error:
        if error.errno in _MISSING:
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete; load another one") from error
        raise StorageError(f"cannot read {path}: {error.strerror or error}; check the storage") from error


def sync_folder(path: Path) -> None:
    """Return once the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str, *, token: str = "", check: Callable[[], None] = nothing) -> None:
    """As ``replace_bytes``, of a text."""
    replace_bytes(path, text.encode(), token=token, check=check)


def replace_bytes(path: Path, content: bytes, *, token: str = "", check: Callable[[], None] = nothing) -> None:
    """Make ``content`` that of ``path``: after a crash it is the former content or this one, never a mixture.

    Args:
        path: what to replace.
        content: its new content.
        token: goes into the name of the file that is written aside.
        check: called between writing aside and replacing; may raise.

    Raises:
        StorageError: it could not be written; the former content stands.
    """
    aside = path.with_name(f"{path.name}{token and '.'}{token}{ASIDE}")
    with storage_errors("write", path):
        aside.unlink(missing_ok=True)
        write_file(aside, [content])
        try:
            check()
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        os.replace(aside, path)
        sync_folder(path.parent)
