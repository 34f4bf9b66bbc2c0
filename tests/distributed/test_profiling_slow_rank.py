"""A rank that is slow on purpose is the one that the report names, though all ranks' steps take the same time."""

import time
from pathlib import Path
from typing import Any

import pytest

from megavid.config.load import load_run
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layout_of
from megavid.profiling.page import page
from megavid.profiling.peak import Peak
from megavid.profiling.records import Settings
from megavid.training.profile_report import Asked, report_of, text_of
from megavid.training.profile_run import Profile, Session
from tests.support.ranks import RankPool

LATE_S = 1.5
"""Far more than two ranks differ by while other tests share their cores."""
PEAK = Peak(1e10, "fp32", "given by the test", True)


def profile_job(slow_rank: int, out: str) -> dict[str, Any] | None:
    """The report of two replicas of ``tiny``, one of which takes longer over every first feed-forward; on rank 0."""
    config = load_run("tiny", ["--train.global_batch_size", "2"])
    layout = layout_of(config, 2)
    with Mesh.open(layout, "cpu", config.train.seed) as mesh:
        session = Session(config, mesh, Settings(steps=1, warmup=1, traced=1, traces="none"), Path(out))
        if mesh.rank == slow_rank:
            slow = session.engine.chunks[0].blocks[0].feed_forward
            slow.register_forward_hook(lambda *_: time.sleep(LATE_S))
        with session:
            run = session.measure("real")
        if not mesh.is_main:
            return None
        return report_of(
            config, Asked(("profile",), "tiny", Path(out), None), Profile(layout, "cpu", PEAK, "reference", [run])
        )


def test_the_slow_rank_is_named(pool: RankPool, tmp_path: Path) -> None:
    slow_rank = 1
    report = pool.run(2, profile_job, slow_rank, str(tmp_path))[0]
    (run,) = report["runs"]
    slow, other = run["ranks"][slow_rank], run["ranks"][1 - slow_rank]
    # By their step times nobody could tell: each rank waits for the other.
    assert slow["step_time_s"] == pytest.approx(other["step_time_s"], rel=0.2)
    assert slow["busy_s"] - other["busy_s"] > 0.5 * LATE_S
    assert other["waiting_s"] - slow["waiting_s"] > 0.5 * LATE_S
    assert run["slowest"]["rank"] == slow_rank
    assert run["slowest"]["over_median"] > 0.1
    assert f"slowest rank: {slow_rank} on {slow['host']}" in text_of(report)
    assert f"Slowest: rank {slow_rank} on {slow['host']}" in page(report)
