"""One step of the loop: hand the microbatches to the model's step, count, and say what happened as host numbers.

Owns the record of a step and of its clips, and the counters. The arithmetic of a step is
``megavid.training.model_step``'s; what is learnt is the objective's.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megavid.config.schema import RunConfig
from megavid.diffusion.objective import ClipLosses, Noised
from megavid.ops.packs import Clip, LatentBatch
from megavid.parallel.engine import Engine
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
        data_wait_s: time that this rank waited for data.
        step_time_s: time from one step's end to the next one's, this rank's, data and all.
        routing: what the routers did, by layer.
        clip_losses: of the clips whose loss this rank computed; none on pipeline stages before the last.
    """

    step: int
    loss: float
    grad_norm: float
    is_finite: bool
    culprit: str
    learning_rate: float
    tokens: int
    clips: int
    data_wait_s: float
    step_time_s: float
    routing: Routing
    clip_losses: tuple[ClipLoss, ...]

    @property
    def tokens_per_s(self) -> float:
        """Tokens of clips per second, over all ranks."""
        return self.tokens / self.step_time_s


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
        """As the objective's; keeps the mean of each clip, on the device."""
        losses = self.objective.loss(velocity_BTP, noised)
        clips = tuple(clip for pack in noised.input.packs for clip in pack.clips)
        self._records.append((clips, noised.sigma_G, losses.sum_G.detach() / losses.elements_G))
        return losses

    def take(self) -> tuple[ClipLoss, ...]:
        """The clips recorded since the last call."""
        records, self._records = self._records, []
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
        self._ended = time.perf_counter()

    def __call__(self, state: TrainState, microbatches: Sequence[LatentBatch], data_wait_s: float) -> StepReport:
        """Take one step.

        Ranks: collective; every rank of one model replica has the same microbatches.
        """
        step = state.step + 1
        rate = learning_rate(self.config.optimizer, step)
        metrics = train_step(self.engine, microbatches, self.objective, learning_rate=rate)
        counts = torch.tensor(
            [sum(b.num_tokens for b in microbatches), sum(len(b.clips) for b in microbatches)],
            dtype=torch.int64,
            device=self.mesh.device,
        )
        tokens, clips = self.mesh.sum(counts, over="dp").tolist()
        state.step = step
        state.updates = self.engine.updates.updates
        state.skipped += not metrics.finite
        state.bad_in_a_row = 0 if metrics.finite else state.bad_in_a_row + 1
        state.tokens += tokens
        state.clips += clips
        began, self._ended = self._ended, time.perf_counter()
        return StepReport(
            step=step,
            loss=metrics.loss,
            grad_norm=metrics.grad_norm,
            is_finite=metrics.finite,
            culprit=metrics.culprit,
            learning_rate=rate,
            tokens=tokens,
            clips=clips,
            data_wait_s=data_wait_s,
            step_time_s=self._ended - began,
            routing=join_stages(self.config.model, self.mesh, metrics.routing),
            clip_losses=self.objective.take(),
        )
