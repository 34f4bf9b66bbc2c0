"""Faults for runs that are forked from a warm parent: production code knows nothing of them.

``install`` is called in the fork before the command starts, so ranks inherit it. It stands between Python and the file
system for paths inside one folder (``os`` functions and opened files), and counts changes: the process whose turn it is
dies, is stopped, or gets an error at one of them. What was hit is written beside the run, so that a table can tell it.
"""

import builtins
import contextlib
import errno
import importlib
import io
import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FRAMES = {
    "decide": "look at the folder", "tidy": "tidy", "resume": "load", "fill": "load", "write_start": "start",
    "cut_after": "cut rows", "event": "events", "write": "metrics", "write_ranks": "start", "write_config": "start",
    "write_part": "save: tensors", "wait_for_parts": "save: wait for parts", "commit": "save: index and manifest",
    "publish": "save: rename", "replace_text": "save: latest", "prune": "save: delete old", "_make_anew": "save: begin",
    "__call__": "step", "agree": "between steps", "train_step": "step", "tell_failure": "save: failing",
    "save": "save: staging", "poll": "between steps", "__next__": "data", "build_engine": "build", "open": "build",
    "enter_run": "look at the folder", "init_distributed": "meet",
}  # fmt: skip
"""What a process was doing, by the innermost function that is listed."""
CHANGES = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir", "truncate", "ftruncate")
"""Functions of ``os`` that count, and after which a disk is another one."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: "kill", "stop" (SIGSTOP), "torn" (half of a write, then killed), "ENOSPC", "EIO", "EIO read", "stale",
            "spike" (the latents of step ``at`` are 30 times too large), "bad clip" (those of the microbatch with draw
            ``at`` are, whenever it comes), "bad clips" (with any draw from ``at`` on),
            "slow" (every step takes ``seconds`` longer), "nan" (one weight of the rank after ``at`` steps), "none".
        rank: whom it befalls; -1 for the launcher.
        at: the change of the file system (or the step, or the read) at which it comes, from 1.
        folder: the run's.
        seconds: of "slow".
        match: only changes whose name has this in it count, as "rename step_00000003".
        lock_wait_s: how long this start waits for the run's lock; 0 for as long as production does.
        patience_s: how long ranks wait for each other's words when one is lost; 0 for as long as production does.
        draws: False leaves out pictures of the loss, which take most of a tiny run's time.
    """

    kind: str
    rank: int
    at: int
    folder: str
    seconds: float = 0.0
    match: str = ""
    lock_wait_s: float = 0.0
    patience_s: float = 0.0
    draws: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def hit_file(folder: Path) -> Path:
    """Where the process that was hit says what it was doing."""
    return folder.with_name(folder.name + ".hit")


def count_file(folder: Path, rank: int) -> Path:
    """Where a process of a run under the fault "none" says how many changes it has made."""
    return folder.with_name(f"{folder.name}.changes_{rank}")


def phase_here() -> str:
    """What this process is doing, from its stack."""
    for frame in reversed(traceback.extract_stack()):
        if "megavid/" in frame.filename and frame.name in FRAMES:
            return FRAMES[frame.name]
    return "other"


