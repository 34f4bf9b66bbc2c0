"""A run whose loss spikes goes back, leaves the samples out, and is one run however often it is stopped on the way."""

from pathlib import Path
from typing import Any

import pytest

from megavid.config.load import load_run
from megavid.errors import ConfigError
from megavid.plan.layout import layout_of
from megavid.training.metrics import read_rows
from megavid.training.run_dir import RunDir
from megavid.training.state import TrainState
from megavid.training.status import status_of
from tests.support.faults import Fault
from tests.support.tiny_run import TINY
from tests.support.warm_parent import Command, WarmParent

FLAGS = (
    *TINY, "--ranks", "2", "--parallel.expert", "2", "--train.global_batch_size", "2", "--checkpoint.interval_steps",
    "2", "--checkpoint.keep_last", "9", "--train.spike_factor", "5", "--train.spike_window", "2",
    "--train.spike_rollback_steps", "2",
)  # fmt: skip
BAD_DRAW = 62
"""A clip of step 7 and of no other."""
SPIKE, BACK_TO, LAST = 7, 4, 9
"""Where it comes, the last checkpoint that is at least two steps older, and the end."""


def figures(out: Path) -> list[tuple[Any, ...]]:
    """What must be the same in two runs, a row a step."""
    return [
        (row["step"], row["loss"], row["grad_norm"], row.get("left_out")) for row in read_rows(out / "metrics.jsonl")
    ]


def train(warm: WarmParent, out: Path, steps: int, *flags: str, kind: str = "bad clip") -> Command:
    fault = Fault(kind, -1, BAD_DRAW, str(out))
    return warm.run("train", "tiny", "--out", str(out), *FLAGS, "--train.steps", str(steps), *flags, fault=fault)


@pytest.fixture(scope="module")
def gone_back(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gone_back") / "run"
    done = train(warm, out, LAST)
    assert done.returncode == 0, done.stderr
    return out


def test_run_goes_back_once_and_leaves_the_samples_out(gone_back: Path) -> None:
    rows = read_rows(gone_back / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, LAST + 1))
    assert not any(row["is_skipped"] for row in rows)
    left_out = SPIKE - BACK_TO
    assert [row.get("left_out", 0) for row in rows] == [0] * BACK_TO + [left_out] * (LAST - BACK_TO)
    (event,) = [event for event in RunDir(gone_back).events() if event["event"] == "rolled_back"]
    assert (event["spike"], event["step"], event["rollbacks"], event["left_out"]) == (SPIKE, BACK_TO, 1, left_out)
    assert event["samples"]
    status = status_of(gone_back)
    assert (status.state, status.rollbacks, status.left_out) == ("finished", 1, left_out)
    assert f"1 times at a spike; samples of {left_out} steps left out" in "\n".join(status.lines())


def test_steps_behind_it_are_those_of_a_fresh_process_on_later_samples(warm: WarmParent, gone_back: Path) -> None:
    """The twin of loading in place: a process that begins with the checkpoint takes the same steps, bit for bit."""
    for step in (BACK_TO + 1, LAST):
        done = warm.run("replay", str(gone_back), "--step", str(step))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("bitwise the recorded one") == 2


def test_run_that_is_stopped_before_and_after_is_the_same_run(
    warm: WarmParent, gone_back: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for stop_at in (SPIKE - 1, SPIKE + 1, 0):  # the second start comes to the spike, and back to this step
        done = train(warm, out, LAST, "--train.stop_at_step", str(stop_at))
        assert done.returncode == 0, done.stderr
        assert figures(out)[-1][0] == (stop_at or LAST)
    assert figures(out) == figures(gone_back)
    same = warm.run("diff", str(gone_back), str(out))
    assert same.returncode == 0, same.stderr
    assert status_of(out).restarts == 2
    assert status_of(out).rollbacks == 1


def test_run_that_keeps_spiking_stops_at_its_limit(warm: WarmParent, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = train(warm, out, 12, "--train.max_rollbacks", "1", kind="bad clips")
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("\n") == 1
    assert "the run has gone back 1 times, the limit is train.max_rollbacks = 1" in done.stderr
    names = [event["event"] for event in RunDir(out).events()]
    assert (names.count("skipped"), names.count("rolled_back")) == (2, 1)


def test_without_a_checkpoint_that_is_old_enough_the_step_alone_is_left_out(warm: WarmParent, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fault = Fault("spike", -1, 3, str(out))
    done = warm.run("train", "tiny", "--out", str(out), *FLAGS, "--train.steps", "4", fault=fault)
    assert done.returncode == 0, done.stderr
    assert [row["is_skipped"] for row in read_rows(out / "metrics.jsonl")] == [False, False, True, False]
    (event,) = [event for event in RunDir(out).events() if event["event"] == "not_rolled_back"]
    assert event["reason"] == "no checkpoint is old enough"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--train.spike_rollback_steps", "5"), "is read with train.spike_factor above 1"),
        (("--train.spike_factor", "3", "--train.spike_rollback_steps", "202"), "keep 201 steps at the least"),
        (
            ("--train.spike_factor", "3", "--train.spike_rollback_steps", "5", "--checkpoint.interval_steps", "0"),
            "keep the last step's only",
        ),
    ],
)
def test_what_could_never_go_back_is_refused(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        layout_of(load_run("tiny", flags), 1)


def test_checkpoints_of_abandoned_steps_are_told_from_those_of_the_run() -> None:
    at_4, at_6, at_7 = (TrainState(step=step) for step in (4, 6, 7))
    back = TrainState(step=4)
    back.go_back_from(at_7)
    assert (back.rollbacks, back.left_out, back.data_step) == ([(4, 7)], 3, 7)
    assert TrainState.from_json(back.to_json(seed=1, loader={})) == back
    later = TrainState(step=9, rollbacks=back.rollbacks, left_out=back.left_out)
    assert TrainState(step=2).is_before(later)
    assert back.is_before(later)
    assert not at_4.is_before(later)  # it was saved again
    assert not at_6.is_before(later)
    assert not later.is_before(back)
    further = TrainState(step=2)
    further.go_back_from(later)
    assert (further.rollbacks, further.left_out, further.data_step) == ([(4, 7), (2, 9)], 10, 12)
    assert not back.is_before(further)
