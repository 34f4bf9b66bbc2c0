"""What happens beside the optimizer step: metrics, TensorBoard, the terminal, validation, worst samples, pictures.

Owns the hooks and their order; each callback is a pair with the interval in steps at which it is asked. Callbacks of
rank 0 only touch files; those that talk to other ranks stand on every rank, in the same order. No callback changes
what is learnt.
"""

import contextlib
import heapq
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from tqdm import tqdm

from megavid.config.schema import RunConfig
from megavid.data.loader import Loader
from megavid.models.moe.stats import collapse_alarms, summary
from megavid.parallel.engine import Engine
from megavid.parallel.mesh import Mesh
from megavid.profiling.peak import Peak
from megavid.training.fp8_figures import rounding_rows, worst_rounding
from megavid.training.kit import SamplingKit
from megavid.training.metrics import MetricsFile
from megavid.training.routing import layer_rows, worst_figures
from megavid.training.run_dir import RunDir
from megavid.training.state import TrainState
from megavid.training.step import StepReport


@dataclass(frozen=True)
class Run:
    """What every callback may look at."""

    config: RunConfig
    mesh: Mesh
    engine: Engine[Any]
    run_dir: RunDir
    state: TrainState
    loader: Loader
    kit: SamplingKit
    peak: Peak | None = None

    def event(self, name: str, **fields: object) -> None:
        """Write a row of events.jsonl, on rank 0."""
        if self.mesh.is_main:
            self.run_dir.event(name, **fields)


class Callback:
    """The hooks; every one does nothing until a callback says otherwise."""

    def before_training(self, run: Run) -> None:
        """Called once, after loading and before the first step."""

    def after_step(self, run: Run, report: StepReport) -> None:
        """Called after each step that the interval divides."""

    def before_save(self, run: Run) -> None:
        """Called on every rank before a checkpoint is taken."""

    def after_training(self, run: Run) -> None:
        """Called once at the end, also when training ends with an error."""


class Callbacks:
    """Pairs of (callback, interval in steps), called in order; a context manager around the loop."""

    def __init__(self, run: Run, entries: Sequence[tuple[Callback, int]]) -> None:
        """Bind the callbacks of this rank."""
        self.run, self.entries = run, entries
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Call ``before_training``; what has begun is ended even if a later one fails to begin."""
        with contextlib.ExitStack() as stack:
            for callback, _ in self.entries:
                callback.before_training(self.run)
                stack.callback(callback.after_training, self.run)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Call ``after_training``, last callback first."""
        self._stack.close()

    def after_step(self, report: StepReport) -> None:
        """Ask every callback whose interval divides the step."""
        for callback, every in self.entries:
            if report.step % every == 0:
                callback.after_step(self.run, report)

    def before_save(self) -> None:
        """Tell every callback that a checkpoint is about to be taken."""
        for callback, _ in self.entries:
            callback.before_save(self.run)


class MetricsLog(Callback):
    """metrics.jsonl, a row a step (rank 0)."""

    def before_training(self, run: Run) -> None:
        """Open the file behind the rows that stay."""
        self.file = MetricsFile(run.run_dir.metrics_file)

    def after_step(self, run: Run, report: StepReport) -> None:
        """Write the row."""
        row: dict[str, object] = {
            "step": report.step,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "step_time_s": round(report.step_time_s, 6),
            "data_wait_s": round(report.data_wait_s, 6),
            "tokens": report.tokens,
            "clips": report.clips,
            "tokens_per_s": round(report.tokens_per_s, 3),
            **speed_figures(report, run.mesh.world_size, run.peak),
            "is_skipped": not report.is_finite,
            "skipped": run.state.skipped,
        }
        if run.state.left_out:
            row["left_out"] = run.state.left_out
        for name, figures in (("router", worst_figures(report.routing)), ("fp8", worst_rounding(report.fp8))):
            if figures:
                row[name] = figures
        self.file.write(row)

    def before_save(self, run: Run) -> None:
        """Put the rows on the disk before the checkpoint that follows them."""
        self.file.sync()

    def after_training(self, run: Run) -> None:
        """Close the file."""
        self.file.__exit__()


