"""One step of the loop: hand the microbatches to the model's step, count, and say what happened as host numbers.

Owns the record of a step and of its clips, and the counters. The arithmetic of a step is
``megavid.training.model_step``'s; what is learnt is the objective's.
"""

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megavid.config.schema import RunConfig
from megavid.diffusion.objective import ClipLosses, Noised
from megavid.ops.packs import Clip, LatentBatch
from megavid.ops.regions import region
from megavid.parallel.engine import Engine
from megavid.parallel.mesh import Mesh
from megavid.plan.adapters import computed_flops, trained_flops
from megavid.plan.flops import recompute_flops
from megavid.profiling.collectives import names_of
from megavid.profiling.records import peak_memory_bytes
from megavid.profiling.waits import WaitClock
from megavid.training.fp8_figures import Fp8Figures, figures_of, is_watched, watching
from megavid.training.model_step import Objective, train_step
from megavid.training.routing import Routing, join_stages
from megavid.training.schedule import learning_rate
from megavid.training.state import TrainState


@dataclass(frozen=True, slots=True)
class ClipLoss:
    """Loss of one clip of a step, mean over its numbers."""

    sample: int
    draw: int
    sigma: float
    loss: float


@dataclass(frozen=True)
class StepReport:
    """What a step did; equal on all ranks unless it says otherwise.

    Attributes:
        step: its number.
        loss: mean square of the velocity error over the global batch.
        grad_norm: global norm of the gradient before clipping.
        is_finite: False where the step was skipped.
        culprit: of a skipped step: what was not finite.
        learning_rate: that Adam took.
        tokens: tokens of clips in the global batch, padding left out.
        clips: clips in the global batch.
        model_flops: FLOPs of the global batch that MFU counts: forward and backward pass of the clips.
        hardware_flops: FLOPs that the ranks compute for it (HFU): padding and recomputation too.
        data_wait_s: time that this rank waited for data.
        comm_wait_s: time that this rank spent in collectives and in waiting for them; None on CUDA, where the host does
            not wait for them.
        memory_peak_bytes: the most memory of any rank so far: reserved by torch (CUDA), or resident (CPU).
        step_time_s: time from one step's end to the next one's, this rank's, data and all.
        routing: what the routers did, by layer.
        clip_losses: of the clips whose loss this rank computed; none on pipeline stages before the last.
        fp8: how well the layers in FP8 were rounded, at the steps that are watched.
    """

    step: int
    loss: float
    grad_norm: float
    is_finite: bool
    culprit: str
    learning_rate: float
    tokens: int
    clips: int
    model_flops: float
    hardware_flops: float
    data_wait_s: float
    comm_wait_s: float | None
    memory_peak_bytes: int
    step_time_s: float
    routing: Routing
    clip_losses: tuple[ClipLoss, ...]
    fp8: Fp8Figures

    @property
    def tokens_per_s(self) -> float:
        """Tokens of clips per second, over all ranks."""
        return self.tokens / self.step_time_s

    @property
    def is_spike(self) -> bool:
        """Whether the step was skipped though its numbers are finite: its loss is too large."""
        return not self.is_finite and math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class RecordingObjective:
    """An objective that also remembers the loss of each clip that passed; the model's step sees no difference."""

    def __init__(self, objective: Objective) -> None:
        """Wrap ``objective``."""
        self.objective = objective
        self._records: list[tuple[tuple[Clip, ...], Tensor, Tensor]] = []

    def noise(self, batch: LatentBatch) -> Noised:
        """As the objective's."""
        return self.objective.noise(batch)

    def loss(self, velocity_BTP: Tensor, noised: Noised) -> ClipLosses:
        """As the objective's; keeps this span's part of the mean of each clip, on the device."""
        losses = self.objective.loss(velocity_BTP, noised)
        clips = tuple(clip for pack in noised.input.packs for clip in pack.clips)
        self._records.append((clips, noised.sigma_G, losses.sum_G.detach() / losses.elements_G))
        return losses

    def take(self, mesh: Mesh) -> tuple[ClipLoss, ...]:
        """The clips recorded since the last call, with the loss of the whole clip.

        Ranks: collective over the context-parallel ranks, which hold parts of the same clips.
        """
        records, self._records = self._records, []
        if not records:  # so it is on all of them: they stand on one pipeline stage
            return ()
        summed = mesh.sum(torch.cat([loss_G for _, _, loss_G in records]), over="cp")
        parts = torch.split(summed, [len(clips) for clips, _, _ in records])
        records = [(clips, sigma_G, loss_G) for (clips, sigma_G, _), loss_G in zip(records, parts, strict=True)]
        return tuple(
            ClipLoss(clip.sample, clip.draw, sigma, loss)
            for clips, sigma_G, loss_G in records
            for clip, sigma, loss in zip(clips, sigma_G.tolist(), loss_G.tolist(), strict=True)
        )


