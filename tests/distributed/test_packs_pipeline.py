"""Law 1 on packs of a mixture, as a run's own loader gives them, through pipelines: what is in a pack, and the loss.

Half the clips are images, 40% short and 10% long, in three resolutions, the longest just under half a pack. So packs
hold few clips or many, of all lengths, and pipeline stages exchange one shape.
"""

from dataclasses import replace
from typing import Any

import pytest

from megavid.config.schema import RunConfig
from megavid.data.loader import Loader
from megavid.data.synthetic import SyntheticSource, mixed_sizes
from megavid.data.tokenizer import DctTokenizer
from megavid.diffusion.objective import FlowObjective
from megavid.models.runner import build_engine
from megavid.ops.packs import Pack
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layout_of
from megavid.training.model_step import train_step
from tests.support import tolerance
from tests.support.data_stubs import TEXT, StubText
from tests.support.newest import newest_too
from tests.support.ranks import RankPool
from tests.support.tiny_world import LEARNING_RATE, SEED, initialize, tiny_config

SIZES = mixed_sizes([(32, 32), (32, 48), (48, 48)], 9, 17)
STEPS = 3
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2": (2, {"pipeline": 2}),
    "pp4": (4, {"pipeline": 4}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "pp2 microbatch2 dp2": (4, {"pipeline": 2, "micro": 2}),
    "pp4 cp2": (8, {"pipeline": 4, "context": 2}),
    "pp2 vpp2 cp2": (4, {"pipeline": 2, "virtual_pipeline": 2, "context": 2}),
}
CASES = [*(("wan_moe", name) for name in LAYOUTS), ("wan", "pp4")]
REFERENCES: dict[str, Any] = {}


def mixture_config(family: str, **options: Any) -> RunConfig:
    """The tiny model on 8 packs of 96 tokens."""
    config = tiny_config(family, **options)
    return replace(config, train=replace(config.train, global_batch_size=8))


def train_on_mixture(config: RunConfig, world: int) -> dict[str, Any]:
    """Job: train on what the loader gives, and tell losses, norms and this rank's packs."""
    source = SyntheticSource(SEED, DctTokenizer(config.model.in_channels), TEXT, sizes=SIZES)
    objective = FlowObjective(config.diffusion, SEED)
    with Mesh.open(layout_of(config, world)) as mesh:
        dp_rank, dp_size = mesh.coordinate("dp"), mesh.size("dp")
        with Loader(config, source, StubText(), dp_rank=dp_rank, dp_size=dp_size) as loader:
            engine = build_engine(config, mesh)
            initialize(engine)
            losses, norms, packs = [], [], []
            for _ in range(STEPS):
                batches = next(loader)
                packs.append([pack for batch in batches for pack in batch.packs])
                metrics = train_step(engine, batches, objective, learning_rate=LEARNING_RATE)
                losses.append(metrics.loss)
                norms.append(metrics.grad_norm)
    return {"loss": losses, "norm": norms, "packs": packs, "dp": dp_rank}


def reference(pool: RankPool, family: str) -> Any:
    if family not in REFERENCES:
        REFERENCES[family] = pool.run(1, train_on_mixture, mixture_config(family), 1)[0]
    return REFERENCES[family]


def test_the_mixture_is_one(pool: RankPool) -> None:
    packs: list[Pack] = [pack for step in reference(pool, "wan")["packs"] for pack in step]
    clips = [clip for pack in packs for clip in pack.clips]
    assert len({clip.grid for clip in clips}) == 9
    assert max(clip.tokens for clip in clips) == 45 <= packs[0].tokens / 2
    assert sum(clip.grid[0] == 1 for clip in clips) / len(clips) == pytest.approx(0.5, abs=0.03)
    assert sum(clip.tokens for clip in clips) / sum(pack.tokens for pack in packs) > 0.95
    assert {len(pack.clips) for pack in packs} == {6, 7, 8}


@pytest.mark.parametrize(("family", "name"), newest_too(CASES, ("wan_moe", "pp2 vpp2 cp2")))
def test_pipelines_see_the_same_packs_and_reach_the_same_loss(pool: RankPool, family: str, name: str) -> None:
    world, options = LAYOUTS[name]
    want = reference(pool, family)
    got = pool.run(world, train_on_mixture, mixture_config(family, **options), world)
    by_rank = {told["dp"]: told["packs"] for told in got}
    for step in range(STEPS):
        assert [pack for rank in sorted(by_rank) for pack in by_rank[rank][step]] == want["packs"][step]
    for told in got:
        assert told["packs"] == by_rank[told["dp"]], "all ranks of a replica read the same packs"
        assert told["loss"] == pytest.approx(want["loss"], rel=tolerance.LOSS_FP32)
        assert told["norm"] == pytest.approx(want["norm"], rel=tolerance.GRAD_NORM_FP32)
