"""Clips from prompts, in any layout: packs, the sampler's loop over the model, and latents to pixels.

Owns the split of prompts over data-parallel ranks. Solvers and guidance are ``megavid.diffusion``'s. A clip depends on
its prompt, size, number and the seed, not on the layout nor on what else is sampled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megavid.config.schema import ModelConfig
from megavid.data.conditioning import Given, given_of
from megavid.data.images import ImageEncoder
from megavid.data.sample import Sample
from megavid.data.text import TextEncoder
from megavid.data.tokenizer import Frames, VideoTokenizer, latent_shape
from megavid.diffusion.guidance import PromptGiven, PromptPacks, pack_prompts
from megavid.diffusion.samplers import SamplerKind, sample, sampler_levels
from megavid.diffusion.timesteps import shift_of_clip
from megavid.models.inputs import ModelInput
from megavid.models.runner import velocity_of
from megavid.ops.patches import patchify, token_grid, unpatchify
from megavid.parallel.engine import Engine
from megavid.training.kit import ClipSize, SamplingKit


@dataclass(frozen=True, slots=True)
class Prompt:
    """One clip to sample.

    Attributes:
        text: its caption.
        size: its size.
        sample: a clip of that size of which the model is given what its task reads; None for the caption alone.
    """

    text: str
    size: ClipSize
    sample: Sample | None = None


@dataclass(frozen=True, slots=True)
class SamplerSettings:
    """How to sample.

    Attributes:
        steps: solver steps.
        guidance: factor on (conditional - unconditional); 1 for none.
        seed: of the start noise.
        kind: solver.
        negative: what guidance leads away from; "" for the empty caption.
    """

    steps: int = 30
    guidance: float = 4.0
    seed: int = 0
    kind: SamplerKind = "unipc"
    negative: str = ""


@torch.no_grad()
def sample_latents(
    engine: Engine[Any],
    kit: SamplingKit,
    prompts: Sequence[Prompt],
    settings: SamplerSettings,
    *,
    on_step: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Latents of each prompt, [C, F, H, W] fp32 on the host, on every rank.

    Args:
        engine: the model with the weights to sample from.
        kit: its text encoder and tokenizer.
        prompts: what to sample; the same list on every rank.
        settings: how.
        on_step: called after each solver step of a round of dp prompts; there are ``rounds`` x steps of them.

    Raises:
        DataError: the tokenizer has no latents of such a size.
        ValueError: the patch does not divide them.

    Ranks: collective. In each round every data-parallel rank takes one prompt; a rank without one repeats the last,
    since ranks that share experts run every forward pass together. Context-parallel ranks carry their span of the
    tokens through all steps and put the clip together once, at the end.
    """
    mesh, model = engine.mesh, engine.config.model
    dp, mine = mesh.size("dp"), mesh.coordinate("dp")
    grids = [grid_of(kit, prompt.size, model.patch_size) for prompt in prompts]
    made: dict[int, Tensor] = {}
    for first in range(0, len(prompts), dp):
        members = range(first, min(first + dp, len(prompts)))
        tokens = max(grid[0] * grid[1] * grid[2] for grid in (grids[number] for number in members))
        number = min(first + mine, len(prompts) - 1)
        packs = prompt_packs(engine, kit, prompts[number], number, grids[number], tokens, settings)
        clean_TP = _solve(engine, packs, settings, on_step)
        if first + mine < len(prompts):
            made[number] = unpatchify(clean_TP.float().cpu(), grids[number], model.patch_size)
    gathered = {n: latents for part in mesh.all_gather_object(made) for n, latents in part.items()}
    return [gathered[number] for number in range(len(prompts))]


