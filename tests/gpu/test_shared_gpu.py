"""Law 1 where four ranks share one GPU: their collectives go over the host, the rest is what a run on GPUs does.

The same on CPU ranks, which is what shows that the collectives are right before a GPU is at hand.
"""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megavid.config.schema import RunConfig
from megavid.models.runner import build_engine
from megavid.parallel.launch import RankEnv, run_local_ranks
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layout_of
from tests.support.ranks import RankPool
from tests.support.staged import StagedGroup, staged_world
from tests.support.tiny_world import initialize, take_step, tiny_config
from tests.support.tolerance import GRAD_NORM_FP32, LOSS_FP32

STEPS = 3
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense, tp2 dp2": ("wan", {"tensor": 2}),
    "dense, pp2 cp2": ("wan", {"pipeline": 2, "context": 2}),
    "experts, tp2 ep2 dp2": ("wan_moe", {"tensor": 2, "expert": 2}),
    "experts, ep4": ("wan_moe", {"expert": 4}),
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ALONE: dict[str, dict[str, list[float]]] = {}


def config_of(family: str, options: dict[str, Any]) -> RunConfig:
    """The tiny model, with heads of a width that attention on GPUs takes."""
    config = tiny_config(family, **options)
    return replace(config, model=replace(config.model, hidden_size=64))


def train(config: RunConfig, device: str, rank: int, size: int, folder: Path) -> dict[str, list[float]]:
    """Losses and norms of a few steps on one of ``size`` ranks that share a device."""
    with staged_world(rank, size, folder / f"meeting_{size}"), Mesh.open(layout_of(config, size), device) as mesh:
        assert isinstance(mesh.group("world"), StagedGroup)
        assert isinstance(mesh.group("tp_dp_cp"), StagedGroup)
        assert mesh.device.type == device
        engine = build_engine(config, mesh)
        initialize(engine)
        taken = [take_step(engine, step) for step in range(STEPS)]
    return {"loss": [step.loss for step in taken], "norm": [step.grad_norm for step in taken]}


def job(config: RunConfig, folder: str) -> dict[str, list[float]]:
    """Job of the pool: its world gives way to one that is staged, and the pool gets another."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    found = train(config, "cpu", rank, size, Path(folder))
    store = dist.FileStore(f"{folder}/after_{size}", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return found


def rank_on_gpu(config: RunConfig, folder: Path, env: RankEnv) -> None:
    """A process of its own on the one GPU; rank 0 writes down what was."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.cuda.set_device(0)
    found = train(config, "cuda", env.rank, env.world_size, folder)
    if env.is_main:
        (folder / f"found_{env.world_size}.json").write_text(json.dumps(found))


def on_gpu(config: RunConfig, size: int, folder: Path) -> dict[str, list[float]]:
    """What a world of ``size`` processes on the one GPU finds."""
    run_local_ranks(partial(rank_on_gpu, config, folder), size, "cuda")
    found: dict[str, list[float]] = json.loads((folder / f"found_{size}.json").read_text())
    return found


def assert_alike(found: dict[str, list[float]], alone: dict[str, list[float]], name: str) -> None:
    print(f"{name}: losses {found['loss']}, on one rank {alone['loss']}")
    assert alone["loss"][-1] < alone["loss"][0], "the model must have learnt something"
    assert found["loss"] == pytest.approx(alone["loss"], rel=LOSS_FP32)
    assert found["norm"] == pytest.approx(alone["norm"], rel=GRAD_NORM_FP32)


@pytest.mark.parametrize("name", LAYOUTS)
def test_four_cpu_ranks_with_staged_collectives_learn_as_one(pool: RankPool, tmp_path: Path, name: str) -> None:
    family, options = LAYOUTS[name]
    if family not in ALONE:
        ALONE[family] = pool.run(1, job, config_of(family, {}), str(tmp_path))[0]
    for found in pool.run(4, job, config_of(family, options), str(tmp_path)):
        assert_alike(found, ALONE[family], name)


@needs_gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_four_ranks_on_one_gpu_learn_as_one(tmp_path: Path, name: str) -> None:
    family, options = LAYOUTS[name]
    found, alone = (on_gpu(config_of(family, given), size, tmp_path) for given, size in ((options, 4), ({}, 1)))
    assert_alike(found, alone, name)
