"""The pool of ranks itself: results by rank, a fresh world for each job, failures named, and life after them."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankFailure, RankPool


def rank_and_sum(term: int) -> tuple[int, int, int]:
    total = torch.tensor(dist.get_rank() + term)
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), int(total)


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("the broken one")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def process_id() -> int:
    return os.getpid()


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_pool_returns_results_by_rank(pool: RankPool, world: int) -> None:
    expected = sum(range(world)) + 10 * world
    assert pool.run(world, rank_and_sum, 10) == [(rank, world, expected) for rank in range(world)]


def test_pool_reuses_its_processes(pool: RankPool) -> None:
    assert pool.run(2, process_id) == pool.run(4, process_id)[:2]


def test_pool_names_the_failing_rank_first_and_recovers(pool: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"\Arank 2 of 4: Traceback[\s\S]*ValueError: the broken one"):
        pool.run(4, fail_on, 2)
    assert len(pool.run(4, process_id)) == 4


def test_pool_names_a_rank_that_died(pool: RankPool) -> None:
    with pytest.raises(RankFailure, match="rank 1 of 2: died"):
        pool.run(2, die_on, 1)
    assert len(pool.run(2, process_id)) == 2


def test_pool_shows_where_a_rank_hangs(pool: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"rank \d still runs after 1\.0 s[\s\S]*hang_on"):
        pool.run(2, hang_on, 1, timeout_s=1.0)
