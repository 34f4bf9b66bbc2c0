"""Checkpoints of runs of adapters, made without training."""

from dataclasses import replace
from pathlib import Path

from megavid.checkpoint import AsyncSaver, Checkpoint, SingleRank
from megavid.checkpoint.base import BASE, Base
from megavid.checkpoint.convert import open_model
from megavid.config.load import dump_toml
from megavid.config.schema import CheckpointConfig, LoraConfig, OptimizerConfig, RunConfig, TrainConfig
from megavid.ops.philox import key_of, normal
from megavid.parallel.fragment import Box, Fragment
from megavid.plan.adapters import adapter_tensors


def adapter_run(folder: Path, base: Path, ema_decay: float = 0.0) -> Path:
    """The folder of the one checkpoint of a run of random adapters over a megavid checkpoint, ``base``."""
    config = replace(
        RunConfig(model=open_model(base).config),
        lora=LoraConfig(rank=2, alpha=3.0),
        train=TrainConfig(init_from=str(base)),
        optimizer=OptimizerConfig(ema_decay=ema_decay),
    )
    fragments = [
        Fragment(name, shape, (Box((0,) * len(shape), shape),), normal(key_of(name), 0, shape[0] * shape[1]))
        for kind in (("model", "ema") if ema_decay else ("model",))
        for name, shape in ((f"{kind}/{n}", s) for n, s in adapter_tensors(config.model, config.lora).items())
    ]
    extra = {BASE: Base.of(Checkpoint(base), "model").to_bytes()}
    settings = CheckpointConfig(async_save=False)
    with AsyncSaver(folder, SingleRank(), settings, run_toml=dump_toml(config), extra=extra) as saver:
        saver.save(1, fragments, {"updates": 1})
    return folder / "step_00000001"
