"""Packs: which draws stand side by side in which pack of a step, a pure function of (seed, data set, model, packs).

Owns which draws a step takes, which wait, and the position between two steps; ``megavid.data.balance`` owns how clips
of known sizes are dealt out. Data-parallel ranks and micro-batches take slices of what comes out; they cannot change
it.

A step takes draws in order, those that wait first, until their tokens fill its packs (``train.global_batch_size`` of
them), and deals them out by their cost, so that packs are full and cost alike. What found no room waits for the next
step; gaps that are left are offered to the next draws, of which at most ``LOOK_AHEAD`` are passed over. Of clips of one
size the oldest come first, and who has waited for two steps' draws is placed before all others. So no draw is lost or
repeated, none waits for long, fewer than GB + ``LOOK_AHEAD`` wait, and the position after any step is a few integers.
It follows from the number of the step alone (``seek`` looks at shapes only and reads nothing); a checkpoint keeps it so
that resuming takes no time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from megavid.config.schema import ModelConfig, RunConfig, require
from megavid.data.balance import Ints, Kinds, Packs
from megavid.data.order import SampleOrder
from megavid.data.sample import Shape
from megavid.errors import DataError
from megavid.ops.patches import token_grid
from megavid.plan.flops import forward_flops

LOOK_AHEAD = 16
_PATIENCE = 2
_UNIT_BITS = 32  # sums over a step, times its packs, stay below 2**62


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a pack: which draw, and its first token."""

    draw: int
    start: int


@dataclass(frozen=True, slots=True)
class PackPosition:
    """Where a stream of packs stands, between two steps."""

    packs: int = 0
    """Packs so far."""
    next_draw: int = 0
    """First draw that was not looked at yet."""
    waiting: tuple[int, ...] = ()
    """Draws before it that stand in no pack yet, ascending."""

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


def kinds_of(model: ModelConfig, sizes: Sequence[int], pack_tokens: int) -> Kinds:
    """What clips of these tokens cost: the linear and quadratic FLOPs of a forward pass, in 2**-32 of a pack's padding.

    Args:
        model: whose FLOPs.
        sizes: tokens of clips, any order; repeated ones count once.
        pack_tokens: tokens of a pack.
    """
    tokens = sorted(set(sizes), reverse=True)
    work = [forward_flops(model, [size]).total for size in tokens]
    padding = [forward_flops(model, [], padding=size).total for size in tokens]
    whole = forward_flops(model, [], padding=pack_tokens).total

    def in_units(flops: float) -> int:
        return max(1, round(flops / whole * (1 << _UNIT_BITS)))

    return Kinds(
        np.array(tokens, np.int64),
        np.array([in_units(flops) for flops in work], np.int64),
        np.array([in_units(flops - idle) for flops, idle in zip(work, padding, strict=True)], np.int64),
        in_units(whole),
    )


