"""Writing a model in any layout: streaming, resumable, and all or nothing.

Owns ``write_model``. Everything is written to DST.partial, tensor after tensor through blocks of a few megabytes,
synced, and renamed to DST at the very end. An error removes the partial folder; a kill leaves it with its journal, and
the same call goes on where it ended.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from megavid import __version__
from megavid.checkpoint.convert.configs import Layout, beyond_wan
from megavid.checkpoint.convert.journal import JOURNAL, SYNC_BYTES, InUseError, Journal, open_lock
from megavid.checkpoint.convert.lazy import BLOCK_BYTES, LazyTensor
from megavid.checkpoint.convert.ledger import HashThread, bytes_of
from megavid.checkpoint.convert.record import RECORD, Side, TensorNote, record_bytes
from megavid.checkpoint.convert.source import ModelSource
from megavid.checkpoint.convert.target import MAX_SHARD_BYTES, Target, TargetFile, plan_target
from megavid.checkpoint.files import FileRecord, hash_file, sync_folder, write_file
from megavid.checkpoint.format import PARTIAL, code_of
from megavid.errors import CheckpointError, ConfigError, MegavidError, StorageError

ASKED = "asked.sha256"
"""What the folder of an unfinished pipeline is of, and its lock."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Progress = Callable[[int], object]
"""Called with the bytes that were written, or found written."""


