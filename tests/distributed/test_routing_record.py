"""Recorded routing goes to the same tokens in every layout, and holds where the routers themselves would flip."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megavid.config.schema import RunConfig
from megavid.errors import DataError
from megavid.models.runner import build_engine
from megavid.ops.philox import key_of, normal_box
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layout_of
from megavid.training.routing_record import RecordedRouting, RoutingLog, watch
from tests.support.ranks import RankPool
from tests.support.tiny_world import initialize, take_step, tiny_config

TILT = 0.05
"""Added noise of router weights, whose deviation is 0.14: enough that some tokens go elsewhere."""
TOKENS = 2 * 2 * (16 + 48 + 4 + 36 + 48)
"""Of the clips of four packs, in two expert layers."""
Told = tuple[float, dict[int, torch.Tensor], str]


def built(config: RunConfig, mesh: Mesh, tilt: float) -> Any:
    engine = build_engine(config, mesh)
    initialize(engine)
    for fragment in engine.weight_fragments("model"):
        if tilt and fragment.name.endswith("moe.router.weight"):
            at = 0
            for box in fragment.boxes:
                drawn = normal_box(key_of(1, fragment.name), fragment.global_shape, box.offset, box.shape).reshape(-1)
                fragment.data[at : at + box.numel] += tilt * drawn
                at += box.numel
    engine.load_finished()
    return engine


def counts(metrics: Any) -> dict[int, torch.Tensor]:
    """Tokens of each expert, and with expert choice those that no expert takes, by noise bucket."""
    return {layer: torch.cat([s.counts_QE.flatten(), s.dropped_Q]) for layer, s in metrics.routing.items()}


def record(config: RunConfig, world: int, folder: str) -> Told:
    """Job: the first step, recorded as step 1."""
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = built(config, mesh, 0.0)
        log = RoutingLog(1, config.model.moe.num_experts)
        watch(engine, log.see)
        log.is_on = True
        metrics = take_step(engine, 0)
        log.write(Path(folder), 1, mesh, lambda: None)
        return metrics.loss, counts(metrics), ""


def force(config: RunConfig, world: int, folder: str, tilt: float, number: int = 0) -> Told:
    """Job: the same step with the recorded routing."""
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = built(config, mesh, tilt)
        forced = RecordedRouting(engine, Path(folder))
        forced.begin(1)
        metrics = take_step(engine, number)
        return metrics.loss, counts(metrics), forced.summary()


def joined(ranks: list[Told]) -> dict[int, torch.Tensor]:
    """Counts of all layers: a pipeline stage has its own only."""
    return {layer: found for _, layers, _ in ranks for layer, found in layers.items()}


@pytest.mark.parametrize("router", ["sigmoid", "softmax", "expert_choice"])
def test_forced_step_is_bitwise_the_recorded_one_in_its_layout(pool: RankPool, tmp_path: Path, router: str) -> None:
    config = tiny_config(moe={"router": router}, expert=2)
    was = pool.run(2, record, config, 2, str(tmp_path))
    now = pool.run(2, force, config, 2, str(tmp_path), 0.0)
    assert now[0][0] == was[0][0]
    assert now[0][2].startswith("recorded, of 1 steps; 0 of ")


@pytest.fixture(scope="module", params=["sigmoid", "expert_choice"])
def recorded(
    request: pytest.FixtureRequest, pool: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, str], Path, dict[int, torch.Tensor]]:
    """A step with sequence parallelism, where a pack's tokens stand on several ranks: its router, record and counts."""
    moe, folder = {"router": request.param}, tmp_path_factory.mktemp("recorded")
    return moe, folder, joined(pool.run(4, record, tiny_config(moe=moe, tensor=2, expert=2), 4, str(folder)))


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, {}),
        (4, {"tensor": 2, "expert": 2}),
        (2, {"context": 2}),
        (2, {"pipeline": 2, "recompute": "full", "micro": 2}),
    ],
)
def test_no_choice_flips_in_another_layout_with_other_weights(
    pool: RankPool,
    recorded: tuple[dict[str, str], Path, dict[int, torch.Tensor]],
    world: int,
    layout: dict[str, Any],
) -> None:
    moe, folder, was = recorded
    ranks = pool.run(world, force, tiny_config(moe=moe, **layout), world, str(folder), TILT)
    now = joined(ranks)
    assert now.keys() == was.keys()
    for layer, expected in was.items():
        assert torch.equal(now[layer], expected), layer
    words = ranks[0][2].split()
    moved, decisions = int(words[4]), int(words[6])
    assert 0 < moved < decisions == TOKENS


def test_record_of_other_samples_is_refused(pool: RankPool, tmp_path: Path) -> None:
    pool.run(1, record, tiny_config(), 1, str(tmp_path))
    (told,) = pool.run(1, refused, tiny_config(), str(tmp_path))
    assert "the record is of other samples" in told


def refused(config: RunConfig, folder: str) -> str:
    """Job: step 2 with the routing of step 1."""
    with pytest.raises(DataError) as told:
        force(config, 1, folder, 0.0, 1)
    return str(told.value)