def speed_figures(report: StepReport, num_ranks: int, peak: Peak | None) -> dict[str, float | None]:
    """How fast a step was and what it waited for; None for what nobody measured.

    ``mfu`` and ``hfu`` need the peak of a known GPU: on other machines ``megavid profile`` measures one.
    """
    useful, computed = (flops / report.step_time_s / num_ranks for flops in (report.model_flops, report.hardware_flops))
    comm_wait_s = report.comm_wait_s
    return {
        "mfu": None if peak is None else round(useful / peak.flops_per_s, 5),
        "hfu": None if peak is None else round(computed / peak.flops_per_s, 5),
        "tflops_per_rank": float(f"{useful / 1e12:.5g}"),
        "memory_peak_gib": round(report.memory_peak_bytes / 2**30, 4),
        "comm_wait_s": None if comm_wait_s is None else round(comm_wait_s, 6),
    }


class RouterLog(Callback):
    """router.jsonl, a row for all expert layers, and an event for each sign of a collapsed router (rank 0).

    Args:
        interval_steps: steps between rows; signs are looked for at every step.
    """

    def __init__(self, interval_steps: int) -> None:
        self.interval_steps = interval_steps

    def before_training(self, run: Run) -> None:
        """Open the file behind the rows that stay."""
        self.file = MetricsFile(run.run_dir.router_file)

    def after_step(self, run: Run, report: StepReport) -> None:
        """Write the row where one is due, and the event."""
        if report.step % self.interval_steps == 0:
            self.file.write({"step": report.step, "layers": layer_rows(report.routing)})
        alarms = [alarm for layer, stats in report.routing.items() for alarm in collapse_alarms(layer, stats)]
        if alarms:
            run.event("router_alarm", step=report.step, alarms=alarms)

    def after_training(self, run: Run) -> None:
        """Close the file."""
        self.file.__exit__()


class Fp8Log(Callback):
    """fp8.jsonl, a row for all layers in FP8 (rank 0)."""

    def before_training(self, run: Run) -> None:
        """Open the file behind the rows that stay."""
        self.file = MetricsFile(run.run_dir.fp8_file)

    def after_step(self, run: Run, report: StepReport) -> None:
        """Write the row."""
        self.file.write({"step": report.step, "layers": rounding_rows(report.fp8)})

    def after_training(self, run: Run) -> None:
        """Close the file."""
        self.file.__exit__()


def scalars_of(run: Run, report: StepReport) -> dict[str, float]:
    """Every figure of a step by its name in TensorBoard; those that nobody measured are left out."""
    scalars = {
        "train/loss": report.loss,
        "train/grad_norm": report.grad_norm,
        "train/learning_rate": report.learning_rate,
        "speed/step_time_s": report.step_time_s,
        "speed/data_wait_s": report.data_wait_s,
        "speed/tokens_per_s": report.tokens_per_s,
    }
    speed = speed_figures(report, run.mesh.world_size, run.peak)
    scalars |= {f"speed/{name}": value for name, value in speed.items() if value is not None}
    scalars |= {f"fp8/{name}": value for name, value in worst_rounding(report.fp8).items()}
    for layer, stats in report.routing.items():
        scalars |= {f"router_{layer}/{name}": value for name, value in summary(stats).items()}
    return scalars


class TensorBoard(Callback):
    """The same figures for TensorBoard (rank 0)."""

    def before_training(self, run: Run) -> None:
        """Open the writer; what an earlier start wrote after the loaded checkpoint is hidden."""
        from torch.utils.tensorboard import SummaryWriter  # here: half a second of imports, for rank 0 alone

        self.writer = SummaryWriter(str(run.run_dir.tensorboard), purge_step=run.state.step + 1)

    def after_step(self, run: Run, report: StepReport) -> None:
        """Write the scalars."""
        for name, value in scalars_of(run, report).items():
            self.writer.add_scalar(name, value, report.step)

    def after_training(self, run: Run) -> None:
        """Flush and close."""
        self.writer.close()


