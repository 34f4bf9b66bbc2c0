"""``megavid status`` says the truth while a run runs, hangs, crashes, stops and is finished, and imports no torch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavid.training.status import duration, status_of
from tests.support.faults import Fault
from tests.support.tiny_run import TINY, rank_pids, wait_for_step
from tests.support.warm_parent import WarmParent

ARGS = (*TINY, "--ranks", "2", "--train.global_batch_size", "2", "--checkpoint.interval_steps", "2")


def test_states_follow_each_other_as_they_come(warm: WarmParent, tmp_path: Path) -> None:
    out = tmp_path / "run"
    slow = Fault("slow", 1, 0, str(out), seconds=0.15)
    train = ("train", "tiny", "--out", str(out), *ARGS, "--train.steps", "300", "--watchdog.slow_interval_steps", "2")

    command = warm.start(*train, fault=slow)
    wait_for_step(command, out, 5)
    running = status_of(out)
    assert running.state == "running", running
    assert running.eta_s is not None
    assert running.step_s is not None
    assert running.eta_s == pytest.approx(running.step_s * (300 - running.step))
    assert running.checkpoint_step in (2, 4, 6)
    assert (running.restarts, running.steps) == (0, 300)

    # Nothing is written, though it lives: hung, once that is longer than its own limit.
    for pid in (command.pid, *rank_pids(out)):
        os.kill(pid, signal.SIGSTOP)
    assert status_of(out).state == "running"
    hung = status_of(out, now=time.time() + 700)
    assert hung.state == "hung"
    assert hung.eta_s is None
    for pid in (*rank_pids(out), command.pid):
        os.kill(pid, signal.SIGCONT)

    os.kill(rank_pids(out)[1], signal.SIGKILL)
    assert command.wait() == 5
    crashed = status_of(out)
    assert crashed.state == "crashed"
    assert "rank 1 was killed by SIGKILL" in crashed.why or "rank 1 on " in crashed.why
    assert crashed.eta_s is None
    errors = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
    assert all(row["message"] and row["host"] for row in errors)
    assert {row["rank"] for row in errors} <= {-1, 0}

    again = warm.start(*train, fault=slow)
    wait_for_step(again, out, crashed.checkpoint_step + 4)
    assert status_of(out).state == "running"
    again.send_signal(signal.SIGTERM)
    assert again.wait() == 75
    stopped = status_of(out)
    assert stopped.state == "stopped"
    assert stopped.why.startswith("SIGTERM")
    assert stopped.restarts == 1
    assert stopped.checkpoint_step == stopped.step
    assert sum(stopped.slow_hosts.values()) >= 1

    steps = str(stopped.step + 1)
    last = warm.run("train", str(out / "run.toml"), "--out", str(out), "--ranks", "2", "--train.steps", "300",
                    "--train.stop_at_step", steps)  # fmt: skip
    assert last.returncode == 0, last.stderr
    assert status_of(out).state == "stopped"

    (out / "checkpoints" / "latest").write_text("step_00000999\n")
    assert status_of(out).checkpoint == ""
    _command_line_agrees(out)


def _command_line_agrees(out: Path) -> None:
    plot = out / "status.png"
    code = (
        "import sys; from megavid.cli.main import main; "
        f"status = main(['status', {str(out)!r}, '--json']); assert 'torch' not in sys.modules; "
        f"main(['status', {str(out)!r}, '--plot', {str(plot)!r}]); assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"state": "stopped"' in done.stdout
    assert "state       stopped: train.stop_at_step; the same command goes on" in done.stdout
    assert "checkpoint  none yet" in done.stdout
    assert plot.stat().st_size > 5000


def test_folder_of_no_run_is_refused(warm: WarmParent, tmp_path: Path) -> None:
    refused = warm.run("status", str(tmp_path))
    assert refused.returncode == 2
    assert "is no run's folder" in refused.stderr
    assert warm.run("status", str(tmp_path), "--plot", "x.pdf").returncode == 2


def test_durations_read_well() -> None:
    assert [duration(s) for s in (4.2, 63, 7500, 270000)] == ["4.2 s", "1 min 3 s", "2 h 5 min", "3 d 3 h"]
