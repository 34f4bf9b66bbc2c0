"""The order of samples: a permutation in every epoch, evenly mixed, without a list, and the same in every process."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from megavid.data.order import SampleOrder, held_out_samples
from megavid.data.permutation import Permutation
from megavid.errors import ConfigError
from tests.support.data_stubs import IMAGE, LONG, MIXED, SHORT, StubSource


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 17, 64, 100, 4097])
def test_permutation_hits_every_place_once(size: int) -> None:
    images = Permutation(size, 3, "a")(np.arange(size, dtype=np.int64))
    assert sorted(images.tolist()) == list(range(size))


def test_permutation_of_six_is_even_over_keys() -> None:
    counts = np.zeros((6, 6))
    for key in range(1200):
        counts[np.arange(6), Permutation(6, key)(np.arange(6, dtype=np.int64))] += 1
    # 200 expected in each cell, deviation 13: five of them.
    assert np.abs(counts - 200).max() < 65


def test_permutation_of_a_billion_needs_no_list() -> None:
    permute = Permutation(10**9, 1, "big")
    places = np.arange(10**9 - 2000, 10**9, dtype=np.int64)
    images = permute(places)
    assert len(set(images.tolist())) == 2000
    assert images.min() >= 0
    assert images.max() < 10**9
    assert permute(places[:1]) == images[0]


def test_order_takes_every_training_sample_once_in_every_epoch() -> None:
    source = StubSource(MIXED)
    held = held_out_samples(source, 5)
    order = SampleOrder(source, 7, held)
    epochs = [order.samples(np.arange(order.epoch_size) + epoch * order.epoch_size) for epoch in range(3)]
    for epoch in epochs:
        assert sorted([*epoch.tolist(), *held]) == list(range(len(source)))
    assert epochs[0].tolist() != epochs[1].tolist()
    assert SampleOrder(source, 8, held).samples(np.arange(9)).tolist() != epochs[0][:9].tolist()


def test_order_of_any_draws_is_that_of_the_whole() -> None:
    order = SampleOrder(StubSource(MIXED), 7)
    whole = order.samples(np.arange(200))
    chosen = np.array([199, 3, 41, 40, 120])
    assert order.samples(chosen).tolist() == whole[chosen].tolist()
    assert [next(order.substitutes(draw)) for draw in range(200)] == whole.tolist()


def test_buckets_mix_evenly() -> None:
    order = SampleOrder(StubSource([(IMAGE, 500), (SHORT, 300), (LONG, 200)]), 1)
    number, _ = order.places(np.arange(1000))
    for bucket, size in enumerate(order.sizes):
        given = np.cumsum(number == bucket)
        assert np.abs(given - np.arange(1, 1001) * size / 1000).max() <= 1.5


def test_neighbours_are_not_of_neighbouring_sizes() -> None:
    """Many buckets of as many samples, as a data set of clips of any length has: each turn of them is shuffled."""
    order = SampleOrder(StubSource([((4, 1, 2, 2 * size), 10) for size in range(1, 401)]), 1)
    widths = np.array([shape[3] for shape in order.shapes])[order.places(np.arange(400))[0]]
    assert sorted(widths.tolist()) == list(range(2, 801, 2))
    assert abs(np.corrcoef(widths[1:], widths[:-1])[0, 1]) < 0.15
    means = widths.reshape(10, 40).mean(1)
    assert means.max() < 1.3 * means.min()


def test_order_of_a_billion_samples_takes_no_list() -> None:
    tracemalloc.start()
    source = StubSource([(IMAGE, 5 * 10**8), (SHORT, 3 * 10**8), (LONG, 2 * 10**8)])
    order = SampleOrder(source, 1, held_out_samples(source, 64))
    samples = order.samples(np.arange(3 * 10**9, 3 * 10**9 + 5000))
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert len(set(samples.tolist())) >= 4998
    assert order.epoch_size == 10**9 - 64


def test_held_out_samples_do_not_depend_on_the_seed_and_leave_something() -> None:
    source = StubSource(MIXED)
    held = held_out_samples(source, 6)
    assert len(set(held)) == 6
    for seed in (1, 2):
        order = SampleOrder(source, seed, held)
        assert not set(order.samples(np.arange(order.epoch_size)).tolist()) & set(held)
    with pytest.raises(ConfigError, match=r"data.validation_samples = 41 must be below the 41 clips of the stub"):
        held_out_samples(source, len(source))


def test_substitutes_are_of_the_same_shape_first_and_then_fit() -> None:
    source = StubSource(MIXED)
    order = SampleOrder(source, 7)
    for draw in range(41):
        candidates = list(order.substitutes(draw))
        shapes = [source.shape(index) for index in candidates]
        same = shapes.count(shapes[0])
        assert len(set(candidates)) == len(candidates)
        assert shapes[:same] == [shapes[0]] * order.sizes[order.shapes.index(shapes[0])]
        assert all(a <= b for shape in shapes for a, b in zip(shape, shapes[0], strict=True))


def test_order_is_the_same_in_another_process() -> None:
    program = (
        "import numpy as np\nfrom tests.support.data_stubs import *\nfrom megavid.data.order import *\n"
        "order = SampleOrder(StubSource(MIXED), 7)\nprint(order.samples(np.arange(60)).tolist(), order.fingerprint())"
    )
    order = SampleOrder(StubSource(MIXED), 7)
    outputs = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "5"}
    ).stdout
    assert outputs.strip() == f"{order.samples(np.arange(60)).tolist()} {order.fingerprint()}"