class _Layer:
    """Counts, and strikes once."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.left, self.has_struck, self.changes = fault, fault.at, False, 0
        self.folder = fault.folder.rstrip("/") + "/"

    @property
    def is_mine(self) -> bool:
        return int(os.environ.get("RANK", "-1")) == self.fault.rank

    def concerns(self, path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and (os.fspath(path) + "/").startswith(self.folder)

    def count(self, what: str, kinds: tuple[str, ...], torn: Callable[[], object] = lambda: None) -> None:
        """One change; strikes if it is the one."""
        if self.fault.kind == "none" and "kill" in kinds:
            self.changes += 1
            rank = int(os.environ.get("RANK", "-1"))
            descriptor = os.open(count_file(Path(self.fault.folder), rank), os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, f"{self.changes:08d}".encode())
            os.close(descriptor)
        if self.has_struck or not self.is_mine or self.fault.kind not in kinds or self.fault.match not in what:
            return
        self.left -= 1
        if self.left == 0:
            self.has_struck = True
            self.strike(what, torn)

    def strike(self, what: str, torn: Callable[[], object]) -> None:
        """Do it."""
        told = json.dumps({"phase": phase_here(), "call": what, "rank": self.fault.rank})
        descriptor = os.open(hit_file(Path(self.fault.folder)), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(descriptor, told.encode())
        os.close(descriptor)
        match self.fault.kind:
            case "torn":
                torn()
                os.kill(os.getpid(), signal.SIGKILL)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(0.05)  # a thread goes on for a moment until the stop has reached it
            case "ENOSPC":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "EIO" | "EIO read":
                raise OSError(errno.EIO, os.strerror(errno.EIO))


WRITES = ("kill", "stop", "torn", "ENOSPC", "EIO")


class _Written:
    """A file that was opened to write; its writes count."""

    def __init__(self, file: Any, layer: _Layer, name: str) -> None:
        self.file, self.layer, self.name = file, layer, name

    def write(self, data: Any) -> Any:
        half = data[: len(data) // 2]

        def torn() -> None:
            self.file.write(half)
            self.file.flush()

        self.layer.count(f"write {self.name}", WRITES, torn)
        return self.file.write(data)

    def __enter__(self) -> "_Written":
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self.file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __iter__(self) -> Any:
        return iter(self.file)


def install(fields: dict[str, Any]) -> None:
    """Put the fault in; in a process that has one thread and is about to fork the ranks."""
    fault = Fault(**fields)
    layer = _Layer(fault)
    if not fault.draws:
        importlib.import_module("megavid.training.plots").plot_run = lambda *args, **named: None
    if fault.lock_wait_s:
        run_dir = importlib.import_module("megavid.training.run_dir")
        run_dir.RunLock.__init__.__kwdefaults__["wait_s"] = fault.lock_wait_s
    if fault.patience_s:
        importlib.import_module("megavid.training.watchdog").GRACE_S = fault.patience_s
    _patch_steps(fault, layer)
    for name in CHANGES:
        setattr(os, name, _counted(getattr(os, name), name, layer))
    opened = io.open

    def faulty_open(file: Any, mode: str = "r", *args: Any, **named: Any) -> Any:
        if not layer.concerns(file):
            return opened(file, mode, *args, **named)
        name = Path(os.fspath(file)).name
        if set(mode) & set("wax+"):
            layer.count(f"open {name}", WRITES)
            return _Written(opened(file, mode, *args, **named), layer, name)
        if name == "latest" and fault.kind == "stale" and layer.left > 0:
            layer.left -= 1
            return io.BytesIO(_former(Path(os.fspath(file)))) if "b" in mode else opened(file, mode, *args, **named)
        layer.count(f"read {name}", ("EIO read",))
        return opened(file, mode, *args, **named)

    builtins.open = faulty_open  # type: ignore[assignment]
    io.open = faulty_open  # type: ignore[assignment]


def _former(latest: Path) -> bytes:
    """What ``latest`` said before: the name of an earlier checkpoint, whether it is still there or not."""
    content = os.open(latest, os.O_RDONLY)
    name = os.read(content, 100).decode().strip()
    os.close(content)
    step = int(name.removeprefix("step_")) if name else 1
    return f"step_{max(step - 1, 1):08d}\n".encode()


def _counted(function: Callable[..., Any], name: str, layer: _Layer) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> Any:
        target = args[0] if args else None
        if isinstance(target, int):  # a descriptor: of which file, Linux tells
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{target}")
        if layer.concerns(target):
            layer.count(f"{name} {Path(os.fspath(target)).name}", WRITES)  # type: ignore[arg-type]
        return function(*args, **named)

    return call


def _patch_steps(fault: Fault, layer: _Layer) -> None:
    """Faults that come with a step of training."""
    module = importlib.import_module("megavid.training.model_step")
    step_module = importlib.import_module("megavid.training.step")
    taken = [0]
    original = module.train_step

    def train_step(engine: Any, *args: Any, **named: Any) -> Any:
        taken[0] += 1
        if layer.is_mine and fault.kind == "slow":
            time.sleep(fault.seconds)
        if layer.is_mine and fault.kind == "nan" and taken[0] == fault.at:
            next(iter(engine.parameters())).data.view(-1)[0] = float("nan")
        if fault.kind == "spike" and taken[0] == fault.at:
            for batch in args[0]:
                batch.clean_BTP.mul_(30.0)
        if fault.kind in ("bad clip", "bad clips"):
            for batch in args[0]:
                draws = [clip.draw for clip in batch.clips]
                if fault.at in draws or (fault.kind == "bad clips" and max(draws) >= fault.at):
                    batch.clean_BTP.mul_(30.0)
        if layer.is_mine and fault.kind in ("kill step", "stop step") and taken[0] == fault.at:
            os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill step" else signal.SIGSTOP)
        return original(engine, *args, **named)

    step_module.train_step = train_step  # type: ignore[attr-defined]