class PackStream:
    """The packs of a run, step after step.

    Args:
        order: what each draw is.
        config: the run; its model says what a clip costs, ``data.pack_tokens`` and ``train.global_batch_size`` what the
            packs of a step are.
        source_name: for messages.

    Raises:
        ConfigError: a clip is longer than a pack.
        DataError: the patch does not divide a clip.
    """

    def __init__(self, order: SampleOrder, config: RunConfig, source_name: str) -> None:
        self.order = order
        self.pack_tokens, self.packs_per_step = config.data.pack_tokens, config.train.global_batch_size
        sizes = [tokens_of(shape, config.model.patch_size, source_name) for shape in order.shapes]
        longest = max(range(len(sizes)), key=lambda number: sizes[number])
        require(
            sizes[longest] <= self.pack_tokens,
            f"data.pack_tokens = {self.pack_tokens} must be at least {sizes[longest]}, the tokens of the longest clips "
            f"of {source_name} (latents {order.shapes[longest]}); raise data.pack_tokens",
        )
        self._kinds = kinds_of(config.model, sizes, self.pack_tokens)
        self._kind_of_bucket = np.searchsorted(-self._kinds.tokens_K, -np.array(sizes, np.int64))
        self._mean_tokens = sum(size * count for size, count in zip(sizes, order.sizes, strict=True)) / order.epoch_size
        self._position = PackPosition()

    @property
    def position(self) -> PackPosition:
        """Where the stream stands: after ``position.packs`` packs."""
        return self._position

    def seek(self, steps: int, position: PackPosition | None = None) -> None:
        """Stand after ``steps`` steps.

        Args:
            steps: number of steps before the next one.
            position: a known position at or before it, to start from; else the beginning, or where the stream stands.
        """
        packs = steps * self.packs_per_step
        if position is not None and position.packs <= packs:
            self._position = position
        elif self._position.packs > packs:
            self._position = PackPosition()
        while self._position.packs < packs:
            self._fill()

    def next(self) -> tuple[tuple[Slot, ...], ...]:
        """The packs of the next step; the draws of a pack ascend."""
        draws, kinds, packs = self._fill()
        order = packs.order()
        # Clips of one kind go to the packs in order, which ``draws``, sorted by kind, is in too.
        clips_KP = packs.clips_PK[order].T
        pack = np.repeat(np.tile(np.arange(len(order)), len(clips_KP)), clips_KP.ravel())
        by_pack = np.lexsort((draws, pack))
        ends = np.cumsum(clips_KP.sum(0)).tolist()
        draw_list, sizes = draws[by_pack].tolist(), self._kinds.tokens_K[kinds[by_pack]].tolist()
        step, first = [], 0
        for end in ends:
            slots, start = [], 0
            for place in range(first, end):
                slots.append(Slot(draw_list[place], start))
                start += sizes[place]
            step.append(tuple(slots))
            first = end
        return tuple(step)

    def _fill(self) -> tuple[Ints, Ints, Packs]:
        """The draws of the next step, by kind and ascending in each, their kinds, and the packs; moves the position."""
        draws, kinds, whole = self._line_up()
        packs = Packs(self._kinds, self.packs_per_step, self.pack_tokens)
        is_due = (draws < self._position.next_draw - _PATIENCE * whole)[:whole]
        due_K = self._count(kinds[:whole][is_due][: self.packs_per_step])
        packs.deal(due_K)  # they are no more than the packs, so each finds room
        packs.deal(self._count(kinds[:whole]) - due_K)
        packs.even_out()
        most = whole + int(packs.free_P.sum() // self._kinds.tokens_K[-1]) + LOOK_AHEAD
        if most > len(draws):
            draws, kinds = self._line(most)
        looked = self._top_up(packs, kinds, whole)
        by_kind = np.argsort(kinds[:looked], kind="stable")
        seen, seen_kinds = draws[by_kind], kinds[by_kind]
        turn = np.arange(looked) - np.searchsorted(seen_kinds, seen_kinds)
        is_placed = turn < packs.clips_PK.sum(0)[seen_kinds]  # of each kind, the oldest
        self._position = PackPosition(
            self._position.packs + self.packs_per_step,
            max(self._position.next_draw, int(draws[looked - 1]) + 1),
            tuple(sorted(seen[~is_placed].tolist()) + list(self._position.waiting[looked:])),
        )
        return seen[is_placed], seen_kinds[is_placed], packs

    def _line_up(self) -> tuple[Ints, Ints, int]:
        """Draws in line for the next step, their kinds, and how many of them have as many tokens as its packs."""
        capacity = self.packs_per_step * self.pack_tokens
        length = int(1.1 * capacity / self._mean_tokens) + LOOK_AHEAD
        while True:
            draws, kinds = self._line(length)
            tokens = np.cumsum(self._kinds.tokens_K[kinds])
            if tokens[-1] > capacity:
                return draws, kinds, int(np.searchsorted(tokens, capacity, side="right"))
            length *= 2

    def _line(self, length: int) -> tuple[Ints, Ints]:
        """The first ``length`` draws or more, those that wait first, and their kinds; they ascend."""
        waiting = np.array(self._position.waiting, np.int64)
        first = self._position.next_draw
        draws = np.concatenate([waiting, np.arange(first, first + max(0, length - len(waiting)), dtype=np.int64)])
        return draws, self._kind_of_bucket[self.order.places(draws)[0]]

    def _top_up(self, packs: Packs, kinds: Ints, first: int) -> int:
        """Offer the gaps to the draws from ``first`` in line on; the first one that was not asked."""
        smallest, passed = int(self._kinds.tokens_K[-1]), 0
        while passed < LOOK_AHEAD and int(packs.free_P.max()) >= smallest:
            kind = int(kinds[first])
            if packs.is_worth_its_time(kind):
                packs.place(kind, 1)
            else:
                passed += 1
            first += 1
        return first

    def _count(self, kinds: Ints) -> Ints:
        return np.bincount(kinds, minlength=len(self._kinds.tokens_K)).astype(np.int64)
