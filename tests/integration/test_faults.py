"""Ranks that die, hang or are slow: the job ends in time with one line that names the rank, and leaves its stacks."""

import json
import os
import platform
import signal
import socket
import time
from pathlib import Path

import pytest

from megavid.training.metrics import read_rows
from megavid.training.run_dir import RunDir
from tests.support.faults import Fault
from tests.support.tiny_run import TINY, assert_ended, rank_pids, wait_for_step
from tests.support.warm_parent import WarmParent

RANKS = ("--ranks", "3", "--train.global_batch_size", "3", "--train.steps", "400")


def test_hung_rank_is_named_and_every_other_rank_leaves_its_stacks(warm: WarmParent, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = warm.start("train", "tiny", "--out", str(out), *TINY, *RANKS, "--watchdog.step_s", "2")
    wait_for_step(command, out, 2)
    pids = rank_pids(out)
    os.kill(pids[1], signal.SIGSTOP)
    began = time.monotonic()
    assert command.wait() == 5, command.stderr
    assert time.monotonic() - began < 25  # 2 s of limit, 4 s for the others' words, 5 s before ranks are killed
    assert_ended(pids)
    assert command.stderr.count("\n") == 1
    line = command.stderr
    assert line.startswith(f"megavid: error: rank 1 on {platform.node()} does not answer; it last entered: ")
    assert "no progress for 2 s (watchdog.step_s)" in line
    assert "rank 0 on" not in line
    folder = Path(line.split()[-1])
    assert folder.parent == out / "hangs"
    assert sorted(file.name for file in folder.iterdir()) == ["rank_00000.txt", "rank_00002.txt"]
    for file in folder.iterdir():
        text = file.read_text()
        for said in ("and is in it", "rank 1 of this host", "most recent call first", "loop.py", "last collectives"):
            assert said in text, said
        assert text.count("Thread 0x") + text.count("Current thread") >= 2


def test_killed_rank_is_named_with_its_host_and_what_it_last_entered(warm: WarmParent, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = warm.start("train", "tiny", "--out", str(out), *TINY, *RANKS)
    wait_for_step(command, out, 2)
    pids = rank_pids(out)
    os.kill(pids[2], signal.SIGKILL)
    assert command.wait() == 5, command.stderr
    assert_ended(pids)
    assert command.stderr.count("\n") == 1
    said = f"megavid: error: rank 2 was killed by SIGKILL on {platform.node()}, having last entered "
    assert command.stderr.startswith(said)
    assert " of world, " in command.stderr or " of " in command.stderr.removeprefix(said)
    dumps = [file.name for file in (out / "hangs").glob("*/*.txt")]
    assert set(dumps) <= {"rank_00000.txt", "rank_00001.txt"}
    assert dumps
    assert not [path for path in Path("/dev/shm").glob("megavid-*.flight") if path.stem.endswith(str(pids[2]))]


@pytest.mark.parametrize("stopped", [0, 1])
def test_hung_rank_ends_ranks_that_no_launcher_started(warm: WarmParent, tmp_path: Path, stopped: int) -> None:
    """As under srun: rank 0 keeps the store, so that a store that never answers is a case of its own."""
    out = tmp_path / "run"
    args = ("train", "tiny", "--out", str(out), *TINY, "--train.global_batch_size", "2", "--train.steps", "400")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        warm.start(*args, "--watchdog.step_s", "2", environ={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    wait_for_step(ranks[0], out, 2)
    os.kill(ranks[stopped].pid, signal.SIGSTOP)
    other = ranks[1 - stopped]
    assert other.wait(40) == 5, other.stderr
    os.kill(ranks[stopped].pid, signal.SIGKILL)
    assert other.stderr.count("\n") == 1
    assert f"rank {stopped} on {platform.node()} does not answer; it last entered: " in other.stderr
    assert f"rank {1 - stopped} on" not in other.stderr
    assert [file.name for file in (out / "hangs").glob("*/*")] == [f"rank_{1 - stopped:05d}.txt"]


def test_slow_rank_is_named_with_its_host(warm: WarmParent, tmp_path: Path) -> None:
    out = tmp_path / "run"
    every = ("--train.steps", "4", "--watchdog.slow_interval_steps", "4")
    fault = Fault("slow", 1, 0, str(out), seconds=1.0)
    done = warm.run("train", "tiny", "--out", str(out), *TINY, *RANKS, *every, fault=fault)
    assert done.returncode == 0, done.stderr
    found = [event for event in RunDir(out).events() if event["event"] == "slow_rank"]
    assert [(event["rank"], event["host"]) for event in found] == [(1, platform.node())]
    assert float(str(found[0]["own_s"])) > 1.0
    assert float(str(found[0]["own_s"])) > 1.5 * float(str(found[0]["median_s"]))


def test_weight_that_is_not_finite_on_one_rank_stops_all_with_its_name(warm: WarmParent, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fault = Fault("nan", 1, 3, str(out))
    done = warm.run("train", "tiny", "--out", str(out), *TINY, *RANKS, "--train.max_bad_steps", "2", fault=fault)
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("\n") == 1
    assert "first not finite: " in done.stderr
    assert " on rank 1 alone (" in done.stderr
    rows = read_rows(out / "metrics.jsonl")
    assert [row["is_skipped"] for row in rows] == [False, False, True, True]
    assert json.loads((out / "ranks.json").read_text())


def test_spike_of_the_loss_is_skipped_and_its_samples_are_named(warm: WarmParent, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ("--train.steps", "6", "--train.spike_factor", "5", "--train.spike_window", "2")
    fault = Fault("spike", -1, 4, str(out))
    done = warm.run("train", "tiny", "--out", str(out), *TINY, *RANKS, *flags, fault=fault)
    assert done.returncode == 0, done.stderr
    rows = read_rows(out / "metrics.jsonl")
    assert [row["is_skipped"] for row in rows] == [False, False, False, True, False, False]
    assert rows[5]["skipped"] == 1
    skipped = [event for event in RunDir(out).events() if event["event"] == "skipped"]
    assert [event["step"] for event in skipped] == [4]
    assert str(skipped[0]["culprit"]).startswith("a spike of the loss, above ")
    assert skipped[0]["samples"]
