"""Which checkpoints there are, which one is meant, and which ones stay.

Owns the folder of checkpoints: finding, resolving what a user typed, publishing a finished save,
retention, and tidying what a killed run left. Only rank 0 changes anything here.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from megavid.checkpoint.fence import Fence
from megavid.checkpoint.files import ASIDE, reading, replace_text, storage_errors, sync_folder
from megavid.checkpoint.format import LATEST, MANIFEST, PARTIAL, REMOVED, REPLACED, step_name, step_of
from megavid.errors import CheckpointError

log = logging.getLogger(__name__)

STALE_S = 1.0
"""How long a pointer that names nothing is read again: network file systems show old content for a moment."""


def list_steps(checkpoints: Path) -> list[int]:
    """Steps of the finished checkpoints in a folder, rising; empty where there is no such folder."""
    if not checkpoints.is_dir():
        return []
    steps = [step_of(entry.name) for entry in checkpoints.iterdir() if (entry / MANIFEST).is_file()]
    return sorted(step for step in steps if step is not None)


def latest(checkpoints: Path) -> Path | None:
    """The checkpoint that ``latest`` points to; None where nothing was saved yet.

    Raises:
        CheckpointError: ``latest`` is damaged, or what it names is gone.
    """
    pointer = checkpoints / LATEST
    if not pointer.exists():  # a run that was killed between its first checkpoint and its first pointer
        steps = list_steps(checkpoints)
        return checkpoints / step_name(steps[-1]) if steps else None
    deadline = time.monotonic() + STALE_S
    while True:
        with reading(pointer):
            content = pointer.read_bytes()
        name = content.decode("ascii", errors="replace").removesuffix("\n")
        found = _folder_of(checkpoints, name) if step_of(name) is not None else None
        if found is not None:
            return found
        if step_of(name) is None or time.monotonic() > deadline:
            break
        time.sleep(STALE_S / 10)  # an old pointer from a cache names a checkpoint that was deleted since
    there = ", ".join(step_name(step) for step in list_steps(checkpoints)) or "none"
    if step_of(name) is None:
        raise CheckpointError(
            f"{pointer} holds {name[:40]!r}, expected the name of one of the checkpoints here: {there}; "
            "write one into it"
        )
    raise CheckpointError(f"{pointer} names {name}, which is not here; there are: {there}; write one of them into it")


def _folder_of(checkpoints: Path, name: str) -> Path | None:
    for folder in (checkpoints / name, checkpoints / (name + REPLACED)):  # the second: killed while saving a step again
        if (folder / MANIFEST).is_file():
            return folder
    return None


def resolve(path: Path) -> Path:
    """The folder of the checkpoint that a user means by a run, its checkpoints, their ``latest``, or a checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    if path.name.endswith(PARTIAL):
        raise CheckpointError(f"{path} is a save that was not finished; give another checkpoint")
    if (path / MANIFEST).is_file() or step_of(path.name) is not None:
        return path
    is_pointer = path.name == LATEST and path.is_file()
    for checkpoints in (path.parent,) if is_pointer else (path / "checkpoints", path):
        found = latest(checkpoints)
        if found is not None:
            return found
    raise CheckpointError(
        f"no checkpoint in {path}; give a run's folder, its checkpoints folder, or one step_XXXXXXXX in it"
    )


def kept(steps: Iterable[int], *, newest: int, keep_last: int, keep_every: int) -> set[int]:
    """The steps that stay.

    Args:
        steps: those that exist.
        newest: the one that ``latest`` points to; it stays. So do later ones: they are of a run that went
            back to an earlier step, are replaced as it comes to them, and must not push the checkpoints
            behind ``newest`` out.
        keep_last: how many stay, ``newest`` counted.
        keep_every: multiples of this stay for ever; 0 for none.
    """
    known = sorted(steps)
    recent = [step for step in known if step <= newest][-keep_last:]
    return {step for step in known if step >= newest or step in recent or (keep_every and step % keep_every == 0)}


def prune(checkpoints: Path, *, newest: int, keep_last: int, keep_every: int) -> None:
    """Delete what ``kept`` does not keep. What cannot be deleted is logged, and tidied by the run's next start."""
    steps = list_steps(checkpoints)
    for step in sorted(set(steps) - kept(steps, newest=newest, keep_last=keep_last, keep_every=keep_every)):
        folder = checkpoints / step_name(step)
        doomed = checkpoints / (step_name(step) + REMOVED)
        try:
            # Renamed first: nobody may find half of a checkpoint under its name.
            os.rename(folder, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            log.warning("cannot delete the old checkpoint %s: %s", folder, error)


def publish(checkpoints: Path, step: int, partial: Path, fence: Fence) -> None:
    """Give a finished ``.partial`` its name and point ``latest`` to it.

    A process killed at any point of this leaves ``latest`` naming a whole checkpoint: the former one or
    this one.

    Raises:
        StorageError: the former checkpoint stands.
        Superseded: another start writes now; see ``Fence``.
    """
    final = checkpoints / step_name(step)
    replaced = checkpoints / (final.name + REPLACED)
    fence.check()
    with storage_errors("rename", partial):
        if final.exists():  # saved again, after going back to an earlier step
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(final, replaced)
        try:
            os.rename(partial, final)
        except OSError:
            if replaced.exists():
                os.rename(replaced, final)
            raise
        sync_folder(checkpoints)
    replace_text(checkpoints / LATEST, final.name + "\n", token=fence.token, check=fence.check)
    shutil.rmtree(replaced, ignore_errors=True)


def tidy(checkpoints: Path) -> None:
    """Make the folder, and remove what a killed run left unfinished; for a run that is about to look for checkpoints.

    Raises:
        StorageError: the folder cannot be made or changed.
    """
    with storage_errors("tidy", checkpoints):
        checkpoints.mkdir(parents=True, exist_ok=True)
        for entry in sorted(checkpoints.iterdir()):
            name = entry.name.partition(".")[0]
            if name == LATEST and entry.suffix == ASIDE:
                entry.unlink()
            if step_of(name) is None or entry.suffix not in (PARTIAL, REMOVED, REPLACED):
                continue
            if entry.suffix == REPLACED and not entry.with_suffix("").exists():
                os.rename(entry, entry.with_suffix(""))
            else:
                shutil.rmtree(entry)
