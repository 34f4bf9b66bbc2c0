"""What real ranks do in ``test_checkpoint_ranks``.

Run as the module ``tests.distributed.checkpoint_cases CASE FOLDER``, in a process of its own.
"""

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megavid.checkpoint import AsyncSaver, latest, list_steps, load
from megavid.checkpoint import write as write_module
from megavid.config.schema import CheckpointConfig
from megavid.errors import RankLost, StorageError
from megavid.parallel.launch import RankEnv, init_distributed, run_local_ranks
from tests.support.checkpoint_world import RUN_TOML, assert_holds, fragments_of


class WorldRanks:
    """All ranks of ``torch.distributed``."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def all_gather_object(self, value: Any, /) -> list[Any]:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered


def _train(folder: Path, steps: range, keep_last: int = 3) -> None:
    """Steps with collectives of their own, which go on while the writers write."""
    ranks = WorldRanks()
    with AsyncSaver(folder, ranks, CheckpointConfig(keep_last=keep_last), run_toml=RUN_TOML, layout="dp2 tp2") as saver:
        for step in steps:
            fragments = fragments_of(ranks.rank, 2, 2, step)
            saver.save(step, fragments, {"samples": 8 * step})
            for _ in range(20):
                for fragment in fragments:
                    fragment.data.zero_()
                total = torch.ones(1)
                dist.all_reduce(total)
                assert total.item() == ranks.world_size
                saver.poll()


def _load(folder: Path, tp: int, dp: int, step: int) -> None:
    fragments = fragments_of(dist.get_rank(), tp, dp, None)
    checkpoint = load(folder, fragments, WorldRanks())
    assert checkpoint.step == step
    assert_holds(fragments, step)


def _start(env: RankEnv) -> None:
    init_distributed(env, "cpu", timeout_s=30)


def reshard(folder: Path) -> None:
    """Four ranks save, 4 and 3 ranks in other layouts load."""

    def save(env: RankEnv) -> None:
        _start(env)
        _train(folder, range(1, 6))

    run_local_ranks(save, 4)
    assert list_steps(folder) == [3, 4, 5]
    for tp, dp in ((4, 1), (1, 3)):
        found = latest(folder)
        assert found is not None

        def read(env: RankEnv, tp: int = tp, dp: int = dp, found: Path = found) -> None:
            _start(env)
            _load(found, tp, dp, 5)

        run_local_ranks(read, tp * dp)


def full_disk(folder: Path) -> None:
    """One rank's disk is full at the second save: every rank raises, and the first checkpoint loads."""

    def save(env: RankEnv) -> None:
        _start(env)
        _train(folder, range(1, 2))
        if env.rank == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(StorageError, match=r"rank_00002\.safetensors: File too large") as caught:
            _train(folder, range(2, 3))
        text = str(caught.value)
        assert WorldRanks().all_gather_object(text) == [text] * 4  # nobody is left in another collective
        raise caught.value

    with pytest.raises(StorageError):
        run_local_ranks(save, 4)
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000001"]
    _check_loads(folder, 1)


def killed_rank(folder: Path) -> None:
    """A rank is killed while it writes: the run is lost, ``latest`` is not, and the next start tidies and goes on."""

    def save(env: RankEnv) -> None:
        _start(env)
        _train(folder, range(1, 3))
        if env.rank == 0:
            write_module.write_file = lambda *args, **named: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        _train(folder, range(3, 4))

    with pytest.raises(RankLost):
        run_local_ranks(save, 4)
    assert (folder / "step_00000003.partial").exists()
    _check_loads(folder, 2)

    def again(env: RankEnv) -> None:
        _start(env)
        _train(folder, range(3, 4))

    run_local_ranks(again, 4)
    assert not (folder / "step_00000003.partial").exists()
    _check_loads(folder, 3)


def _check_loads(folder: Path, step: int) -> None:
    def read(env: RankEnv) -> None:
        _start(env)
        found = latest(folder)
        assert found is not None
        _load(found, 1, 2, step)

    run_local_ranks(read, 2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"reshard": reshard, "full_disk": full_disk, "killed_rank": killed_rank}[sys.argv[1]](Path(sys.argv[2]))
