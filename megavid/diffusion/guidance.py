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

from megavid.diffusion.objective import clip_noise, timestep_rows
from megavid.diffusion.timesteps import TIMESTEP_SCALE
from megavid.errors import ConfigError
from megavid.models.inputs import ModelInput
from megavid.ops.packs import Clip, Pack, Span, clip_index, clip_parts, known_index, whole
from megavid.ops.philox import key_of


@dataclass(frozen=True)
class PromptGiven:
    """What a prompt gives of its clip beside the caption; the empty caption's twin is given the same.

    Attributes:
        known: places along time whose tokens are given clean.
        clean_TP: clean latents as patches, of which the known tokens are read.
        condition_TP: what is known, in channels after the noised latents.
        image_LI: image features.
    """

    known: tuple[int, ...] = ()
    clean_TP: Tensor | None = None
    condition_TP: Tensor | None = None
    image_LI: Tensor | None = None


@dataclass(frozen=True)
class PromptPacks:
    """Prompts laid out in packs.

    Attributes:
        packs: B segment tables with G clips in all; ``clip.draw`` is the prompt's number. With guidance every pack is
            followed by its twin, the same table.
        text_GLD: features of the prompt, or in a twin of the empty caption, of each clip.
        guidance: factor on (conditional - unconditional); 1 for none, and then there are no twins.
        span: tokens of every pack that states [B, T, P] hold.
        clean_BTP: clean latents of known tokens of whole packs; None where none are known.
        condition_BTP: what is known, in channels after the noised latents, of whole packs; None for none.
        image_GLI: image features of each clip; None for none.
        has_image_G: which clips have an image.
    """

    packs: tuple[Pack, ...]
    text_GLD: Tensor
    guidance: float
    span: Span
    clean_BTP: Tensor | None = None
    condition_BTP: Tensor | None = None
    image_GLI: Tensor | None = None
    has_image_G: Tensor | None = None

    @property
    def packs_per_prompt(self) -> int:
        """2 with guidance: the pack of the prompt's clip, then its twin."""
        return 1 if self.guidance == 1 else 2

    def within(self, span: Span) -> "PromptPacks":
        """The same prompts, with states that hold ``span`` only."""
        return replace(self, span=span)

    def start_noise(self, numbers: int, seed: int) -> Tensor:
        """State at sigma = 1, [B, T, P] fp32: keyed by (seed, "sample", prompt number), whatever else is sampled; known
        tokens are clean.

        Args:
            numbers: P, the numbers in one token.
            seed: the caller's.
        """
        like_BTP = torch.empty(len(self.packs), self.span.tokens, numbers, device=self.text_GLD.device)
        keys = [key_of(seed, "sample", clip.draw) for pack in self.packs for clip in pack.clips]
        return self.with_known(clip_noise(self.packs, keys, like_BTP, self.span))

    def with_known(self, state_BTP: Tensor) -> Tensor:
        """The state with its known tokens clean."""
        if self.clean_BTP is None:
            return state_BTP
        known_BT1 = self._known_index(state_BTP.device).unsqueeze(-1)
        return torch.where(known_BT1, self._within(self.clean_BTP).to(state_BTP.dtype), state_BTP)

    def input_at(self, state_BTP: Tensor, sigma: float, timestep: float | None = None) -> ModelInput:
        """The model's input for a state at one noise level, of which it is told ``timestep`` (None: 1000 * sigma).

        Known tokens are clean and at timestep 0.
        """
        timestep = TIMESTEP_SCALE * sigma if timestep is None else timestep
        device = state_BTP.device
        timestep_G = torch.full((len(self.text_GLD),), timestep, dtype=torch.float32, device=device)
        rows = timestep_rows(self.packs, timestep_G, self._clip_index(device), self._known_index(device))
        patches_BTP = self.with_known(state_BTP)
        if self.condition_BTP is not None:
            patches_BTP = torch.cat((patches_BTP, self._within(self.condition_BTP).to(state_BTP.dtype)), dim=-1)
        return ModelInput(
            packs=self.packs,
            patches_BTP=patches_BTP,
            timestep_R=rows.timestep_R,
            row_BT=rows.row_BT,
            text_GLD=self.text_GLD,
            start=self.span.start,
            image_GLI=self.image_GLI,
            has_image_G=self.has_image_G,
        )

    def guide(self, velocity_BTP: Tensor) -> Tensor:
        """Guided velocity, the same for both clips of a prompt; zero in the padding, and where tokens are known.

        unconditional + guidance * (conditional - unconditional).
        """
        step = self.packs_per_prompt
        if step == 2:
            guided = torch.lerp(velocity_BTP[1::2], velocity_BTP[::2], self.guidance)
            velocity_BTP = guided.repeat_interleave(2, dim=0)
        device = velocity_BTP.device
        is_still_BT = (self._clip_index(device) < 0) | self._known_index(device)
        return velocity_BTP.masked_fill(is_still_BT.unsqueeze(-1), 0.0)

    def clips_of(self, state_BTP: Tensor) -> list[Tensor]:
        """Tokens of each prompt's clip, [tokens, P], in the order of the prompts; of a state of whole packs."""
        return [
            state_BTP[row, clip.start : clip.start + clip.tokens]
            for row in range(0, len(self.packs), self.packs_per_prompt)
            for clip in self.packs[row].clips
        ]

    def _clip_index(self, device: torch.device) -> Tensor:
        return clip_index(self.packs, self.span).to(device)

    def _known_index(self, device: torch.device) -> Tensor:
        return known_index(self.packs, self.span).to(device)

    def _within(self, whole_BTP: Tensor) -> Tensor:
        return whole_BTP[:, self.span.start : self.span.stop]


