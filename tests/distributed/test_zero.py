"""The model under DeepSpeed's ZeRO is the model under megatron-core: losses, weights, and checkpoints both ways."""

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megavid import checkpoint
from megavid.config.deepspeed import DeepSpeedConfig
from megavid.config.schema import RunConfig
from megavid.diffusion.objective import FlowObjective
from megavid.models.runner import build_engine
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layout_of
from megavid.training.model_step import train_step
from tests.distributed.test_layouts import ABSOLUTE, assert_near, compare
from tests.support import tolerance
from tests.support.ranks import RankPool
from tests.support.tiny_world import (
    SEED,
    assemble,
    held,
    initialize,
    load_and_train,
    microbatches,
    take_step,
    tiny_config,
    train,
    train_and_save,
)
from tests.support.zero_world import anew

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed; pip install 'megavid[deepspeed]' runs these",
)
STEPS = 3


def zero(config: RunConfig, stage: int, offload: str = "none") -> RunConfig:
    table = DeepSpeedConfig(zero_stage=stage, offload=offload)  # type: ignore[arg-type]
    return replace(config, train=replace(config.train, backend="deepspeed"), deepspeed=table)


@pytest.fixture(scope="module", autouse=True)
def fresh_ranks_afterwards(pool: RankPool) -> Iterator[None]:
    """ZeRO-3 leaves a linear of its own in torch.nn.functional, which rounds otherwise."""
    yield
    pool.renew()


@pytest.fixture(scope="module")
def native(pool: RankPool) -> dict[str, Any]:
    """Three steps of the native engine on one rank."""
    (result,) = pool.run(1, train, tiny_config(), 1, STEPS)
    return result


@pytest.mark.parametrize(
    ("stage", "offload", "micro"), [(1, "none", 1), (2, "none", 2), (2, "optimizer", 1), (3, "none", 1), (3, "all", 2)]
)
def test_steps_on_two_ranks_are_those_of_the_native_engine_on_one(
    pool: RankPool, native: dict[str, Any], stage: int, offload: str, micro: int
) -> None:
    ranks = pool.run(2, anew, train, zero(tiny_config(micro=micro), stage, offload), 2, STEPS)
    for told in ranks:
        assert told["loss"] == pytest.approx(native["loss"], rel=tolerance.LOSS_FP32)
        assert told["norm"] == pytest.approx(native["norm"], rel=tolerance.GRAD_NORM_FP32)
        assert_near(told["velocity"], native["velocity"], tolerance.WEIGHT_FP32, "velocity")
    for part, absolute in (("first", 1e-8), ("final", ABSOLUTE)):  # gradients; weights, average and balancing bias
        compare(assemble([told[part] for told in ranks]), assemble([native[part]]), absolute)


def test_router_losses_count_the_same(pool: RankPool) -> None:
    """They hang on the graph by themselves, past the loss that is scaled for ZeRO's means over ranks."""
    config = tiny_config(moe={"router": "softmax", "aux_loss_weight": 0.1, "z_loss_weight": 1e-2})
    (native,) = pool.run(1, train, config, 1, STEPS)
    ranks = pool.run(2, anew, train, zero(config, 2), 2, STEPS)
    compare(assemble([told["first"] for told in ranks]), assemble([native["first"]]), 1e-8)  # gradients
    assert ranks[0]["norm"] == pytest.approx(native["norm"], rel=tolerance.GRAD_NORM_FP32)


def save_and_load(config: RunConfig, world: int, mine: str, theirs: str) -> dict[str, Any]:
    """Job: two steps, save, two more; back to what was saved, in place, and again; then from another checkpoint."""
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        initialize(engine)

        def two() -> list[float]:
            return [take_step(engine, step).loss for step in (2, 3)]

        def load(folder: str) -> None:
            found = checkpoint.load(checkpoint.resolve(Path(folder)), engine.fragments(), mesh)
            engine.load_finished(found.state["updates"])

        for step in range(2):
            take_step(engine, step)
        state = {"updates": engine.updates.updates}
        checkpoint.save(Path(mine), 2, engine.fragments(), state, mesh, run_toml="", layout="")
        told: dict[str, Any] = {"on": two()}
        load(mine)
        told["again"] = two()
        load(theirs)
        told["loaded"] = held(engine.fragments())
        told["theirs"] = two()
        return told


@pytest.mark.parametrize("stage", [1, 3])
def test_checkpoints_are_those_of_the_native_engine(pool: RankPool, tmp_path: Path, stage: int) -> None:
    mine, theirs = str(tmp_path / "mine"), str(tmp_path / "theirs")
    (native,) = pool.run(1, train_and_save, tiny_config(), 1, theirs, 2, 2)
    ranks = pool.run(2, anew, save_and_load, zero(tiny_config(), stage), 2, mine, theirs)
    assert ranks[0]["again"] == ranks[0]["on"]  # law 2: bitwise
    assert ranks[0]["theirs"] == pytest.approx(native["loss"], rel=tolerance.LOSS_FP32)
    expected = assemble([native["saved"]])
    for name, value in assemble([rank["loaded"] for rank in ranks]).items():
        assert torch.equal(value, expected[name]), name
    (on,) = pool.run(1, load_and_train, tiny_config(), 1, mine, 2, 2)
    assert on["loss"] == pytest.approx(ranks[0]["on"], rel=tolerance.LOSS_FP32)


def skip_one(config: RunConfig, world: int) -> list[tuple[float, float, bool, str]]:
    """Job: a step, one above the limit, one with a number that is not finite, and two more."""
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        initialize(engine)
        objective = FlowObjective(config.diffusion, SEED)
        told = []
        for number, limit in enumerate((math.inf, 0.0, math.inf, math.inf, math.inf)):
            batches = microbatches(config, mesh, number)
            if number == 2 and mesh.rank == 0:
                batches[0].clean_BTP[0, 0, 0] = math.nan
            found = train_step(engine, batches, objective, learning_rate=1e-2, loss_limit=limit)
            told.append((found.loss, found.grad_norm, found.finite, found.culprit))
        assert take_step(engine, 5).finite
        return told


@pytest.mark.parametrize(("stage", "offload"), [(1, "none"), (2, "optimizer"), (3, "none")])
def test_skipped_steps_leave_nothing_behind(pool: RankPool, stage: int, offload: str) -> None:
    (expected,) = pool.run(1, skip_one, tiny_config(), 1)
    found = pool.run(2, anew, skip_one, zero(tiny_config(), stage, offload), 2)[0]
    assert [row[2] for row in found] == [row[2] for row in expected] == [True, False, False, True, True]
    for number in (0, 1, 3, 4):
        assert found[number][0] == pytest.approx(expected[number][0], rel=tolerance.LOSS_FP32)
        assert found[number][1] == pytest.approx(expected[number][1], rel=tolerance.GRAD_NORM_FP32)
    assert found[1][3] == expected[1][3]
