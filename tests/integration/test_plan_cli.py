"""``megavid plan`` as people and programs call it: the JSON contract, errors in one line, no torch, two seconds."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megavid.cli.main import main
from megavid.config.load import load_run
from megavid.config.schema import ParallelConfig
from megavid.plan.layout import layout_of
from megavid.plan.parameters import count
from tests.support.warm_parent import WarmParent

ROOT = Path(__file__).parents[2]
FLAGSHIP = ("wan_moe_100b_a20b", "--world-size", "1024", "--gpu", "h100-80gb")
WAN_1B = ("wan_1b", "--world-size", "8", "--gpu", "h100-80gb")


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, as a shell starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-X", "importtime", "-m", "megavid", "plan", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    """The JSON of a plan made in this process."""
    assert main(["plan", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def text(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["plan", *argv]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def searched() -> Any:
    """A search of 64 GPUs, by a process of its own."""
    done = run("wan_moe_7b_a2b", "--world-size", "64", "--gpu", "h100-80gb", "--search", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_answer_comes_within_two_seconds_and_without_torch() -> None:
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(*FLAGSHIP)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Time of the processor, so that a busy machine does not fail the test.
    seconds = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "megavid.plan.answer" in imported
    heavy = {"torch", "numpy", "megatron", "tyro", "scipy"}
    assert not {name.partition(".")[0] for name in imported} & heavy
    assert seconds < 2.0


def test_the_json_has_every_key_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, *FLAGSHIP)
    config = load_run("wan_moe_100b_a20b", [])
    counts = count(config.model)
    assert (found["parameters"]["total"], found["parameters"]["active"]) == (counts.total, counts.active)
    assert set(found["layout"]) == set(ParallelConfig.__dataclass_fields__)
    assert found["flops"]["per_step"] == pytest.approx(found["flops"]["per_sample"] * config.train.global_batch_size)
    assert sum(found["memory"]["parts"].values()) == pytest.approx(found["memory"]["per_rank_gib"])
    assert max(found["memory"]["stages_gib"]) == pytest.approx(found["memory"]["per_rank_gib"])
    assert isinstance(found["fits"], bool)
    assert found["step_time_s"] == pytest.approx(sum(found["step_time_parts_s"].values()))
    assert isinstance(found["binds"], str)
    low, high = found["mfu_interval"]
    assert 0 < low < found["mfu"] < high < 1
    assert found["mfu"] < found["hfu"]  # this preset recomputes something
    assert "published runs on Hopper" in found["mfu_interval_of"]
    sent = sum(transfer["bytes"] for transfer in found["traffic"])
    assert 0 <= found["traffic_stage"] < found["ranks"]["pp"]
    assert sent > 0


def test_mfu_is_model_flops_over_the_dense_bf16_peak(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, *FLAGSHIP)
    peak = 1024 * 989.4e12
    assert found["mfu"] == pytest.approx(found["flops"]["per_step"] / (found["step_time_s"] * peak))


def test_the_clip_of_the_command_line_sets_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    short = answer(capsys, *WAN_1B)
    long = answer(capsys, *WAN_1B, "--frames", "81", "--height", "720", "--width", "1280", "--parallel.recompute=full")
    assert short["batch"]["clip_tokens"] == [32760]
    assert long["batch"]["clip_tokens"] == [75600]
    assert long["flops"]["per_sample"] > 2.3 * short["flops"]["per_sample"]
    assert long["layout"]["recompute"] == "full"


def test_config_keys_change_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    plain = answer(capsys, *WAN_1B)
    kept = answer(capsys, *WAN_1B, "--parallel.recompute", "none")
    batch = answer(capsys, *WAN_1B, "--train.global_batch_size", "128")
    assert kept["memory"]["parts"]["activations"] > plain["memory"]["parts"]["activations"]
    assert kept["flops"]["recompute"] == {}
    assert batch["flops"]["per_step"] == 2 * plain["flops"]["per_step"]


def test_headroom_decides_what_fits_and_memory_binds_where_it_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, *WAN_1B)
    assert found["fits"]
    tight = answer(capsys, *WAN_1B, "--headroom", "0.99")
    assert (tight["fits"], tight["binds"]) == (False, "memory")
    assert tight["memory"] == {**found["memory"], "headroom": 0.99}


def test_a_token_budget_gives_days_and_gpu_hours(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, *WAN_1B, "--tokens", "1e12")
    budget = found["budget"]
    assert budget["tokens"] == 1e12
    assert budget["days_without_failures"] == pytest.approx(1e12 / found["tokens_per_s"] / 86400)
    assert budget["days"] == pytest.approx(budget["days_without_failures"] / found["goodput"]["fraction"])
    assert budget["gpu_hours"] == pytest.approx(budget["days"] * 24 * 8)
    low, high = budget["days_interval"]
    assert low < budget["days"] < high
    assert budget["gpu_hours_interval"] == pytest.approx([low * 24 * 8, high * 24 * 8])


def test_the_search_prints_candidates_that_fit_best_first(searched: Any) -> None:
    rows = searched["candidates"]
    assert len(rows) == 6
    assert all(row["fits"] for row in rows)
    times = [row["step_time_s"] for row in rows]
    assert times == sorted(times)
    assert searched["step_time_s"] == times[0]
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert all(row["reason"] for row in rows)
    config = load_run("wan_moe_7b_a2b", [])
    for row in rows:
        assert row["memory"]["per_rank_gib"] <= 0.95 * row["memory"]["limit_gib"]
        flags = [part for key, value in row["layout"].items() for part in (f"--parallel.{key}", str(value))]
        flags += ["--train.micro_batch_size", str(row["batch"]["micro_batch_size"])]
        flags += ["--data.pack_tokens", str(row["batch"]["pack_tokens"])]
        assert layout_of(load_run("wan_moe_7b_a2b", flags), 64).dp == row["ranks"]["dp"]
    assert searched["batch"]["global_batch_size"] == config.train.global_batch_size


def test_the_command_of_a_candidate_gives_the_same_answer(searched: Any, capsys: pytest.CaptureFixture[str]) -> None:
    row = searched["candidates"][1]
    words = row["command"].split()
    at = words.index("train")
    preset, flags = words[at + 1], words[at + 4 :]
    assert words[at + 2] == "--out"
    again = answer(capsys, preset, "--world-size", "64", "--gpu", "h100-80gb", *flags)
    assert again["step_time_s"] == row["step_time_s"]
    assert again["layout"] == row["layout"]


def test_the_text_is_readable_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    found = text(capsys, *FLAGSHIP)
    assert max(map(len, found.splitlines())) <= 110
    assert found.isascii()
    for title in ("Parameters", "Work, FLOPs", "Memory of a rank", "Step, seconds", "Traffic", "Run", "Command"):
        assert title in found
    assert "99.26 B" in found
    assert "megavid train wan_moe_100b_a20b" in found


def test_the_summary_is_the_first_lines(capsys: pytest.CaptureFixture[str]) -> None:
    whole, short = text(capsys, *WAN_1B), text(capsys, *WAN_1B, "--summary")
    assert whole.startswith(short.rstrip("\n"))
    assert "MFU" in short
    assert "Parameters" not in short


def test_pages_show_what_the_commands_print() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/print_pages.py"), "--check"], capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}{done.stderr}; run tools/print_pages.py"


def test_the_hindcast_is_printed_row_by_row(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "--hindcast")
    assert len(found["rows"]) >= 5
    assert all(row["source"] and row["published_step_s"] > 0 for row in found["rows"])
    assert abs(found["mean_error"]) <= 0.15
    printed = text(capsys, "--hindcast")
    assert all(row["name"] in printed for row in found["rows"])


def test_data_prints_storage_rates_and_break_even(capsys: pytest.CaptureFixture[str]) -> None:
    data = ("wan_14b", "--data", "1e9", "--world-size", "64", "--gpu", "h100-80gb")
    found = answer(capsys, *data)
    sizes = {kind["name"]: kind["total_bytes"] for kind in found["kinds"]}
    assert sizes["video"] == 5e15
    assert sizes["latents 8x8x4 bf16"] == pytest.approx(5e15, rel=0.2)
    rates = {rate["name"]: rate for rate in found["read"]}
    expected = found["clips_per_step"] * 5e6 / found["step_time_interval_s"][0]  # no step waits, the fastest neither
    assert rates["video"]["unique_rate"] == pytest.approx(expected)
    printed = text(capsys, *data)
    assert "5.00 PB" in printed
    assert "pass --encode-gpu-s" in printed  # no time is published for the per-frame tokenizer
    assert max(map(len, printed.splitlines())) <= 110
    assert "With --world-size" in text(capsys, *data[:3])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("wan_14b",), "--world-size N is missing"),
        (("wan_14b", "--world-size", "64"), "--gpu GPU is missing"),
        (("wan_14b", "--world-size", "64", "--gpu", "h100"), "unknown hardware 'h100'"),
        (("wan_14c", "--world-size", "64", "--gpu", "h200"), "did you mean 'wan_14b'?"),
        (("wan_14b", "--world-size", "0", "--gpu", "h200"), "--world-size 0 must be a whole number, at least 1"),
        (("wan_14b", "--world-size", "60", "--gpu", "h200"), "must divide the number of ranks = 60"),
        (("wan_14b", "--world-size", "64", "--gpu", "h200", "--parallel.tensr", "2"), "did you mean"),
        (("wan_14b", "--world-size", "64", "--gpu", "h200", "--frames", "80"), "--frames 80 must be 1 more than"),
        (("wan_14b", "--world-size", "64", "--gpu", "h200", "--headroom", "1"), "--headroom 1 must be below 1"),
        (("wan_14b", "--world-size", "64", "--gpu", "h200", "--store", "s3"), "read with --data only"),
        (("wan_14b", "--data", "10", "--store", "s4"), "--store s4: no such row"),
        (("wan_14b", "--world-size", "64", "--gpu", "h200", "--calibration", "/nowhere"), "cannot read calibration"),
        (("wan_14b", "--data", "10", "--summary"), "--summary shortens the text of a plan"),
        (("wan_14b", "--data", "inf"), "--data inf must be a finite number"),
        (("wan_14b", "--data", "10", "--tokens", "9"), "--tokens 9 is not read with --data"),
        (("wan_14b", "--data", "10", "--mtbf-gpu-hours", "9"), "--mtbf-gpu-hours 9 is not read with --data"),
        (("wan_14b", "--data", "10", "--restart-minutes", "9"), "--restart-minutes 9 is not read with --data"),
        (("wan_14b", "--data", "10", "--storage-gb-s", "9"), "--storage-gb-s 9 is not read with --data"),
        (("wan_14b", "--data", "10", "--calibration", "x"), "--calibration x is read with --world-size N only"),
        (("wan_14b", "--world-size", "64", "--gpu", "h200", "--storage-gb-s", "0"), "--storage-gb-s 0 must be above 0"),
        (("wan_14b", "--data", "10", "--search"), "--search is not read with --data"),
        (("wan_14b", "--data", "10", "--gpu", "h200"), "--gpu h200 is read with --world-size N only"),
        (("--hindcast", "wan_14b"), "--hindcast takes no other argument"),
        (("wan_moe_100b_a20b", "--world-size", "8", "--gpu", "a100-80gb", "--search"), "no layout of 8 GPUs"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], said: str
) -> None:
    assert main(["plan", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megavid: error: ")
    assert error.count("\n") == 1
    assert said in error


def test_a_checkpoint_on_disk_is_as_large_as_planned(
    warm: WarmParent, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--train.steps", "1", "--train.global_batch_size", "2", "--data.validation_samples", "4")
    done = warm.run("train", "tiny", "--out", str(tmp_path / "run"), *flags)
    assert done.returncode == 0, done.stderr
    files = (tmp_path / "run" / "checkpoints" / "step_00000001").glob("*.safetensors")
    written = sum(file.stat().st_size for file in files)
    planned = answer(capsys, "tiny", "--world-size", "1", "--gpu", "h200")["goodput"]["checkpoint_bytes"]
    # Beside the tensors stand their headers, the routers' bias and a few counters.
    assert written == pytest.approx(planned, rel=0.01)


def test_no_prediction_is_printed_as_a_point(capsys: pytest.CaptureFixture[str]) -> None:
    printed = text(capsys, "wan_1b", "--world-size", "8", "--gpu", "h200", "--search", "--summary")
    ranking = printed.partition("Ranking")[2].partition("Notes")[0]
    rows = [line for line in ranking.splitlines() if "MFU" in line]
    assert len(rows) >= 6
    assert all(re.match(r" +\d+ +[\d.]+ to [\d.]+ s +MFU +[\d.]+% to [\d.]+%", row) for row in rows), rows
    assert "none of them on h200" in " ".join(printed.split())
    data = answer(capsys, *WAN_1B, "--data", "1e6")
    fast, slow = data["step_time_interval_s"]
    assert fast < data["step_time_s"] < slow


def test_assumptions_that_may_be_too_good_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    near = answer(capsys, *FLAGSHIP, "--parallel.expert", "8", "--parallel.tensor", "1")
    far = answer(capsys, *FLAGSHIP, "--parallel.expert", "16", "--parallel.tensor", "1")
    assert near["assumes"] == []
    assert len(far["assumes"]) == 1
    assert "all-to-alls across nodes (ep)" in far["assumes"][0]
