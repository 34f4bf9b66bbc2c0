"""The arithmetic of a profile's report, the peak's name, the clock of collectives, the regions, forced balance."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megavid.config.load import load_run
from megavid.ops.moe_math import round_robin
from megavid.ops.regions import PREFIX, in_region, region, regions_on
from megavid.plan.calibration import gpu_calibration
from megavid.plan.flops import Flops
from megavid.plan.hardware import Hardware, hardware
from megavid.plan.layout import layout_of
from megavid.profiling.attribution import Owner, Split
from megavid.profiling.charts import binary, pairs_chart, seconds, ticks
from megavid.profiling.page import _prediction
from megavid.profiling.peak import Peak, machine_of
from megavid.profiling.prediction import prediction_rows
from megavid.profiling.records import RankRecord
from megavid.profiling.report import RunFigures, StepFigures, percentiles, run_report, slowest
from megavid.profiling.waits import WaitClock
from megavid.training.callbacks import speed_figures


def record(rank: int, waiting_s: float, step_s: float = 2.0) -> RankRecord:
    split = Split(
        step_s,
        {
            Owner("forward", "dense_ffn", "operators"): step_s - waiting_s,
            Owner("communication", "dp", "host"): waiting_s,
        },
    )
    return RankRecord(
        rank=rank,
        host=f"node{rank}",
        coordinates={"tp": 0, "cp": 0, "dp": rank, "pp": 0, "edp": rank},
        step_s=[step_s, step_s],
        data_wait_s=[0.0, 0.1],
        clip_tokens=[[8], [8]],
        wait_s={"dp": 2 * waiting_s},
        splits=[split],
    )


def test_slowest_rank_is_the_one_that_waits_least() -> None:
    found = slowest([record(0, 0.5), record(1, 0.1), record(2, 0.5)])
    assert (found["rank"], found["host"]) == (1, "node1")
    assert found["over_median"] == pytest.approx(1.9 / 1.5 - 1)


def test_rates_and_percentiles_follow_from_times() -> None:
    step = StepFigures(tokens=100, clips=4, model_flops=6e12, hardware_flops=8e12)
    flops = Flops({"dense_ffn": 2e12})
    run = RunFigures(
        routing="real", steps=[step, step], ranks=[record(0, 0.5), record(1, 0.0)], counts={}, forward=flops,
        recompute=Flops({}), pack_tokens=128,
    )  # fmt: skip
    table = run_report(run, Peak(6e12, "fp32", "a test", True))
    assert table["mfu"] == pytest.approx(6e12 / 2.0 / 2 / 6e12)
    assert table["hfu"] == pytest.approx(8e12 / 2.0 / 2 / 6e12)
    assert (table["tflops_per_rank"], table["tokens_per_s"]) == pytest.approx((1.5, 50.0))
    assert table["pack_fill"] == pytest.approx(100 / 128)
    assert table["comm_wait_s"] == pytest.approx({"dp": 0.25})
    assert table["data_wait_s"] == pytest.approx(0.05)
    assert table["experts"] is None
    (row,) = [row for row in table["parts"] if row["part"] == "dense_ffn"]
    assert row["tflops_per_s"] == pytest.approx(2.0 / 2 / 1.75)  # a rank's half of the FLOPs in its operators' time
    assert sum(bar["share"] for bar in table["waterfall"]) == pytest.approx(1.0)


def test_percentiles_are_linear_between_neighbours() -> None:
    found = percentiles([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (found["p50"], found["p5"], found["p95"], found["mean"]) == pytest.approx((3.0, 1.2, 4.8, 3.0))
    assert found["all"] == [4.0, 1.0, 2.0, 3.0, 5.0]
    assert percentiles([7.0])["p99"] == 7.0


@pytest.mark.parametrize(
    ("device", "machine"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_is_taken_from_the_table_for_known_modules_only(device: str, machine: str | None) -> None:
    found = machine_of(device)
    assert (found.name if found else None) == machine


def test_figures_that_nobody_measured_are_none() -> None:
    report: Any = SimpleNamespace(
        model_flops=4e12, hardware_flops=5e12, step_time_s=2.0, memory_peak_bytes=3 << 30, comm_wait_s=None
    )
    assert speed_figures(report, 4, None) == {
        "mfu": None, "hfu": None, "tflops_per_rank": 0.5, "memory_peak_gib": 3.0, "comm_wait_s": None,
    }  # fmt: skip
    report.comm_wait_s = 0.25
    known = speed_figures(report, 4, Peak(1e12, "bf16", "a test", False))
    assert (known["mfu"], known["hfu"], known["comm_wait_s"]) == (0.5, 0.625, 0.25)


def names_in_trace(call: Any) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    return {event.key for event in profiler.key_averages() if event.key.startswith(PREFIX)}


def test_regions_show_only_where_they_are_on() -> None:
    @in_region("outer")
    def work() -> None:
        with region("inner"):
            torch.ones(2) + 1

    def marked() -> None:
        with regions_on():
            work()

    assert names_in_trace(work) == set()
    assert names_in_trace(marked) == {f"{PREFIX}outer", f"{PREFIX}inner"}
    assert names_in_trace(work) == set()


def test_clock_leaves_groups_of_one_rank_out_and_torch_as_it_was() -> None:
    before = dict(vars(dist.ProcessGroup)), dist.Work.wait
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with WaitClock({}) as clock:
            dist.all_reduce(torch.ones(2))
    finally:
        dist.destroy_process_group()
    assert clock.total_s == 0.0
    assert (dict(vars(dist.ProcessGroup)), dist.Work.wait) == before


def test_round_robin_gives_every_expert_the_same_load_and_padding_none() -> None:
    valid = torch.tensor([True, True, False, True, True])
    ids_TK = round_robin(valid, top_k=2, num_experts=4)
    assert ids_TK[valid].flatten().bincount(minlength=4).tolist() == [2, 2, 2, 2]
    assert all(len(set(row)) == 2 for row in ids_TK.tolist())


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (12.34, "12.3 s"), (0.9999, "1 s"), (0.0123, "12.3 ms"), (4.5e-6, "4.5 us"), (1234.5, "1,234 s")],
)
def test_times_have_a_unit_that_fits(value: float, words: str) -> None:
    assert seconds(value) == words


def test_bytes_and_ticks_are_round() -> None:
    assert (binary(0), binary(1536), binary(3 << 30)) == ("0", "1.5 KiB", "3 GiB")
    for high in (0.003, 0.9, 1.0, 7.3, 480.0, 1e-7):
        found = ticks(high)
        assert found[0] == 0
        assert 3 <= len(found) <= 6, (high, found)
        assert found[-1] <= high
        mantissa = found[1] / 10 ** math.floor(math.log10(found[1]) + 1e-9)
        assert round(mantissa, 6) in (1.0, 2.0, 5.0)


def test_measured_seconds_stand_beside_the_part_that_is_predicted() -> None:
    config = load_run("tiny", ["--parallel.pipeline", "2"])
    owners = {
        Owner("forward", "experts", "operators"): 1.0,
        Owner("backward", "experts", "operators"): 2.0,
        Owner("backward", "experts", "host"): 0.25,
        Owner("forward", "norms", "operators"): 0.5,
        Owner("communication", "pp", "host"): 0.75,
        Owner("communication", "intra_dist_opt", "host"): 0.125,
        Owner("step", "gradients", "operators"): 0.0625,
        Owner("step", "input_wait", "host"): 4.0,
    }
    machine = Hardware(
        name="a test", peak={"fp32": 5e10}, memory_bytes=1 << 34, memory_rate=5e9, nvlink_rate=1e9, nvlink_domain=2,
        network_rate=1e9,
    )  # fmt: skip
    clips = [[96, 96, 160] * 8]
    table = prediction_rows(config, layout_of(config, 2), clips, (machine, gpu_calibration()), owners, 9.0)
    assert table["notes"] == []
    measured = {row["part"]: row["measured_s"] for row in table["parts"]}
    assert measured["whole step"] == 9.0
    assert measured["experts"] == 3.0
    assert (measured["host"], measured["glue"], measured["pipeline and bubble"]) == (0.25, 0.5, 0.75)
    assert (measured["communication: data"], measured["optimizer"]) == (0.125, 0.0625)
    predicted = {row["part"]: row["predicted_s"] for row in table["parts"]}
    assert predicted["input wait"] is None
    assert predicted["whole step"] == pytest.approx(
        sum(value for part, value in predicted.items() if value is not None and part != "whole step")
    )
    assert table["workload"] == "3 clips in a pack, 352 tokens"
    rows = [(row["part"], row["predicted_s"], row["measured_s"]) for row in table["parts"]]
    assert pairs_chart(rows).count("<rect") == 2 * len(rows) - 1


def test_a_profile_in_fp8_says_so_and_what_its_prediction_takes_it_for() -> None:
    config = load_run("tiny", ["--precision.dtype", "bf16", "--precision.fp8", "mxfp8"])
    assert config.precision.describe() == "bf16, FP8 mxfp8"
    machine = hardware("h100-80gb"), gpu_calibration()
    owners = {Owner("forward", "experts", "operators"): 1.0}
    table = prediction_rows(config, layout_of(config, 1), [[96] * 8], machine, owners, 9.0)
    assert "precision.fp8 = 'mxfp8': products with tiles of 32 on h100-80gb are turned back" in table["notes"][0]
    assert "turned back to wide numbers, and planned so" in _prediction("real", table)
