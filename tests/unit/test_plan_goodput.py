"""Checkpoints and failures: the closed form against a simulation, the best interval against a search, the bytes."""

import random
from typing import Any

import pytest

from megavid.config.load import load_run
from megavid.plan.goodput import Faults, best_interval_s, checkpoint_bytes, goodput_of, plan_goodput
from megavid.plan.parameters import count


def simulated(interval_s: float, blocked_s: float, write_s: float, restart_s: float, mtbf_s: float) -> float:
    """The slow twin: live through many failures, one save after another."""
    chance = random.Random(7)
    kept, clock = 0.0, 0.0
    for _ in range(20_000):
        life = chance.expovariate(1 / mtbf_s)
        clock += life
        # The first restart_s of a life bring the job back; then saves follow one another.
        saves, rest = divmod(max(0.0, life - restart_s), interval_s + blocked_s)
        # The newest snapshot is whole only write_s after it was taken.
        kept += interval_s * (saves if rest >= write_s else max(0.0, saves - 1))
    return kept / clock


@pytest.mark.parametrize("mtbf_s", [20_000.0, 200_000.0])
@pytest.mark.parametrize("write_s", [0.0, 300.0])
def test_goodput_is_what_a_simulated_job_keeps(mtbf_s: float, write_s: float) -> None:
    times = {"interval_s": 600.0, "blocked_s": 20.0, "write_s": write_s, "restart_s": 300.0, "mtbf_s": mtbf_s}
    assert goodput_of(**times) == pytest.approx(simulated(**times), abs=0.004)


@pytest.mark.parametrize("blocked_s", [0.1, 5.0, 60.0])
def test_the_best_interval_beats_its_neighbours(blocked_s: float) -> None:
    times = {"blocked_s": blocked_s, "write_s": 0.0, "mtbf_s": 100_000.0}
    best = best_interval_s(**times)
    at = {factor: goodput_of(best * factor, restart_s=300.0, **times) for factor in (0.7, 0.85, 1.0, 1.2, 1.4)}
    assert max(at, key=lambda factor: at[factor]) == 1.0


def test_no_interval_is_shorter_than_the_writing() -> None:
    assert best_interval_s(blocked_s=1e-3, write_s=500.0, mtbf_s=3600.0) == 500.0


def test_failures_come_as_often_as_llama_3_published() -> None:
    # 419 in 54 days on 16,384 GPUs is one in about three hours.
    assert Faults().mtbf_s(16_384) / 3600 == pytest.approx(3.09, abs=0.01)
    assert Faults().mtbf_s(1024) == pytest.approx(16 * Faults().mtbf_s(16_384))


def test_a_checkpoint_of_the_flagship_is_sixteen_bytes_a_parameter() -> None:
    config = load_run("wan_moe_100b_a20b", [])
    total = count(config.model).total
    assert checkpoint_bytes(total, config.optimizer) == 16 * total
    without = load_run("wan_moe_100b_a20b", ["--optimizer.ema_decay", "0"])
    assert checkpoint_bytes(total, without.optimizer) == 12 * total


def plan(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "checkpoint_size": 1_600_000_000_000, "rank_bytes": 1_600_000_000, "host_bytes": 1_600_000_000,
        "world_size": 1024, "step_time_s": 10.0, "interval_steps": 100, "is_async": True, "faults": Faults(),
    }  # fmt: skip
    return plan_goodput(**(values | changes))


def test_an_asynchronous_save_blocks_for_the_copy_only() -> None:
    later, now = plan(), plan(is_async=False)
    assert later.blocked_s == 1_600_000_000 / Faults().host_rate
    assert now.blocked_s == pytest.approx(later.blocked_s + later.write_s)
    assert later.fraction > now.fraction


def test_the_configured_interval_is_judged_beside_the_best() -> None:
    found = plan(interval_steps=2000)
    assert found.configured_fraction < found.fraction <= 1
    assert plan(interval_steps=0).configured_fraction == 0
    assert plan(interval_steps=found.interval_steps).configured_fraction == found.fraction


def test_more_failures_and_slower_storage_cost_goodput() -> None:
    assert plan(faults=Faults(mtbf_gpu_hours=5_000)).fraction < plan().fraction
    assert plan(faults=Faults(storage_rate=1e9)).fraction < plan().fraction
    assert plan(faults=Faults(restart_s=3600)).fraction < plan().fraction
