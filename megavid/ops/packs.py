"""Packs and their segment table: clips of any length and resolution, in a fixed number of tokens.

Owns what a microbatch is (host data) and the index tensors that attention, modulation, RoPE and losses derive
from it. Knows no rank. The padded tail of a pack belongs to no clip (-1) and takes part in nothing.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Clip:
    """One entry of a pack's segment table."""

    draw: int
    """Place in the run's order of samples, from 0, never repeated; keys noise, timestep and caption drop."""
    sample: int
    """Index in the data set, for logs; repeats every epoch."""
    start: int
    """First token in the pack."""
    grid: tuple[int, int, int]
    """Tokens along time, height and width."""
    frame_rate: float
    """Latent frames per second."""

    @property
    def tokens(self) -> int:
        """Tokens of this clip."""
        frames, rows, columns = self.grid
        return frames * rows * columns


@dataclass(frozen=True, slots=True)
class Pack:
    """Clips side by side in ``tokens`` tokens; what is left over at the end is padding."""

    clips: tuple[Clip, ...]
    tokens: int


@dataclass(frozen=True)
class LatentBatch:
    """One microbatch of B packs with G clips in all, counted pack after pack.

    Attributes:
        packs: the B segment tables.
        clean_BTP: clean latents as patches, fp32; P runs over (channel, frame, row, column) of a patch;
            padding is zero.
        text_GLD: text features of each clip, fp32; captions that the run drops are already the empty
            caption's features.
    """

    packs: tuple[Pack, ...]
    clean_BTP: Tensor
    text_GLD: Tensor

    @property
    def clips(self) -> tuple[Clip, ...]:
        """All G clips, pack after pack."""
        return tuple(clip for pack in self.packs for clip in pack.clips)

    def to(self, device: torch.device) -> "LatentBatch":
        """The same microbatch with its tensors on ``device``; a copy from pinned memory does not wait for the host."""
        return replace(
            self,
            clean_BTP=self.clean_BTP.to(device, non_blocking=True),
            text_GLD=self.text_GLD.to(device, non_blocking=True),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens that belong to clips, padding left out."""
        return sum(clip.tokens for clip in self.clips)


def clip_index(packs: tuple[Pack, ...]) -> Tensor:
    """Clip (0 to G-1) of every token, [B, T] int64; -1 in the padding."""
    index_BT = torch.full((len(packs), packs[0].tokens), -1, dtype=torch.int64)
    number = 0
    for row, pack in enumerate(packs):
        for clip in pack.clips:
            index_BT[row, clip.start : clip.start + clip.tokens] = number
            number += 1
    return index_BT


def positions(packs: tuple[Pack, ...], frame_rate: float) -> Tensor:
    """Place of every token on the axes of RoPE, [B, T, 3] fp32: time, row, column; zero in the padding.

    Time counts seconds times ``frame_rate`` (latent frames per second), which is the frame's number at that
    rate (Wan's integer index).
    """
    place_BT3 = torch.zeros(len(packs), packs[0].tokens, 3)
    for row, pack in enumerate(packs):
        for clip in pack.clips:
            time, y, x = (torch.arange(n, dtype=torch.float32) for n in clip.grid)
            grid = torch.cartesian_prod(time * (frame_rate / clip.frame_rate), y, x)
            place_BT3[row, clip.start : clip.start + clip.tokens] = grid
    return place_BT3
