"""Who is to blame, who is slow, and a record that outlives its process."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megavid.config.watchdog import WatchdogConfig
from megavid.errors import ConfigError, RankLost
from megavid.parallel.launch import RankEnv
from megavid.training.flight import FlightRecorder, LastCall, read_slot, remove_slots_of_the_dead, slot_of
from megavid.training.slow import slow_ranks
from megavid.training.state import TrainState
from megavid.training.verdict import Report, judge
from megavid.training.watchdog import Watchdog, is_lost_connection

HOSTS = {0: "a", 1: "a", 2: "b", 3: "b"}


def call(sequence: int, is_inside: bool = True, number: int = 3) -> LastCall:
    return LastCall(sequence, number, "all_reduce", "dp", 100.0, is_inside)


def reports(**calls: LastCall) -> dict[int, Report]:
    found = {int(name[1:]): last for name, last in calls.items()}
    return {rank: Report(rank, 7, last, {}) for rank, last in found.items()}


def test_rank_that_does_not_answer_is_named_with_what_its_neighbours_know() -> None:
    told = reports(r0=call(9), r1=call(9), r3=call(9))
    told[3] = Report(3, 7, call(9), {2: call(8, number=2)})
    line = judge(told, HOSTS, 112.0)
    assert line == ("rank 2 on b does not answer; it last entered: all_reduce 2 of dp, 12.0 s ago, and is in it")
    del told[3]
    line = judge(told, HOSTS, 112.0)
    assert line.count("unknown, as no rank of that host answers") == 2
    assert "rank 2 on b" in line
    assert "rank 3 on b" in line


def test_rank_outside_of_a_collective_is_to_blame_while_others_wait_in_one() -> None:
    line = judge(reports(r0=call(9), r1=call(9), r2=call(9, is_inside=False), r3=call(9)), HOSTS, 101.0)
    assert line.startswith("rank 2 on b stands still outside of any collective; it last entered: all_reduce 3 of dp")
    assert line.endswith("and has left it")


def test_rank_with_the_fewest_calls_is_behind() -> None:
    assert judge(reports(r0=call(9), r1=call(8), r2=call(9), r3=call(9)), HOSTS, 101.0).startswith(
        "rank 1 on a is behind the others"
    )
    everyone = judge(reports(r0=call(9), r1=call(9), r2=call(9), r3=call(9)), HOSTS, 101.0)
    assert everyone.count("stands still like all others") == 4


def test_many_lost_ranks_are_counted() -> None:
    line = judge(reports(r0=call(9)), dict.fromkeys(range(12), "h"), 101.0)
    assert line.endswith("; and 7 more ranks")


def test_reports_travel_as_text() -> None:
    report = Report(3, 7, call(9), {2: call(8)})
    assert Report.from_json(report.to_json()) == report


def test_slow_rank_is_told_from_those_that_wait_for_it() -> None:
    assert slow_ranks([0.1, 0.1, 0.16, 0.1], 0.0, 1.5) == [2]
    assert slow_ranks([0.1, 0.1, 0.14, 0.1], 0.0, 1.5) == []
    assert slow_ranks([0.3, 0.1], 0.0, 1.5) == [0]
    assert slow_ranks([0.001, 0.003], 0.0, 1.5) == []  # noise
    assert slow_ranks([0.0, 0.0, 2.0], 1.0, 1.5) == [2]  # where only waits for data are known, against the step


def test_slot_of_a_killed_process_tells_what_it_last_entered() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        recorder = FlightRecorder({})
        recorder.__enter__()
        # A group of one is left out, as nothing travels in it: the hook is called with a group that says it has two.
        recorder._axes["g"] = b"dp"

        class Group:
            group_name = "g"

            def size(self) -> int:
                return 2

        hook = vars(dist.ProcessGroup)["barrier"]
        with pytest.raises(TypeError):  # torch's own function refuses this group, after the hook has taken note
            hook(Group())
        os.write(writer, b"x")
        time.sleep(60)
    os.read(reader, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    last = read_slot(child)
    assert last is not None
    assert (last.sequence, last.number, last.operation, last.group, last.is_inside) == (1, 1, "barrier", "dp", False)
    assert abs(last.since - time.time()) < 60
    remove_slots_of_the_dead()
    assert slot_of(child).exists()  # somebody may still want to read it
    remove_slots_of_the_dead(age_s=-1.0)
    assert not slot_of(child).exists()
    assert read_slot(child) is None


def test_recorder_puts_everything_back() -> None:
    before = {name: vars(dist.ProcessGroup).get(name) for name in ("allreduce", "barrier")}, vars(dist.Work)["wait"]
    with FlightRecorder({}) as recorder:
        assert vars(dist.ProcessGroup)["barrier"] is not before[0]["barrier"]
        assert recorder.last().text(0.0) == "no collective yet"
    assert ({name: vars(dist.ProcessGroup).get(name) for name in before[0]}, vars(dist.Work)["wait"]) == before


def test_only_torchs_words_for_a_lost_peer_count_as_one() -> None:
    assert is_lost_connection(RuntimeError("[../gloo/transport/tcp/pair.cc:1] Connection closed by peer"))
    assert not is_lost_connection(RuntimeError("shape '[2]' is invalid"))
    assert not is_lost_connection(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_lost_connection(RankLost("gloo/transport"))


@pytest.mark.parametrize(
    "fields", [{"step_s": -1.0}, {"first_step_s": float("inf")}, {"slow_factor": 0.9}, {"slow_interval_steps": 0}]
)
def test_limits_that_make_no_sense_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"watchdog.{next(iter(fields))}"):
        WatchdogConfig(**fields)  # type: ignore[arg-type]
    assert WatchdogConfig(step_s=0.0).longest_s == 86_400.0


def test_spike_is_told_by_the_median_of_the_last_losses() -> None:
    state = TrainState(losses=[1.0, 9.0, 2.0, 3.0, 4.0])
    assert state.loss_limit(0.0, 3) == float("inf")
    assert state.loss_limit(2.0, 6) == float("inf")
    assert state.loss_limit(2.0, 3) == 6.0
    table = state.to_json(seed=1, loader={})
    assert TrainState.from_json(table) == state
    del table["losses"]
    assert TrainState.from_json(table).losses == []


def test_the_first_step_has_a_limit_of_its_own(tmp_path: Path) -> None:
    config = WatchdogConfig(first_step_s=900.0, step_s=60.0)
    watchdog = Watchdog(config, RankEnv(), FlightRecorder({}), tmp_path, "token", lambda rank, error: None)
    assert watchdog.limit_s == 900.0
    watchdog.beat(1)
    assert watchdog.limit_s == 60.0
    watchdog.config = WatchdogConfig(step_s=0.0)
    assert watchdog.limit_s == float("inf")


def test_rank_that_keeps_a_store_that_never_answers_is_named() -> None:
    told = judge(reports(r1=call(9)), HOSTS, 101.0, is_deaf=True)
    assert told.startswith("rank 0 on a does not answer; it last entered: unknown")
    assert "rank 2" not in told
