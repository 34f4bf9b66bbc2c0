"""The arithmetic of boxes: every flat range is exact, every search finds what a scan finds, every gap is seen."""

import itertools
import math
import random

import pytest
import torch

from megavid.checkpoint.index import Index, SavedBox, TensorRecord, check_cover, intersection
from megavid.checkpoint.read import _pieces, _span, _strides
from megavid.errors import CheckpointError
from megavid.parallel.fragment import Box, boxes_of_range


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(box.offset, box.shape))


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 5), (6,), (2, 3, 2, 4), (1, 5), (1, 2, 6)])
def test_boxes_of_range_are_exact_for_every_range(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    whole = torch.arange(size).view(shape)
    most = 0
    for start, stop in itertools.combinations_with_replacement(range(size + 1), 2):
        boxes = boxes_of_range(shape, start, stop)
        most = max(most, len(boxes))
        flat = [whole[_slices(box)].reshape(-1) for box in boxes]
        assert torch.equal(torch.cat(flat) if flat else whole.view(-1)[:0], torch.arange(start, stop))
    assert most <= 2 * len(shape) - 1


def _random_partition(shape: tuple[int, ...], generator: random.Random) -> list[Box]:
    size = math.prod(shape)
    cuts = sorted({0, size, *(generator.randrange(size + 1) for _ in range(generator.randrange(6)))})
    return [box for low, high in itertools.pairwise(cuts) for box in boxes_of_range(shape, low, high)]


def test_meeting_finds_what_a_scan_finds() -> None:
    generator = random.Random(0)
    for _ in range(200):
        shape = tuple(generator.randrange(1, 7) for _ in range(generator.randrange(1, 5)))
        boxes = _random_partition(shape, generator)
        record = TensorRecord("F32", shape, [SavedBox("f", n, box) for n, box in enumerate(boxes)])
        check_cover("x", record)
        for wanted in _random_partition(shape, generator):
            found = {(saved.start, shared) for saved, shared in record.meeting(wanted)}
            scan = {(n, shared) for n, box in enumerate(boxes) if (shared := intersection(box, wanted)) is not None}
            assert found == scan
            assert sum(shared.numel for _, shared in found) == wanted.numel


def test_search_does_not_look_at_all_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = [SavedBox("f", 0, Box((0, 4 * n), (8, 4))) for n in range(1000)]
    record = TensorRecord("F32", (8, 4000), boxes)
    looks = []
    monkeypatch.setattr("megavid.checkpoint.index.intersection", lambda a, b: looks.append(a) or intersection(a, b))
    assert len(list(record.meeting(Box((0, 2000), (8, 8))))) == 2
    assert len(looks) <= 3


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([Box((0, 0), (2, 4)), Box((3, 0), (1, 4))], "12 elements are saved, expected 16"),
        ([Box((0, 0), (2, 4)), Box((1, 0), (3, 4))], "share elements"),
        ([Box((0, 0), (4, 4)), Box((0, 0), (4, 4))], "share elements"),
        ([Box((0, 0), (4, 3)), Box((0, 3), (4, 2))], "reaches outside"),
        ([], "0 elements are saved, expected 16"),
    ],
)
def test_check_cover_sees_gaps_and_overlaps(boxes: list[Box], message: str) -> None:
    record = TensorRecord("F32", (4, 4), [SavedBox("f", 0, box) for box in boxes])
    with pytest.raises(CheckpointError, match=message):
        check_cover("model/x", record)


def test_merge_refuses_ranks_that_differ() -> None:
    one = Index.of_boxes({"x": ("F32", (4,), [SavedBox("f", 0, Box((0,), (2,)))])})
    other = Index.of_boxes({"x": ("BF16", (4,), [SavedBox("g", 0, Box((2,), (2,)))])})
    with pytest.raises(CheckpointError, match="tensor x: one rank saves"):
        Index.merge([one, other])
    same = Index.of_boxes({"x": ("F32", (4,), [SavedBox("g", 8, Box((2,), (2,)))])})
    record = Index.merge([one, same]).record("x")
    assert record is not None
    assert [(b.file, b.start) for b in record.boxes] == [("f", 0), ("g", 8)]


def test_pieces_cover_a_region_with_short_reads_and_short_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megavid.checkpoint.read.READ_BYTES", 256)
    monkeypatch.setattr("megavid.checkpoint.read.GAP_BYTES", 16)
    saved, strides = (6, 10, 8), _strides((6, 10, 8))
    for region in (
        Box((0, 0, 0), saved),
        Box((1, 2, 3), (4, 5, 4)),
        Box((0, 9, 7), (6, 1, 1)),
        Box((2, 0, 0), (3, 10, 1)),
    ):
        pieces = list(_pieces(region, strides, 4))
        seen = torch.zeros(saved, dtype=torch.int32)
        for piece in pieces:
            seen[_slices(piece)] += 1
            assert _span(piece, strides) * 4 <= 256
            assert _span(piece, strides) <= piece.numel + (piece.numel - 1) * 4
        want = torch.zeros(saved, dtype=torch.int32)
        want[_slices(region)] = 1
        assert torch.equal(seen, want)
