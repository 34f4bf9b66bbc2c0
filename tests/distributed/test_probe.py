"""The probe on real ranks: cases are trained and timed, links answer, and a rank that fails is one line."""

import pytest
import torch.distributed as dist

from megavid.errors import ConfigError, MegavidError
from megavid.parallel.launch import RankEnv
from megavid.profiling.links import OVERLAPPED, WAITED, Links, name_of, time_links
from megavid.training.probe_run import Case, on_ranks, time_cases
from tests.support.ranks import RankPool

TINY = (
    Case(name="dense", ranks=2, width=32, ffn=32, clips=(32, 16), padding=16, packs=2),
    Case(name="experts", ranks=2, layers=3, width=32, ffn=32, clips=(32,), packs=4, micro=2, experts=4, expert_ffn=16,
         parallel=(("expert", 2),)),
)  # fmt: skip


def steps_job() -> dict[str, list[float]]:
    return time_cases(TINY, 0.0, RankEnv(dist.get_rank(), 2), least_steps=2)


def links_job() -> Links:
    return time_links(0.001)


def test_ranks_time_the_same_number_of_steps_of_every_case(pool: RankPool) -> None:
    for found in pool.run(2, steps_job):
        assert {name: len(times) for name, times in found.items()} == {"dense": 2, "experts": 2}
        assert all(seconds > 0 for times in found.values() for seconds in times)


def test_links_are_timed_between_ranks(pool: RankPool) -> None:
    for links in pool.run(2, links_job):
        overlapped = {name_of(kind, is_beside=True) for kind in OVERLAPPED}
        assert set(links.calls) == {*WAITED, *overlapped}
        assert all(cost.rate > 1e6 and 0 <= cost.latency_s < 10 for cost in links.calls.values())
        assert links.rate > 1e6
        assert 0 < links.alltoall_ratio <= 1
        assert links.crowding >= 1.0


def _fails(env: RankEnv) -> None:
    raise ConfigError("no such model")


def test_what_a_rank_answers_or_fails_with_comes_back() -> None:
    assert on_ranks(lambda env: env.world_size, 1) == 1
    assert on_ranks(lambda env: env.world_size, 2) == 2
    with pytest.raises(MegavidError, match="2 ranks of a measurement failed: no such model"):
        on_ranks(_fails, 2)
