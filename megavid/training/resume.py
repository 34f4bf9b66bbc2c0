"""Where a run's weights come from: a checkpoint of its own, another run's weights, or fresh numbers.

Owns what ``train.init_from`` may differ in, and where a run of adapters finds its frozen base. Reading tensors is
``megavid.checkpoint``'s, into any layout.
"""

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megavid.checkpoint import Checkpoint, latest, resolve
from megavid.checkpoint.base import BASE, Base
from megavid.checkpoint.ranks import agreed
from megavid.config.load import from_table
from megavid.config.resume import differences
from megavid.config.schema import RunConfig
from megavid.data.sample import ClipSource
from megavid.errors import CheckpointError, ConfigError
from megavid.parallel.engine import Engine, Weights
from megavid.parallel.fragment import HISTORY
from megavid.training.kit import trained_tokenizer
from megavid.training.state import TrainState

INIT_MAY_DIFFER: dict[str, str] = {
    "model.text_length": "no weight has this length; captions are padded to it",
    "model.latent_frame_rate": "a unit of time; no weight depends on it",
    "model.task": "no weight depends on it; the channels that it asks for do",
    "model.moe.top_k": "the same experts, more or fewer for each token",
    "model.moe.num_groups": "a limit on routing",
    "model.moe.top_groups": "a limit on routing",
    "model.moe.route_scale": "a factor on the gates",
    "model.moe.bias_update_rate": "how balance is kept",
    "model.moe.aux_loss_weight": "how balance is kept",
    "model.moe.z_loss_weight": "how large the router's logits grow",
}
"""Keys of ``model`` that may differ from the checkpoint of ``train.init_from``, and why the weights still fit. Every
key outside ``model`` may differ; the latents must be of the same tokenizer."""


def config_of(checkpoint: Checkpoint) -> RunConfig:
    """The resolved config of the run that saved a checkpoint."""
    return from_table(RunConfig, tomllib.loads(checkpoint.run_toml))


def has_average(config: RunConfig) -> bool:
    """Whether checkpoints of this config hold a moving average of the weights."""
    return config.optimizer.ema_decay > 0


def check_init_from(config: RunConfig, source: ClipSource) -> Checkpoint:
    """The checkpoint that ``train.init_from`` names, whose weights fit this run's model and data.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: its model differs in a key that is not in ``INIT_MAY_DIFFER``.
        DataError: its model was trained on latents of another tokenizer than the data's.
    """
    checkpoint = Checkpoint(resolve(Path(config.train.init_from)))
    if BASE in checkpoint.manifest.files:
        raise ConfigError(
            f"train.init_from = {checkpoint.folder} holds adapters only; make it a whole model first: megavid convert "
            f"{checkpoint.folder} DST --to megavid"
        )
    for key, theirs, mine in differences(config_of(checkpoint), config):
        if key.startswith("model.") and not any(fnmatchcase(key, allowed) for allowed in INIT_MAY_DIFFER):
            raise ConfigError(
                f"train.init_from = {checkpoint.folder} is of another model: {key} is {theirs!r} there, {mine!r} here; "
                f"of the model only these may differ: {', '.join(INIT_MAY_DIFFER)}"
            )
    tokenizer = trained_tokenizer(checkpoint)
    if tokenizer is not None:
        tokenizer.require_same(source.tokenizer, source.name)
    return checkpoint


def base_of(config: RunConfig, source: ClipSource, resumed: Path | None) -> Base | None:
    """The frozen model of a run of adapters; None for a run that trains the whole model.

    Args:
        config: of this start.
        source: the data, whose latents the base must have been trained on.
        resumed: the checkpoint that this start goes on from, which names its base; None for a new run.

    Raises:
        ConfigError: ``train.init_from`` names none, or one that does not fit.
        CheckpointError: the base is gone, or is another one than it was.
    """
    if not config.lora.rank:
        return None
    if resumed is not None:
        known = Base.read(Checkpoint(resumed))
        return Base.of(known.open(config.train.init_from), known.weights)
    if not config.train.init_from:
        raise ConfigError(
            f"lora.rank = {config.lora.rank} needs the model that adapters are for: --train.init_from FOLDER, a "
            "checkpoint, or what megavid convert --to megavid wrote"
        )
    checkpoint = check_init_from(config, source)
    return Base.of(checkpoint, "ema" if has_average(config_of(checkpoint)) else "model")


