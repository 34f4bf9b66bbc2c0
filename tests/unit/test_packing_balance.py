"""Dealing out clips: the quick way equals one clip after another, nothing is lost, and packs get more even."""

import numpy as np
import pytest

from megavid.data.balance import Ints, Kinds, Packs


def kinds_of_squares(*tokens: int, caption: int = 0, linear: int = 100, padding_work: int = 0) -> Kinds:
    """A clip of n tokens costs caption + n * (linear + n), of which caption + n * n is above padding."""
    sizes = np.array(tokens, np.int64)
    return Kinds(sizes, caption + sizes * (linear + sizes), caption + sizes * sizes, padding_work)


def some_kinds(random: np.random.Generator, count: int) -> Kinds:
    return kinds_of_squares(*np.sort(random.choice(np.arange(1, 60), count, replace=False))[::-1].tolist())


def place_one_by_one(packs: Packs, kind: int, count: int) -> int:
    """The rule itself: each clip goes to the least load among the packs with room, the first of equal ones."""
    for number in range(count):
        with_room = [pack for pack in range(len(packs)) if packs.free_P[pack] >= packs.kinds.tokens_K[kind]]
        if not with_room:
            return number
        pack = min(with_room, key=lambda pack: (packs.load_P[pack], pack))
        packs.clips_PK[pack, kind] += 1
        packs.free_P[pack] -= packs.kinds.tokens_K[kind]
        packs.load_P[pack] += packs.kinds.excess_K[kind]
    return count


def check_books(packs: Packs, pack_tokens: int) -> None:
    """Free tokens and load are those of the clips, and no pack overflows."""
    kinds = packs.kinds
    assert (packs.clips_PK >= 0).all()
    assert (packs.free_P >= 0).all()
    assert (packs.free_P == pack_tokens - packs.clips_PK @ kinds.tokens_K).all()
    assert (packs.load_P == kinds.padding_work + packs.clips_PK @ kinds.excess_K).all()


@pytest.mark.parametrize("seed", range(30))
def test_placing_many_clips_at_once_is_placing_one_after_another(seed: int) -> None:
    random = np.random.default_rng(seed)
    kinds = some_kinds(random, int(random.integers(1, 6)))
    count, pack_tokens = int(random.integers(1, 20)), int(random.integers(60, 400))
    quick, slow = Packs(kinds, count, pack_tokens), Packs(kinds, count, pack_tokens)
    for kind in range(len(kinds.tokens_K)):
        clips = int(random.integers(0, 60))
        assert quick.place(kind, clips) == place_one_by_one(slow, kind, clips)
        assert (quick.clips_PK == slow.clips_PK).all()
    check_books(quick, pack_tokens)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kind_count", [1, 2, 9, 30])
def test_evening_out_loses_no_clip_and_never_raises_the_heaviest(seed: int, kind_count: int) -> None:
    random = np.random.default_rng(seed)
    kinds = some_kinds(random, kind_count)
    packs = Packs(kinds, int(random.integers(1, 40)), 300)
    counts = random.integers(0, 200 // kind_count, kind_count)
    left = packs.deal(counts)
    assert (packs.clips_PK.sum(0) + left == counts).all()
    smallest_left = kinds.tokens_K[left > 0].min(initial=10**6)
    assert packs.free_P.max() < smallest_left, "what was left over has no room"
    before = packs.load_P.max()
    packs.even_out()
    assert packs.load_P.max() <= before
    assert (packs.clips_PK.sum(0) + left == counts).all()
    check_books(packs, 300)


def test_a_long_clip_and_its_company_are_traded_for_short_ones() -> None:
    packs = Packs(kinds_of_squares(50, 40, 20), 2, 100)
    packs.clips_PK[:] = [[1, 1, 0], [0, 0, 5]]
    packs.free_P[:], packs.load_P[:] = [10, 0], [2500 + 1600, 5 * 400]
    packs.even_out()
    # 50 for three of 20: no other swap brings 4100 and 2000 nearer.
    assert packs.clips_PK.tolist() == [[0, 1, 3], [1, 0, 2]]
    assert packs.load_P.tolist() == [2800, 3300]
    check_books(packs, 100)


def test_full_packs_are_evened_out_on_a_mixture() -> None:
    kinds = kinds_of_squares(324, 216, 144, 108, 72, 48, 36, 24, 16, caption=4000, padding_work=600 * 672)
    packs = Packs(kinds, 32, 672)
    packs.deal(np.array([11, 11, 11, 43, 43, 43, 54, 54, 54]))
    assert packs.load_P.max() > 1.08 * packs.load_P.mean()
    packs.even_out()
    assert packs.load_P.max() < 1.06 * packs.load_P.mean()


def runs(values: Ints, length: int) -> Ints:
    return values.reshape(-1, length).sum(1)


@pytest.mark.parametrize("seed", range(5))
def test_every_run_of_neighbours_has_its_share(seed: int) -> None:
    packs = Packs(kinds_of_squares(5), 48, 100)
    packs.load_P[:] = np.random.default_rng(seed).choice([90, 100, 140], 48)
    order = packs.order()
    assert sorted(order.tolist()) == list(range(48))
    loads = packs.load_P[order]
    deviation = np.abs(loads - loads.mean()).max()
    for length in (1, 2, 3, 4, 6, 8, 12, 16, 24):
        sums = runs(loads, length)
        assert np.abs(sums - sums.mean()).max() <= 2 * deviation
    assert runs(np.sort(loads), 24).max() > runs(loads, 24).max() + 4 * deviation, "not so in any order"


def test_a_clip_that_would_hold_up_all_packs_is_not_worth_its_time() -> None:
    kinds = kinds_of_squares(50, 10, linear=10, padding_work=1000)
    packs = Packs(kinds, 3, 100)
    packs.place(1, 15)
    assert not packs.is_worth_its_time(0), "two packs would wait for it"
    packs.place(1, 1)
    assert packs.is_worth_its_time(1), "no pack gets heavier than the heaviest"
    lone = Packs(kinds, 1, 100)
    lone.place(1, 5)
    assert lone.is_worth_its_time(0), "nobody waits"
    lone.place(1, 1)
    assert not lone.is_worth_its_time(0), "no room"
