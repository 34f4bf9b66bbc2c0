"""Running recorded steps again: from the nearest checkpoint before, on any ranks of this machine, writing nothing.

Owns finding where to begin, the layout that a step was recorded in, and the comparison with the recorded row.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavid.checkpoint import Checkpoint, list_steps, resolve
from megavid.checkpoint.format import step_name, step_of
from megavid.config.schema import RunConfig
from megavid.data.build import build_source, build_text_encoder
from megavid.errors import DataError
from megavid.models.runner import build_engine
from megavid.parallel.launch import Device, RankEnv
from megavid.parallel.mesh import Mesh
from megavid.parallel.world import open_mesh
from megavid.plan.layout import Layout
from megavid.training.begin import agreed_base, load_or_initialize, open_steps
from megavid.training.metrics import BEGINNINGS, read_rows
from megavid.training.resume import config_of
from megavid.training.routing_record import RecordedRouting
from megavid.training.run_dir import RunDir, Start
from megavid.training.state import TrainState
from megavid.training.step import StepReport

LAW = 1e-5
"""Relative difference of a loss that another layout may make in fp32."""


@dataclass(frozen=True)
class Recorded:
    """One step as the run recorded it.

    Attributes:
        step: its number.
        loss: as written; None where it was not finite.
        grad_norm: likewise.
        layout: of the start that took it, as ``Layout.describe`` says it.
        ranks: of that start.
        config: of that start.
        checkpoint: to begin from: the last one before the step; None to begin with the run.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    layout: str
    ranks: int
    config: RunConfig
    checkpoint: Path | None

    @property
    def first(self) -> int:
        """The first step to take."""
        return 1 if self.checkpoint is None else Checkpoint(self.checkpoint).step + 1


def recorded(folder: Path, step: int) -> Recorded:
    """Find a step of a run.

    Raises:
        ConfigError: no run is in ``folder``.
        DataError: it has no such step.
    """
    run_dir = RunDir(folder)
    config = run_dir.config()
    row = next((row for row in read_rows(run_dir.metrics_file) if row["step"] == step), None)
    if row is None:
        raise DataError(f"{run_dir.metrics_file} has no step {step}; give one that the run has taken")
    starts = [event for event in run_dir.events() if event["event"] in BEGINNINGS]
    took = [event for event in starts if _number(event["step"]) < step]
    if not took:
        raise DataError(f"{run_dir.events_file} names no start before step {step}")
    steps = steps_of_run(run_dir.checkpoints)
    before, after = [s for s in steps if s < step], [s for s in steps if s >= step]
    if after:  # written by the start that took the step, or by a later one
        saved = config_of(Checkpoint(run_dir.checkpoints / step_name(after[0])))
        config = dataclasses.replace(saved, data=dataclasses.replace(saved.data, path=config.data.path))
    checkpoint = run_dir.checkpoints / step_name(before[-1]) if before else None
    loss, norm = (_figure(row[name]) for name in ("loss", "grad_norm"))
    ranks = _number(took[-1]["ranks"])
    return Recorded(step, loss, norm, str(took[-1]["layout"]), ranks, config, checkpoint)