def rounds(num_prompts: int, engine: Engine[Any]) -> int:
    """Rounds that ``sample_latents`` takes for this many prompts."""
    return -(-num_prompts // engine.mesh.size("dp"))


def grid_of(kit: SamplingKit, size: ClipSize, patch_size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tokens along time, height and width of a clip of this size.

    Raises:
        DataError: the tokenizer has no latents of such a size.
        ValueError: the patch does not divide them.
    """
    _, frames, height, width = latent_shape(kit.tokenizer, size.frames, size.height, size.width)
    return token_grid(frames, height, width, patch_size)


def prompt_packs(
    engine: Engine[Any],
    kit: SamplingKit,
    prompt: Prompt,
    number: int,
    grid: tuple[int, int, int],
    tokens: int,
    settings: SamplerSettings,
) -> PromptPacks:
    """One prompt in a pack (with guidance two) of the fewest tokens that hold a clip of ``tokens`` and fit the layout.

    States hold this rank's span of them.
    """
    mesh = engine.mesh
    unit = mesh.layout.tp * mesh.layout.cp
    pack_tokens = -(-tokens // unit) * unit
    prompting = Prompting(engine.config.model, kit.text_encoder, kit.tokenizer.temporal, mesh.device)
    return prompting.packs(prompt, number, grid, pack_tokens, settings).within(mesh.token_span(pack_tokens))


@dataclass(frozen=True)
class Prompting:
    """What a prompt's packs depend on beside the prompt.

    Attributes:
        model: the model's shape.
        text_encoder: reads prompts.
        temporal: frames of video in a latent frame.
        device: the model's.
    """

    model: ModelConfig
    text_encoder: TextEncoder
    temporal: int
    device: torch.device

    def packs(
        self, prompt: Prompt, number: int, grid: tuple[int, int, int], pack_tokens: int, settings: SamplerSettings
    ) -> PromptPacks:
        """Prompt ``number`` in a pack (with guidance two) of ``pack_tokens`` tokens."""
        text_GLD = encode(self.text_encoder, [prompt.text, settings.negative]).to(self.device)
        return pack_prompts(
            text_GLD[:1],
            text_GLD[1],
            grids=[grid],
            frame_rate=prompt.size.frame_rate / self.temporal,
            pack_tokens=pack_tokens,
            guidance=settings.guidance,
            first_number=number,
            given=[self._given(prompt)],
        )

    def _given(self, prompt: Prompt) -> PromptGiven:
        """What the prompt gives beside its caption, on the model's device."""
        if prompt.sample is None:
            return PromptGiven()
        given: Given = given_of(prompt.sample, self.model, self.temporal)

        def patches(latents_CFHW: Tensor | None) -> Tensor | None:
            if latents_CFHW is None:
                return None
            return patchify(latents_CFHW.float(), self.model.patch_size).to(self.device)

        return PromptGiven(
            known=given.frames,
            clean_TP=patches(prompt.sample.latents_CFHW) if given.frames else None,
            condition_TP=patches(given.channels_CFHW),
            image_LI=None if given.image_LI is None else given.image_LI.to(self.device),
        )


def pictured(
    text: str, size: ClipSize, pictures: Sequence[Frames], tokenizer: VideoTokenizer, images: ImageEncoder | None
) -> Prompt:
    """A prompt for a clip that begins with a picture, or with one and ends with another.

    Args:
        text: the caption.
        size: the clip's.
        pictures: one or two, [height, width, 3] uint8, of the clip's size.
        tokenizer: the one whose latents the model was trained on.
        images: the image encoder whose features the model was trained on; None for none.

    Raises:
        DataError: the tokenizer has no latents of such a size.
    """
    video_FHW3 = np.zeros((size.frames, size.height, size.width, 3), np.uint8)
    known = (0, size.frames - 1)[: len(pictures)]
    for frame, picture in zip(known, pictures, strict=True):
        video_FHW3[frame] = picture
    condition_CFHW = tokenizer.encode(video_FHW3, known)
    # The first latent frame is of the first picture alone; the others are not read.
    latents_CFHW = torch.zeros_like(condition_CFHW)
    latents_CFHW[:, :1] = tokenizer.encode(video_FHW3[:1])
    image_LI = None if images is None else images.encode(pictures)
    return Prompt(text, size, Sample("prompt", latents_CFHW, text, 1.0, None, {}, known, condition_CFHW, image_LI))


def encode(text_encoder: TextEncoder, captions: Sequence[str]) -> Tensor:
    """Features of captions, [G, L, width] fp32."""
    return text_encoder.encode(captions).float()


def _solve(engine: Engine[Any], packs: PromptPacks, settings: SamplerSettings, on_step: Callable[[], None]) -> Tensor:
    """Tokens of the one prompt in ``packs``, [tokens, P]."""
    config = engine.config
    width = config.model.out_channels * config.model.patch_volume
    clip = packs.packs[0].clips[0]

    def velocity(inputs: ModelInput) -> Tensor:
        return velocity_of(engine, inputs)

    levels = sampler_levels(settings.kind, settings.steps, shift=shift_of_clip(clip.tokens, config.diffusion))
    clean_BTP = sample(
        velocity,
        packs,
        packs.start_noise(width, settings.seed),
        levels.sigmas,
        timesteps=levels.timesteps,
        kind=settings.kind,
        on_step=lambda done, total: on_step(),
    )
    return packs.clips_of(engine.mesh.gather_tokens(clean_BTP))[0]


def decode(tokenizer: VideoTokenizer, latents: Sequence[Tensor]) -> list[Frames]:
    """Pixels of latents, uint8 [frames, height, width, 3] each."""
    return [tokenizer.decode(latents_CFHW) for latents_CFHW in latents]
