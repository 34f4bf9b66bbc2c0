"""Index tensors of packs: what a span of the tokens holds is that part of the whole."""

import itertools

import pytest
import torch

from megavid.ops.attention import cross_attention, dense_attention
from megavid.ops.packs import Clip, Pack, Span, clip_index, clip_parts, positions, whole

PACKS = (
    Pack((Clip(0, 0, 0, (2, 2, 3), 4.0), Clip(1, 1, 12, (1, 2, 2), 2.0)), 24),
    Pack((Clip(2, 2, 2, (3, 1, 4), 4.0), Clip(3, 3, 15, (1, 3, 3), 4.0)), 24),
    Pack((), 24),
)
CUTS = [0, 1, 13, 13, 16, 24]
SPANS = [Span(*pair) for pair in itertools.pairwise(CUTS)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)


def test_places_are_those_of_the_clips_grid_in_seconds_times_the_rate() -> None:
    place_BT3 = positions(PACKS, 4.0)
    frames, rows, columns = (torch.arange(float(n)) for n in (2, 2, 3))
    assert torch.equal(place_BT3[0, :12], torch.cartesian_prod(frames, rows, columns))
    assert place_BT3[1, 2:14, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4
    slow = positions((Pack((Clip(0, 0, 0, (2, 1, 1), 2.0),), 2),), 4.0)
    assert slow[0, :, 0].tolist() == [0.0, 2.0]
    assert not place_BT3[clip_index(PACKS) < 0].any()


def test_spans_put_together_are_the_whole() -> None:
    assert torch.equal(torch.cat([clip_index(PACKS, span) for span in SPANS], dim=1), clip_index(PACKS))
    assert torch.equal(torch.cat([positions(PACKS, 3.0, span) for span in SPANS], dim=1), positions(PACKS, 3.0))


def test_every_clip_has_a_part_in_every_span_and_its_tokens_come_once() -> None:
    seen: dict[int, list[int]] = {}
    for span in SPANS:
        parts = list(clip_parts(PACKS, span))
        assert [part.number for part in parts] == [0, 1, 2, 3]
        for part in parts:
            assert 0 <= part.start <= part.stop <= span.tokens
            assert part.tokens == 0 or span.start + part.start == part.clip.start + part.first
            seen.setdefault(part.number, []).extend(range(part.first, part.first + part.tokens))
    assert seen == {part.number: list(range(part.clip.tokens)) for part in clip_parts(PACKS, whole(PACKS))}


def test_attention_to_captions_of_spans_is_that_of_the_whole() -> None:
    queries = torch.randn(24, 3, 2, 6, dtype=torch.float64)
    keys, values = torch.randn(2, 5, 4, 2, 6, dtype=torch.float64)
    got = torch.cat([cross_attention(queries[s.start : s.stop], keys, values, PACKS, s) for s in SPANS if s.tokens])
    want = torch.zeros_like(queries)
    for part in clip_parts(PACKS, whole(PACKS)):
        here = (slice(part.start, part.stop), part.row)
        want[here] = dense_attention(queries[here], keys[:, part.number], values[:, part.number])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_span_of_padding_gives_every_input_a_gradient_of_zero() -> None:
    inputs = [torch.randn(4, 3, 2, 6), torch.randn(5, 4, 2, 6), torch.randn(5, 4, 2, 6)]
    for x in inputs:
        x.requires_grad_()
    out = cross_attention(*inputs, (PACKS[2],) * 3, Span(20, 24))
    out.sum().backward()
    assert not out.any()
    assert all(x.grad is not None and not x.grad.any() for x in inputs)
