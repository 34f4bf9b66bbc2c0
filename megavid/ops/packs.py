"""Packs and their segment table: clips of any length and resolution, in a fixed number of tokens.

Owns what a microbatch is (host data) and the index tensors that attention, modulation, RoPE and losses derive
from it. Knows no rank: tensors may hold a span of every pack's tokens instead of all, and then a clip may lie partly
in it or not at all, while the segment tables stay whole. The padded tail of a pack belongs to no clip (-1) and takes
part in nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

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
    known: tuple[int, ...] = ()
    """Places along time whose tokens are given clean: their noise level is 0, and no loss is taken of them."""

    @property
    def known_tokens(self) -> int:
        """Tokens that are given clean."""
        return len(self.known) * self.grid[1] * self.grid[2]

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


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens ``start`` to ``stop - 1`` of every pack: those that tensors [B, T, ...] of a microbatch hold."""

    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """Tokens of each pack in it."""
        return self.stop - self.start


class ClipPart(NamedTuple):
    """The tokens of one clip that a span holds, possibly none.

    Attributes:
        number: of the clip in the microbatch, 0 to G-1.
        row: number of its pack, 0 to B-1.
        clip: its entry in the segment table.
        start: first of these tokens, counted in the span.
        stop: behind the last of them, likewise; equal to ``start`` where the span holds none.
        first: number of token ``start`` within the clip.
    """

    number: int
    row: int
    clip: Clip
    start: int
    stop: int
    first: int

    @property
    def here(self) -> tuple[int, slice]:
        """Index of these tokens in a tensor [B, T, ...] of the span."""
        return self.row, slice(self.start, self.stop)

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.stop - self.start


def clip_parts(packs: tuple[Pack, ...], span: Span) -> Iterator[ClipPart]:
    """What ``span`` holds of each of the G clips, pack after pack."""
    number = 0
    for row, pack in enumerate(packs):
        for clip in pack.clips:
            low, high = (min(max(at, span.start), span.stop) for at in (clip.start, clip.start + clip.tokens))
            first = min(max(span.start - clip.start, 0), clip.tokens)
            yield ClipPart(number, row, clip, low - span.start, high - span.start, first)
            number += 1


@dataclass(frozen=True)
class LatentBatch:
    """One microbatch of B packs with G clips in all, counted pack after pack.

    Attributes:
        packs: the B segment tables, of whole packs.
        clean_BTP: clean latents as patches, fp32; P runs over (channel, frame, row, column) of a patch;
            padding is zero.
        text_GLD: text features of each clip, fp32; captions that the run drops are already the empty
            caption's features.
        start: token of every pack that clean_BTP begins with.
        condition_BTP: what is known of the clips, in channels that follow the noised ones in the model's input, fp32;
            None for models that take none.
        image_GLI: image features of each clip, fp32, zero for a clip without image; None for models that take none.
        has_image_G: bool, whether a clip has an image.
    """

    packs: tuple[Pack, ...]
    clean_BTP: Tensor
    text_GLD: Tensor
    start: int = 0
    condition_BTP: Tensor | None = None
    image_GLI: Tensor | None = None
    has_image_G: Tensor | None = None

    @property
    def clips(self) -> tuple[Clip, ...]:
        """All G clips, pack after pack."""
        return tuple(clip for pack in self.packs for clip in pack.clips)

    @property
    def span(self) -> Span:
        """The tokens that clean_BTP holds."""
        return Span(self.start, self.start + self.clean_BTP.shape[1])

    def part(self, span: Span) -> "LatentBatch":
        """The same microbatch with the tensors of ``span`` alone; not a copy."""
        first = span.start - self.start
        assert 0 <= first <= first + span.tokens <= self.clean_BTP.shape[1], (span, self.span)
        window = slice(first, first + span.tokens)
        condition_BTP = None if self.condition_BTP is None else self.condition_BTP[:, window]
        return replace(self, clean_BTP=self.clean_BTP[:, window], condition_BTP=condition_BTP, start=span.start)

    def to(self, device: torch.device) -> "LatentBatch":
        """The same microbatch with its tensors on ``device``; a copy from pinned memory does not wait for the host."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            clean_BTP=self.clean_BTP.to(device, non_blocking=True),
            text_GLD=self.text_GLD.to(device, non_blocking=True),
            condition_BTP=move(self.condition_BTP),
            image_GLI=move(self.image_GLI),
            has_image_G=move(self.has_image_G),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of whole clips, padding left out."""
        return sum(clip.tokens for clip in self.clips)

    @property
    def num_unknown_tokens(self) -> int:
        """Those of them that are not given: what a loss is taken of."""
        return sum(clip.tokens - clip.known_tokens for clip in self.clips)


def whole(packs: tuple[Pack, ...]) -> Span:
    """The span of all tokens."""
    return Span(0, packs[0].tokens)


def clip_index(packs: tuple[Pack, ...], span: Span | None = None) -> Tensor:
    """Clip (0 to G-1) of every token of the span (None: of all), [B, T] int64; -1 in the padding."""
    span = span or whole(packs)
    index_BT = torch.full((len(packs), span.tokens), -1, dtype=torch.int64)
    for part in clip_parts(packs, span):
        index_BT[part.here] = part.number
    return index_BT


def known_index(packs: tuple[Pack, ...], span: Span | None = None) -> Tensor:
    """Which tokens of the span (None: of all) are given clean (``Clip.known``), [B, T] bool."""
    span = span or whole(packs)
    known_BT = torch.zeros(len(packs), span.tokens, dtype=torch.bool)
    for part in clip_parts(packs, span):
        _, rows, columns = part.clip.grid
        for frame in part.clip.known:
            low, high = (frame * rows * columns - part.first, (frame + 1) * rows * columns - part.first)
            window = slice(part.start + max(low, 0), part.start + min(max(high, 0), part.tokens))
            known_BT[part.row, window] = True
    return known_BT


def positions(packs: tuple[Pack, ...], frame_rate: float, span: Span | None = None) -> Tensor:
    """Place of every token of the span on the axes of RoPE, [B, T, 3] fp32: time, row, column; zero in the padding.

    Time counts seconds times ``frame_rate`` (latent frames per second), which is the frame's number at that
    rate (Wan's integer index).
    """
    span = span or whole(packs)
    place_BT3 = torch.zeros(len(packs), span.tokens, 3)
    for part in clip_parts(packs, span):
        _, rows, columns = part.clip.grid
        token = torch.arange(part.first, part.first + part.tokens)
        frame, row, column = token // (rows * columns), token // columns % rows, token % columns
        place_BT3[part.here] = torch.stack((frame * (frame_rate / part.clip.frame_rate), row, column), dim=-1)
    return place_BT3
