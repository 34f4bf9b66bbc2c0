"""The folder of a run: who may write to it, what it says of the run, and what a second start of the same command does.

Owns run.toml, events.jsonl, ranks.json, the lock and the rules of starting again. metrics.jsonl is
``megavid.training.metrics``'s; the folder of checkpoints is ``megavid.checkpoint``'s. The command line asks it before
any rank starts.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from megavid import checkpoint
from megavid.checkpoint.fence import Fence
from megavid.checkpoint.format import step_name as checkpoint_name
from megavid.config.load import dump_toml, load_run
from megavid.config.resume import first_difference
from megavid.config.schema import RunConfig
from megavid.errors import CheckpointError, ConfigError, MegavidError, StorageError
from megavid.parallel.host import host_name
from megavid.training.metrics import row_text

ERROR_CHARACTERS = 8000
"""Of a traceback that errors.jsonl keeps."""
LOCK_WAIT_S = 10.0
"""How long a start waits for the lock: the ranks of a launcher that was killed need a moment to die."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a start of the command has to do with this folder.

    Attributes:
        kind: a new run, one that goes on, or one that is already finished.
        step: last step of the checkpoint that it goes on from; 0 for a new run.
        checkpoint: that checkpoint; None for a new run.
        fence: this start's right to write.
    """

    kind: Literal["new", "resume", "finished"]
    step: int
    checkpoint: Path | None
    fence: Fence = field(default_factory=Fence)

    def finished_text(self, config: RunConfig, folder: Path) -> str:
        """What a start on a finished run says."""
        return f"{folder} is finished: step {self.step} of {config.train.steps}; a larger train.steps goes on"


class RunDir:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is read or made yet."""
        self.path = path
        self.config_file = path / "run.toml"
        self.metrics_file = path / "metrics.jsonl"
        self.router_file = path / "router.jsonl"
        self.fp8_file = path / "fp8.jsonl"
        self.events_file = path / "events.jsonl"
        self.ranks_file = path / "ranks.json"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.pictures = path / "samples"
        self.hangs = path / "hangs"
        self.routing = path / "routing"
        self.fence = Fence()
        self.loss_plot = path / "loss.png"

    def decide(self, config: RunConfig, *, resume_step: int = 0) -> Start:
        """Say what starting ``config`` here means, and make this start the one that may write; call it under the lock.

        Args:
            config: the resolved config of this start.
            resume_step: go on from this checkpoint instead of the latest; 0 for the latest.

        Raises:
            ConfigError: the folder belongs to a run of another config (the first differing key is named).
            CheckpointError: the checkpoint is not there, or its manifest is damaged; its other files are checked when
                the ranks load it.
        """
        if self.config_file.exists():
            refused = first_difference(self.config(), config)
            if refused is not None:
                raise ConfigError(f"--out {self.path} holds a run of another config: {refused}; use another folder")
        fence = Fence.put_up(self.path)  # before anything is changed or believed
        if self.checkpoints.is_dir():
            checkpoint.tidy(self.checkpoints)
        folder = self._checkpoint(resume_step)
        if folder is None:
            return Start("new", 0, None, fence)
        try:
            step = checkpoint.Checkpoint(folder).step
        except CheckpointError as error:
            raise self.with_way_out(error) from error
        # Asked for by number, a run goes on from there even if it once got to its end.
        is_finished = step >= config.train.steps
        return Start("finished" if is_finished else "resume", step, folder, fence)

    def _checkpoint(self, resume_step: int) -> Path | None:
        if not resume_step:
            return checkpoint.latest(self.checkpoints)
        if resume_step not in checkpoint.list_steps(self.checkpoints):
            raise CheckpointError(f"--resume-step {resume_step}: no such checkpoint; {self._there()}")
        return self.checkpoints / checkpoint_name(resume_step)

    def _there(self) -> str:
        steps = ", ".join(map(str, checkpoint.list_steps(self.checkpoints)))
        return f"in {self.checkpoints} there are those of step {steps}" if steps else f"{self.checkpoints} holds none"

    def with_way_out(self, error: CheckpointError) -> CheckpointError:
        """``error`` of a checkpoint of this run, with the words that lead to another one."""
        return CheckpointError(f"{error}; --resume-step N goes on from another one ({self._there()})")

    def write_config(self, config: RunConfig) -> None:
        """Write the resolved config aside, then rename it to run.toml."""
        write_whole(self.config_file, dump_toml(config))

    def config(self) -> RunConfig:
        """The config of the last start.

        Raises:
            ConfigError: no run began here, or its run.toml was changed by hand.
        """
        return load_run(str(self.config_file), [])

    def write_ranks(self, ranks: Sequence[dict[str, object]]) -> None:
        """Write ranks.json of the running start, one row a rank."""
        write_whole(self.ranks_file, "[\n" + ",\n".join(json.dumps(row) for row in ranks) + "\n]\n")

    def event(self, name: str, **fields: object) -> None:
        """Append one object to events.jsonl and flush it.

        Raises:
            Superseded: another start writes now.
        """
        self.fence.check()
        row = {"event": name, **fields, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        with self.events_file.open("a", encoding="utf-8") as file:
            file.write(row_text(row))

    def error(self, rank: int, error: BaseException) -> None:
        """Append how a rank ended to errors.jsonl; a folder that cannot be written is no second error.

        Args:
            rank: whose; -1 for the launcher's word on ranks that could not speak.
            error: one line is kept of a ``MegavidError``, the traceback of any other.
        """
        is_ours = isinstance(error, MegavidError)
        text = str(error) if is_ours else "".join(traceback.format_exception(error))[-ERROR_CHARACTERS:]
        row = {
            "rank": rank, "host": host_name(), "pid": os.getpid(), "kind": type(error).__name__, "message": text,
            "at": time.time(), "start": self.fence.token,
        }  # fmt: skip
        with contextlib.suppress(OSError):
            descriptor = os.open(self.path / "errors.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, row_text(row).encode())  # one call: rows of several ranks do not mix
            finally:
                os.close(descriptor)

    def events(self) -> list[dict[str, object]]:
        """All complete rows of events.jsonl."""
        if not self.events_file.exists():
            return []
        lines = self.events_file.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]


class RunLock:
    """Holds ``DIR/.lock`` as long as a start runs, so that two starts never write to one folder.

    A POSIX ``flock``: it goes with the process, however that ends. Ranks forked by a launcher hold it with it. Where
    the holder's Slurm job, or its start of this job, is over (``is_over``; it lives on where its node was lost), or the
    caller says so, the lock is taken over: the holder keeps a file that is no longer there, and ``Fence`` keeps it from
    writing.
    """

    def __init__(self, folder: Path, *, wait_s: float = LOCK_WAIT_S, takes_over: bool = False) -> None:
        """Name the folder to lock.

        Args:
            folder: the run's.
            wait_s: how long to wait for another start to end.
            takes_over: then take the lock from it.
        """
        self.file, self.wait_s, self.takes_over = folder / ".lock", wait_s, takes_over
        self._descriptor = -1

    def __enter__(self) -> Self:
        """Make the folder if need be and take the lock.

        Raises:
            ConfigError: another start holds it.
            StorageError: the folder cannot be made or written.
        """
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(
                f"--out {self.file.parent}: {error.strerror}; name a folder that can be written"
            ) from error
        deadline = time.monotonic() + self.wait_s
        while not self._try():
            if time.monotonic() > deadline:
                holder = os.pread(self._descriptor, 200, 0).decode(errors="replace").strip()
                os.close(self._descriptor)
                if self.takes_over or is_over(holder, os.environ):
                    self.file.unlink(missing_ok=True)
                    self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
                    deadline, self.takes_over = time.monotonic() + self.wait_s, False
                    continue
                raise ConfigError(
                    f"--out {self.file.parent} is in use by another start ({holder or 'unknown'}); wait for it, "
                    "stop it, use another folder, or replace it with --take-over"
                )
            time.sleep(0.1)
        os.ftruncate(self._descriptor, 0)
        mine = f"pid {os.getpid()} on {os.uname().nodename}{slurm_words(os.environ)}\n"
        os.pwrite(self._descriptor, mine.encode(), 0)
        return self

    def _try(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return True  # a file system without locks: nothing to hold, the run goes on unguarded
            raise
        return True

    def __exit__(self, *_: object) -> None:
        """Let the lock go."""
        os.close(self._descriptor)


def slurm_words(environ: Mapping[str, str]) -> str:
    """Which start of which Slurm job this process belongs to, as the lock says it; "" for none."""
    job, start, cluster = (
        environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME")
    )
    return f", Slurm job {job} start {start or 0} of cluster {cluster or 'unknown'}" if job else ""


def is_over(holder: str, environ: Mapping[str, str]) -> bool:
    """Whether ``holder``, a lock's text, names a start that Slurm has given up, so that only a lost node can hold it.

    That is a former start of this very job, or another job that job.sh has asked Slurm about (``MEGAVID_ENDED_JOB``):
    each one of a chain has its own number.
    """
    match = re.search(r"Slurm job (\d+) start (\d+) of cluster (\S+)$", holder)
    if match is None or match[3] != (environ.get("SLURM_CLUSTER_NAME") or "unknown"):
        return False
    if match[1] != environ.get("SLURM_JOB_ID"):
        return match[1] == environ.get("MEGAVID_ENDED_JOB")
    return int(environ.get("SLURM_RESTART_COUNT") or 0) > int(match[2])


def write_whole(file: Path, text: str) -> None:
    """Write ``file`` aside and rename it, so that a reader never sees half of it."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, file)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error.strerror}") from error
