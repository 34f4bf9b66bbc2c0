"""The generator: known answers, slices of one stream, boxes of one tensor, and the two distributions."""

import math

import pytest
import torch

from megavid.ops import philox as module
from megavid.ops.philox import Key, key_of, normal, normal_box, philox, uniform, uniform_at

KEY: Key = (0xA4093822, 0x299F31D0)

# Random123's own known-answer table (kat_vectors, philox4x32-10): counter, key, block.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "block"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, block):
    assert philox(counter, key) == block


@pytest.mark.parametrize(("counter", "key", "block"), KNOWN_ANSWERS)
def test_tensor_rounds_give_the_known_answers(counter, key, block):
    words = [torch.tensor([word, word]) for word in counter]
    assert [int(word[1]) for word in module.philox_rounds(*words, key)] == list(block)


@pytest.mark.parametrize("index", [0, 1, 5, 2**31, 2**32 - 1, 2**32, 100_000_000_003, 2**62])
def test_tensor_code_equals_plain_integers_at_any_counter(index):
    assert uniform(KEY, index, 3)[0] == uniform_at(KEY, index)
    w0, w1, w2, w3 = philox((index & 0xFFFFFFFF, index >> 32, 1, 0), KEY)
    expected = []
    for radius_word, angle_word in ((w0, w1), (w2, w3)):
        radius = math.sqrt(-2 * math.log((radius_word + 0.5) / 2**32))
        angle = 2 * math.pi * (angle_word + 0.5 - 2**29) / 2**32
        # The top two bits are whole quarter turns, so the angle inside one starts an eighth of a turn early.
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    if index < 2**61:
        torch.testing.assert_close(normal(KEY, 4 * index, 4), torch.tensor(expected), rtol=1e-6, atol=1e-7)


def test_slices_equal_the_slice_of_the_whole(monkeypatch):
    whole, whole_uniform = normal(KEY, 0, 5000), uniform(KEY, 0, 5000)
    monkeypatch.setattr(module, "_CHUNK_CPU", 64)
    for start, count in ((0, 1), (3, 2), (1, 4), (17, 999), (250, 260), (4000, 1000), (7, 0)):
        assert torch.equal(normal(KEY, start, count), whole[start : start + count])
        assert torch.equal(uniform(KEY, start, count), whole_uniform[start : start + count])


def test_normal_is_the_same_on_any_number_of_threads():
    threads = torch.get_num_threads()
    try:
        draws = []
        for count in (1, 2):
            torch.set_num_threads(count)
            draws.append(normal(KEY, 1, 70_000))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*draws)


@pytest.mark.parametrize("chunk", [8, 1 << 14])
@pytest.mark.parametrize(
    ("shape", "offset", "extent"),
    [
        ((7,), (2,), (5,)),
        ((9, 13), (2, 0), (5, 13)),
        ((9, 13), (0, 4), (9, 6)),
        ((9, 12), (1, 4), (8, 4)),
        ((9, 13), (3, 3), (1, 1)),
        ((4, 5, 6, 7), (1, 2, 0, 3), (2, 3, 6, 2)),
        ((4, 5, 6, 7), (1, 2, 3, 0), (3, 2, 3, 7)),
        ((3, 200), (1, 50), (2, 101)),
        ((3, 4), (1, 1), (0, 2)),
        ((), (), ()),
    ],
)
def test_box_equals_the_box_of_the_whole(monkeypatch, chunk, shape, offset, extent):
    whole = normal(KEY, 0, math.prod(shape)).view(shape)
    monkeypatch.setattr(module, "_CHUNK_CPU", chunk)
    index = tuple(slice(low, low + size) for low, size in zip(offset, extent))
    assert torch.equal(normal_box(KEY, shape, offset, extent), whole[index])


def test_box_far_into_a_huge_tensor_draws_only_its_part():
    shape = (40, 50_000, 50_000)  # 1e11 elements
    box = normal_box(KEY, shape, (39, 49_999, 49_000), (1, 1, 1000))
    assert torch.equal(box.flatten(), normal(KEY, math.prod(shape) - 1000, 1000))


def test_box_outside_its_tensor_is_refused():
    with pytest.raises(ValueError, match=r"box at \(2, 0\) of \(2, 3\) must lie in a tensor of \(3, 3\)"):
        normal_box(KEY, (3, 3), (2, 0), (2, 3))


def test_normal_has_the_moments_and_the_distribution_of_a_normal():
    x = normal(key_of(1234, "moments"), 0, 1 << 19).double()
    n = x.numel()
    for power, value, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - value) < 4 * math.sqrt(variance / n)
    cdf = torch.special.ndtr(x.sort().values)
    distance = (cdf - torch.arange(1, n + 1) / n).abs().max()
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at 0.1%
    lanes = x.view(-1, 4)
    assert torch.corrcoef(lanes.T).sub(torch.eye(4)).abs().max() < 4 / math.sqrt(n / 4)


def test_uniform_stays_inside_and_is_flat():
    u = uniform(key_of(1234, "flat"), 0, 1 << 17)
    assert u.min() > 0
    assert u.max() < 1
    counts = torch.histc(u, bins=16, min=0, max=1)
    expected = u.numel() / 16
    assert float(((counts - expected) ** 2 / expected).sum()) < 37.7  # chi-squared, 15 degrees, 0.1%


def test_keys_tell_their_parts_apart():
    keys = [key_of(1, "2"), key_of("1", 2), key_of("12"), key_of(12), key_of("1", "2"), key_of(1, 2), key_of(-1)]
    assert len(set(keys)) == len(keys)
    assert key_of(1234, "noise", 7) == key_of(1234, "noise", 7)
    assert all(0 <= word < 2**32 for key in keys for word in key)
