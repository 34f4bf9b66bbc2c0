"""Validation loss on the held-out clips, with noise and noise levels that never change.

Owns the sum over clips, in total and by noise bucket, and the split of the batches over data-parallel ranks. Which
clips are held out is the loader's; their noise is ``megavid.diffusion.objective``'s.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megavid.diffusion.objective import ValidationObjective
from megavid.models.moe.tokens import NOISE_BUCKETS, noise_bucket
from megavid.models.runner import velocity_of
from megavid.ops.packs import LatentBatch
from megavid.parallel.engine import Engine


@dataclass(frozen=True, slots=True)
class ValidationLoss:
    """Mean square of the velocity error over the held-out clips.

    Attributes:
        loss: over all of them.
        by_noise: over those of each noise bucket, cleanest first; None for a bucket with no clip.
    """

    loss: float
    by_noise: tuple[float | None, ...]


def validation_loss(
    engine: Engine[Any], batches: Sequence[LatentBatch], *, on_batch: Callable[[], None] = lambda: None
) -> ValidationLoss:
    """Validation loss with the weights that the model has now.

    Args:
        engine: the model.
        batches: held-out clips, the same list on every rank.
        on_batch: called after each forward pass.

    Ranks: collective. Each data-parallel rank takes every dp-th batch; a rank that has run out repeats the last one
    with weight 0, because ranks that share experts run every forward pass together. Context-parallel ranks each take
    their span of the tokens.
    """
    mesh, diffusion = engine.mesh, engine.config.diffusion
    objective = ValidationObjective(levels=(diffusion.sigma_min, diffusion.sigma_max))
    dp, mine = mesh.size("dp"), mesh.coordinate("dp")
    sums = torch.zeros(2, NOISE_BUCKETS, dtype=torch.float64)
    for first in range(0, len(batches), dp):
        number = first + mine
        batch = batches[min(number, len(batches) - 1)]
        noised = objective.noise(batch.part(mesh.token_span(batch.packs[0].tokens)).to(mesh.device))
        losses = objective.loss(velocity_of(engine, noised.input), noised)
        if number < len(batches):
            bucket_G = noise_bucket(noised.sigma_G).cpu()
            sums[0].index_add_(0, bucket_G, losses.sum_G.double().cpu())
            if mesh.coordinate("cp") == 0:  # each rank counts the numbers of whole clips
                sums[1].index_add_(0, bucket_G, losses.elements_G.double().cpu())
        on_batch()
    errors_Q, elements_Q = mesh.sum(sums.to(mesh.device), over="dp_cp").cpu()
    by_noise = tuple(
        error / elements if elements else None
        for error, elements in zip(errors_Q.tolist(), elements_Q.tolist(), strict=True)
    )
    return ValidationLoss(float(errors_Q.sum() / elements_Q.sum()), by_noise)
