"""Where a run's weights come from: a checkpoint of its own, another run's weights, or fresh numbers.

Owns what ``train.init_from`` may differ in. Reading tensors is ``megavid.checkpoint``'s, into any layout.
"""

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megavid.checkpoint import Checkpoint, load, resolve
from megavid.config.load import from_table
from megavid.config.resume import differences
from megavid.config.schema import RunConfig
from megavid.data.sample import ClipSource
from megavid.errors import ConfigError
from megavid.parallel.engine import Engine
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


def told_differences(config: RunConfig, checkpoint: Checkpoint) -> list[str]:
    """A line for each key of the model that differs from the checkpoint of ``train.init_from`` and may."""
    return [
        f"train.init_from: {key} is {theirs!r} there, {mine!r} here ({INIT_MAY_DIFFER[key]})"
        for key, theirs, mine in differences(config_of(checkpoint), config)
        if key in INIT_MAY_DIFFER
    ]


def resume(engine: Engine[Any], folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """Fill the engine from a checkpoint of this run; return the counters and the loader's state.

    Ranks: collective; the layout may be another one than the checkpoint was saved in.
    """
    checkpoint = load(folder, engine.fragments(), engine.mesh)
    state = TrainState.from_json(checkpoint.state)
    engine.load_finished(state.updates)
    return state, checkpoint.state["loader"]


def load_weights(engine: Engine[Any], checkpoint: Checkpoint, *, kind: str) -> None:
    """Fill the model's weights, and its routers' bias, from a checkpoint of any run of this model.

    Args:
        engine: with an optimizer (its moments stay zero and its average begins at the weights) or without.
        checkpoint: where from.
        kind: ``model``, or ``ema`` for the moving average.

    Ranks: collective.
    """
    known = checkpoint.index.tensors
    buffers = [fragment for fragment in engine.buffer_fragments() if fragment.name in known]
    checkpoint.fill([*engine.weight_fragments(kind), *buffers], engine.mesh, allow_unread=("",))
    if engine.optimizer is not None:
        for shard in engine.optimizer.shards:
            if shard.ema is not None:
                shard.ema.copy_(shard.master.detach())
    engine.load_finished(0)
