"""The callbacks that run the model or draw: validation loss, picture grids of prompts, and the loss plot.

Owns when weights are averaged for them and what they write. They talk to other ranks, so they stand on every rank.
"""

import contextlib
import sys
import time
from typing import Any

from tqdm import tqdm

from megavid.data.pictures import contact_sheet
from megavid.data.video import write_png
from megavid.ops.packs import LatentBatch
from megavid.training.callbacks import Callback, Run
from megavid.training.kit import size_of
from megavid.training.metrics import read_rows
from megavid.training.resume import has_average
from megavid.training.sampling import Prompt, SamplerSettings, decode, rounds, sample_latents
from megavid.training.step import StepReport
from megavid.training.validation import ValidationLoss, validation_loss

SMALL_METRICS_BYTES = 8 << 20
"""Beyond this the loss plot is drawn at the end only, so that ranks do not wait for it at every checkpoint."""
PLOT_INTERVAL_S = 60.0
"""The loss plot is drawn at a checkpoint when the last one is so old: drawing takes as long as many a checkpoint."""
MAX_PROMPTS = 8
"""Prompts of a picture grid where the config names none: captions of the first held-out clips."""


class Validation(Callback):
    """Loss on the held-out clips, in total and by noise bucket, of the weights and of their average."""

    def before_training(self, run: Run) -> None:
        """Read the held-out clips once; they are few and never change."""
        self.batches: list[LatentBatch] = list(run.loader.validation_batches())

    def after_step(self, run: Run, report: StepReport) -> None:
        """Compute and write."""
        with progress(run, "validation", 2 * len(self.batches)) as bar:
            found = {"": validation_loss(run.engine, self.batches, on_batch=bar.update)}
            if has_average(run.config):
                with run.engine.averaged_weights():
                    found["ema_"] = validation_loss(run.engine, self.batches, on_batch=bar.update)
        fields: dict[str, object] = {}
        for name, result in found.items():
            fields[f"{name}loss"] = result.loss
            fields[f"{name}by_noise"] = result.by_noise
        run.event("validated", step=report.step, **fields)
        if run.mesh.is_main:
            print(f"step {report.step:>6}  validation loss {_line(found)}", flush=True)


class PictureGrid(Callback):
    """Samples of fixed prompts as a picture: one row a prompt, frames from left to right (EMA weights where kept)."""

    def after_step(self, run: Run, report: StepReport) -> None:
        """Sample and write samples/step_XXXXXXXX.png."""
        prompts = self._prompts(run)
        if not prompts:  # nothing but still images is held out, which no model makes from a picture
            return
        settings = SamplerSettings(steps=run.config.log.sample_steps)
        total = settings.steps * rounds(len(prompts), run.engine)
        average = run.engine.averaged_weights() if has_average(run.config) else contextlib.nullcontext()
        with progress(run, "sampling", total) as bar, average:
            latents = sample_latents(run.engine, run.kit, prompts, settings, on_step=bar.update)
        if run.mesh.is_main:
            clips = decode(run.kit.video_tokenizer(), latents)
            run.run_dir.pictures.mkdir(exist_ok=True)
            file = run.run_dir.pictures / f"step_{report.step:08d}.png"
            write_png(file, contact_sheet([(prompt.text, [clip]) for prompt, clip in zip(prompts, clips)]))
            run.event("sampled", step=report.step, file=str(file.relative_to(run.run_dir.path)))

    def _prompts(self, run: Run) -> list[Prompt]:
        """The prompts of the config, else held-out clips: their captions, and what the model is given of a clip."""
        texts, is_given = run.config.log.sample_prompts, run.config.model.task != "t2v"
        if texts or not is_given:
            return [Prompt(text, run.kit.size) for text in texts or run.loader.validation_captions()[:MAX_PROMPTS]]
        samples = [sample for sample in run.loader.validation_samples() if sample.shape[1] > 1][:MAX_PROMPTS]
        return [Prompt(sample.caption, size_of(sample, run.kit.tokenizer), sample) for sample in samples]


class LossPlot(Callback):
    """loss.png, drawn at checkpoints, at most once a minute, and at the end (rank 0)."""

    def before_training(self, run: Run) -> None:
        """A minute from now on."""
        self._drawn_s = time.monotonic()

    def before_save(self, run: Run) -> None:
        """Draw it, where the last one is old, and while that takes a moment only."""
        if time.monotonic() - self._drawn_s < PLOT_INTERVAL_S:
            return
        if run.run_dir.metrics_file.stat().st_size < SMALL_METRICS_BYTES:
            self._draw(run)
            self._drawn_s = time.monotonic()

    def after_training(self, run: Run) -> None:
        """Draw it a last time."""
        if run.run_dir.metrics_file.stat().st_size > 0:
            self._draw(run)

    def _draw(self, run: Run) -> None:
        from megavid.training.plots import plot_run  # here: a second of imports that one rank in a thousand needs

        rows = read_rows(run.run_dir.metrics_file)
        plot_run(rows, run.run_dir.events(), run.run_dir.loss_plot, title=run.run_dir.path.name)


def progress(run: Run, what: str, total: int) -> "tqdm[Any]":
    """A bar that goes away when done; only on rank 0 and where a person looks on."""
    is_shown = run.mesh.is_main and sys.stderr.isatty()
    return tqdm(total=total, desc=what, leave=False, dynamic_ncols=True, disable=not is_shown)


def _line(found: dict[str, ValidationLoss]) -> str:
    parts = [f"{result.loss:.5f}{' (EMA)' if name else ''}" for name, result in found.items()]
    return ", ".join(parts)
