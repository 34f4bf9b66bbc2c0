"""What happens to a job on a cluster, done to one: after each fault the curve is bitwise that of an undisturbed run.

docs/reliability.md lists the promises; each test here is a row of its table.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from megavid.training.metrics import read_rows
from tests.support.slurm import SlurmCluster, halting
from tests.support.warm_parent import WarmParent

EXAMPLES = Path(__file__).parents[2] / "examples" / "slurm"
STEPS = 24
FLAGS = (
    "--train.steps", str(STEPS), "--train.global_batch_size", "2", "--checkpoint.interval_steps", "3",
    "--data.validation_samples", "2", "--log.tensorboard", "false", "--parallel.expert", "2",
    "--watchdog.step_s", "12",
)  # fmt: skip
NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")


def rows(out: Path) -> list[tuple[object, ...]]:
    """What must not depend on what happened to the run."""
    return [(row["step"], row["loss"], row["grad_norm"], row["tokens"]) for row in read_rows(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[object, ...]]:
    """The rows of the same run on two ranks of this machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = warm.run("train", "tiny", "--out", str(folder / "run"), "--ranks", "2", *FLAGS)
    assert done.returncode == 0, done.stderr
    return rows(folder / "run")


@dataclass
class Training:
    """A run, and the job that trains it now."""

    cluster: SlurmCluster
    out: Path
    job: str = ""
    ranks_by: str = "srun"
    log_from: int = 0
    """Where the log of the present start begins."""

    def queue(self, *args: str) -> None:
        """Queue the shipped script on this run."""
        self.log_from = 0
        self.job = self.cluster.submit(
            EXAMPLES / "train.sbatch", "tiny", "--out", str(self.out), *FLAGS, *args, options=NODES,
            env={"MEGAVID_RANKS_BY": self.ranks_by},
        )  # fmt: skip

    def submit(self, *args: str) -> None:
        """Queue it, and wait until it trains."""
        count = len(self.starts())
        self.queue(*args)
        self._wait_start(count)

    def restart(self) -> int:
        """The job is queued again and nothing of it runs; its next start goes on from the latest checkpoint, which?"""
        self.cluster.wait_state(self.job, "PENDING")
        self.assert_nothing_left()
        latest = int((self.out / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))
        self.log_from, count = len(self.cluster.log(self.job)), len(self.starts())
        self.cluster.start_now(self.job)
        self._wait_start(count)
        assert self.starts()[-1] == latest
        return latest

    def _wait_start(self, count: int) -> None:
        deadline = time.monotonic() + 300
        while len(self.starts()) == count:
            assert time.monotonic() < deadline, self.cluster.log(self.job) + self.cluster.controller_log()
            time.sleep(0.1)

    def events(self) -> list[dict[str, object]]:
        file = self.out / "events.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def starts(self) -> list[int]:
        """The step that each start began with or went on from."""
        return [int(str(event["step"])) for event in self.events() if event["event"] in ("started", "resumed")]

    def pid(self, rank: int) -> int:
        pid: int = json.loads((self.out / "ranks.json").read_text())[rank]["pid"]
        return pid

    def wait_steps(self, count: int) -> None:
        """Wait until this start has taken so many steps; its ranks are then in the middle of the next one."""
        step = self.starts()[-1] + count
        self.cluster.wait_log(self.job, f"step{step:>7}/{STEPS}", start=self.log_from)

    def assert_stopped(self, reason: str) -> int:
        """The job is queued again, after a save for that reason; at which step."""
        self.cluster.wait_state(self.job, "PENDING")
        last = self.events()[-1]
        assert (last["event"], last.get("reason")) == ("stopped", reason), self.cluster.log(self.job)
        return int(str(last["step"]))

    def faults(self) -> list[list[str]]:
        """Checkpoint and host of each fault that job.sh has noted."""
        file = self.out / "slurm" / "faults"
        return [line.split()[:2] for line in file.read_text().splitlines()] if file.exists() else []

    def assert_nothing_left(self, job: str = "") -> None:
        """No process of the job (the present one, unless named) runs, or will in a moment."""
        deadline = time.monotonic() + 300
        while left := self.cluster.processes(job or self.job):
            assert time.monotonic() < deadline, [self.cluster.command(pid) for pid in left]
            time.sleep(0.1)


def test_one_run_through_every_fault_has_the_undisturbed_curve(
    cluster: SlurmCluster, tmp_path: Path, undisturbed: list[tuple[object, ...]]
) -> None:
    """One run, so that each fault costs one start instead of two; every one leaves the run as it should be."""
    training = Training(cluster, tmp_path / "run")
    training.submit()
    try:
        term_to_the_ranks_saves(training)
        requeue_from_outside_goes_back_to_the_checkpoint(training)
        killed_rank_ends_all_and_is_noted(training)
        hung_rank_is_ended_by_the_watchdog(training)
        lost_node_is_left(training)
        cancelled_job_saves_and_stays_cancelled(training)
        time_limit_saves_at_an_agreed_step(training)
        next_job_takes_the_run_from_a_lost_node(training)
    finally:
        cluster.end(training.job)
    assert rows(training.out) == undisturbed
    assert len(training.starts()) == 9


