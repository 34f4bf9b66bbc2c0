"""Rank 0's share of a save: wait until every rank's part is there, make the checkpoint whole, and give it its name.

Ranks agree through files, not through collectives: the writers are threads behind the step loop, and a
collective there would run beside the step's own. Merging is left to rank 0 alone, so that a checkpoint has
one index whatever the world size; at 512 ranks that is some hundred thousand boxes, seconds of a
background thread.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megavid.checkpoint.fence import Fence
from megavid.checkpoint.files import storage_errors, sync_folder, write_file
from megavid.checkpoint.format import (
    DIGEST,
    INDEX,
    MANIFEST,
    RUN,
    STATE,
    failed_file,
    part_file,
    partial_name,
)
from megavid.checkpoint.index import Index, check_cover
from megavid.checkpoint.manifest import Manifest, decode, digest_text, versions_here
from megavid.checkpoint.retention import prune, publish
from megavid.checkpoint.write import Part
from megavid.errors import StorageError


@dataclass(frozen=True)
class Target:
    """What is being saved, and where.

    Attributes:
        checkpoints: folder of all checkpoints; every rank must see the same one.
        step: optimizer steps done.
        state: content of ``state.json``.
        run: content of ``run.toml``.
        layout: how the ranks stand, for people.
        world_size: ranks that write.
        extra: more small files that belong to it, by name.
        fence: this start's right to write.
    """

    checkpoints: Path
    step: int
    state: bytes
    run: bytes
    layout: str
    world_size: int
    extra: Mapping[str, bytes] = field(default_factory=dict)
    fence: Fence = field(default_factory=Fence)

    @property
    def partial(self) -> Path:
        """Where it is written: no two starts of a run write to the same place."""
        return self.checkpoints / partial_name(self.step, self.fence.token)


class CalledOffError(Exception):
    """Another rank failed, and tells why at the next poll; this one stops."""


def tell_failure(target: Target, rank: int) -> None:
    """Leave word for rank 0's thread that this rank failed; why is told in memory: a full disk has no room."""
    with suppress(OSError):  # not even for a name; then rank 0 hears of it at the next poll
        (target.partial / failed_file(rank)).touch()


def wait_for_parts(target: Target, *, beat: Callable[[], None], stall_s: float) -> list[Part]:
    """The parts of all ranks, once each has written its own.

    Args:
        target: what is being saved.
        beat: called while waiting; raises when the save is called off.
        stall_s: give up when no file has grown for this long: a long save is no fault, a standstill is.

    Raises:
        CalledOffError: a rank failed.
        StorageError: nothing moves.
    """
    folder, pause = target.partial, 0.005
    moved, size, looked = time.monotonic(), -1, float("-inf")
    while True:
        with storage_errors("list", folder):
            names = {entry.name for entry in folder.iterdir()}
        if any(failed_file(rank) in names for rank in range(target.world_size)):
            raise CalledOffError
        missing = [rank for rank in range(target.world_size) if part_file(rank) not in names]
        if not missing:
            break
        if time.monotonic() - looked > stall_s / 20:  # sizes cost the file system more than names do
            looked, now = time.monotonic(), _bytes_in(folder)
            if now != size:
                moved, size = looked, now
        if time.monotonic() - moved > stall_s:
            raise StorageError(
                f"saving step {target.step}: nothing was written to {folder} for {stall_s:g} s; ranks "
                f"{missing[:8]} ({len(missing)} of {target.world_size}) have not finished; check their machines "
                "and the storage"
            )
        beat()
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    parts = []
    for rank in range(target.world_size):
        path = folder / part_file(rank)
        with storage_errors("read", path):
            parts.append(Part.from_json(decode(path.read_bytes(), path), path))
    return parts


def _bytes_in(folder: Path) -> int:
    total = 0
    for entry in folder.iterdir():
        try:
            total += entry.stat().st_size + 1
        except FileNotFoundError:  # it was renamed while we looked
            continue
    return total


def commit(target: Target, *, keep_last: int, keep_every: int, beat: Callable[[], None], stall_s: float) -> None:
    """Wait for all parts, write index, state and manifest, verify, publish, and delete what is no longer kept.

    Raises:
        CalledOffError: a rank failed.
        StorageError: the storage failed; the former checkpoint stands.
        Superseded: another start of the run writes now; nothing of this save shows.
        CheckpointError: the ranks' boxes do not cover every tensor exactly once.
    """
    folder = target.partial
    parts = wait_for_parts(target, beat=beat, stall_s=stall_s)
    index = Index.merge(part.index for part in parts)
    for name in index.tensors:
        record = index.record(name)
        assert record is not None
        check_cover(name, record)
        beat()
    files = {name: file for part in parts for name, file in part.files.items()}
    content = json.dumps(index.to_json(), separators=(",", ":")).encode()
    for name, text in ((INDEX, content), (STATE, target.state), (RUN, target.run), *target.extra.items()):
        files[name] = write_file(folder / name, [text], beat=beat)
    manifest = Manifest(target.step, target.layout, target.world_size, versions_here(), files)
    write_file(folder / MANIFEST, [manifest.to_bytes()])
    write_file(folder / DIGEST, [digest_text(manifest.to_bytes())])
    _check_sizes(folder, manifest)
    with storage_errors("tidy", folder):
        for rank in range(target.world_size):
            (folder / part_file(rank)).unlink()
        sync_folder(folder)
    beat()
    publish(target.checkpoints, target.step, folder, target.fence)
    target.fence.check()
    prune(target.checkpoints, newest=target.step, keep_last=keep_last, keep_every=keep_every)


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    """Every file is as long, seen from rank 0, as the rank that hashed it wrote it."""
    for name, file in manifest.files.items():
        with storage_errors("read", folder / name):
            size = (folder / name).stat().st_size
        if size != file.size:
            raise StorageError(f"{folder / name} has {size} bytes, but {file.size} were written; check the storage")
