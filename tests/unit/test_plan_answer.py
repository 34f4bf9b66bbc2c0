"""What binds and what to try: every part of a step has a cause, and advice is true where it can be checked."""

import re
from typing import Any

import pytest

from megavid.config.load import load_run
from megavid.plan.advice import CAUSES, causes_of, input_seconds
from megavid.plan.answer import Answer, plan_run
from megavid.plan.calibration import gpu_calibration
from megavid.plan.critical_path import AXIS_PARTS
from megavid.plan.flops import PARTS
from megavid.plan.hardware import hardware
from megavid.plan.job import Job
from megavid.plan.layout import layout_of
from megavid.plan.workload import workload_of_clip
from tests.support.flagship import PLAIN

H100 = hardware("h100-80gb")


def plan(preset: str, world: int, *flags: str, **options: Any) -> Answer:
    config = load_run(preset, flags)
    workload = workload_of_clip(config, 81, 480, 832)
    return plan_run(config, workload, Job(world, H100, gpu_calibration(), **options))


def test_every_part_of_a_step_has_one_cause() -> None:
    causes = [part for parts in CAUSES.values() for part in parts]
    assert len(causes) == len(set(causes))
    known = {*PARTS, *AXIS_PARTS.values(), "recompute", "glue", "imbalance", "host", "bubble", "optimizer"}
    assert set(causes) == known


def test_causes_add_up_to_the_step() -> None:
    time = plan("wan_moe_100b_a20b", 1024).time
    causes = causes_of(time)
    assert sum(causes.values()) == pytest.approx(time.total)
    assert set(causes) == set(CAUSES)
    assert list(causes.values()) == sorted(causes.values(), reverse=True)


def test_few_microbatches_make_the_bubble_bind_and_more_chunks_are_advised() -> None:
    found = plan("wan_moe_100b_a20b", 1024, *PLAIN, "--parallel.pipeline", "8", "--parallel.tensor", "4",
                 "--train.global_batch_size", "256")  # fmt: skip
    assert found.binding.name == "bubble"
    assert found.binding.share == pytest.approx(found.time.parts["bubble"] / found.time.total)
    advice = next(text for text in found.binding.advice if "bubble" in text)
    chunks = re.search(r"virtual_pipeline = (\d+)", advice)
    assert chunks
    better = plan("wan_moe_100b_a20b", 1024, *PLAIN, "--parallel.pipeline", "8", "--parallel.tensor", "4",
                  "--train.global_batch_size", "256", "--parallel.virtual_pipeline", chunks[1])  # fmt: skip
    assert better.time.parts["bubble"] < found.time.parts["bubble"]
    assert better.time.total < found.time.total


def test_where_memory_binds_the_first_advice_fits() -> None:
    found = plan("wan_14b", 64, "--parallel.recompute", "none", "--parallel.tensor", "2")
    assert not found.fits
    assert found.binding.name == "memory"
    mode = re.search(r"parallel\.recompute = '(\w+)' needs .* and fits", found.binding.advice[0])
    assert mode
    assert plan("wan_14b", 64, "--parallel.recompute", mode[1], "--parallel.tensor", "2").fits


def test_advice_on_recomputation_is_checked_against_memory() -> None:
    found = plan("wan_14b", 64, "--parallel.recompute", "full")
    advice = [text for text in found.binding.advice if "recompute" in text]
    assert "parallel.recompute = 'selective' fits" in advice[0]
    assert plan("wan_14b", 64, "--parallel.recompute", "selective").fits


def test_reading_is_shared_by_the_ranks_of_a_node_and_grows_with_what_a_replica_takes() -> None:
    config = load_run("wan_14b", ["--parallel.tensor", "8"])
    workload = workload_of_clip(config, 81, 480, 832)
    many, few = layout_of(config, 64), layout_of(config, 8)
    assert input_seconds(config, few, workload) == pytest.approx(8 * input_seconds(config, many, workload))
    wide = load_run("wan_14b", ["--parallel.tensor", "4"])
    assert input_seconds(wide, layout_of(wide, 64), workload) == pytest.approx(input_seconds(config, many, workload))


def test_days_follow_the_budget_and_the_interval_of_the_mfu() -> None:
    found = plan("wan_1b", 8, budget_tokens=1e11)
    assert found.days(with_failures=False) == pytest.approx(1e11 / found.tokens_per_s / 86400)
    assert found.days(mfu=found.mfu / 2) == pytest.approx(2 * found.days())
    fast, slow = found.step_interval
    assert fast < found.time.total < slow


def test_hfu_is_above_mfu_by_what_is_computed_again() -> None:
    none, full = (plan("wan_1b", 8, "--parallel.recompute", mode) for mode in ("none", "full"))
    assert none.hfu / none.mfu == pytest.approx(1.0, abs=0.01)  # padding alone
    assert full.hfu / full.mfu == pytest.approx(4 / 3, abs=0.01)


def test_fp8_is_planned_as_what_it_runs_on_and_says_what_it_assumes() -> None:
    plain, narrow, tiles = (
        plan("wan_14b", 64, "--parallel.tensor", "4", "--precision.fp8", kind)
        for kind in ("off", "tensorwise", "mxfp8")
    )
    assert narrow.time.parts["dense_ffn"] < plain.time.parts["dense_ffn"] < tiles.time.parts["dense_ffn"]
    assert tiles.time.total > 2 * plain.time.total
    assert narrow.mfu == pytest.approx(plain.mfu * plain.time.total / narrow.time.total)  # of the bf16 peak, both
    assert [[note for note in found.notes if "precision.fp8" in note] != [] for found in (plain, narrow)] == [
        False,
        True,
    ]
    assert any("an assumption: products in FP8 were not measured" in note for note in narrow.notes)
    assert any("products with tiles of 32 on h100-80gb are turned back to wide numbers" in note for note in tiles.notes)


def test_compiled_ops_are_advised_where_they_are_off_and_said_not_to_be_timed_where_they_are_on() -> None:
    plain, compiled = (plan("wan_1b", 8, "--train.ops", ops) for ops in ("reference", "compiled"))
    assert compiled.time.total == plain.time.total
    assert any("train.ops = 'auto'" in text for text in plain.binding.advice)
    assert not any("operators" in text or "train.ops" in text for text in compiled.binding.advice)
    assert [[note for note in found.notes if "train.ops" in note] != [] for found in (plain, compiled)] == [False, True]