def check_base(config: RunConfig, source: ClipSource, out: Path) -> None:
    """Check that a run of adapters in the folder ``out`` has its base; raises as ``base_of``."""
    resumed = latest(out / "checkpoints") if (out / "checkpoints").is_dir() else None
    if resumed is not None:
        try:
            is_adapted = BASE in Checkpoint(resumed).manifest.files
        except CheckpointError:
            is_adapted = False
        if not is_adapted:  # another run, or damaged: who decides what to go on from says so
            return
    base_of(config, source, resumed)


def told_differences(config: RunConfig, checkpoint: Checkpoint) -> list[str]:
    """A line for each key of the model that differs from the checkpoint of ``train.init_from`` and may."""
    return [
        f"train.init_from: {key} is {theirs!r} there, {mine!r} here ({INIT_MAY_DIFFER[key]})"
        for key, theirs, mine in differences(config_of(checkpoint), config)
        if key in INIT_MAY_DIFFER
    ]


def resume(engine: Engine[Any], folder: Path, base: Base | None) -> tuple[TrainState, dict[str, Any]]:
    """Fill the engine from a checkpoint of this run; return the counters and the loader's state.

    Args:
        engine: with an optimizer.
        folder: the checkpoint.
        base: of a run of adapters, the frozen model.

    Ranks: collective; the layout may be another one than the checkpoint was saved in. So may the precision, as replay
    asks for: FP8 histories are then taken where they fit, and begin anew elsewhere.
    """
    with agreed(engine.mesh):
        checkpoint = Checkpoint(folder)
        saved = {name: list(tensor["shape"]) for name, tensor in checkpoint.index.tensors.items()}
        is_same = config_of(checkpoint).precision == engine.config.precision
    wanted = engine.fragments()
    if not is_same:
        wanted = [f for f in wanted if not f.name.startswith(HISTORY) or saved.get(f.name) == list(f.global_shape)]
    checkpoint.fill(wanted, engine.mesh, allow_unread=() if is_same else (HISTORY,))
    if base is not None:
        _fill(engine, base.open(), base.weights, "frozen")
    state = TrainState.from_json(checkpoint.state)
    engine.load_finished(state.updates)
    return state, checkpoint.state["loader"]


def begin_adapters(engine: Engine[Any], base: Base) -> None:
    """Fill the frozen model of a run of adapters; draw the adapters.

    Ranks: collective.
    """
    _fill(engine, base.open(), base.weights, "frozen")
    engine.initialize(engine.config.train.seed, "trained")


def load_weights(engine: Engine[Any], checkpoint: Checkpoint, *, kind: str) -> None:
    """Fill the model's weights, and its routers' bias, from a checkpoint of any run of this model.

    Args:
        engine: with an optimizer (its moments stay zero and its average begins at the weights) or without.
        checkpoint: where from; one of adapters also names the checkpoint of their base.
        kind: ``model``, or ``ema`` for the moving average.

    Ranks: collective.
    """
    if engine.has_frozen:
        known = Base.read(checkpoint)
        _fill(engine, known.open(engine.config.train.init_from), known.weights, "frozen")
        checkpoint.fill(engine.weight_fragments(kind, "trained"), engine.mesh, allow_unread=("",))
    else:
        _fill(engine, checkpoint, kind, "all")
    if engine.optimizer is not None:
        for shard in engine.optimizer.shards:
            if shard.ema is not None:
                shard.ema.copy_(shard.master.detach())
    engine.load_finished(0)


def _fill(engine: Engine[Any], checkpoint: Checkpoint, kind: str, which: Weights) -> None:
    known = checkpoint.index.tensors
    buffers = [fragment for fragment in engine.buffer_fragments() if fragment.name in known]
    checkpoint.fill([*engine.weight_fragments(kind, which), *buffers], engine.mesh, allow_unread=("",))
