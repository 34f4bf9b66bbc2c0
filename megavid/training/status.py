"""What a run is doing, from the files of its folder alone: step, speed, checkpoints, restarts, and whether it lives.

Owns the rule that tells running, stopped, crashed and hung apart. Imports no torch and starts nothing, so that it
answers at once on a login node. Reads, never writes.
"""

import fcntl
import json
import os
import platform
import statistics
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megavid.config.watchdog import WatchdogConfig
from megavid.errors import DataError
from megavid.training.metrics import BEGINNINGS

State = Literal["new", "running", "hung", "stopped", "finished", "crashed"]
Row = dict[str, Any]
TAIL_BYTES = 1 << 20
"""Of metrics.jsonl: enough for the last thousand steps, however long the run."""
WINDOW = 50
"""Steps whose median is the speed."""


@dataclass(frozen=True)
class Status:
    """What a folder says of its run.

    Attributes:
        state: "new": started, no step yet; "hung": alive, but no step for longer than its own limit.
        why: what the state is known by.
        step: the last step with a row.
        steps: of the run.
        eta_s: seconds to the last step at the present speed; None where nothing is running, or no speed is known.
        step_s: median seconds of the last steps; None before the first.
        loss: of the last step; None where it was not finite.
        mfu: median of the last steps; None where no peak is known.
        checkpoint: name of the last one; "" for none.
        checkpoint_step: its step.
        restarts: starts behind the first one.
        skipped: steps skipped for numbers that are not finite, or a spike of the loss.
        rollbacks: times that the run went back at a spike.
        left_out: steps whose samples were left out by that.
        bad_samples: damaged samples that were replaced, each once.
        slow_hosts: hosts of ranks that were named slow, with how often.
        layout: of the last start.
        age_s: seconds since the last row or event was written.
    """

    state: State
    why: str
    step: int
    steps: int
    eta_s: float | None
    step_s: float | None
    loss: float | None
    mfu: float | None
    checkpoint: str
    checkpoint_step: int
    restarts: int
    skipped: int
    rollbacks: int
    left_out: int
    bad_samples: int
    slow_hosts: dict[str, int]
    layout: str
    age_s: float

    def to_json(self) -> Row:
        """As plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        lost = self.step - self.checkpoint_step
        after = f", {lost} steps ago" if lost else ""
        slow = ", ".join(f"{host} ({times} times)" for host, times in self.slow_hosts.items())
        rows = [
            ("state", f"{self.state}: {self.why}"),
            ("step", f"{self.step} of {self.steps}" + (f", loss {self.loss:.5f}" if self.loss is not None else "")),
            ("speed", "no step yet" if self.step_s is None else f"{self.step_s:.3g} s a step"),
            ("ETA", "none: it is not running" if self.eta_s is None else duration(self.eta_s)),
            ("MFU", "not known: no peak of this machine" if self.mfu is None else f"{self.mfu:.1%}"),
            ("checkpoint", f"{self.checkpoint}{after}" if self.checkpoint else "none yet"),
            ("restarts", str(self.restarts)),
            ("skipped", f"{self.skipped} steps (not finite, or a spike), {self.bad_samples} damaged samples replaced"),
            ("went back", f"{self.rollbacks} times at a spike; samples of {self.left_out} steps left out"),
            ("slow hosts", slow or "none named"),
            ("layout", self.layout or "not known"),
            ("last sign", f"{duration(self.age_s)} ago"),
        ]
        return [f"{name:<11} {text}" for name, text in rows]


def status_of(folder: Path, *, now: float | None = None) -> Status:
    """Look at a run's folder.

    Args:
        folder: ``DIR`` of ``megavid train --out DIR``.
        now: seconds of the epoch; None for the present.

    Raises:
        DataError: no run began here, or a file is not what a run writes.
    """
    now = time.time() if now is None else now
    try:
        config = tomllib.loads((folder / "run.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is no run's folder: {error}; give the DIR of megavid train --out DIR") from error
    events, rows = read_tail(folder / "events.jsonl", 1 << 30), read_tail(folder / "metrics.jsonl", TAIL_BYTES)
    starts = [number for number, event in enumerate(events) if event["event"] in ("started", "resumed")]
    last_start = events[starts[-1]] if starts else {}
    began = [event for event in events if event["event"] in BEGINNINGS][-1:]
    step = int(rows[-1]["step"]) if rows else 0
    steps = int(config["train"]["steps"])
    recent = [row["step_time_s"] for row in rows[-WINDOW:] if row.get("step_time_s")]
    step_s = statistics.median(recent) if recent else None
    mfus = [row["mfu"] for row in rows[-WINDOW:] if row.get("mfu") is not None]
    age_s = max(0.0, now - newest_change(folder))
    state, why = _state(folder, config, events, starts, has_rows=bool(rows), age_s=age_s)
    pointer = latest_checkpoint(folder / "checkpoints")
    slow: dict[str, int] = {}
    for event in events:
        if event["event"] == "slow_rank":
            slow[str(event["host"])] = slow.get(str(event["host"]), 0) + 1
    bad = {sample for event in events if event["event"] == "bad_samples" for sample in event["samples"]}
    return Status(
        state=state,
        why=why,
        step=step,
        steps=steps,
        eta_s=step_s * (steps - step) if step_s is not None and state in ("new", "running") else None,
        step_s=step_s,
        loss=rows[-1]["loss"] if rows else None,
        mfu=statistics.median(mfus) if mfus else None,
        checkpoint=pointer,
        checkpoint_step=int(pointer.removeprefix("step_")) if pointer else 0,
        restarts=max(0, len(starts) - 1),
        skipped=int(rows[-1].get("skipped", 0)) if rows else 0,
        rollbacks=int(began[0].get("rollbacks", 0)) if began else 0,
        left_out=int(began[0].get("left_out", 0)) if began else 0,
        bad_samples=len(bad),
        slow_hosts=slow,
        layout=str(last_start.get("layout", "")),
        age_s=age_s,
    )


def _state(
    folder: Path, config: Row, events: Sequence[Row], starts: Sequence[int], *, has_rows: bool, age_s: float
) -> tuple[State, str]:
    alive, holder = is_alive(folder)
    after = [event["event"] for event in events[starts[-1] :]] if starts else []
    limits = load_limits(config)
    limit_s = limits.step_s if "saved" in after or has_rows else limits.first_step_s
    if alive is None:  # ranks of another machine, whose lock does not show here: their files tell
        beyond = limit_s + 60 if limit_s else 1860.0
        alive, holder = age_s < beyond, f"{holder}, seen by its files alone"
    if not alive:
        if "finished" in after:
            return "finished", "it came to its last step"
        if "stopped" in after:
            reason = next(event for event in reversed(events) if event["event"] == "stopped")["reason"]
            return "stopped", f"{reason}; the same command goes on"
        errors = errors_of_last_start(folder)
        said = str(errors[0]["message"]).strip().splitlines()[-1] if errors else "it ended without a word"
        return "crashed", f"{said}; the same command goes on"
    if not starts or not (has_rows or "saved" in after):
        return "new", f"{holder}; no step is done yet"
    if limit_s and age_s > limit_s:
        return "hung", f"{holder}, but nothing was written for {duration(age_s)} (watchdog.step_s = {limit_s:g})"
    return "running", holder


def load_limits(config: Row) -> WatchdogConfig:
    """The limits of the run; the default ones where its run.toml is older than they are."""
    return WatchdogConfig(**config.get("watchdog", {}))


def is_alive(folder: Path) -> tuple[bool | None, str]:
    """Whether a start holds the run's lock, and who; None where this machine cannot know.

    The lock is tried, not taken: it goes back at once.
    """
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return False, "nobody"
    try:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "somebody"
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            is_here = holder.partition(" on ")[2].partition(",")[0] == platform.node()
            return (False if is_here else None), holder
        return True, holder
    finally:
        os.close(descriptor)


def latest_checkpoint(checkpoints: Path) -> str:
    """Name of the checkpoint that ``latest`` points to and that is there; "" for none."""
    with suppress(OSError):
        name = (checkpoints / "latest").read_text().strip()
        if name.startswith("step_") and (checkpoints / name / "manifest.json").is_file():
            return name
    return ""


def newest_change(folder: Path) -> float:
    """When a row or an event was last written, in seconds of the epoch by the file system's clock."""
    times = [0.0]
    for name in ("metrics.jsonl", "events.jsonl", "run.toml"):
        with suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times)


def read_tail(file: Path, size: int) -> list[Row]:
    """The complete rows among the last ``size`` bytes; a row that is being written, or was cut off, is left out.

    Raises:
        DataError: a whole row is not JSON.
    """
    try:
        with file.open("rb") as handle:
            start = max(0, handle.seek(0, os.SEEK_END) - size)
            handle.seek(start)
            lines = handle.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    if start:
        lines = lines[1:]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise DataError(f"{file} has a row that is not JSON: {error}") from error


def errors_of_last_start(folder: Path) -> list[Row]:
    """Rows of errors.jsonl that ranks of the last start wrote, the first one that failed first."""
    with suppress(OSError, ValueError):
        token = json.loads((folder / "incarnation.json").read_text())["token"]
        rows = [row for row in read_tail(folder / "errors.jsonl", TAIL_BYTES) if row["start"] == token]
        return sorted(rows, key=lambda row: float(row["at"]))
    return []


def duration(seconds: float) -> str:
    """Seconds for people: "3 d 4 h", "2 h 5 min", "7 min 3 s", "4.2 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    for unit, smaller, size, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // part)} {smaller}"
    raise AssertionError("unreachable")