def write_model(
    source: ModelSource,
    dst: Path,
    *,
    to: str,
    dtype: torch.dtype | None = None,
    dtype_of: Mapping[str, torch.dtype] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    command: str = "",
    keep: Sequence[str] = ("ema/",),
    progress: Progress = lambda count: None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write ``source`` to a new folder ``dst``, with conversion.json beside the weights.

    Args:
        source: the model.
        dst: must not exist; it appears when all of it is on the disk.
        to: "diffusers" (our inference class for a model that diffusers' has not), "megavid" or "original".
        dtype: see ``plan_target``.
        dtype_of: see ``plan_target``.
        max_shard_bytes: see ``plan_target``.
        command: how the user said it; another command does not go on with this one's partial folder.
        keep: see ``plan_target``.
        progress: hears of bytes.
        check: called with the whole folder before it gets its name; raises to call it off.

    Raises:
        ConfigError: ``dst`` exists, or the layout cannot hold the model.
        CheckpointError: the source is damaged; nothing stays behind.
        StorageError: the storage failed; after a full disk nothing stays behind.
    """
    dst = Path(dst)
    target = plan_target(
        source, layout_for(source, to), dtype=dtype, dtype_of=dtype_of, max_shard_bytes=max_shard_bytes, keep=keep
    )
    refuse_existing(dst)
    with new_folder(dst, JOURNAL) as (partial, note):
        journal = Journal(note)
        source.verify()
        fingerprint = _fingerprint(source, target, command)
        if not journal.read(fingerprint):
            clear_folder(partial)
            journal.begin(fingerprint)
        source.ledger.digests.update(journal.sources)
        digests, files = _write_tensors(source, target, partial, journal, progress)
        source.ledger.complete()
        record = record_bytes(
            _source_side(source), _target_side(dst, target, digests), source.config, _levels(source), command=command
        )
        for name, content in target.small_files(files, (RECORD, record)).items():
            (partial / name).unlink(missing_ok=True)
            write_file(partial / name, [content])
        if check is not None:
            check(partial)


def layout_for(source: ModelSource, to: str) -> Layout:
    """The layout that ``--to`` means for this model."""
    if to == "diffusers":
        return "inference" if beyond_wan(source.config) else "diffusers"
    if to == "original":
        return "original"
    if to == "megavid":
        return "megavid"
    raise ConfigError(f"--to {to} must be diffusers, megavid or original")


def refuse_existing(dst: Path) -> None:
    """Raise ``ConfigError`` where there is a ``dst`` already."""
    if dst.exists() or dst.is_symlink():
        raise ConfigError(f"{dst} exists; nothing is overwritten: remove it, or give another folder")


@contextmanager
def new_folder(dst: Path, marker: str) -> Iterator[tuple[Path, IO[bytes]]]:
    """A folder to write to, ``dst``.partial, that becomes ``dst`` when the body ends well; and its locked marker.

    The marker is a file, ``JOURNAL`` or ``ASKED``, by which the next try knows the folder as one of ours; it goes last,
    so that a kill at any point can be gone on from. An error of the body removes the folder, unless the storage failed
    otherwise than by being full: then, and after a kill or Ctrl-C, it stays for the next try.
    """
    partial = dst.with_name(dst.name + PARTIAL)
    with _going_on(partial):
        _refuse_foreign(partial)
        partial.mkdir(parents=True, exist_ok=True)
    try:
        with _going_on(partial), open_lock(partial / marker) as note:
            yield partial, note
            sync_folder(partial)
            refuse_existing(dst)
            os.rename(partial, dst)
            sync_folder(dst.parent)
            (dst / marker).unlink()
    except InUseError:
        raise
    except MegavidError as error:
        if not isinstance(error, StorageError) or (
            isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL
        ):
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _refuse_foreign(partial: Path) -> None:
    """Raise ``ConfigError`` where ``partial`` is there and no conversion has made it: it would be cleared."""
    is_ours = partial.is_dir() and not partial.is_symlink()
    if is_ours and any(partial.iterdir()):
        is_ours = any((partial / name).is_file() for name in (JOURNAL, ASKED))
    if not is_ours and (partial.exists() or partial.is_symlink()):
        raise ConfigError(
            f"{partial} exists and is no interrupted conversion, which is what stands there meanwhile; move it away, "
            "or give another DST"
        )


@contextmanager
def _going_on(partial: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the body into one line that says whether the same command goes on."""
    try:
        yield
    except OSError as error:
        what = f"cannot write {error.filename or partial}: {error.strerror or error}"
        if error.errno in FULL:
            raise StorageError(f"{what}; nothing was converted and {partial} was removed; free space") from error
        raise StorageError(f"{what}; check the storage; the same command goes on from {partial}") from error


def clear_folder(partial: Path) -> None:
    """Remove what another conversion has left."""
    for entry in partial.iterdir():
        if entry.name in (JOURNAL, ASKED):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _fingerprint(source: ModelSource, target: Target, command: str) -> str:
    """What must be the same for an interrupted conversion to go on."""
    heads = [[file.name, hashlib.sha256(file.head).hexdigest()] for file in target.files]
    facts = [__version__, source.identity, target.layout, heads, command]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _write_tensors(
    source: ModelSource, target: Target, partial: Path, journal: Journal, progress: Progress
) -> tuple[dict[str, str], dict[str, FileRecord]]:
    """Write every tensor file; returns the digest of every tensor by name, and every file."""
    digests: dict[str, str] = {}
    files: dict[str, FileRecord] = {}
    with HashThread() as of_tensor, HashThread() as of_file:
        writer = _Writer(source, journal, progress, of_tensor, of_file)
        for file in target.files:
            path, done = partial / file.name, journal.files.get(file.name)
            if done is not None and path.is_file() and hash_file(path) == done:
                progress(done.size)
            else:
                done = writer.write(path, file)
            files[file.name] = done
            digests |= {name: journal.tensors[name] for name in file.tensors}
    return digests, files


class _Writer:
    """Writes one file after another."""

    def __init__(
        self, source: ModelSource, journal: Journal, progress: Progress, of_tensor: HashThread, of_file: HashThread
    ) -> None:
        self.ledger, self.journal, self.progress = source.ledger, journal, progress
        self.of_tensor, self.of_file = of_tensor, of_file
        self._told = set(source.ledger.digests)
        self._unsynced = 0

    def write(self, path: Path, file: TargetFile) -> FileRecord:
        """Write a file, or the rest of it."""
        with open(path, "a+b", buffering=0) as out:
            digest, done = self._take_over(out, file)
            out.seek(0, os.SEEK_END)
            for name, tensor in list(file.tensors.items())[done:]:
                self._write_tensor(out, name, tensor, digest)
            self.of_file.wait()
            os.fsync(out.fileno())
            self._unsynced = 0
            record = FileRecord(os.fstat(out.fileno()).st_size, digest.hexdigest())
        assert record.size == file.size, (path, record.size, file.size)
        self.journal.note({"file": file.name, "size": record.size, "sha256": record.sha256})
        self.journal.commit()
        return record

    def _take_over(self, out: IO[bytes], file: TargetFile) -> "tuple[hashlib._Hash, int]":
        """Hash what is there already, check it against the journal, and cut off the rest; how many tensors stay."""
        digest, at, done = hashlib.sha256(file.head), len(file.head), 0
        size = os.fstat(out.fileno()).st_size
        is_begun = size >= at and os.pread(out.fileno(), at, 0) == file.head
        for name, tensor in file.tensors.items() if is_begun else ():
            known = self.journal.tensors.get(name)
            if known is None or at + tensor.nbytes > size:
                break
            ahead, own = digest.copy(), hashlib.sha256()
            for start in range(0, tensor.nbytes, BLOCK_BYTES):
                block = os.pread(out.fileno(), min(BLOCK_BYTES, tensor.nbytes - start), at + start)
                ahead.update(block)
                own.update(block)
            if own.hexdigest() != known:
                break
            digest, at, done = ahead, at + tensor.nbytes, done + 1
        out.truncate(at if is_begun else 0)
        if not is_begun:
            out.seek(0)
            _write_all(out, memoryview(file.head))
        self.progress(at)
        return digest, done

    def _write_tensor(self, out: IO[bytes], name: str, tensor: LazyTensor, of_file: "hashlib._Hash") -> None:
        """Write one tensor, hashed for itself and for the file."""
        own = hashlib.sha256()
        # Bytes that leave as they come are hashed once for both sides.
        known = self.ledger.tensors.get(tensor.key)
        is_same = known is not None and known.dtype == tensor.dtype
        with self.ledger.elsewhere(tensor.key) if is_same else nullcontext():
            for block in tensor.blocks():
                _check_finite(block, tensor, name)
                data = bytes_of(block)
                self.of_tensor.update(own, data)
                self.of_file.update(of_file, data)
                _write_all(out, data)
                self.progress(len(data))
        self.of_tensor.wait()
        if is_same:
            self.ledger.record(tensor.key, own.hexdigest())
        self.journal.tensors[name] = own.hexdigest()
        fresh = {key: digest for key, digest in self.ledger.digests.items() if key not in self._told}
        self._told |= fresh.keys()
        self.journal.note({"tensor": name, "sha256": own.hexdigest(), "sources": fresh})
        self._unsynced += tensor.nbytes
        if self._unsynced >= SYNC_BYTES:
            os.fsync(out.fileno())
            self._unsynced = 0
            self.journal.commit()


def _check_finite(block: Tensor, tensor: LazyTensor, name: str) -> None:
    """fp16 ends at 65,504: a number beyond it must not become infinite without a word."""
    if block.dtype == torch.float16 and not tensor.key and not torch.isfinite(block).all():
        raise CheckpointError(f"tensor {name} has numbers beyond fp16's 65,504 ({tensor.where}); use --dtype bf16")


def _write_all(out: IO[bytes], data: memoryview) -> None:
    while data:  # a raw write may take less than it was given
        data = data[out.write(data) :]


def _levels(source: ModelSource) -> dict[str, float]:
    """What the weights know of noise levels, keys of ``diffusion``."""
    diffusion = source.run.diffusion
    return {
        "sigma_min": diffusion.sigma_min,
        "sigma_max": diffusion.sigma_max,
        "flow_shift": diffusion.flow_shift,
    }


def _source_side(source: ModelSource) -> Side:
    notes = {
        key: TensorNote(code_of(tensor.dtype, key), tensor.shape, source.ledger.digests[key])
        for key, tensor in source.ledger.tensors.items()
    }
    return Side(str(source.path), source.layout, notes)


def _target_side(dst: Path, target: Target, digests: Mapping[str, str]) -> Side:
    notes = {
        name: TensorNote(code_of(tensor.dtype, name), tensor.shape, digests[name])
        for name, tensor in target.tensors.items()
    }
    return Side(str(dst), target.layout, notes)
