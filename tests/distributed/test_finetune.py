"""Fine-tuning what was converted: from diffusers' weights, steps on one batch lower the loss, alike in every layout."""

import itertools
from typing import Any

import pytest

from megavid.config.schema import RunConfig
from megavid.diffusion.objective import FlowObjective
from megavid.models.runner import build_engine, velocity_of
from megavid.ops.packs import clip_parts
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layout_of
from megavid.training.model_step import train_step
from tests.distributed.test_diffusers_twin import config_of, fill
from tests.support import diffusers_wan, tolerance
from tests.support.ranks import RankPool
from tests.support.tiny_world import microbatches

STEPS, RATE = 6, 2e-3
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "cp2 full recompute": (2, {"context": 2, "recompute": "full"}),
}
VARIANTS = ("i2v with image branch", "first-last frame", "i2v", "ti2v")
WANTED: dict[str, list[float]] = {}


def finetune(config: RunConfig, world: int) -> list[float]:
    """Job: losses of steps on one global batch, its noise the same each time."""
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        fill(engine, diffusers_wan.in_model_space(diffusers_wan.tiny_diffusers(config.model), config.model))
        batch, objective = microbatches(config, mesh, 0), FlowObjective(config.diffusion, 1)
        return [train_step(engine, batch, objective, learning_rate=RATE).loss for _ in range(STEPS)]


def wanted(pool: RankPool, variant: str) -> list[float]:
    """Losses on one rank; computed once."""
    if variant not in WANTED:
        WANTED[variant] = pool.run(1, finetune, config_of(variant), 1)[0]
    return WANTED[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_on_one_batch_lower_its_loss(pool: RankPool, variant: str) -> None:
    losses = wanted(pool, variant)
    assert all(after < before for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_fine_tuning_does_not_depend_on_the_layout(pool: RankPool, variant: str, layout: str) -> None:
    world, options = LAYOUTS[layout]
    for losses in pool.run(world, finetune, config_of(variant, **options), world):
        assert losses == pytest.approx(wanted(pool, variant), rel=tolerance.LOSS_FP32)


def losses_of_clips(config: RunConfig) -> tuple[float, list[tuple[float, int]]]:
    """Job: loss of a step, and squared error and numbers of each clip before it, known tokens left out by hand."""
    with Mesh.open(layout_of(config, 1)) as mesh:
        engine = build_engine(config, mesh)
        fill(engine, diffusers_wan.in_model_space(diffusers_wan.tiny_diffusers(config.model), config.model))
        batch, objective = microbatches(config, mesh, 0), FlowObjective(config.diffusion, 1)
        found = []
        for packs in batch:
            noised = objective.noise(packs)
            square_BTP = (velocity_of(engine, noised.input) - noised.target_BTP).square()
            for part in clip_parts(packs.packs, packs.span):
                first = len(part.clip.known) * part.clip.grid[1] * part.clip.grid[2]
                kept = square_BTP[part.here][first:]
                found.append((float(kept.sum()), kept.numel()))
        return train_step(engine, batch, objective, learning_rate=RATE).loss, found


def test_the_loss_is_the_mean_over_what_is_not_known(pool: RankPool) -> None:
    ((loss, clips),) = pool.run(1, losses_of_clips, config_of("ti2v"))
    assert loss == pytest.approx(sum(error for error, _ in clips) / sum(numbers for _, numbers in clips), rel=1e-5)
