"""Saving behind the step loop: the loop waits for the copy to host memory, a thread writes.

A thread, not a process: writing and hashing leave Python's lock, so the loop runs on; a thread sees the
staging buffers without a copy and dies with its process, where a forked child of a process with CUDA, gloo
and OpenMP threads is undefined, and a spawned one would have to be sent the state. All decisions that end
a run are taken by all ranks at once, in ``save``, ``poll`` and ``wait``.
"""

import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megavid.checkpoint.commit import CalledOffError, Target, commit, tell_failure
from megavid.checkpoint.fence import Fence
from megavid.checkpoint.files import storage_errors
from megavid.checkpoint.format import check_file_name, step_name
from megavid.checkpoint.ranks import Ranks, agreed, packed, raise_first, unpacked
from megavid.checkpoint.retention import tidy
from megavid.checkpoint.write import FILE_BYTES, Plan, Staging, plan_files, write_part
from megavid.config.schema import CheckpointConfig
from megavid.errors import MegavidError, NumericalStop, StopRequested, StorageError
from megavid.parallel.fragment import Fragment

log = logging.getLogger(__name__)

STALL_S = 600.0
"""Seconds without a byte written after which a save has failed."""


class _Save:
    """One save under way on this rank: a thread, and what became of it."""

    def __init__(self, target: Target, saver: "AsyncSaver", plan: Plan, views: list[memoryview]) -> None:
        self.target, self._saver, self._plan, self._views = target, saver, plan, views
        self._called_off = threading.Event()
        self._beat_at = time.monotonic()
        self._is_done = False
        self._error: MegavidError | None = None
        self._thread = threading.Thread(target=self._run, name=f"save-{target.step}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        saver, rank = self._saver, self._saver.ranks.rank
        try:
            write_part(self.target.partial, self._plan, self._views, rank=rank, beat=self._beat, reread=saver.reread)
            if rank == 0:
                commit(
                    self.target,
                    keep_last=saver.config.keep_last,
                    keep_every=saver.config.keep_every,
                    beat=self._beat,
                    stall_s=saver.stall_s,
                )
        except CalledOffError:
            pass
        except Exception as error:
            if not isinstance(error, MegavidError):
                log.exception("writing %s", self.target.partial)
            self._error = self._cause(unpacked(packed(error) or []))
            tell_failure(self.target, rank)
        self._is_done = True

    def _cause(self, error: MegavidError) -> MegavidError:
        """``error``, or that another start writes now: it has removed what this one was writing."""
        try:
            self.target.fence.check()
        except MegavidError as deeper:
            return deeper
        return error

    def _beat(self) -> None:
        self._beat_at = time.monotonic()
        if self._called_off.is_set():
            raise CalledOffError

    def look(self) -> tuple[bool, MegavidError | None]:
        """Whether this rank has nothing more to wait for, and what went wrong."""
        is_alive, silent_s = self._thread.is_alive(), time.monotonic() - self._beat_at
        step = step_name(self.target.step)
        if not is_alive and not self._is_done:
            return True, StorageError(f"the thread that writes {step} died; earlier checkpoints are intact")
        if is_alive and silent_s > self._saver.stall_s:
            return True, StorageError(
                f"the thread that writes {self.target.partial} has stood still for {silent_s:.0f} s on rank "
                f"{self._saver.ranks.rank}; check the storage; earlier checkpoints are intact"
            )
        return not is_alive, self._error

    def call_off(self) -> None:
        """Have the thread stop at its next block."""
        self._called_off.set()

    def finish(self) -> None:
        """Wait for the thread as long as it gets on; a failure is only logged."""
        while not self.look()[0]:
            self.join(0.5)
        if self._error is not None:
            log.warning("%s", self._error)

    def join(self, timeout_s: float) -> None:
        """Wait for the thread, but no longer than this."""
        self._thread.join(timeout_s)


class AsyncSaver:
    """Saves a run's checkpoints. Every method is collective: all ranks call it at the same step.

    Use it as a context manager: leaving it waits for the last save, or calls it off if the body raised an error that
    other ranks may not know of.
    """

    def __init__(
        self,
        checkpoints: Path,
        ranks: Ranks,
        config: CheckpointConfig,
        *,
        run_toml: str,
        layout: str = "",
        extra: Mapping[str, bytes] | None = None,
        file_bytes: int = FILE_BYTES,
        stall_s: float = STALL_S,
        reread: bool = False,
        fence: Fence | None = None,
    ) -> None:
        """Make the folder and remove what a killed run left unfinished in it.

        Args:
            checkpoints: folder of the run's checkpoints; all ranks must see the same one.
            ranks: the mesh, or ``SingleRank()``.
            config: table ``checkpoint`` of the run.
            run_toml: the resolved config, kept in every checkpoint.
            layout: how the ranks stand, for people: ``mesh.layout.describe()``.
            extra: more small files to keep in every checkpoint, by name, such as a text encoder's
                vocabulary.
            file_bytes: size at which a rank begins a new file.
            stall_s: seconds without a byte written after which a save has failed.
            reread: read every file back after writing it, past the page cache.
            fence: this start's right to write; None where nothing can replace the caller.

        Raises:
            StorageError: the folder cannot be written to.
        """
        self.ranks, self.config, self.stall_s, self.reread = ranks, config, stall_s, reread
        self.held_s = 0.0
        """Seconds for which the last ``save`` held the step loop."""
        self._checkpoints, self._run, self._layout, self._file_bytes = checkpoints, run_toml, layout, file_bytes
        self._extra = {check_file_name(name, checkpoints): content for name, content in (extra or {}).items()}
        self._staging, self._fence = Staging(), fence or Fence()
        self._save: _Save | None = None
        with agreed(ranks):
            if ranks.rank == 0:
                tidy(checkpoints)

    def save(self, step: int, fragments: Sequence[Fragment], state: Mapping[str, Any]) -> None:
        """Copy the state to host memory and begin to write it; first wait for the former save.

        Args:
            step: optimizer steps done.
            fragments: what this rank holds of every tensor; they may change once this returns.
            state: plain data for ``state.json``, the same on all ranks; rank 0's is written, with ``step``
                added.

        Raises:
            StorageError: the former save failed, or this one could not begin.
            Superseded: another start of the run writes now.
            CheckpointError: a fragment cannot be saved.
        """
        began = time.monotonic()
        self.wait()
        with agreed(self.ranks):
            plan = plan_files(fragments, rank=self.ranks.rank, step=step, file_bytes=self._file_bytes)
            target = Target(
                checkpoints=self._checkpoints,
                step=step,
                state=(json.dumps({**state, "step": step}, indent=1) + "\n").encode(),
                run=self._run.encode(),
                layout=self._layout,
                world_size=self.ranks.world_size,
                extra=self._extra,
                fence=self._fence,
            )
            views = self._staging.copy(plan)
            if self.ranks.rank == 0:
                self._fence.check()
                _make_anew(target.partial)
        self._save = _Save(target, self, plan, views)
        if not self.config.async_save:
            self.wait()
        self.held_s = time.monotonic() - began

    def poll(self) -> bool:
        """Raise if the save under way has failed on any rank; costs nothing when none is.

        Returns:
            True when no save is under way (any more): the last one is on the disk and ``latest`` names it.

        Raises:
            StorageError: on every rank, once all have stopped writing; the former checkpoint stands.
            CheckpointError: likewise, the ranks' boxes do not cover every tensor exactly once.

        Ranks: one small gather while a save is under way.
        """
        save = self._save
        if save is None:
            return True
        is_over, error = save.look()
        told = self.ranks.all_gather_object((is_over, packed(error)))
        errors = [text for _, text in told]
        has_failed = any(text is not None for text in errors)
        if has_failed:
            save.call_off()
        if not all(over for over, _ in told):
            return False
        self._save = None
        if has_failed and self.ranks.rank == 0:
            shutil.rmtree(save.target.partial, ignore_errors=True)  # the next start would remove it too
        raise_first(errors)
        return True

    def wait(self) -> None:
        """Return when the save under way is on the disk; raises as ``poll`` does."""
        pause = 0.01
        while not self.poll():
            if self._save is not None:
                self._save.join(pause)
            pause = min(2 * pause, 1.0)

    def __enter__(self) -> "AsyncSaver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.wait()
        elif self._save is not None:  # no collective here: other ranks may not come
            if issubclass(kind, NumericalStop | StopRequested):  # all ranks end alike, and what is being saved is good
                self._save.finish()
            else:
                self._save.call_off()
                self._save.join(5.0)


def save(
    checkpoints: Path,
    step: int,
    fragments: Sequence[Fragment],
    state: Mapping[str, Any],
    ranks: Ranks,
    *,
    run_toml: str,
    layout: str = "",
) -> Path:
    """Write one checkpoint and return its folder when it is on the disk; deletes no other.

    For tools; a run has an ``AsyncSaver``.

    Raises:
        StorageError: the storage failed.
        CheckpointError: the fragments do not cover every tensor exactly once.
    """
    for_ever = CheckpointConfig(keep_last=1 << 30, async_save=False)
    with AsyncSaver(checkpoints, ranks, for_ever, run_toml=run_toml, layout=layout) as saver:
        saver.save(step, fragments, state)
    return checkpoints / step_name(step)


def _make_anew(folder: Path) -> None:
    with storage_errors("create", folder):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
