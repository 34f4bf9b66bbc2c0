"""The training loop: everything a run does on one rank, from the open mesh to the last checkpoint.

Owns the order of things. Every decision that ends or changes the run is taken by all ranks at the same step.
"""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megavid.checkpoint import AsyncSaver, Checkpoint, latest
from megavid.checkpoint.base import BASE
from megavid.config.load import dump_toml
from megavid.config.schema import RunConfig
from megavid.data.build import build_source, build_text_encoder
from megavid.errors import NumericalStop, StopRequested
from megavid.models.runner import build_engine
from megavid.parallel.engine import Engine
from megavid.parallel.host import host_name
from megavid.parallel.mesh import Mesh
from megavid.profiling.peak import known_peak
from megavid.training import rollback
from megavid.training.begin import agreed_base, load_or_initialize, open_steps
from megavid.training.build import build_callbacks
from megavid.training.callbacks import Run
from megavid.training.diagnose import first_bad_part
from megavid.training.kit import SamplingKit
from megavid.training.metrics import cut_after
from megavid.training.resume import (
    config_of,
    has_average,
)
from megavid.training.rollback import RollBack
from megavid.training.run_dir import RunDir, Start
from megavid.training.state import TrainState
from megavid.training.step import StepReport, TrainStep
from megavid.training.stop import StopSignal


def train(
    config: RunConfig,
    mesh: Mesh,
    run_dir: RunDir,
    start: Start,
    *,
    on_step: Callable[[int], None] = lambda step: None,
) -> TrainState:
    """Train to ``config.train.steps``, or to ``train.stop_at_step``, and return the final state.

    Args:
        config: the run.
        mesh: open, in the layout of the config.
        run_dir: where everything is written; this start holds its lock.
        start: what this start goes on from; not a finished run.
        on_step: told of every step that is done.

    Raises:
        NumericalStop: too many steps in a row were not finite, or the run has gone back too often.
        StopRequested: a signal asked for it; everything is saved.
        Superseded: another start of this run began; nothing more was written.

    Ranks: collective over the world.
    """
    with StopSignal(mesh) as stop:
        engine = build_engine(config, mesh)
        ended = train_from(config, engine, run_dir, start, stop, on_step)
        while isinstance(ended, RollBack):
            on_step(0)
            again = replace(start, kind="resume", step=0, checkpoint=ended.checkpoint)
            ended = train_from(config, engine, run_dir, again, stop, on_step, ended)
        return ended


def train_from(
    config: RunConfig,
    engine: Engine[Any],
    run_dir: RunDir,
    start: Start,
    stop: StopSignal,
    on_step: Callable[[int], None],
    back: RollBack | None = None,
) -> TrainState | RollBack:
    """Train from ``start`` on; ``back`` is why, where the run has gone back there.

    Returns:
        The final state, or the decision to go back.
    """
    run, take_step, saver = open_run(config, engine, run_dir, start, back)
    mesh, state, loader = engine.mesh, run.state, run.loader
    with loader, saver:
        if back is not None:
            save(run, saver)
            saver.wait()  # the rows behind it go only now
        write_start(run, start, back)
        with build_callbacks(run) as callbacks:
            while state.step < last_step(config) and not stop.agreed:
                waited_s = loader.waited_s
                microbatches = next(loader)
                report = take_step(state, microbatches, loader.waited_s - waited_s)
                on_step(report.step)
                if mesh.is_main:
                    start.fence.check()  # before a row of this step is written
                callbacks.after_step(report)
                if not report.is_finite:
                    samples = note_bad_step(run, report)
                    back = rollback.decide(run, report, samples, saver)
                    if back is not None:
                        return back
                if state.bad_in_a_row >= config.train.max_bad_steps:
                    raise numerical_stop(run, report, first_bad_part(engine, take_step.objective, microbatches))

                saver.poll()  # a save that failed in the background ends the run here
                stop.agree()  # every rank takes the same decision, once per step
                if is_save_due(config, state.step) or stop.agreed:
                    callbacks.before_save()
                    save(run, saver)
        saver.wait()
    if config.lora.rank and mesh.is_main:
        write_adapter(run_dir)
    return finish(run, stop.agreed)


def open_run(
    config: RunConfig, engine: Engine[Any], run_dir: RunDir, start: Start, back: RollBack | None
) -> tuple[Run, TrainStep, AsyncSaver]:
    """Fill the engine, and build what feeds it, steps it and saves it; loader and saver are not entered yet."""
    mesh = engine.mesh
    source = build_source(config)
    text_encoder = build_text_encoder(config)
    kit = SamplingKit.of(config, source, text_encoder)
    base = agreed_base(config, source, start, mesh)
    state, loader_state = load_or_initialize(engine, config, source, run_dir, start, base)
    if back is not None:
        state.go_back_from(back.later)
    take_step, loader = open_steps(config, engine, source, text_encoder, state, loader_state)
    saver = AsyncSaver(
        run_dir.checkpoints, mesh, config.checkpoint, run_toml=dump_toml(config),
        layout=mesh.layout.describe(), extra={**kit.files(), **({BASE: base.to_bytes()} if base else {})},
        fence=start.fence,
    )  # fmt: skip
    return Run(config, mesh, engine, run_dir, state, loader, kit, known_peak(mesh.device)), take_step, saver


