"""Two starts of one run at once: the former one ends and changes nothing, wherever it was frozen."""

import os
import signal
import time
from pathlib import Path

import pytest

from megavid.checkpoint import Checkpoint, Fence, SingleRank, latest
from megavid.checkpoint.files import replace_text
from megavid.errors import Superseded
from megavid.training.metrics import read_rows
from megavid.training.run_dir import RunDir, is_over, slurm_words
from tests.support.faults import Fault
from tests.support.tiny_run import TINY, is_running, wait_for_step
from tests.support.warm_parent import Command, WarmParent

STEPS = ("--train.global_batch_size", "2", "--train.steps", "5", "--checkpoint.interval_steps", "1")


def curve(out: Path) -> list[tuple[object, ...]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_rows(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[object, ...]]:
    out = tmp_path_factory.mktemp("undisturbed")
    assert warm.run("train", "tiny", "--out", str(out), *TINY, *STEPS).returncode == 0
    return curve(out)


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def wait_until_stopped(command: Command) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{command.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert command.poll() is None, command.stderr
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Where the first start is frozen: just before each change that others would see, behind the check that allowed it.
@pytest.mark.parametrize(
    "change", ["write rank_00000.safetensors", "rename step_00000003.", "replace latest.", "write metrics.jsonl"]
)
def test_former_start_that_wakes_up_changes_nothing(
    warm: WarmParent, tmp_path: Path, undisturbed: list[tuple[object, ...]], change: str
) -> None:
    out = tmp_path / "run"
    args = ("train", "tiny", "--out", str(out), *TINY, *STEPS)
    at = 1 if "step_" in change else 2
    former = warm.start(*args, fault=Fault("stop", -1, at, str(out), match=change))
    wait_until_stopped(former)
    (out / ".lock").unlink()  # as on a file system whose locks do not reach the lost node
    later = warm.run(*args)
    assert later.returncode == 0, later.stderr
    before = state_of(out)
    os.kill(former.pid, signal.SIGCONT)
    assert former.wait() == Superseded.exit_code, former.stderr
    assert former.stderr.count("\n") == 1
    assert "is now written by start 2" in former.stderr
    assert state_of(out) == before
    assert curve(out) == undisturbed
    folder = latest(out / "checkpoints")
    assert folder is not None
    Checkpoint(folder).verify(SingleRank())


def test_running_start_ends_when_another_takes_over(
    warm: WarmParent, tmp_path: Path, undisturbed: list[tuple[object, ...]]
) -> None:
    out = tmp_path / "run"
    ranks = ("--ranks", "2", "--parallel.expert", "2")
    slow = Fault("slow", 0, 0, str(out), seconds=0.5)
    args = ("train", "tiny", "--out", str(out), *TINY, *STEPS, *ranks)
    former = warm.start(*args, fault=slow)
    wait_for_step(former, out, 2)
    later = warm.run(*args, "--take-over", fault=Fault("none", 0, 0, str(out), lock_wait_s=0.2))
    assert later.returncode == 0, later.stderr
    assert former.wait() == Superseded.exit_code, former.stderr
    assert "is now written by start 2" in former.stderr
    assert not is_running(former.pid)
    assert [row[0] for row in curve(out)] == list(range(1, 6))
    names = [event["event"] for event in RunDir(out).events()]
    assert names.count("finished") == 1
    assert names[-1] == "finished"
    assert [row[1] for row in curve(out)] == pytest.approx([row[1] for row in undisturbed], rel=1e-5)


def test_check_stands_between_writing_aside_and_replacing(tmp_path: Path) -> None:
    former = Fence.put_up(tmp_path)
    former.check()
    later = Fence.put_up(tmp_path)
    later.check()
    with pytest.raises(Superseded, match="is now written by start 2"):
        replace_text(tmp_path / "latest", "step_00000001\n", token=former.token, check=former.check)
    assert not (tmp_path / "latest").exists()
    (tmp_path / "incarnation.json").unlink()
    with pytest.raises(Superseded, match="the file is gone"):
        later.check()


def test_lock_is_taken_from_a_start_that_slurm_has_given_up_alone() -> None:
    holder, here = "pid 12 on n1, Slurm job 77 start 1 of cluster big", {"SLURM_CLUSTER_NAME": "big"}
    assert is_over(holder, {**here, "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2"})
    assert not is_over(holder, {**here, "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"})
    assert not is_over(holder, {**here, "SLURM_JOB_ID": "78", "SLURM_RESTART_COUNT": "2"})
    assert not is_over("pid 12 on n1", {**here, "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2"})
    assert is_over(holder, {**here, "SLURM_JOB_ID": "78", "MEGAVID_ENDED_JOB": "77"})
    assert not is_over(holder, {**here, "SLURM_JOB_ID": "78", "MEGAVID_ENDED_JOB": "76"})
    assert not is_over(holder, {**here, "SLURM_JOB_ID": "78", "MEGAVID_ENDED_JOB": ""})
    elsewhere = {"SLURM_CLUSTER_NAME": "small", "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2"}
    assert not is_over(holder, elsewhere)
    assert is_over("pid 12 on n1" + slurm_words(elsewhere), {**elsewhere, "SLURM_RESTART_COUNT": "3"})
