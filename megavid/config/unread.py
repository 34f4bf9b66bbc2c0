"""Keys that a run would not read: each is refused where it has another value than its default, not ignored.

Owns the one table of such keys and the sentence. Left out are keys that stand in presets for a switch which one flag
turns over, so that the flag is enough: ``model.moe.*`` with ``model.family = "wan"``, ``model.moe.bias_update_rate``,
``log.*`` and the distributions of ``diffusion.timestep_sampling``. Imports no torch.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

from megavid.config.checks import require
from megavid.config.schema import RunConfig


class Reader(NamedTuple):
    """What reads some keys.

    Attributes:
        keys: dotted names.
        is_there: whether a run has it.
        words: how a run gets it.
    """

    keys: tuple[str, ...]
    is_there: Callable[[RunConfig], bool]
    words: str


def _has_fp8_experts(run: RunConfig) -> bool:
    model, precision = run.model, run.precision
    return any(precision.is_fp8_layer(i, model.num_layers) and model.is_moe_layer(i) for i in range(model.num_layers))


READERS = (
    Reader(("model.image_size",), lambda run: run.model.task == "i2v", "model.task = 'i2v'"),
    Reader(
        ("model.image_length", "model.image_positions"),
        lambda run: run.model.image_size > 0,
        "model.image_size above 0",
    ),
    Reader(
        ("model.moe.aux_loss_weight",), lambda run: run.model.moe.router == "softmax", "model.moe.router = 'softmax'"
    ),
    Reader(("model.moe.route_scale",), lambda run: run.model.moe.router == "sigmoid", "model.moe.router = 'sigmoid'"),
    Reader(("parallel.context_strategy",), lambda run: run.parallel.context > 1, "parallel.context above 1"),
    Reader(
        ("train.spike_window", "train.spike_rollback_steps"),
        lambda run: run.train.spike_factor > 0,
        "train.spike_factor above 1",
    ),
    Reader(
        ("train.max_rollbacks",), lambda run: run.train.spike_rollback_steps > 0, "train.spike_rollback_steps above 0"
    ),
    Reader(
        ("precision.fp8_attention", "precision.fp8_gradients", "precision.fp8_skip_first", "precision.fp8_skip_last"),
        lambda run: run.precision.fp8 != "off",
        "a recipe of precision.fp8",
    ),
    Reader(
        ("precision.fp8_experts",),
        _has_fp8_experts,
        "a recipe of precision.fp8 and a block with experts in it",
    ),
    Reader(("precision.fp8_history",), lambda run: run.precision.fp8 == "delayed", "precision.fp8 = 'delayed'"),
    Reader(("lora.alpha", "lora.targets"), lambda run: run.lora.rank > 0, "lora.rank above 0"),
    Reader(
        ("deepspeed.zero_stage", "deepspeed.offload"),
        lambda run: run.train.backend == "deepspeed",
        "train.backend = 'deepspeed'",
    ),
)
"""Every key that is read by some runs only, but for those named above."""
_DEFAULTS = RunConfig()


def refuse_unread(config: RunConfig) -> None:
    """Refuse a key that was set and that this run would not read.

    Raises:
        ConfigError: there is one; the line says what reads it, and its default.
    """
    for reader in READERS:
        if reader.is_there(config):
            continue
        for key in reader.keys:
            value, default = attrgetter(key)(config), attrgetter(key)(_DEFAULTS)
            require(value == default, f"{key} = {value!r} is read with {reader.words} only; set that, or {default!r}")