class Terminal(Callback):
    """A progress bar where a person looks on, a line every ``log.interval_steps`` elsewhere (rank 0)."""

    def before_training(self, run: Run) -> None:
        """Show the bar."""
        self.bar = tqdm(
            total=run.config.train.steps,
            initial=run.state.step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def after_step(self, run: Run, report: StepReport) -> None:
        """Move the bar, or write the line."""
        if not self.bar.disable:
            self.bar.update(report.step - self.bar.n)
            self.bar.set_postfix_str(f"loss {report.loss:.4f}, norm {report.grad_norm:.3f}")
        if self.bar.disable or not report.is_finite:
            self.bar.write(line_of(run, report), file=sys.stdout)
            sys.stdout.flush()

    def after_training(self, run: Run) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def line_of(run: Run, report: StepReport) -> str:
    """The terminal's line of a step."""
    skipped = "" if report.is_finite else f"  SKIPPED: {report.culprit}"
    share = speed_figures(report, run.mesh.world_size, run.peak)["mfu"]
    mfu = "" if share is None else f"  MFU {share:.1%}"
    return (
        f"step {report.step:>6}/{run.config.train.steps}  loss {report.loss:.5f}  grad_norm {report.grad_norm:.4f}  "
        f"lr {report.learning_rate:.3g}  {report.step_time_s:.2f} s  {report.tokens_per_s:,.0f} tokens/s"
        f"{mfu}  wait {report.data_wait_s:.2f} s{skipped}"
    )


class WorstSamples(Callback):
    """Names the clips with the highest loss since the last checkpoint in events.jsonl, with their ids."""

    def __init__(self, count: int) -> None:
        """Keep the ``count`` worst."""
        self.count = count
        self.worst: list[tuple[float, int, int, float]] = []

    def after_step(self, run: Run, report: StepReport) -> None:
        """Keep the worst of this rank."""
        found = [(clip.loss, clip.draw, clip.sample, clip.sigma) for clip in report.clip_losses]
        found = [row for row in found if math.isfinite(row[0])]  # the others are named as their step is skipped
        self.worst = heapq.nlargest(self.count, self.worst + found)

    def before_save(self, run: Run) -> None:
        """Gather the worst of all ranks and write them."""
        gathered = run.mesh.all_gather_object(self.worst)
        # Ranks that share a replica recorded the same clips: a draw counts once.
        by_draw = {draw: (loss, draw, sample, sigma) for rows in gathered for loss, draw, sample, sigma in rows}
        rows = [
            {"sample": sample, "draw": draw, "sigma": round(sigma, 4), "loss": round(loss, 5)}
            for loss, draw, sample, sigma in heapq.nlargest(self.count, by_draw.values())
        ]
        run.event("worst_samples", step=run.state.step, clips=rows)
        self.worst = []


class BadSamples(Callback):
    """Names the damaged clips that the loader replaced in events.jsonl."""

    def before_save(self, run: Run) -> None:
        """Gather what all ranks met since the last checkpoint."""
        gathered = run.mesh.all_gather_object(run.loader.new_bad_samples())
        found = sorted({line for lines in gathered for line in lines})
        if found:
            run.event("bad_samples", step=run.state.step, samples=found)


class CaptureLog(Callback):
    """Says what ``train.capture`` compiled on this rank, and for which shape, as it happens (rank 0)."""

    def after_step(self, run: Run, report: StepReport) -> None:
        """Write a row of events.jsonl and a line for each function that was compiled, or will not be."""
        for chunk in run.engine.chunks:
            for found in chunk.capture.take_news():
                shape = list(found.shape)
                run.event("captured", step=report.step, part=found.part, shape=shape, is_refused=found.is_refused)
                tqdm.write(found.describe(), file=sys.stdout)
