"""``--ranks N``: local ranks start, meet, fail in every way, stop on request, and never outlive their launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What became of each case of launch_cases.py; they share one process's imports and run at once."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.launch_cases", str(tmp_path_factory.mktemp("launch"))],
        cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: Results = json.loads(done.stdout)
    return found


def test_ranks_meet_and_know_who_they_are(results: Results) -> None:
    case = results["ends_well"]
    assert (case["status"], case["stderr"]) == (0, "")
    total, world, is_same_env, threads = json.loads(case["stdout"])
    assert (total, world, is_same_env) == (6, 4, True)
    assert threads == max(1, len(os.sched_getaffinity(0)) // 4)


def test_first_failing_rank_is_shown_and_the_others_end(results: Results) -> None:
    case = results["raises"]
    assert case["status"] == 1
    assert case["stderr"].count("rank 1 failed:\nTraceback") == 1
    assert case["stderr"].endswith("ValueError: broken\n")
    assert "rank 0" not in case["stderr"]


def test_error_of_every_rank_is_one_line_once(results: Results) -> None:
    case = results["refuses"]
    assert (case["status"], case["stderr"]) == (2, "megavid: index.json: the same on every rank\n")


def test_killed_rank_is_named_with_its_signal(results: Results) -> None:
    case = results["is_killed"]
    assert case["status"] == 5
    assert case["stderr"].endswith("megavid: rank 2 was killed by SIGKILL; the other ranks were ended\n")


def test_exit_status_is_that_of_the_failing_rank(results: Results) -> None:
    assert results["exits"]["status"] == 7
    assert results["exits"]["seconds"] < 30


def test_ranks_that_do_not_listen_are_killed(results: Results) -> None:
    assert results["ignores_sigterm"]["status"] == 1
    assert results["ignores_sigterm"]["seconds"] < 45


def test_stop_request_reaches_ranks_and_their_answer_comes_back(results: Results) -> None:
    case = results["saves_and_stops"]
    assert (case["status"], case["stderr"]) == (75, "megavid: stopped on request\n")


def test_interrupt_without_an_answer_ends_as_interrupted(results: Results) -> None:
    case = results["is_interrupted"]
    assert (case["status"], case["stderr"], case["alive"]) == (130, "", [])


def test_ranks_die_with_a_killed_launcher(results: Results) -> None:
    case = results["launcher_is_killed"]
    assert (case["status"], case["alive"]) == (-9, [])
