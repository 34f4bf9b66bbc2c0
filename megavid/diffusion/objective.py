"""The objective: how a microbatch is noised, and how far a predicted velocity is from the true one.

Owns all randomness of training that is not initialisation, order or dropout. Everything about a clip is keyed by
(seed, purpose, clip.draw), so it depends neither on the pack, row or rank that the clip stands on nor on what
stands beside it. Knows no rank, no model class, no data set: a batch whose tensors hold a span of the tokens gets that
span of the same noise, and its losses are parts of sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megavid.config.schema import DiffusionConfig
from megavid.diffusion.flow import interpolate, velocity_of
from megavid.diffusion.timesteps import TIMESTEP_SCALE, stratified_sigma, training_sigma
from megavid.models.inputs import ModelInput
from megavid.ops.packs import LatentBatch, Pack, Span, clip_index, clip_parts, known_index
from megavid.ops.philox import Key, key_of, normal, uniform_at


@dataclass(frozen=True)
class Noised:
    """A microbatch ready for the model, and what its answer is held against.

    Attributes:
        input: what the model is called with; one row of its timestep table per clip, and of clips with known tokens
            one more, whose timestep is 0.
        target_BTP: true velocity, noise - clean, dtype of the clean latents; zero in the padding.
        valid_BT: bool, False in the padding.
        known_BT: bool, tokens that are given clean: no loss is taken of them.
        sigma_G: noise level of each clip, fp32.
    """

    input: ModelInput
    target_BTP: Tensor
    valid_BT: Tensor
    known_BT: Tensor
    sigma_G: Tensor


@dataclass(frozen=True)
class ClipLosses:
    """Squared error of each clip; a mean over any set of clips is ``sum_G.sum() / elements_G.sum()``.

    Attributes:
        sum_G: squared error summed over the numbers of each clip that the batch's span holds, fp32 (fp64 for fp64
            velocities); has a gradient. Spans that make up the packs add up to the clip's.
        elements_G: numbers in each whole clip, known ones left out, int64.
    """

    sum_G: Tensor
    elements_G: Tensor


class FlowObjective:
    """Rectified-flow matching with per-clip noise levels."""

    def __init__(self, config: DiffusionConfig, seed: int) -> None:
        """Bind the recipe and the run's seed."""
        self.config, self.seed = config, seed

    def noise(self, batch: LatentBatch) -> Noised:
        """Draw noise and a noise level for every clip of a training microbatch."""
        clips = batch.clips
        sigmas = [training_sigma(clip.draw, clip.tokens, self.config, self.seed) for clip in clips]
        return add_noise(batch, [key_of(self.seed, "noise", clip.draw) for clip in clips], sigmas)

    def loss(self, velocity_BTP: Tensor, noised: Noised) -> ClipLosses:
        """Squared error of the predicted velocity, clip by clip."""
        return clip_losses(velocity_BTP, noised)

    def drops_caption(self, draw: int) -> bool:
        """Whether draw number ``draw`` of the run is trained with the empty caption."""
        return uniform_at(key_of(self.seed, "caption"), draw) < self.config.caption_drop


class ValidationObjective:
    """The same on held-out clips, with noise and noise levels that never change.

    A clip's noise is keyed by (seed, "validation", clip.sample, repeat), its level is the stratum of its number.
    """

    def __init__(self, seed: int = 0, *, repeat: int = 0, levels: tuple[float, float] = (0.0, 1.0)) -> None:
        """Bind a seed and the range of noise levels, which runs to be compared must share, and the number of the pass
        over the clips."""
        self.seed, self.repeat, self.levels = seed, repeat, levels

    def noise(self, batch: LatentBatch, numbers: Sequence[int] | None = None) -> Noised:
        """Noise a validation microbatch.

        Args:
            batch: held-out clips.
            numbers: number of each of the G clips among the held-out ones, from 0; ``clip.draw`` if not given.
        """
        clips = batch.clips
        numbers = [clip.draw for clip in clips] if numbers is None else numbers
        keys = [key_of(self.seed, "validation", clip.sample, self.repeat) for clip in clips]
        sigmas = [stratified_sigma(number, repeat=self.repeat, levels=self.levels) for number in numbers]
        return add_noise(batch, keys, sigmas)

    def loss(self, velocity_BTP: Tensor, noised: Noised) -> ClipLosses:
        """Squared error of the predicted velocity, clip by clip."""
        return clip_losses(velocity_BTP, noised)


