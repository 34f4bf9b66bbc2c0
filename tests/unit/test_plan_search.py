"""The search against a slow twin that tries everything, and what it says of those that lose."""

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from megavid.config.load import load_run
from megavid.config.schema import PrecisionConfig, RunConfig
from megavid.errors import ConfigError
from megavid.plan.bounds import RECOMPUTE, STRATEGIES
from megavid.plan.calibration import gpu_calibration
from megavid.plan.enumerate import Space
from megavid.plan.hardware import Hardware, hardware
from megavid.plan.job import Job
from megavid.plan.layout import layout_of
from megavid.plan.memory import worst_memory
from megavid.plan.search import search
from megavid.plan.time import step_time
from megavid.plan.workload import workload_of_clip

CLIP = (17, 256, 256)
H100 = hardware("h100-80gb")
CALIBRATION = gpu_calibration()


def small(family: str, **train: Any) -> RunConfig:
    """Eight blocks of a large model, so that layouts differ and trying everything takes seconds."""
    config = load_run({"wan": "wan_1b", "wan_moe": "wan_moe_7b_a2b"}[family], [])
    model = replace(config.model, num_layers=8)
    return replace(config, model=model, train=replace(config.train, global_batch_size=16, **train))


def on(gpu: Hardware) -> Job:
    """Eight of them."""
    return Job(8, gpu, CALIBRATION)


def tight(gib: float) -> Hardware:
    """An H100 with less memory, so that some layouts do not fit."""
    return replace(H100, memory_bytes=int(gib * 2**30))


@cache
def everything(family: str, world: int) -> list[tuple[float, int]]:
    """The slow twin: every value of every key, no bound, no order; step times and bytes of all that is legal."""
    config = small(family)
    found = []
    sizes = (1, 2, 4, 8)
    degrees = (sizes, sizes, sizes, sizes, sizes, sizes)
    kinds = (("auto", *STRATEGIES), RECOMPUTE, (1, 2, 4), ("auto", False))
    for tp, cp, pp, ep, etp, vpp, strategy, recompute, micro, sequence in itertools.product(*degrees, *kinds):
        if (cp == 1) != (strategy == "auto") or tp * cp * pp > world or ep * etp * pp > world:
            continue
        try:
            parallel = replace(
                config.parallel, tensor=tp, context=cp, pipeline=pp, expert=ep, expert_tensor=etp, virtual_pipeline=vpp,
                context_strategy=strategy, recompute=recompute, sequence=sequence,
                overlap_grad_reduce=True, overlap_param_gather=True,
            )  # fmt: skip
            trial = replace(config, parallel=parallel, train=replace(config.train, micro_batch_size=micro))
            workload = workload_of_clip(trial, *CLIP)
            trial = replace(trial, data=replace(trial.data, pack_tokens=workload.pack_tokens))
            layout = layout_of(trial, world)
        except ConfigError:
            continue
        seconds = step_time(trial, layout, workload, H100, CALIBRATION).total
        found.append((seconds, worst_memory(trial, layout, workload)[1].total))
    return found


@pytest.mark.parametrize(("family", "gib"), [("wan", 80), ("wan", 12), ("wan_moe", 60), ("wan_moe", 22)])
def test_the_best_is_the_best_of_everything(family: str, gib: float) -> None:
    config, gpu = small(family), tight(gib)
    slow = [seconds for seconds, size in everything(family, 8) if size <= gpu.memory_bytes * 0.95]
    fast = search(config, CLIP, on(gpu))
    assert len(slow) > 20
    assert fast.candidates[0].answer.time.total == pytest.approx(min(slow), rel=1e-12)
    assert all(candidate.answer.fits for candidate in fast.candidates)


@pytest.mark.parametrize(
    ("family", "recipe"), [("wan", "off"), ("wan_moe", "off"), ("wan", "mxfp8"), ("wan_moe", "tensorwise")]
)
def test_no_bound_is_above_what_it_bounds(family: str, recipe: str) -> None:
    config = replace(small(family), precision=PrecisionConfig(dtype="bf16", fp8=recipe))
    space = Space(config, Job(8, tight(1000), CALIBRATION, headroom=0.0), CLIP)
    points = space.points()
    memory_seen = 0
    for point in points[:: max(1, len(points) // 150)]:
        for trial in space.trials(point):
            seconds = step_time(trial.config, trial.layout, trial.workload, H100, CALIBRATION).total
            assert point.floor_s <= seconds * (1 + 1e-9), trial.layout.describe()
            total = worst_memory(trial.config, trial.layout, trial.workload)[1].total
            assert space.memory_floor(point) <= total, trial.layout.describe()
            memory_seen += 1
    assert memory_seen > 100


def test_runners_up_come_with_the_reason_why_they_lose() -> None:
    found = search(small("wan_moe"), CLIP, on(H100), runners_up=4)
    assert len(found.candidates) == 5
    assert found.candidates[0].reason == "the best"
    times = [candidate.answer.time.total for candidate in found.candidates]
    assert times == sorted(times)
    for candidate, seconds in zip(found.candidates[1:], times[1:]):
        is_tie = seconds < times[0] * 1.0005
        assert ("% slower: " in candidate.reason) != is_tie


def test_what_would_be_faster_but_does_not_fit_is_named_with_what_it_lacks() -> None:
    roomy = search(small("wan_moe"), CLIP, on(tight(80)))
    needs = roomy.candidates[0].answer.memory.total / 2**30
    found = search(small("wan_moe"), CLIP, on(tight(0.8 * needs)))
    assert found.too_large
    best = found.candidates[0].answer
    for candidate in found.too_large:
        assert not candidate.answer.fits
        assert candidate.answer.time.total < best.time.total
        assert "GiB too large" in candidate.reason


def test_where_nothing_fits_the_smallest_layout_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no layout of 8 GPUs (fits|is legal)"):
        search(small("wan_moe"), CLIP, on(tight(4)))


def test_the_global_batch_bounds_data_parallelism_and_the_notes_say_so() -> None:
    config = small("wan")
    config = replace(config, train=replace(config.train, global_batch_size=4))
    found = search(config, CLIP, on(H100))
    assert all(candidate.answer.layout.dp <= 4 for candidate in found.candidates)
    assert any("train.global_batch_size = 4 packs bounds data parallelism" in note for note in found.notes)


def test_keys_that_are_pinned_keep_their_values() -> None:
    config = small("wan_moe")
    config = replace(config, parallel=replace(config.parallel, tensor=2, recompute="full", overlap_grad_reduce=False))
    pinned = ("parallel.tensor", "parallel.recompute", "parallel.overlap_grad_reduce", "train.micro_batch_size")
    for candidate in search(config, CLIP, on(H100), pinned=pinned).candidates:
        parallel = candidate.answer.config.parallel
        assert (parallel.tensor, parallel.recompute, parallel.overlap_grad_reduce) == (2, "full", False)
        assert candidate.answer.config.train.micro_batch_size == config.train.micro_batch_size
    with pytest.raises(ConfigError, match=r"with parallel\.tensor as given is legal"):
        search(replace(config, parallel=replace(config.parallel, tensor=3)), CLIP, on(H100),
               pinned=("parallel.tensor",))  # fmt: skip


def test_packs_hold_one_clip_and_divide_by_the_ranks_that_share_them() -> None:
    for candidate in search(small("wan"), CLIP, on(H100)).candidates:
        answer = candidate.answer
        assert len(answer.workload.clip_tokens) == 1
        assert answer.workload.pack_tokens % (answer.layout.tp * answer.layout.cp) == 0
        assert answer.config.data.pack_tokens == answer.workload.pack_tokens
