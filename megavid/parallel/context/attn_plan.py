"""Who attends to whom in a pack: rectangles of (queries, keys), in global token indices.

Owns the masks that video needs: whole packs, clips side by side, blocks of frames in causal order with a window and
sink frames, or any list of rectangles. Every one is a union of unmasked rectangles, so that no kernel ever sees a mask.
A token in no rectangle's queries attends to nothing: its output is zero.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megavid.errors import ConfigError
from megavid.ops.packs import Pack


class Rectangle(NamedTuple):
    """Queries [q_start, q_stop) attend to keys [k_start, k_stop)."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int


@dataclass(frozen=True)
class AttnPlan:
    """The disjoint rectangles of one pack.

    Attributes:
        num_tokens: of the pack, padding included.
        rectangles: none empty, none overlapping another.
    """

    num_tokens: int
    rectangles: tuple[Rectangle, ...]

    @classmethod
    def bidirectional(cls, num_tokens: int) -> "AttnPlan":
        """Every token attends to every token."""
        return cls.packed((num_tokens,), num_tokens)

    @classmethod
    def packed(cls, clips: Pack | Sequence[int], num_tokens: int | None = None) -> "AttnPlan":
        """Every clip attends to itself; the padding to nothing.

        Args:
            clips: a pack, or the tokens of clips side by side from token 0.
            num_tokens: of the pack where ``clips`` are lengths; None for their sum.
        """
        if isinstance(clips, Pack):
            spans = [(clip.start, clip.start + clip.tokens) for clip in clips.clips]
            return cls(clips.tokens, tuple(Rectangle(*span, *span) for span in spans))
        spans, start = [], 0
        for length in clips:
            spans.append((start, start + length))
            start += length
        total = start if num_tokens is None else num_tokens
        return cls(total, tuple(Rectangle(*span, *span) for span in spans if span[1] > span[0]))

    @classmethod
    def block_causal(
        cls,
        frames: int,
        tokens_per_frame: int,
        block: int,
        *,
        window: int | None = None,
        sink: int = 0,
        num_tokens: int | None = None,
    ) -> "AttnPlan":
        """Blocks of frames attend to themselves and to what came before.

        Args:
            frames: latent frames of the clip.
            tokens_per_frame: tokens of one frame.
            block: frames that attend to each other both ways; the last block may be shorter.
            window: frames that a block sees, its own included, counted back from its end; None for all.
            sink: frames at the beginning that every block sees besides.
            num_tokens: of the pack; None for those of the clip.
        """
        if block < 1 or (window is not None and window < block):
            raise ConfigError(f"block-causal attention needs 1 <= block <= window frames, got {block} and {window}")
        rectangles = []
        for first in range(0, frames, block):
            end = min(first + block, frames)
            start = 0 if window is None else max(0, end - window)
            kept = [(0, end)] if sink >= start else [(0, sink), (start, end)]
            for left, right in kept:
                if right > left:
                    rectangles.append(Rectangle(*(n * tokens_per_frame for n in (first, end, left, right))))
        return cls(frames * tokens_per_frame if num_tokens is None else num_tokens, tuple(rectangles))

    @classmethod
    def of_rectangles(cls, num_tokens: int, rectangles: Iterable[Sequence[int]]) -> "AttnPlan":
        """Any mask, from (q_start, q_stop, k_start, k_stop) each; empty ones are dropped.

        Raises:
            ConfigError: two overlap (a key would count twice), or one leaves the pack.
        """
        kept = [Rectangle(*each) for each in rectangles]
        kept = [r for r in kept if r.q_stop > r.q_start and r.k_stop > r.k_start]
        for number, one in enumerate(kept):
            if min(one) < 0 or max(one) > num_tokens:
                raise ConfigError(f"attention rectangle {tuple(one)} leaves the pack's {num_tokens} tokens")
            for other in kept[:number]:
                if _overlap(one[:2], other[:2]) and _overlap(one[2:], other[2:]):
                    raise ConfigError(f"attention rectangles {tuple(other)} and {tuple(one)} overlap; cut one of them")
        return cls(num_tokens, tuple(kept))

    @property
    def area(self) -> int:
        """Pairs of a query and a key: the work of attention."""
        return sum((r.q_stop - r.q_start) * (r.k_stop - r.k_start) for r in self.rectangles)

    def mask(self) -> Tensor:
        """The mask written out, [T, T] bool, True where the query (row) sees the key: the rectangles' slow twin."""
        mask = torch.zeros(self.num_tokens, self.num_tokens, dtype=torch.bool)
        for r in self.rectangles:
            mask[r.q_start : r.q_stop, r.k_start : r.k_stop] = True
        return mask


def _overlap(one: Sequence[int], other: Sequence[int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]