def steps_of_run(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints that the run came by, without those that it has gone back behind since, rising."""
    steps = list_steps(checkpoints)
    if not steps:
        return []
    states = {step: TrainState.from_json(Checkpoint(checkpoints / step_name(step)).state) for step in steps}
    newest = TrainState.from_json(Checkpoint(resolve(checkpoints)).state)
    # Later ones than the newest are of a run that was told to go on from an earlier step.
    later = {step for step, state in states.items() if step > newest.step and state.rollbacks == newest.rollbacks}
    return [step for step, state in states.items() if step in later or state.is_before(newest)]


def routing_of(folder: Path, step: int) -> Path:
    """Where a run has recorded its routing.

    Raises:
        DataError: not that of ``step``.
    """
    routing = RunDir(folder).routing
    if not (routing / step_name(step)).is_dir():
        there = sorted(step_of(path.name) or 0 for path in routing.glob("step_*[0-9]"))
        raise DataError(
            f"{routing} has no record of step {step}; there are those of steps: {', '.join(map(str, there)) or 'none'} "
            "(log.routing_interval_steps)"
        )
    return routing


def _figure(value: object) -> float | None:
    return value if isinstance(value, float) else None


def _number(value: object) -> int:
    assert isinstance(value, int)
    return value


def replay_rank(
    config: RunConfig,
    layout: Layout,
    device: Device,
    what: Recorded,
    finish: Callable[[Sequence[StepReport], str], None],
    env: RankEnv,
    *,
    routing: Path | None = None,
) -> None:
    """Take the steps up to the recorded one as one rank; rank 0 gives their reports to ``finish``.

    Args:
        config: of the run, in the layout to replay it in.
        layout: of the world that ``env`` names.
        device: where tensors live.
        what: the step.
        finish: called on rank 0, with a line on the routing.
        env: who this rank is.
        routing: the run's record of it, to be forced; None where routers choose for themselves.
    """
    with open_mesh(config, layout, device, env) as mesh:
        forced: list[RecordedRouting] = []

        def force(engine: Any) -> None:
            if routing is not None:
                forced.append(RecordedRouting(engine, routing))

        def before_step(step: int) -> None:
            for recorded_routing in forced:
                recorded_routing.begin(step)

        reports = take_steps(config, mesh, what, on_engine=force, before_step=before_step)
        told = forced[0].summary() if forced else ""
        if mesh.is_main:
            finish(reports, told)


def take_steps(
    config: RunConfig,
    mesh: Mesh,
    what: Recorded,
    *,
    on_engine: Callable[[Any], None] = lambda engine: None,
    before_step: Callable[[int], None] = lambda step: None,
) -> list[StepReport]:
    """The reports of the steps from the checkpoint to the recorded one; the last is the recorded one's.

    Args:
        config: of the run.
        mesh: open.
        what: the step.
        on_engine: called with the engine, its weights loaded.
        before_step: called with the number of each step.

    Ranks: collective.
    """
    source = build_source(config)
    engine = build_engine(config, mesh)
    start = Start("new", 0, None) if what.checkpoint is None else Start("resume", what.first - 1, what.checkpoint)
    base = agreed_base(config, source, start, mesh)
    state, loader_state = load_or_initialize(engine, config, source, RunDir(Path()), start, base)
    on_engine(engine)
    take_step, loader = open_steps(config, engine, source, build_text_encoder(config), state, loader_state)
    reports = []
    with loader:
        while state.step < what.step:
            before_step(state.step + 1)
            reports.append(take_step(state, next(loader), 0.0))
    return reports


def compare(what: Recorded, report: StepReport, layout: str, config: RunConfig, routing: str) -> tuple[bool, list[str]]:
    """Whether the step is the recorded one, bit for bit in its layout and by law 1 in another; and lines to print.

    Args:
        what: the recorded step.
        report: the same step, taken again.
        layout: that it was taken in.
        config: that it was taken with: in another precision, or on another backend, the gap is told, not judged.
        routing: a line on forced routing; "" for none.
    """
    precision, was_precision = config.precision.describe(), what.config.precision.describe()
    is_same_math = (precision, config.train.backend) == (was_precision, what.config.train.backend)
    is_same_layout = layout == what.layout and is_same_math
    lines = [
        f"step        {what.step}, from {what.checkpoint.name if what.checkpoint else 'the beginning of the run'}",
        f"layout      {layout}" + ("" if layout == what.layout else f"; the run's was {what.layout}"),
    ]
    lines += [f"precision   {precision}; the run's was {was_precision}"] if precision != was_precision else []
    lines += [f"routing     {routing}"] if routing else []
    is_good = True
    for name, was, now in (("loss", what.loss, report.loss), ("grad_norm", what.grad_norm, report.grad_norm)):
        if was is None:
            verdict = "it was not finite then" + ("" if report.is_finite else ", and is not now")
            is_good &= not report.is_finite
        elif was == now:
            verdict = "bitwise the recorded one"
        else:
            gap = abs(now - was) / abs(was)
            verdict = f"recorded {was!r}: {gap:.1e} apart"
            is_good &= not is_same_layout and (not is_same_math or gap <= (LAW if name == "loss" else 10 * LAW))
        lines.append(f"{name:<11} {now!r}  {verdict}")
    return is_good, lines
