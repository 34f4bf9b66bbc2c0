"""Kill a run at random points, start it again, and see that nothing is lost: the loop behind tools/kill_loop.py.

Each fault is drawn from the seed and its number alone. A run of two ranks is started, hit, and started again under the
next fault, until it comes to its end; then its curve must be that of the undisturbed run, bit for bit, and a new one
begins. Every start behind a fault is a resume.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megavid.training.metrics import read_rows
from tests.support.faults import Fault, count_file, hit_file
from tests.support.tiny_run import TINY, is_running
from tests.support.warm_parent import Command, WarmParent

RANKS, STEPS = 2, 4
FLAGS = (
    *TINY, "--model.num_layers", "1", "--model.moe.dense_first", "0", "--model.moe.dense_last", "0",
    "--ranks", str(RANKS), "--parallel.expert", "2", "--train.global_batch_size", "2",
    "--train.steps", str(STEPS), "--checkpoint.interval_steps", "1", "--checkpoint.keep_last", "2",
    "--watchdog.step_s", "2", "--watchdog.first_step_s", "30",
)  # fmt: skip
LIMIT_S = 60.0
"""A command that runs longer than this hangs."""
KINDS = {"any time": 70, "kill": 60, "torn": 12, "ENOSPC": 20, "EIO": 16, "EIO read": 10, "stale": 8, "stop": 4}
"""What befalls a run, and how often in 200."""
STATUS = {"kill": {5, -9}, "torn": {5, -9}, "ENOSPC": {3}, "EIO": {3}, "EIO read": {2, 3}, "stop": {5}}
"""Exit statuses that are the truth; minus the signal where the launcher itself was killed."""

Curve = list[tuple[object, ...]]


@dataclass(frozen=True)
class Outcome:
    """One fault and the resume behind it.

    Attributes:
        number: of the fault.
        kind: of the fault.
        rank: whom it hit, -1 for the launcher.
        phase: what that process, or the run, was doing.
        status: exit status of the command that was hit.
        step: of the latest checkpoint after it, 0 for none.
        seconds: that the command took.
    """

    number: int
    kind: str
    rank: int
    phase: str
    status: int
    step: int
    seconds: float


class KillLoop:
    """The loop; ``outcomes`` grows with every resume."""

    def __init__(self, warm: WarmParent, folder: Path, seed: int) -> None:
        self.warm, self.folder, self.seed = warm, folder, seed
        self.outcomes: list[Outcome] = []
        began = time.monotonic()
        whole = self._start(folder / "undisturbed", Fault("none", -1, 0, str(folder / "undisturbed")))
        assert whole.wait(LIMIT_S) == 0, whole.stderr
        self.whole_s = time.monotonic() - began
        self.curve = curve_of(folder / "undisturbed")
        self.changes = {rank: int(count_file(folder / "undisturbed", rank).read_text()) for rank in (-1, *range(RANKS))}

    def run(self, first: int, count: int, on_outcome: Callable[[Outcome], None] = lambda outcome: None) -> None:
        """Faults ``first`` to ``first + count - 1``, each with its resume; AssertionError where a promise breaks."""
        number, run, pending = first, 0, list[Outcome]()
        while number < first + count or pending:
            out = self.folder / f"run_{first}_{run}"
            chance = random.Random(f"{self.seed}/{number}/{run}")
            is_last = number >= first + count
            kind = "none" if is_last else chance.choices(list(KINDS), list(KINDS.values()))[0]
            before = latest_step(out)
            if not before and kind in ("EIO read", "stale"):
                kind = "kill"  # there is nothing to read yet
            outcome, resumed_at = self._once(out, number, kind, chance)
            for earlier in pending:  # this start was its resume
                assert resumed_at is None or resumed_at == before or kind == "stale", (earlier, outcome, resumed_at)
                self.outcomes.append(earlier)
                on_outcome(earlier)
            pending = []
            assert outcome.step >= before, f"checkpoint of step {before} was lost: {outcome}"
            if outcome.status == 0:
                assert curve_of(out) == self.curve, f"the curve differs: {out}"
                run += 1
                if before == 0:
                    self.whole_s = min(self.whole_s, outcome.seconds)
                if outcome.kind == "stale":  # read, and got over
                    self.outcomes.append(outcome)
                    on_outcome(outcome)
                    number += 1
            else:
                pending, number = [outcome], number + 1

    def _start(self, out: Path, fault: Fault) -> Command:
        return self.warm.start("train", "tiny", "--out", str(out), *FLAGS, fault=fault)

    def _once(self, out: Path, number: int, kind: str, chance: random.Random) -> tuple[Outcome, int | None]:
        """One start under one fault; what became of it, and the step it went on from, None if it did not get so far."""
        rank = -1 if kind != "stop" and chance.random() < 0.15 else chance.randrange(RANKS)
        if kind in ("EIO read", "stale"):
            rank = -1 if kind == "stale" else chance.choice([-1, 0])
        left = (STEPS - latest_step(out)) / STEPS if rank >= 0 else 1.0  # what is left to be done of a run's changes
        at = (
            1
            if kind == "stale"
            else chance.randint(1, 4 if kind == "EIO read" else max(4, int(self.changes[rank] * left)))
        )
        hit_file(out).unlink(missing_ok=True)
        events = event_count(out)
        began = time.monotonic()
        command = self._start(out, Fault(kind, rank, at, str(out), lock_wait_s=5.0, patience_s=0.3))
        phase = self._kill_at_any_time(command, out, rank, chance) if kind == "any time" else ""
        status = command.wait(LIMIT_S)
        seconds = time.monotonic() - began
        self._no_process_is_left(out, command)
        if hit_file(out).exists():
            phase = json.loads(hit_file(out).read_text())["phase"]
        elif kind == "stale":
            phase = "look at the folder"
        outcome = Outcome(number, kind, rank, phase, status, latest_step(out), round(seconds, 2))
        expected = {5, -9} if kind == "any time" else STATUS.get(kind, set())
        assert status == 0 or status in expected, f"{outcome}: {command.stderr}"
        if status > 0:
            assert command.stderr.startswith("megavid: error: "), command.stderr
            assert command.stderr.count("\n") == 1, command.stderr
        return outcome, resumed_step(out, events)

    def _kill_at_any_time(self, command: Command, out: Path, rank: int, chance: random.Random) -> str:
        """Kill the launcher or one of its ranks by the clock; what the run was doing, seen from outside."""
        deadline = time.monotonic() + chance.uniform(0.0, 0.8 * self.whole_s)
        while (left := deadline - time.monotonic()) > 0 and command.poll() is None:
            time.sleep(min(left, 0.01))
        ranks = [pid for pid in children_of(command.pid) if is_running(pid)]
        victim = command.pid if rank == -1 or not ranks else ranks[rank % len(ranks)]
        phase = "before the ranks" if not ranks else "start" if not has_started(out, ranks) else "steps"
        if phase == "steps" and any(path.suffix == ".partial" for path in (out / "checkpoints").glob("*")):
            phase = "steps, save under way"
        if command.poll() is None:
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                return phase
        return phase

    def _no_process_is_left(self, out: Path, command: Command) -> None:
        file, deadline = out / "ranks.json", time.monotonic() + 10
        pids = [row["pid"] for row in json.loads(file.read_text())] if file.exists() else []
        while any(is_running(pid) and parent_of(pid) in (command.pid, 1) for pid in pids):
            assert time.monotonic() < deadline, f"left behind: {pids}"
            time.sleep(0.02)


def curve_of(out: Path) -> Curve:
    """Step, loss, gradient norm and tokens of every row, as written: bit for bit."""
    return [(row["step"], row["loss"], row["grad_norm"], row["tokens"]) for row in read_rows(out / "metrics.jsonl")]


def latest_step(out: Path) -> int:
    """Step of the checkpoint that ``latest`` names, which must be whole; 0 for none.

    Killed between the first checkpoint and the first ``latest``, a run has one all the same.
    """
    pointer = out / "checkpoints" / "latest"
    if not pointer.exists():
        whole = [folder.parent.name for folder in pointer.parent.glob("step_????????/manifest.json")]
        return max((int(name.removeprefix("step_")) for name in whole), default=0)
    name = pointer.read_text().strip()
    folders = [out / "checkpoints" / name, out / "checkpoints" / (name + ".replaced")]
    assert any((folder / "manifest.json").is_file() for folder in folders), f"latest names {name}, which is gone"
    return int(name.removeprefix("step_"))


def event_count(out: Path) -> int:
    """Rows of events.jsonl so far."""
    file = out / "events.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def resumed_step(out: Path, after: int) -> int | None:
    """Step that a start went on from, if its event is among those after the first ``after``."""
    file = out / "events.jsonl"
    for line in file.read_text().split("\n")[after:-1] if file.exists() else []:
        row = json.loads(line)
        if row["event"] in ("started", "resumed"):
            return int(row["step"])
    return None


def children_of(pid: int) -> list[int]:
    """Processes that ``pid`` started."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def parent_of(pid: int) -> int:
    """The process that started ``pid``; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def has_started(out: Path, ranks: list[int]) -> bool:
    """Whether ranks.json is of these ranks."""
    try:
        return {row["pid"] for row in json.loads((out / "ranks.json").read_text())} == set(ranks)
    except (OSError, ValueError):
        return False


def table(outcomes: list[Outcome]) -> str:
    """Faults by kind and phase, as Markdown."""
    names = {
        "any time": "kill -9 by the clock", "kill": "kill -9 at a change of the file system",
        "torn": "half a write, kill -9", "stop": "SIGSTOP (watchdog)",
    }  # fmt: skip
    counts = Counter((outcome.kind, outcome.phase) for outcome in outcomes)
    lines = ["| fault | launcher, rank 0, rank 1 | phases hit | resumes |", "| --- | --- | --- | --- |"]
    for kind in KINDS:
        mine = [outcome for outcome in outcomes if outcome.kind == kind]
        who = Counter(outcome.rank for outcome in mine)
        phases = sorted((phase for known, phase in counts if known == kind), key=lambda phase: -counts[kind, phase])
        shown = ", ".join(f"{phase} {counts[kind, phase]}" for phase in phases)
        lines.append(f"| {names.get(kind, kind)} | {who[-1]}, {who[0]}, {who[1]} | {shown} | {len(mine)} |")
    return "\n".join([*lines, f"| all | | {len({outcome.phase for outcome in outcomes})} phases | {len(outcomes)} |"])


def file_system_of(folder: Path) -> str:
    """Kind of the file system that holds ``folder``."""
    told = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


def to_line(outcome: Outcome) -> str:
    """An outcome as one line of JSON."""
    return json.dumps(asdict(outcome))
