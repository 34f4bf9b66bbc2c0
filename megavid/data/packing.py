"""Packs: which draws stand side by side in which pack, a pure function of (seed, data set, data.pack_tokens).

Owns the rule and its position. Data-parallel ranks and micro-batches take slices of what comes out; they
cannot change it.

The rule is greedy with a bounded look-ahead: a pack takes draws in order; one that does not fit is passed
over and stands first in line for the next pack; after ``LOOK_AHEAD`` passed over, or when no clip can fit
any more, the pack is closed. So no draw is lost or repeated, none waits for long, and the position after
any pack is a few integers. It follows from the number of the pack alone (``seek`` looks at shapes only and
reads nothing); a checkpoint keeps it so that resuming takes no time.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from megavid.config.schema import require
from megavid.data.order import SampleOrder
from megavid.data.sample import Shape
from megavid.errors import DataError
from megavid.ops.patches import token_grid

LOOK_AHEAD = 16
_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a pack: which draw, and its first token."""

    draw: int
    start: int


@dataclass(frozen=True, slots=True)
class PackPosition:
    """Where a stream of packs stands."""

    packs: int = 0
    """Packs so far."""
    next_draw: int = 0
    """First draw that was not looked at yet."""
    waiting: tuple[int, ...] = ()
    """Draws that were passed over, in order."""

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        return {"packs": self.packs, "next_draw": self.next_draw, "waiting": list(self.waiting)}

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Read back.

        Raises:
            DataError: it is not a position.
        """
        match values:
            case {"packs": int(packs), "next_draw": int(next_draw), "waiting": [*waiting]}:
                return cls(packs, next_draw, tuple(int(draw) for draw in waiting))
        raise DataError(f"the data position in the checkpoint is {values!r}, not a position of packs")


def tokens_of(shape: Shape, patch_size: tuple[int, int, int], source_name: str) -> int:
    """Tokens of latents of ``shape``.

    Raises:
        DataError: the patch does not divide it.
    """
    _, frames, height, width = shape
    try:
        time, rows, columns = token_grid(frames, height, width, patch_size)
    except ValueError as error:
        raise DataError(f"{source_name}: {error}; prepare the data with other sizes") from error
    return time * rows * columns


def next_fit(tokens: list[int], pack_tokens: int) -> list[list[tuple[int, int]]]:
    """Packs of a short list of clips in its order, as (number in the list, first token): for validation."""
    packs: list[list[tuple[int, int]]] = []
    free = 0
    for number, size in enumerate(tokens):
        if size > free:
            packs.append([])
            free = pack_tokens
        packs[-1].append((number, pack_tokens - free))
        free -= size
    return packs


class PackStream:
    """The packs of a run, one after another.

    Args:
        order: what each draw is.
        patch_size: ``model.patch_size``.
        pack_tokens: ``data.pack_tokens``.
        source_name: for messages.

    Raises:
        ConfigError: a clip is longer than a pack.
        DataError: the patch does not divide a clip.
    """

    def __init__(
        self, order: SampleOrder, patch_size: tuple[int, int, int], pack_tokens: int, source_name: str
    ) -> None:
        self.order = order
        self.pack_tokens = pack_tokens
        sizes = {shape: tokens_of(shape, patch_size, source_name) for shape in order.shapes}
        longest = max(sizes, key=lambda shape: sizes[shape])
        require(
            sizes[longest] <= pack_tokens,
            f"data.pack_tokens = {pack_tokens} must be at least {sizes[longest]}, the tokens of the longest clips of "
            f"{source_name} (latents {longest}); raise data.pack_tokens",
        )
        self._sizes = np.array([sizes[shape] for shape in order.shapes], np.int64)
        self._smallest = min(sizes.values())
        self._position = PackPosition()
        self._chunk, self._chunk_sizes = -1, list[int]()

    @property
    def position(self) -> PackPosition:
        """Where the stream stands: after ``position.packs`` packs."""
        return self._position

    def seek(self, packs: int, position: PackPosition | None = None) -> None:
        """Stand before pack number ``packs`` (from 0).

        Args:
            packs: number of the next pack.
            position: a known position at or before it, to start from; else the beginning, or where the stream stands.
        """
        if position is not None and position.packs <= packs:
            self._position = position
        elif self._position.packs > packs:
            self._position = PackPosition()
        while self._position.packs < packs:
            self.next()

    def next(self) -> tuple[Slot, ...]:
        """The next pack."""
        waiting, draw = list(self._position.waiting), self._position.next_draw
        slots, passed, free = list[Slot](), list[int](), self.pack_tokens
        # After the waiting ones come the new draws, from ``draw`` on.
        turn = 0
        while free >= self._smallest and len(passed) < LOOK_AHEAD:
            if turn < len(waiting):
                candidate = waiting[turn]
                turn += 1
            else:
                candidate = draw
                draw += 1
            size = self._tokens(candidate)
            if size <= free:
                slots.append(Slot(candidate, self.pack_tokens - free))
                free -= size
            else:
                passed.append(candidate)
        self._position = PackPosition(self._position.packs + 1, draw, (*passed, *waiting[turn:]))
        return tuple(slots)

    def _tokens(self, draw: int) -> int:
        chunk, place = divmod(draw, _CHUNK)
        if chunk != self._chunk:
            # Draws that wait are rarely of the chunk before, so one chunk is enough.
            draws = np.arange(chunk * _CHUNK, (chunk + 1) * _CHUNK, dtype=np.int64)
            self._chunk, self._chunk_sizes = chunk, self._sizes[self.order.places(draws)[0]].tolist()
        return self._chunk_sizes[place]