def pack_prompts(
    text_GLD: Tensor,
    empty_LD: Tensor,
    *,
    grids: Sequence[tuple[int, int, int]],
    frame_rate: float,
    pack_tokens: int,
    guidance: float,
    first_number: int = 0,
    given: Sequence[PromptGiven] = (),
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
        given: what each prompt gives beside its caption; empty for nothing. All give members of the same kinds, but for
            images, which some may lack.

    Raises:
        ConfigError: a clip that does not fit in a pack, or no prompt at all.
        ValueError: text, grids and what is given differ in number.
    """
    if len(text_GLD) == 0:
        raise ConfigError("no prompt was given, at least 1 is needed; pass --prompt TEXT")
    given = given or (PromptGiven(),) * len(grids)
    if not len(text_GLD) == len(grids) == len(given):
        raise ValueError(f"{len(text_GLD)} prompts need as many grids, got {len(grids)}, and {len(given)} are given")
    filled = _filled(grids, frame_rate, pack_tokens, first_number, given)
    packs: list[Pack] = []
    text: list[Tensor] = []
    order: list[PromptGiven] = []
    for entries in filled:
        pack = Pack(tuple(clip for _, clip in entries), pack_tokens)
        packs.append(pack)
        text += [text_GLD[prompt] for prompt, _ in entries]
        order += [given[prompt] for prompt, _ in entries]
        if guidance != 1:
            packs.append(pack)
            text += [empty_LD] * len(entries)
            order += [given[prompt] for prompt, _ in entries]
    images = _images(order, text_GLD.device)
    return PromptPacks(
        tuple(packs), torch.stack(text), guidance, Span(0, pack_tokens),
        clean_BTP=_in_packs(packs, [clip.clean_TP for clip in order]),
        condition_BTP=_in_packs(packs, [clip.condition_TP for clip in order]),
        image_GLI=images, has_image_G=None if images is None else torch.tensor(
            [clip.image_LI is not None for clip in order], device=images.device
        ),
    )  # fmt: skip


def _filled(
    grids: Sequence[tuple[int, int, int]],
    frame_rate: float,
    pack_tokens: int,
    first_number: int,
    given: Sequence[PromptGiven],
) -> list[list[tuple[int, Clip]]]:
    """Clips of every pack with the prompt of each; raises as ``pack_prompts``."""
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
        clip = Clip(first_number + prompt, prompt, start, grid, frame_rate, known=given[prompt].known)
        filled[-1].append((prompt, clip))
        start += tokens
    return filled


def _in_packs(packs: Sequence[Pack], clips_TP: Sequence[Tensor | None]) -> Tensor | None:
    """Numbers of every clip's tokens where the clip stands, [B, T, P]; zero elsewhere, None where no clip has any."""
    known = [clip_TP for clip_TP in clips_TP if clip_TP is not None]
    if not known:
        return None
    out_BTP = known[0].new_zeros(len(packs), packs[0].tokens, known[0].shape[-1])
    for part, clip_TP in zip(clip_parts(tuple(packs), whole(tuple(packs))), clips_TP, strict=True):
        if clip_TP is not None:
            out_BTP[part.here] = clip_TP
    return out_BTP


def _images(given: Sequence[PromptGiven], device: torch.device) -> Tensor | None:
    """Image features of every clip, zero for one without; None where no clip has any."""
    known = [clip.image_LI for clip in given if clip.image_LI is not None]
    if not known:
        return None
    rows = [torch.zeros_like(known[0]) if clip.image_LI is None else clip.image_LI for clip in given]
    return torch.stack(rows).to(device)
