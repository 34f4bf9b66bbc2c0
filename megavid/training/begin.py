"""How a run of steps begins: the weights and counters of its engine, and what feeds and steps it from there on.

Owns what training, replays and profiles have in common before their first step.
"""

from collections.abc import Mapping
from typing import Any

from megavid.checkpoint.base import Base
from megavid.checkpoint.ranks import agreed
from megavid.config.schema import RunConfig
from megavid.data.loader import Loader
from megavid.data.sample import ClipSource
from megavid.data.text import TextEncoder
from megavid.diffusion.objective import FlowObjective
from megavid.errors import CheckpointError
from megavid.parallel.engine import Engine
from megavid.parallel.mesh import Mesh
from megavid.training.resume import (
    base_of,
    begin_adapters,
    check_init_from,
    config_of,
    has_average,
    load_weights,
    resume,
)
from megavid.training.run_dir import RunDir, Start
from megavid.training.state import TrainState
from megavid.training.step import TrainStep


def agreed_base(config: RunConfig, source: ClipSource, start: Start, mesh: Mesh) -> Base | None:
    """The frozen model of a run of adapters: what rank 0 finds, as a run that is named may save in this very moment.

    Ranks: collective.
    """
    if not config.lora.rank:
        return None
    with agreed(mesh):
        found = base_of(config, source, start.checkpoint) if mesh.is_main else None
    base: Base | None = mesh.broadcast_object(found)
    return base


def load_or_initialize(
    engine: Engine[Any],
    config: RunConfig,
    source: ClipSource,
    run_dir: RunDir,
    start: Start,
    base: Base | None,
) -> tuple[TrainState, dict[str, Any] | None]:
    """Fill the weights; return the counters and the loader's state, None at the beginning of a run."""
    if start.checkpoint is not None:
        try:
            return resume(engine, start.checkpoint, base)
        except CheckpointError as error:
            raise run_dir.with_way_out(error) from error
    first_weights(engine, config, source, base)
    return TrainState(), None


def first_weights(engine: Engine[Any], config: RunConfig, source: ClipSource, base: Base | None = None) -> None:
    """Fill the weights of a run that begins: those of ``train.init_from``, else fresh ones."""
    if base is not None:
        begin_adapters(engine, base)
    elif config.train.init_from:
        checkpoint = check_init_from(config, source)
        load_weights(engine, checkpoint, kind="ema" if has_average(config_of(checkpoint)) else "model")
    else:
        engine.initialize(config.train.seed)


def open_steps(
    config: RunConfig,
    engine: Engine[Any],
    source: ClipSource,
    text_encoder: TextEncoder,
    state: TrainState,
    loader_state: Mapping[str, object] | None = None,
) -> tuple[TrainStep, Loader]:
    """What takes the steps after ``state``, and what feeds them this rank's part; the loader is not entered yet."""
    mesh = engine.mesh
    objective = FlowObjective(config.diffusion, config.train.seed)
    loader = Loader(
        config, source, text_encoder, dp_rank=mesh.coordinate("dp"), dp_size=mesh.size("dp"),
        start_step=state.data_step + 1, state=loader_state, drops_caption=objective.drops_caption,
    )  # fmt: skip
    return TrainStep(config, engine, objective), loader