def term_to_the_ranks_saves(training: Training) -> None:
    training.wait_steps(2)
    training.cluster.ask("scancel", "--signal=TERM", training.job)
    step = training.assert_stopped("SIGTERM")
    assert training.restart() == step


def requeue_from_outside_goes_back_to_the_checkpoint(training: Training) -> None:
    training.wait_steps(2)
    training.cluster.ask("scontrol", "requeue", training.job)
    training.restart()
    assert not training.faults()


def killed_rank_ends_all_and_is_noted(training: Training) -> None:
    training.wait_steps(2)
    host = training.cluster.hosts(training.job)[1]
    os.kill(training.pid(1), signal.SIGKILL)
    step = training.restart()
    assert training.faults() == [[f"step_{step:08d}", host]]


def hung_rank_is_ended_by_the_watchdog(training: Training) -> None:
    training.wait_steps(2)
    host = training.cluster.hosts(training.job)[1]
    os.kill(training.pid(1), signal.SIGSTOP)
    step = training.restart()
    assert training.faults()[1:] == [[f"step_{step:08d}", host]], training.cluster.log(training.job)
    assert list((training.out / "hangs").iterdir())


def lost_node_is_left(training: Training) -> None:
    cluster = training.cluster
    training.wait_steps(1)
    lost = cluster.hosts(training.job)[1]
    with lost_node(cluster, lost):
        training.restart()  # from the last checkpoint, or from a save: Slurm asks the ranks that it reaches first
        assert lost not in cluster.hosts(training.job)


def time_limit_saves_at_an_agreed_step(training: Training) -> None:
    """Slurm's own USR1, ``--signal`` of the shipped script; it looks at time limits every 30 s."""
    training.submit("--watchdog.step_s", "100")
    cluster, job = training.cluster, training.job
    training.wait_steps(1)
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    with halting(training.pid(0), 0.025):  # so that the run does not come to its end before
        cluster.wait_log(job, "got USR1", 60.0)
    step = training.assert_stopped("SIGUSR1")
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert training.restart() == step


def cancelled_job_saves_and_stays_cancelled(training: Training) -> None:
    training.wait_steps(1)
    training.cluster.ask("scancel", training.job)
    assert training.cluster.wait_end(training.job) == "CANCELLED"
    training.assert_nothing_left()
    assert training.events()[-1]["event"] == "stopped", training.cluster.log(training.job)


def next_job_takes_the_run_from_a_lost_node(training: Training) -> None:
    """As in a chain, whose next job has another number; rank 0 of the former one sleeps through it with the lock."""
    cluster = training.cluster
    cluster.ask("scontrol", "update", f"JobId={training.job}", "Requeue=0")
    training.wait_steps(1)
    former, asleep, lost = training.job, training.pid(0), cluster.hosts(training.job)[0]
    os.kill(asleep, signal.SIGSTOP)
    with lost_node(cluster, lost):
        assert cluster.wait_end(former) == "NODE_FAIL"
        training.submit()
        try:
            assert cluster.wait_end(training.job) == "COMPLETED", cluster.log(training.job)
            written = (training.out / "events.jsonl").read_bytes()
        finally:
            os.kill(asleep, signal.SIGCONT)
        for job in (former, training.job):
            training.assert_nothing_left(job)
    assert (training.out / "events.jsonl").read_bytes() == written


@contextmanager
def lost_node(cluster: SlurmCluster, name: str) -> Iterator[None]:
    """While open, Slurm does not reach that node; what runs on it lives on."""
    cluster.kill_node(name)
    # As Slurm finds out by itself, some 26 s later.
    cluster.ask("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=lost")
    try:
        yield
    finally:
        cluster.start_node(name)
        with suppress(AssertionError):  # it is back already: ReturnToService = 2
            cluster.ask("scontrol", "update", f"NodeName={name}", "State=RESUME")


def test_ranks_of_torchrun_save_and_die_like_those_of_srun(
    cluster: SlurmCluster, tmp_path: Path, undisturbed: list[tuple[object, ...]]
) -> None:
    """torchrun says 1 whatever its ranks said, and would kill them half a minute after a signal."""
    training = Training(cluster, tmp_path / "run", ranks_by="torchrun")
    training.submit()
    try:
        training.wait_steps(2)
        cluster.ask("scancel", "--batch", "--signal=USR1", training.job)
        step = training.assert_stopped("SIGUSR1")
        assert training.restart() == step
        training.wait_steps(1)
        os.kill(training.pid(1), signal.SIGKILL)
        cluster.wait_state(training.job, "PENDING")
        assert len(training.faults()) == 1, cluster.log(training.job)
    finally:
        cluster.end(training.job)
    found = rows(training.out)
    assert len(found) > step
    assert found == undisturbed[: len(found)]


def test_bad_input_is_not_requeued(cluster: SlurmCluster, tmp_path: Path) -> None:
    training = Training(cluster, tmp_path / "run")
    training.queue("--model.num_heads", "3")
    assert cluster.wait_end(training.job) == "FAILED"
    assert "status 2 needs a person" in cluster.log(training.job)
    training.assert_nothing_left()
