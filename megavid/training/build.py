"""Which callbacks a run has, at which interval, in which order.

Owns the list. Callbacks that talk to other ranks stand on every rank, in the same order; the others on rank 0.
"""

from pathlib import Path

import torch

from megavid.config.schema import RunConfig
from megavid.errors import ConfigError
from megavid.training.callbacks import (
    BadSamples,
    Callback,
    Callbacks,
    CaptureLog,
    Fp8Log,
    MetricsLog,
    RouterLog,
    Run,
    TensorBoard,
    Terminal,
    WorstSamples,
)
from megavid.training.prometheus import PrometheusFile
from megavid.training.reports import LossPlot, PictureGrid, Validation
from megavid.training.routing_record import RoutingLog
from megavid.training.slow import SlowRanks
from megavid.training.stragglers import GpuStragglers, check_detector
from megavid.training.wandb_log import WandbLog, check_wandb


def build_callbacks(run: Run) -> Callbacks:
    """The callbacks of this rank as (callback, interval in steps)."""
    log = run.config.log
    entries: list[tuple[Callback, int]] = []
    if run.mesh.is_main:
        entries.append((MetricsLog(), 1))
        if run.config.model.family == "wan_moe":
            entries.append((RouterLog(log.interval_steps), 1))
        if run.config.precision.fp8 != "off" and log.fp8_interval_steps:
            entries.append((Fp8Log(), log.fp8_interval_steps))
        if run.config.train.capture != "off":
            entries.append((CaptureLog(), 1))
        if log.tensorboard:
            entries.append((TensorBoard(), 1))
        if log.wandb_project:
            entries.append((WandbLog(log.wandb_project), 1))
        if log.prometheus:
            entries.append((PrometheusFile(Path(log.prometheus)), log.interval_steps))
        entries.append((Terminal(), log.interval_steps))
    if log.routing_interval_steps:
        entries.append((RoutingLog(log.routing_interval_steps, run.config.model.moe.num_experts), 1))
    if log.validation_interval_steps:
        entries.append((Validation(), log.validation_interval_steps))
    if log.sample_interval_steps:
        entries.append((PictureGrid(), log.sample_interval_steps))
    if log.worst_samples:
        entries.append((WorstSamples(log.worst_samples), 1))
    entries.append((BadSamples(), 1))
    if run.config.watchdog.slow_factor and run.mesh.world_size > 1:
        entries.append((SlowRanks(), 1))
    if run.config.watchdog.gpu_stragglers:
        entries.append((GpuStragglers(), 1))
    if run.mesh.is_main:
        entries.append((LossPlot(), 1))
    return Callbacks(run, entries)


def check_reports(config: RunConfig) -> None:
    """Refuse reports that could never come, before anything runs.

    Raises:
        ConfigError: validation or held-out captions without held-out clips, or routing without experts.
    """
    log = config.log
    check_wandb(log.wandb_project)
    if config.watchdog.gpu_stragglers:
        check_detector(torch.cuda.is_available())
    if log.prometheus and not Path(log.prometheus).parent.is_dir():
        raise ConfigError(f"log.prometheus = {log.prometheus!r}: its folder does not exist; make it, or name another")
    if log.routing_interval_steps and config.model.family != "wan_moe":
        raise ConfigError(
            f"log.routing_interval_steps = {log.routing_interval_steps} needs experts, but model.family = "
            f"'{config.model.family}'; set it to 0"
        )
    if config.data.validation_samples:
        return
    if log.validation_interval_steps:
        raise ConfigError(
            f"log.validation_interval_steps = {log.validation_interval_steps} needs held-out clips, but "
            "data.validation_samples = 0; raise it or set the interval to 0"
        )
    if log.sample_interval_steps and not log.sample_prompts:
        raise ConfigError(
            f"log.sample_interval_steps = {log.sample_interval_steps} needs prompts, but log.sample_prompts is empty "
            "and data.validation_samples = 0; give prompts"
        )
