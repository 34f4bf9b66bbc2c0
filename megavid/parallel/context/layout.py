"""Which tokens of a pack stand on which context-parallel rank.

Owns the map between a rank's token rows and global token indices. Shards may be uneven, empty, or made of several
spans in any order; together they hold every token once. RoPE, noise, loss and attention all read the same map.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megavid.errors import ConfigError
from megavid.ops.packs import Span
from megavid.parallel.context.groups import ContextGroups


class Run(NamedTuple):
    """Tokens [start, stop) of the pack that lie side by side from row ``row`` of a tensor."""

    start: int
    stop: int
    row: int


@dataclass(frozen=True)
class CPLayout:
    """The spans of every context-parallel rank, and this rank's place and groups.

    Attributes:
        spans: of each rank, in the order of its rows.
        groups: this rank's place.
    """

    spans: tuple[tuple[Span, ...], ...]
    groups: ContextGroups = field(default_factory=ContextGroups)

    def __post_init__(self) -> None:
        if len(self.spans) != self.groups.plan.cp:
            raise ConfigError(
                f"a context-parallel layout of {len(self.spans)} shards needs as many ranks, got parallel.context = "
                f"{self.groups.plan.cp}"
            )
        end = 0
        for start, stop in sorted((span.start, span.stop) for spans in self.spans for span in spans if span.tokens):
            if start != end:
                what = "twice" if start < end else "nowhere"
                raise ConfigError(f"a context-parallel layout holds token {min(start, end)} {what}; check its spans")
            end = stop

    @classmethod
    def contiguous(cls, num_tokens: int, groups: ContextGroups | None = None) -> "CPLayout":
        """Rank r of cp holds tokens [r T / cp, (r + 1) T / cp).

        Raises:
            ConfigError: the ranks do not divide the tokens.
        """
        groups = groups or ContextGroups()
        cp = groups.plan.cp
        if num_tokens % cp:
            raise ConfigError(f"parallel.context = {cp} must divide data.pack_tokens = {num_tokens}; change either")
        return cls.from_lengths((num_tokens // cp,) * cp, groups)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], groups: ContextGroups | None = None) -> "CPLayout":
        """One span for each rank, one after another, of any lengths (0 too)."""
        spans, start = [], 0
        for length in lengths:
            spans.append((Span(start, start + length),))
            start += length
        return cls(tuple(spans), groups or ContextGroups())

    @property
    def num_tokens(self) -> int:
        """Tokens of the pack, over all ranks."""
        return sum(self.lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each context-parallel rank."""
        return tuple(sum(span.tokens for span in spans) for spans in self.spans)

    @property
    def local_tokens(self) -> int:
        """Tokens of this rank."""
        return self.lengths[self.groups.rank]

    @property
    def span(self) -> Span:
        """The one span of this rank, where it has one."""
        (span,) = self.spans[self.groups.rank]
        return span

    @property
    def ulysses_lengths(self) -> tuple[int, ...]:
        """Tokens of each rank of this rank's Ulysses group."""
        first = self.groups.ring_rank * self.groups.plan.ulysses
        return self.lengths[first : first + self.groups.plan.ulysses]

    @property
    def ring_lengths(self) -> tuple[int, ...]:
        """Tokens of each ring shard: what the ranks of one Ulysses group hold together."""
        ulysses = self.groups.plan.ulysses
        return tuple(sum(self.lengths[start : start + ulysses]) for start in range(0, len(self.spans), ulysses))

    def index(self, rank: int | None = None) -> Tensor:
        """Global index of each token row of a rank (this one), int64."""
        spans = self.spans[self.groups.rank if rank is None else rank]
        parts = [torch.arange(span.start, span.stop) for span in spans]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def shard_runs(self, ring_rank: int, first_row: int = 0) -> tuple[Run, ...]:
        """The rows of ring shard ``ring_rank``, as its ranks hold them after the all-to-all, from row ``first_row``."""
        ulysses = self.groups.plan.ulysses
        runs: list[Run] = []
        row = first_row
        for rank in range(ring_rank * ulysses, (ring_rank + 1) * ulysses):
            for span in self.spans[rank]:
                if runs and runs[-1].stop == span.start:
                    runs[-1] = Run(runs[-1].start, span.stop, runs[-1].row)
                elif span.tokens:
                    runs.append(Run(span.start, span.stop, row))
                row += span.tokens
        return tuple(runs)
