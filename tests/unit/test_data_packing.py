"""Packs of a run: every draw once and soon, inside the pack, with no overlap, and the same from any position."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
import pytest

from megavid.config.load import load_run
from megavid.config.schema import RunConfig
from megavid.data.order import SampleOrder
from megavid.data.packing import LOOK_AHEAD, PackPosition, PackStream, Slot, kinds_of, next_fit
from megavid.data.sample import Shape
from megavid.errors import ConfigError, DataError
from megavid.plan.flops import forward_flops
from tests.support.data_stubs import IMAGE, LONG, MIXED, SHORT, StubSource, stub_config
from tests.unit.test_training_metrics import load_tool

bench_packing = load_tool("bench_packing")

Runs = Sequence[tuple[Shape, int]]
Step = tuple[tuple[Slot, ...], ...]


def of(tokens: int) -> Shape:
    """A shape of so many tokens."""
    return (4, 1, 2, 2 * tokens)


DATA: dict[str, tuple[Runs, int]] = {
    "a mixture": (MIXED, 192),
    "a mixture, roomy": (MIXED, 1000),
    "tight: the longest fills a pack": (MIXED, 180),
    "one size": ([(of(40), 50)], 100),
    "one size that fills a pack": ([(of(100), 50)], 100),
    "longer than half a pack": ([(of(60), 30), (of(55), 20), (of(52), 9)], 100),
    "images only": ([(of(4), 40), (of(6), 30), (of(9), 25)], 192),
    "few long clips": ([(of(10), 300), (of(90), 3)], 192),
    "much room that nothing fills": ([(of(51), 30), (of(33), 20)], 100),
    "many sizes": ([(of(size), 2) for size in range(5, 100, 3)], 100),
}
BATCHES = (1, 2, 3, 8, 40)


def config_of(pack_tokens: int = 192, packs: int = 8) -> RunConfig:
    config = stub_config(pack_tokens=pack_tokens)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_size=packs))


def stream(runs: Runs = MIXED, pack_tokens: int = 192, packs: int = 8) -> PackStream:
    return PackStream(SampleOrder(StubSource(runs), 7), config_of(pack_tokens, packs), "the stub")


def tokens_of_draws(runs: Runs, draws: int) -> list[int]:
    source = StubSource(runs)
    shapes = [source.shape(index) for index in SampleOrder(source, 7).samples(np.arange(draws)).tolist()]
    return [int(np.prod(shape[1:])) // 4 for shape in shapes]


@pytest.mark.parametrize("packs", BATCHES)
@pytest.mark.parametrize("name", DATA)
def test_packs_fit_do_not_overlap_and_take_every_draw_once_and_soon(name: str, packs: int) -> None:
    runs, pack_tokens = DATA[name]
    packing = stream(runs, pack_tokens, packs)
    steps, positions = [], []
    for _ in range(max(120 // packs, 10)):
        steps.append(packing.next())
        positions.append(packing.position)
    end = packing.position
    tokens = tokens_of_draws(runs, end.next_draw)
    step_of = {}
    for number, step in enumerate(steps):
        assert len(step) == packs
        for slots in step:
            assert slots, "no pack is empty where clips are plenty"
            assert [slot.start for slot in slots] == [sum(tokens[s.draw] for s in slots[:n]) for n in range(len(slots))]
            assert slots[-1].start + tokens[slots[-1].draw] <= pack_tokens
            for slot in slots:
                assert slot.draw not in step_of
                step_of[slot.draw] = number
    assert sorted([*step_of, *end.waiting]) == list(range(end.next_draw))
    seen_in = np.searchsorted([position.next_draw for position in positions], sorted(step_of), side="right")
    waited = [step_of[draw] - seen for draw, seen in zip(sorted(step_of), seen_in.tolist(), strict=True)]
    assert max(waited) <= 4 + (packs + LOOK_AHEAD) / packs
    for position in positions:
        assert len(position.waiting) < packs + LOOK_AHEAD
        assert list(position.waiting) == sorted(position.waiting)


@pytest.mark.parametrize("name", DATA)
def test_position_is_found_from_the_number_or_from_any_earlier_position(name: str) -> None:
    runs, pack_tokens = DATA[name]
    straight = stream(runs, pack_tokens)
    positions, following = [], []
    for _ in range(16):
        positions.append(PackPosition.from_json(json.loads(json.dumps(straight.position.to_json()))))
        following.append(straight.next())
    for step in range(16):
        other = stream(runs, pack_tokens)
        other.seek(step, positions[step])
        assert other.next() == following[step]
    for steps, start in ((13, None), (13, positions[10]), (5, positions[10]), (0, None)):
        other = stream(runs, pack_tokens)
        other.seek(steps, start)
        assert other.position == positions[steps]
        assert other.next() == following[steps]
        other.seek(3)
        assert other.next() == following[3]


def test_position_survives_json() -> None:
    position = PackPosition(3, 17, (12, 14))
    assert PackPosition.from_json(position.to_json()) == position
    with pytest.raises(DataError, match="not a position of packs"):
        PackPosition.from_json({"packs": 3})


def test_packs_are_the_same_in_another_process() -> None:
    program = (
        "from tests.unit.test_data_packing import *\n"
        "packs = stream()\nprint([[s.draw for s in p] for _ in range(5) for p in packs.next()])"
    )
    packs = stream()
    expected = [[slot.draw for slot in slots] for _ in range(5) for slots in packs.next()]
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "5"}
    ).stdout
    assert output.strip() == str(expected)


def padding(runs: Runs, pack_tokens: int, packs: int, steps: int = 10) -> float:
    packing = stream(runs, pack_tokens, packs)
    filled = [packing.next() for _ in range(steps)]
    tokens = tokens_of_draws(runs, packing.position.next_draw)
    used = sum(tokens[slot.draw] for step in filled for slots in step for slot in slots)
    return 1 - used / (pack_tokens * packs * steps)


def test_packs_are_filled_as_far_as_sizes_allow() -> None:
    assert padding([(of(40), 50)], 100, 8) == pytest.approx(0.2)
    assert padding([(of(51), 20), (of(33), 20)], 100, 8) == pytest.approx(0.16)
    assert padding([(of(25), 50)], 100, 8) == 0
    assert padding([(IMAGE, 100), (SHORT, 100), (LONG, 100)], 384, 8) < 0.05
    for packs in BATCHES:
        assert padding([(of(4), 40), (of(6), 30), (of(9), 25)], 192, packs) < 0.02
        assert padding([(of(size), 2) for size in range(5, 51, 3)], 192, packs) < 0.04


def test_clips_of_one_size_stay_in_order() -> None:
    packs = stream([(of(40), 50)], 100, 3)
    assert [[slot.draw for slot in slots] for slots in packs.next()] == [[0, 1], [2, 3], [4, 5]]
    assert packs.next()[0] == (Slot(6, 0), Slot(7, 40))


def test_long_clips_are_spread_before_any_pack_has_two() -> None:
    runs = [(of(10), 600), (of(90), 40)]
    packs = stream(runs, 192, 24)
    step = packs.next()
    tokens = tokens_of_draws(runs, packs.position.next_draw)
    long_clips = [sum(tokens[slot.draw] == 90 for slot in slots) for slots in step]
    assert sum(long_clips) == 19, "fewer than packs"
    assert max(long_clips) == 1


def test_cost_of_a_clip_is_its_flops_linear_and_quadratic() -> None:
    model = load_run("wan_14b", []).model
    kinds = kinds_of(model, [1560, 32760, 390, 1560], 65568)
    assert kinds.tokens_K.tolist() == [32760, 1560, 390]
    ratio = forward_flops(model, [32760]).total / forward_flops(model, [390]).total
    assert ratio > 1.5 * 84, "attention is a third of it"
    assert kinds.work_K[0] / kinds.work_K[2] == pytest.approx(ratio)
    idle = forward_flops(model, [], padding=65568).total
    clips = forward_flops(model, [32760, 1560], padding=65568 - 34320).total
    assert (kinds.padding_work + kinds.excess_K[:2].sum()) / kinds.padding_work == pytest.approx(clips / idle)


def test_clip_longer_than_a_pack_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"data.pack_tokens = 96 must be at least 180"):
        stream(pack_tokens=96)


def test_clip_that_the_patch_does_not_divide_is_an_error() -> None:
    with pytest.raises(DataError, match=r"multiples of patch_size"):
        stream([((4, 1, 9, 8), 3)])


def test_next_fit_keeps_order() -> None:
    assert next_fit([4, 4, 3, 9, 1], 10) == [[(0, 0), (1, 4)], [(2, 0)], [(3, 0), (4, 9)]]


@pytest.mark.parametrize(("microbatches", "micro_batch_size"), [(1, 1), (4, 1), (2, 2), (16, 1)])
@pytest.mark.parametrize(("preset", "clips"), [("tiny", "small"), ("wan_14b", "480p")])
def test_packs_of_a_mixture_are_full_and_even(
    preset: str, clips: str, microbatches: int, micro_batch_size: int
) -> None:
    """Half images, 40% short, 10% long, three resolutions, 8 ranks, the longest clip half a pack; the worst step."""
    source = bench_packing.source_of(clips)
    config = bench_packing.run_config(preset, source, 8, microbatches, micro_batch_size)
    steps, _ = bench_packing.packed(config, source, 12)
    longest = max(tokens for step in steps for pack in step.packs for tokens in pack)
    assert longest <= config.data.pack_tokens / 2
    figures = bench_packing.measure(config.model, steps, 8, micro_batch_size)
    assert figures.padding.max() < 0.03
    assert figures.ranks.max() < 1.10
    assert figures.microbatches.max() < 1.10
    if microbatches >= 4:
        assert figures.ranks.max() < 1.04, "heavy and light packs alternate"
    rows = bench_packing.measure(config.model, bench_packing.one_per_row(config, source, 12), 8, micro_batch_size)
    assert rows.padding.min() > 0.5
    assert rows.microbatches.min() > 1.5
    assert figures.efficiency.min() > 2 * rows.efficiency.max()


def test_packs_of_a_run_have_swapped_clips() -> None:
    source = bench_packing.source_of("small")
    config = bench_packing.run_config("tiny", source, 8, 4, 1)
    figures = bench_packing.measure(config.model, bench_packing.packed(config, source, 12)[0], 8, 1)
    assert figures.microbatches.max() < 1.025, "1.03 without swaps"


def test_table_of_the_tool(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_packing.main(["--ranks", "2", "--steps", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["one", "clip", "per", "row", "packs"]
    assert [line.split("  ")[0] for line in lines[4:7]] == ["padding", "ranks, max / mean", "microbatches, max / mean"]
    assert bench_packing.main(["--pack-tokens", "96"]) == 2
    assert "data.pack_tokens = 96 must be at least 180" in capsys.readouterr().err


def test_packs_of_a_thousand_are_filled_in_well_under_a_second() -> None:
    source = bench_packing.source_of("480p")
    config = bench_packing.run_config("wan_14b", source, 64, 16, 1)
    packs = PackStream(SampleOrder(source, 1), config, source.name)
    times = []
    for _ in range(3):
        started = time.process_time()
        packs.next()
        times.append(time.process_time() - started)
    assert min(times) < 1.0
