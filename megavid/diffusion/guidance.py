"""Packs to sample from: prompts as clips, with their empty-caption twins where guidance asks for them.

Owns classifier-free guidance and what goes with it: which clips a prompt has, their start noise, and the guided
velocity. With guidance 1 a prompt is one clip; otherwise it is two, the prompt's and the empty caption's, which go
through the model in one forward and hold the same latents all the way. Twins stand at the same tokens of two packs, so
that whoever holds a span of the tokens can guide it alone.

Source: Ho and Salimans 2022 (arXiv:2207.12598).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megavid.diffusion.objective import clip_noise
from megavid.diffusion.timesteps import TIMESTEP_SCALE
from megavid.errors import ConfigError
from megavid.models.inputs import ModelInput
from megavid.ops.packs import Clip, Pack, Span, clip_index
from megavid.ops.philox import key_of


@dataclass(frozen=True)
class PromptPacks:
    """Prompts laid out in packs.

    Attributes:
        packs: B segment tables with G clips in all; ``clip.draw`` is the prompt's number. With guidance every pack is
            followed by its twin, the same table.
        text_GLD: features of the prompt, or in a twin of the empty caption, of each clip.
        guidance: factor on (conditional - unconditional); 1 for none, and then there are no twins.
        span: tokens of every pack that states [B, T, P] hold.
    """

    packs: tuple[Pack, ...]
    text_GLD: Tensor
    guidance: float
    span: Span

    @property
    def packs_per_prompt(self) -> int:
        """2 with guidance: the pack of the prompt's clip, then its twin."""
        return 1 if self.guidance == 1 else 2

    def within(self, span: Span) -> "PromptPacks":
        """The same prompts, with states that hold ``span`` only."""
        return replace(self, span=span)

    def start_noise(self, numbers: int, seed: int) -> Tensor:
        """State at sigma = 1, [B, T, P] fp32: keyed by (seed, "sample", prompt number), whatever else is sampled.

        Args:
            numbers: P, the numbers in one token.
            seed: the caller's.
        """
        like_BTP = torch.empty(len(self.packs), self.span.tokens, numbers, device=self.text_GLD.device)
        keys = [key_of(seed, "sample", clip.draw) for pack in self.packs for clip in pack.clips]
        return clip_noise(self.packs, keys, like_BTP, self.span)

    def input_at(self, state_BTP: Tensor, sigma: float, timestep: float | None = None) -> ModelInput:
        """The model's input for a state at one noise level, of which it is told ``timestep`` (None: 1000 * sigma)."""
        timestep = TIMESTEP_SCALE * sigma if timestep is None else timestep
        timestep_R = torch.full((len(self.text_GLD),), timestep, dtype=torch.float32, device=state_BTP.device)
        return ModelInput(
            packs=self.packs,
            patches_BTP=state_BTP,
            timestep_R=timestep_R,
            row_BT=self._clip_index(state_BTP.device).clamp(min=0),
            text_GLD=self.text_GLD,
            start=self.span.start,
        )

    def guide(self, velocity_BTP: Tensor) -> Tensor:
        """Guided velocity, the same for both clips of a prompt; zero in the padding.

        unconditional + guidance * (conditional - unconditional).
        """
        step = self.packs_per_prompt
        if step == 2:
            guided = torch.lerp(velocity_BTP[1::2], velocity_BTP[::2], self.guidance)
            velocity_BTP = guided.repeat_interleave(2, dim=0)
        return velocity_BTP.masked_fill((self._clip_index(velocity_BTP.device) < 0).unsqueeze(-1), 0.0)

    def clips_of(self, state_BTP: Tensor) -> list[Tensor]:
        """Tokens of each prompt's clip, [tokens, P], in the order of the prompts; of a state of whole packs."""
        return [
            state_BTP[row, clip.start : clip.start + clip.tokens]
            for row in range(0, len(self.packs), self.packs_per_prompt)
            for clip in self.packs[row].clips
        ]

    def _clip_index(self, device: torch.device) -> Tensor:
        return clip_index(self.packs, self.span).to(device)


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
    """Lay prompts out in packs, as many clips in each as fit, in order; with guidance each pack before its twin.

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
    if len(text_GLD) != len(grids):
        raise ValueError(f"{len(text_GLD)} prompts need as many grids, got {len(grids)}")
    filled: list[list[tuple[int, Clip]]] = [[]]
    start = 0
    for prompt, grid in enumerate(grids):
        tokens = math.prod(grid)
        if tokens > pack_tokens:
            raise ConfigError(
                f"a clip of {grid[0]} x {grid[1]} x {grid[2]} = {tokens} tokens must fit in data.pack_tokens = "
                f"{pack_tokens}; ask for fewer frames or a smaller picture, or raise data.pack_tokens"
            )
        if start + tokens > pack_tokens:
            filled.append([])
            start = 0
        filled[-1].append((prompt, Clip(first_number + prompt, prompt, start, grid, frame_rate)))
        start += tokens
    packs: list[Pack] = []
    text: list[Tensor] = []
    for entries in filled:
        pack = Pack(tuple(clip for _, clip in entries), pack_tokens)
        packs.append(pack)
        text += [text_GLD[prompt] for prompt, _ in entries]
        if guidance != 1:
            packs.append(pack)
            text += [empty_LD] * len(entries)
    return PromptPacks(tuple(packs), torch.stack(text), guidance, Span(0, pack_tokens))