def add_noise(batch: LatentBatch, keys: Sequence[Key], sigmas: Sequence[float]) -> Noised:
    """Noise a microbatch with given streams and noise levels.

    Args:
        batch: clean packs with G clips in all.
        keys: stream of each clip; its token j, number p gets element j * P + p.
        sigmas: noise level of each clip.
    """
    clean_BTP = batch.clean_BTP
    noise_BTP = clip_noise(batch.packs, keys, clean_BTP, batch.span)
    clip_BT = clip_index(batch.packs, batch.span).to(clean_BTP.device)
    known_BT = known_index(batch.packs, batch.span).to(clean_BTP.device)
    sigma_G = torch.tensor(sigmas, dtype=torch.float32, device=clean_BTP.device)
    rows = timestep_rows(batch.packs, TIMESTEP_SCALE * sigma_G, clip_BT, known_BT)
    level_BT = sigma_G.to(clean_BTP.dtype)[clip_BT.clamp(min=0)].masked_fill(known_BT, 0.0)
    patches_BTP = interpolate(clean_BTP, noise_BTP, level_BT.unsqueeze(-1))
    if batch.condition_BTP is not None:
        patches_BTP = torch.cat((patches_BTP, batch.condition_BTP), dim=-1)
    model_input = ModelInput(
        packs=batch.packs,
        patches_BTP=patches_BTP,
        timestep_R=rows.timestep_R,
        row_BT=rows.row_BT,
        text_GLD=batch.text_GLD,
        start=batch.start,
        image_GLI=batch.image_GLI,
        has_image_G=batch.has_image_G,
    )
    return Noised(model_input, velocity_of(clean_BTP, noise_BTP), clip_BT >= 0, known_BT, sigma_G)


class TimestepRows(NamedTuple):
    """The timestep table of a microbatch, and each token's row of it.

    Attributes:
        timestep_R: 1000 * noise level of the G clips, then 0 for each clip with known tokens.
        row_BT: int64; 0 in the padding.
    """

    timestep_R: Tensor
    row_BT: Tensor


def timestep_rows(packs: tuple[Pack, ...], timestep_G: Tensor, clip_BT: Tensor, known_BT: Tensor) -> TimestepRows:
    """The timestep table of clips at these timesteps.

    Args:
        packs: the segment tables.
        timestep_G: timestep of each clip, 1000 * noise level.
        clip_BT: ``clip_index`` of the tokens at hand.
        known_BT: ``known_index`` of them.
    """
    has_known = [bool(clip.known) for pack in packs for clip in pack.clips]
    row_BT = clip_BT.clamp(min=0)
    if not any(has_known):
        return TimestepRows(timestep_G, row_BT)
    # Every clip has a row of its own for what is known, so that a table's size follows from its clips.
    own_G = torch.tensor(has_known, device=row_BT.device).cumsum(0) - 1 + len(has_known)
    zero = timestep_G.new_zeros(sum(has_known))
    return TimestepRows(torch.cat((timestep_G, zero)), torch.where(known_BT, own_G[row_BT], row_BT))


def clip_noise(packs: tuple[Pack, ...], keys: Sequence[Key], like_BTP: Tensor, span: Span) -> Tensor:
    """Standard normal noise of each clip's own stream at the tokens of ``span``, as ``like_BTP``; zero in the padding.

    Args:
        packs: the segment tables.
        keys: stream of each clip; its token j, number p gets element j * P + p, whatever the span.
        like_BTP: shape, dtype and device.
        span: the tokens that it holds.
    """
    noise_BTP = torch.zeros_like(like_BTP)
    width = like_BTP.shape[-1]
    for key, part in zip(keys, clip_parts(packs, span), strict=True):
        numbers = normal(key, part.first * width, part.tokens * width, like_BTP.device)
        noise_BTP[part.here] = numbers.view(part.tokens, width)
    return noise_BTP


def clip_losses(velocity_BTP: Tensor, noised: Noised) -> ClipLosses:
    """Squared error of the predicted velocity against ``noised.target_BTP``, summed over each clip's tokens here but
    for those that are given clean."""
    wide = torch.promote_types(velocity_BTP.dtype, torch.float32)
    square_BT = (velocity_BTP.to(wide) - noised.target_BTP.to(wide)).square().sum(-1)
    square_BT = square_BT.masked_fill(noised.known_BT, 0.0)
    # One slice per clip rather than an indexed add: the same order of additions wherever the clip stands, on CUDA too.
    parts = list(clip_parts(noised.input.packs, noised.input.span))
    sum_G = torch.stack([square_BT[part.here].sum() for part in parts])
    tokens = [part.clip.tokens - part.clip.known_tokens for part in parts]
    elements_G = torch.tensor(tokens, device=sum_G.device) * velocity_BTP.shape[-1]
    return ClipLosses(sum_G, elements_G)