def save(run: Run, saver: AsyncSaver) -> None:
    """Begin a checkpoint of the run as it stands."""
    progress = run.state.to_json(seed=run.config.train.seed, loader=run.loader.state_dict())
    saver.save(run.state.step, run.engine.fragments(), progress)
    run.event("saved", step=run.state.step, held_s=round(saver.held_s, 3))


def last_step(config: RunConfig) -> int:
    """The step after which this start ends."""
    return min(config.train.steps, config.train.stop_at_step or config.train.steps)


def is_save_due(config: RunConfig, step: int) -> bool:
    """Whether a checkpoint is taken after ``step``."""
    interval = config.checkpoint.interval_steps
    return step == last_step(config) or (interval > 0 and step % interval == 0)


def write_adapter(run_dir: RunDir) -> None:
    """Write the adapter of the last checkpoint beside run.toml, in the form that diffusers loads."""
    from megavid.checkpoint.convert.adapter import ADAPTER, saved_adapter  # here: only a run of adapters needs it

    found = latest(run_dir.checkpoints)
    if found is None:
        return
    checkpoint = Checkpoint(found)
    run_dir.fence.check()
    saved = saved_adapter(checkpoint, "ema" if has_average(config_of(checkpoint)) else "model")
    saved.write(run_dir.path)
    run_dir.event("adapter", step=checkpoint.step, file=ADAPTER)


def write_start(run: Run, start: Start, back: RollBack | None) -> None:
    """Write what this start is: run.toml, ranks.json, an event; cut the rows after the loaded checkpoint."""
    mesh, run_dir, layout = run.mesh, run.run_dir, run.mesh.layout.describe()
    row = {
        "rank": mesh.rank,
        "pid": os.getpid(),
        "host": host_name(),
        "coordinates": mesh.coordinates,
        "parameters": sum(math.prod(p.shape) for placement in run.engine.placements() for p in placement.pieces),
    }
    rows = mesh.all_gather_object(row)
    if mesh.is_main:
        for file in (run_dir.metrics_file, run_dir.router_file, run_dir.fp8_file):
            cut_after(file, run.state.step)
        run_dir.write_config(run.config)
        run_dir.write_ranks(rows)
        fields: dict[str, object] = {"step": run.state.step, "layout": layout, "ranks": mesh.world_size}
        fields["peak"] = None if run.peak is None else run.peak.to_json()  # what mfu and hfu are fractions of
        if run.state.rollbacks:
            fields |= {"rollbacks": len(run.state.rollbacks), "left_out": run.state.left_out}
        if back is not None:
            spike = {"spike": back.later.step, "loss": back.loss, "samples": back.samples}
            run_dir.event("rolled_back", **fields, checkpoint=back.checkpoint.name, **spike)
        elif start.checkpoint is not None:
            run_dir.event("resumed", **fields, checkpoint=start.checkpoint.name)
        else:
            run_dir.event("started", **fields, init_from=run.config.train.init_from)


def note_bad_step(run: Run, report: StepReport) -> list[int]:
    """Note a skipped step with the samples that made it so (all of the step, where every loss is finite)."""
    samples = bad_samples(run, report)
    run.event(
        "skipped",
        step=report.step,
        culprit=report.culprit,
        samples=samples,
        in_a_row=run.state.bad_in_a_row,
    )
    return samples


def bad_samples(run: Run, report: StepReport) -> list[int]:
    """Samples of the step whose loss is not finite, on any rank; all of its samples where every loss is finite."""
    gathered = run.mesh.all_gather_object(report.clip_losses)
    clips = [clip for losses in gathered for clip in losses]
    bad = [clip for clip in clips if not math.isfinite(clip.loss)]
    return sorted({clip.sample for clip in bad or clips})


def numerical_stop(run: Run, report: StepReport, origin: str) -> NumericalStop:
    """The error that ends a run after too many skipped steps in a row."""
    samples = bad_samples(run, report)
    why = report.culprit if report.is_spike else f"first not finite: {origin} ({report.culprit})"
    shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
    return NumericalStop(
        f"step {report.step}: loss {report.loss}, gradient norm {report.grad_norm}, {why}, "
        f"samples {shown}; {run.state.bad_in_a_row} steps in a row were skipped, the limit is "
        f"train.max_bad_steps = {run.config.train.max_bad_steps}"
    )


def finish(run: Run, stopped_by: str) -> TrainState:
    """Say how this start ended.

    Raises:
        StopRequested: a signal ended it before its last step.
    """
    step, steps = run.state.step, run.config.train.steps
    if step >= steps:
        run.event("finished", step=step)
    elif stopped_by:
        run.event("stopped", step=step, reason=stopped_by)
        raise StopRequested(
            f"{stopped_by} at step {step} of {steps}: saved; the same command on {run.run_dir.path} goes on"
        )
    else:
        run.event("stopped", step=step, reason="train.stop_at_step")
    return run.state
