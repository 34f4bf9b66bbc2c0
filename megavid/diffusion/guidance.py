"""Packs to sample from: prompts as clips, with their empty-caption twins where guidance asks for them.

Owns classifier-free guidance and what goes with it: which clips a prompt has, their start noise, and the guided
velocity. With guidance 1 a prompt is one clip; otherwise it is two, the prompt's and then the empty caption's, which
go through the model in one forward and hold the same latents all the way.

Source: Ho and Salimans 2022 (arXiv:2207.12598).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megavid.diffusion.objective import clip_noise
from megavid.diffusion.timesteps import TIMESTEP_SCALE
from megavid.errors import ConfigError
from megavid.models.inputs import ModelInput
from megavid.ops.packs import Clip, Pack, clip_index
from megavid.ops.philox import key_of


@dataclass(frozen=True)
class PromptPacks:
    """Prompts laid out in packs.

    Attributes:
        packs: B segment tables with G clips in all; ``clip.draw`` is the prompt's number.
        text_GLD: features of the prompt, or of the empty caption, of each clip.
        guidance: factor on (conditional - unconditional); 1 for none, and then there are no empty-caption clips.
    """

    packs: tuple[Pack, ...]
    text_GLD: Tensor
    guidance: float

    @property
    def clips_per_prompt(self) -> int:
        """2 with guidance: the prompt's clip, then the empty caption's."""
        return 1 if self.guidance == 1 else 2

    def places(self) -> list[tuple[int, Clip]]:
        """Row and clip of all G clips."""
        return [(row, clip) for row, pack in enumerate(self.packs) for clip in pack.clips]

    def start_noise(self, numbers: int, seed: int) -> Tensor:
        """State at sigma = 1, [B, T, P] fp32: keyed by (seed, "sample", prompt number), whatever else is sampled.

        Args:
            numbers: P, the numbers in one token.
            seed: the caller's.
        """
        like_BTP = torch.empty(len(self.packs), self.packs[0].tokens, numbers, device=self.text_GLD.device)
        keys = [key_of(seed, "sample", clip.draw) for _, clip in self.places()]
        return clip_noise(self.packs, keys, like_BTP)

    def input_at(self, state_BTP: Tensor, sigma: float) -> ModelInput:
        """The model's input for a state at one noise level."""
        clip_BT = clip_index(self.packs).to(state_BTP.device)
        timestep_R = torch.full(
            (len(self.text_GLD),), TIMESTEP_SCALE * sigma, dtype=torch.float32, device=state_BTP.device
        )
        return ModelInput(
            packs=self.packs,
            patches_BTP=state_BTP,
            timestep_R=timestep_R,
            row_BT=clip_BT.clamp(min=0),
            text_GLD=self.text_GLD,
        )

    def guide(self, velocity_BTP: Tensor) -> Tensor:
        """Guided velocity, the same for both clips of a prompt; zero in the padding.

        unconditional + guidance * (conditional - unconditional).
        """
        guided_BTP = torch.zeros_like(velocity_BTP)
        places = self.places()
        for first in range(0, len(places), self.clips_per_prompt):
            spans = [(row, slice(c.start, c.start + c.tokens)) for row, c in places[first:][: self.clips_per_prompt]]
            velocity = velocity_BTP[spans[0]]
            if len(spans) == 2:
                velocity = torch.lerp(velocity_BTP[spans[1]], velocity, self.guidance)
            for span in spans:
                guided_BTP[span] = velocity
        return guided_BTP

    def clips_of(self, state_BTP: Tensor) -> list[Tensor]:
        """Tokens of each prompt's clip, [tokens, P], in the order of the prompts."""
        places = self.places()[:: self.clips_per_prompt]
        return [state_BTP[row, clip.start : clip.start + clip.tokens] for row, clip in places]


def pack_prompts(
    text_GLD: Tensor,
    empty_LD: Tensor,
    *,
    grids: Sequence[tuple[int, int, int]],
    frame_rate: float,
    pack_tokens: int,
    guidance: float,
    first_number: int = 0,
) -> PromptPacks:
    """Lay prompts out in packs, as many clips in each as fit, in order.

    Args:
        text_GLD: features of each prompt (here G counts prompts).
        empty_LD: features of the empty caption.
        grids: tokens along time, height and width of each prompt's clip.
        frame_rate: latent frames per second.
        pack_tokens: tokens of a pack; at least the longest clip.
        guidance: 1 for none.
        first_number: number of the first prompt; its start noise is keyed by it.

    Raises:
        ConfigError: a clip that does not fit in a pack, or no prompt at all.
        ValueError: text and grids differ in number.
    """
    if len(text_GLD) == 0:
        raise ConfigError("no prompt was given, at least 1 is needed; pass --prompt TEXT")
    text: list[Tensor] = []
    packs: list[Pack] = []
    clips: list[Clip] = []
    start = 0
    for prompt, (features_LD, grid) in enumerate(zip(text_GLD, grids, strict=True)):
        tokens = math.prod(grid)
        if tokens > pack_tokens:
            raise ConfigError(
                f"a clip of {grid[0]} x {grid[1]} x {grid[2]} = {tokens} tokens must fit in data.pack_tokens = "
                f"{pack_tokens}; ask for fewer frames or a smaller picture, or raise data.pack_tokens"
            )
        for features in (features_LD,) if guidance == 1 else (features_LD, empty_LD):
            if start + tokens > pack_tokens:
                packs.append(Pack(tuple(clips), pack_tokens))
                clips, start = [], 0
            clips.append(Clip(first_number + prompt, prompt, start, grid, frame_rate))
            text.append(features)
            start += tokens
    packs.append(Pack(tuple(clips), pack_tokens))
    return PromptPacks(tuple(packs), torch.stack(text), guidance)