class TrainStep:
    """Takes steps and advances the counters of the state."""

    def __init__(self, config: RunConfig, engine: Engine[Any], objective: Objective) -> None:
        """Bind what stays the same from step to step."""
        self.config, self.engine, self.mesh = config, engine, engine.mesh
        self.objective = RecordingObjective(objective)
        self.waits = None if self.mesh.device.type == "cuda" else WaitClock(names_of(self.mesh))
        self._ended = time.perf_counter()

    def __call__(self, state: TrainState, microbatches: Sequence[LatentBatch], data_wait_s: float) -> StepReport:
        """Take one step.

        Ranks: collective; every rank of one model replica has the same microbatches.
        """
        step = state.step + 1
        rate = learning_rate(self.config.optimizer, step)
        limit = state.loss_limit(self.config.train.spike_factor, self.config.train.spike_window)
        waited_s = 0.0 if self.waits is None else self.waits.total_s
        is_fp8_watched = is_watched(self.config, step)
        with self.waits or contextlib.nullcontext():
            with watching(self.engine, is_fp8_watched):
                metrics = train_step(self.engine, microbatches, self.objective, learning_rate=rate, loss_limit=limit)
            with region("statistics"):
                counts = self._counts(microbatches)
                routing = join_stages(self.config.model, self.mesh, metrics.routing)
                clip_losses = self.objective.take(self.mesh)
                fp8 = figures_of(self.engine) if is_fp8_watched else {}
        state.step = step
        state.updates = self.engine.updates.updates
        state.skipped += not metrics.finite
        state.bad_in_a_row = 0 if metrics.finite else state.bad_in_a_row + 1
        if metrics.finite:
            state.losses = [*state.losses, metrics.loss][-self.config.train.spike_window :]
        state.tokens += counts.tokens
        state.clips += counts.clips
        began, self._ended = self._ended, time.perf_counter()
        return StepReport(
            step=step,
            loss=metrics.loss,
            grad_norm=metrics.grad_norm,
            is_finite=metrics.finite,
            culprit=metrics.culprit,
            learning_rate=rate,
            tokens=counts.tokens,
            clips=counts.clips,
            model_flops=counts.model_flops,
            hardware_flops=counts.hardware_flops,
            data_wait_s=data_wait_s,
            comm_wait_s=None if self.waits is None else self.waits.total_s - waited_s,
            memory_peak_bytes=counts.memory_peak_bytes,
            step_time_s=self._ended - began,
            routing=routing,
            clip_losses=clip_losses,
            fp8=fp8,
        )

    def _counts(self, microbatches: Sequence[LatentBatch]) -> "_Counts":
        """What the global batch holds, in one sum over the data-parallel ranks, and the most memory of any rank."""
        model = self.config.model
        clip_tokens = [clip.tokens for batch in microbatches for clip in batch.clips]
        padding = sum(pack.tokens for batch in microbatches for pack in batch.packs) - sum(clip_tokens)
        again = recompute_flops(model, clip_tokens, self.config.parallel.recompute, padding=padding).total
        local = [
            float(sum(clip_tokens)),
            float(len(clip_tokens)),
            trained_flops(self.config, clip_tokens),
            computed_flops(self.config, clip_tokens, padding=padding) + again,
        ]
        device = self.mesh.device
        summed = self.mesh.sum(torch.tensor(local, dtype=torch.float64, device=device), over="dp")
        memory = torch.tensor([peak_memory_bytes(device)], dtype=torch.int64, device=device)
        most = self.mesh.max(memory, over="world")
        tokens, clips, useful, computed = summed.tolist()
        return _Counts(int(tokens), int(clips), useful, computed, int(most))


class _Counts(NamedTuple):
    tokens: int
    clips: int
    model_flops: float
    hardware_flops: float
    memory_peak_bytes: int
