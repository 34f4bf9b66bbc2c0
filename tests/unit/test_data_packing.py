"""Packs: every draw once, inside the pack, with no overlap, and the same from any position."""

import numpy as np
import pytest

from megavid.data.order import SampleOrder
from megavid.data.packing import LOOK_AHEAD, PackPosition, PackStream, next_fit
from megavid.errors import ConfigError, DataError
from tests.support.data_stubs import IMAGE, LONG, MIXED, SHORT, StubSource

TOKENS = {IMAGE: 16, SHORT: 48, LONG: 180}


def stream(pack_tokens: int = 192) -> PackStream:
    return PackStream(SampleOrder(StubSource(MIXED), 7), (1, 2, 2), pack_tokens, "the stub")


@pytest.mark.parametrize("pack_tokens", [180, 192, 200, 384, 1000])
def test_packs_fit_do_not_overlap_and_lose_no_draw(pack_tokens: int) -> None:
    packs, order = stream(pack_tokens), SampleOrder(StubSource(MIXED), 7)
    source, seen = StubSource(MIXED), []
    for _ in range(300):
        slots, end = packs.next(), 0
        assert slots
        for slot in slots:
            assert slot.start == end
            end += TOKENS[source.shape(int(order.samples(np.array([slot.draw]))[0]))]
        assert end <= pack_tokens
        seen += [slot.draw for slot in slots]
    position = packs.position
    assert sorted([*seen, *position.waiting]) == list(range(position.next_draw))
    assert len(position.waiting) <= LOOK_AHEAD


def test_packs_are_well_filled() -> None:
    source = StubSource([(IMAGE, 100), (SHORT, 100), (LONG, 100)])
    packs = PackStream(SampleOrder(source, 7), (1, 2, 2), 384, "the stub")
    packs.seek(500)
    drawn = packs.position.next_draw - len(packs.position.waiting)
    assert drawn * np.mean(list(TOKENS.values())) / (500 * 384) > 0.9


def test_position_is_found_from_the_number_or_from_any_earlier_position() -> None:
    straight = stream()
    positions, following = [], []
    for _ in range(40):
        positions.append(straight.position)
        following.append(straight.next())
    for packs, start in ((37, None), (37, positions[20]), (5, positions[20]), (0, None)):
        other = stream()
        other.seek(packs, start)
        assert other.position == positions[packs]
        assert other.next() == following[packs]


def test_position_survives_json() -> None:
    position = PackPosition(3, 17, (12, 14))
    assert PackPosition.from_json(position.to_json()) == position
    with pytest.raises(DataError, match="not a position of packs"):
        PackPosition.from_json({"packs": 3})


def test_clip_longer_than_a_pack_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"data.pack_tokens = 96 must be at least 180"):
        stream(96)


def test_clip_that_the_patch_does_not_divide_is_an_error() -> None:
    source = StubSource([((4, 1, 9, 8), 3)])
    with pytest.raises(DataError, match=r"multiples of patch_size"):
        PackStream(SampleOrder(source, 7), (1, 2, 2), 96, "the stub")


def test_next_fit_keeps_order() -> None:
    assert next_fit([4, 4, 3, 9, 1], 10) == [[(0, 0), (1, 4)], [(2, 0)], [(3, 0), (4, 9)]]
