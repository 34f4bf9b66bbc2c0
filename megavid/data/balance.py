"""Which clips stand together in a pack, so that packs are full and cost alike: integer arithmetic on sizes of clips.

Owns the rule by which clips of known sizes are dealt out to the packs of one step. Knows no draw, no file and no rank;
``megavid.data.packing`` says which clips they are and which wait. Clips of one size are one kind and interchangeable,
so all is done in whole vectors: clips of each kind in each pack, [packs P, kinds K]. There are integers alone, so every
machine deals alike.

Largest kind first, every clip goes to the pack with the least work among those with room (Graham 1969, "Bounds on
multiprocessing timing anomalies"). Then packs well above the mean swap a few clips of one kind for a few of another
with the lightest ones. At last the packs are put in an order in which every run of neighbours is nearly even.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_EVEN_PERCENT = 102
"""A pack is well above the mean from here on: less is not worth a swap."""
_ROUNDS = 24
_GIVEN = (1, 2, 3)
_KINDS = 12
"""Kinds of a pack that swaps look at, the largest: it bounds the time where almost every clip has a size of its own."""
_FEW = 8
_NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Kinds:
    """The sizes that clips come in, largest first, and what each costs.

    Costs are whole numbers in one unit, such that those of a whole step add up to less than 2**62.

    Attributes:
        tokens_K: tokens of a clip, strictly falling.
        work_K: work of a clip.
        excess_K: what a clip costs above padding in its place, at least 1.
        padding_work: what a pack without clips costs: shapes are fixed, so padding passes the matrices too.
    """

    tokens_K: Ints
    work_K: Ints
    excess_K: Ints
    padding_work: int


class Packs:
    """The packs of one step while they are filled.

    Args:
        kinds: sizes of clips.
        packs: their number.
        pack_tokens: tokens of each.
    """

    def __init__(self, kinds: Kinds, packs: int, pack_tokens: int) -> None:
        self.kinds = kinds
        self.clips_PK = np.zeros((packs, len(kinds.tokens_K)), np.int64)
        """Clips of each kind in each pack."""
        self.free_P = np.full(packs, pack_tokens, np.int64)
        """Tokens without a clip."""
        self.load_P = np.full(packs, kinds.padding_work, np.int64)
        """What the pack costs, padding included: what a pipeline waits for."""

    def __len__(self) -> int:
        return len(self.free_P)

    def deal(self, counts_K: Ints) -> Ints:
        """Place clips of all kinds, largest first; how many of each kind found no room."""
        left_K = counts_K.copy()
        for kind in np.flatnonzero(counts_K).tolist():
            left_K[kind] -= self.place(kind, int(counts_K[kind]))
        return left_K

    def place(self, kind: int, count: int) -> int:
        """Put up to ``count`` clips of one kind where the load is least and room is left; how many found room.

        The result is that of one clip after another, ties to the first pack.
        """
        room_P = self.free_P // self.kinds.tokens_K[kind]
        count = min(count, int(room_P.sum()))
        if count > _FEW:
            self._add(kind, _smallest_keys(self.load_P, int(self.kinds.excess_K[kind]), room_P, count))
            return count
        for _ in range(count):
            pack = int(np.where(self.free_P >= self.kinds.tokens_K[kind], self.load_P, _NEVER).argmin())
            self.clips_PK[pack, kind] += 1
            self.free_P[pack] -= self.kinds.tokens_K[kind]
            self.load_P[pack] += self.kinds.excess_K[kind]
        return count

    def is_worth_its_time(self, kind: int) -> bool:
        """Whether one more clip of ``kind`` finds room where it does more good than harm.

        It does where its pack will not be well above the mean, or not above the heaviest; else where the work of the
        step grows by more than the time of the heaviest pack, as it does in a pack that is alone.
        """
        has_room_P = self.free_P >= self.kinds.tokens_K[kind]
        if not has_room_P.any():
            return False
        load = int(self.load_P[has_room_P].min()) + int(self.kinds.excess_K[kind])
        heaviest = max(int(self.load_P.max()), self._well_above_mean())
        work, more = int((self.clips_PK @ self.kinds.work_K).sum()), int(self.kinds.work_K[kind])
        return load <= heaviest or (work + more) * heaviest >= work * load

    def even_out(self) -> None:
        """Swap clips between heavy and light packs. None comes or goes, no pack overflows, the heaviest only loses."""
        idle = 0
        for turn in range(_ROUNDS):
            by_load = np.argsort(self.load_P, kind="stable")
            heavy = by_load[::-1][: len(self) // 2]
            heavy = heavy[self.load_P[heavy] > self._well_above_mean()]
            if not len(heavy):
                return
            # Partners change from round to round, the lightest ones first.
            light = np.roll(by_load[: len(self) - len(heavy)], -turn)[: len(heavy)]
            idle = 0 if self._swap(heavy, light) else idle + 1
            if idle == len(self) // 2:
                return

    def order(self) -> Ints:
        """Numbers of the packs in an order in which every run of neighbours has nearly its share of the work.

        Whenever the packs so far are below their share the heaviest one left comes next, else the lightest: their sum
        never leaves the line by more than one pack's deviation, hence no run of them by more than two.
        """
        by_load = np.argsort(self.load_P, kind="stable").tolist()
        deviation = (self.load_P * len(self) - self.load_P.sum()).tolist()
        chosen, ahead, first, last = list[int](), 0, 0, len(self) - 1
        while first <= last:
            if ahead <= 0:
                chosen.append(by_load[last])
                last -= 1
            else:
                chosen.append(by_load[first])
                first += 1
            ahead += deviation[chosen[-1]]
        return np.array(chosen, np.int64)

    def _well_above_mean(self) -> int:
        return int(self.load_P.sum()) * _EVEN_PERCENT // (100 * len(self))

    def _add(self, kind: int, taken_P: Ints) -> None:
        self.clips_PK[:, kind] += taken_P
        self.free_P -= taken_P * self.kinds.tokens_K[kind]
        self.load_P += taken_P * self.kinds.excess_K[kind]

    def _swap(self, heavy_Q: Ints, light_Q: Ints) -> bool:
        """Make each pair (heavy[q], light[q]) as even as one swap can; whether any pair became more even.

        The heavy pack gives i clips of kind a and takes j of kind b: for every (a, b), small i, and the fewest and the
        most j that both have room for.
        """
        kinds_QA, kinds_QB = self._kinds_in(heavy_Q), self._kinds_in(light_Q)
        size, excess = self.kinds.tokens_K, self.kinds.excess_K
        size_b, excess_b = size[kinds_QB][:, None, :], excess[kinds_QB][:, None, :]
        has_a = np.take_along_axis(self.clips_PK[heavy_Q], kinds_QA, 1)[:, :, None]
        has_b = np.take_along_axis(self.clips_PK[light_Q], kinds_QB, 1)[:, None, :]
        free, free_light = self.free_P[heavy_Q][:, None, None], self.free_P[light_Q][:, None, None]
        load, load_light = self.load_P[heavy_Q][:, None, None], self.load_P[light_Q][:, None, None]
        best_QAB = np.broadcast_to(load, (len(heavy_Q), kinds_QA.shape[1], kinds_QB.shape[1])).copy()
        given_QAB, taken_QAB = np.zeros_like(best_QAB), np.zeros_like(best_QAB)
        for given in _GIVEN:
            size_given, excess_given = given * size[kinds_QA][:, :, None], given * excess[kinds_QA][:, :, None]
            fewest = np.maximum(-((free_light - size_given) // size_b), 0)
            most = np.minimum((free + size_given) // size_b, has_b)
            for taken in (fewest, most):
                moved = excess_given - taken * excess_b
                after = np.maximum(load - moved, load_light + moved)
                is_better = (given <= has_a) & (fewest <= most) & (after < best_QAB)
                for kept, new in ((best_QAB, after), (given_QAB, given), (taken_QAB, taken)):
                    np.copyto(kept, new, where=is_better)
        flat = best_QAB.reshape(len(heavy_Q), -1)
        choice = flat.argmin(1)
        pairs = np.flatnonzero(flat[np.arange(len(heavy_Q)), choice] < self.load_P[heavy_Q])
        a, b = np.divmod(choice[pairs], kinds_QB.shape[1])
        self._move(heavy_Q[pairs], light_Q[pairs], kinds_QA[pairs, a], given_QAB[pairs, a, b])
        self._move(light_Q[pairs], heavy_Q[pairs], kinds_QB[pairs, b], taken_QAB[pairs, a, b])
        return bool(len(pairs))

    def _move(self, source_Q: Ints, target_Q: Ints, kind_Q: Ints, count_Q: Ints) -> None:
        for packs_Q, change_Q in ((source_Q, -count_Q), (target_Q, count_Q)):
            self.clips_PK[packs_Q, kind_Q] += change_Q
            self.free_P[packs_Q] -= change_Q * self.kinds.tokens_K[kind_Q]
            self.load_P[packs_Q] += change_Q * self.kinds.excess_K[kind_Q]

    def _kinds_in(self, packs_Q: Ints) -> Ints:
        """Kinds that a swap tries in each of ``packs``, [Q, at most _KINDS]: all, or the largest of those it holds."""
        kinds = self.clips_PK.shape[1]
        if kinds <= _KINDS:
            return np.broadcast_to(np.arange(kinds), (len(packs_Q), kinds))
        row, kind = np.nonzero(self.clips_PK[packs_Q])
        place = np.arange(len(row)) - np.searchsorted(row, row)
        kinds_QA = np.full((len(packs_Q), _KINDS), kinds - 1, np.int64)
        kinds_QA[row[place < _KINDS], place[place < _KINDS]] = kind[place < _KINDS]
        return kinds_QA


def _smallest_keys(start_P: Ints, step: int, room_P: Ints, count: int) -> Ints:
    """How many of the ``count`` smallest numbers start + step * j (0 <= j < room) each pack has; ties to the first.

    They are the loads that clips of one kind would meet: a pack's rise by the clip's own load, so the least-loaded
    rule takes the smallest of all. ``count`` is at most ``room_P.sum()``.
    """

    def below(key: int) -> Ints:
        return np.clip(-((start_P - key) // step), 0, room_P)

    # At most ``count`` keys are below ``low``; all are below ``high``.
    low, high = int(start_P.min()), int((start_P + step * room_P).max()) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if int(below(middle).sum()) <= count:
            low = middle
        else:
            high = middle
    taken_P = below(low)
    tied = np.flatnonzero((taken_P < room_P) & (start_P + step * taken_P == low))
    taken_P[tied[: count - int(taken_P.sum())]] += 1
    return taken_P
