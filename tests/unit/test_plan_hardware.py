"""The hardware table and the calibration: every number has a source, files round-trip, errors say what to do."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megavid.errors import ConfigError
from megavid.plan.calibration import (
    FREE,
    NUMBERS,
    PROBE_RANGES,
    Calibration,
    CallCost,
    gpu_calibration,
    load_calibration,
    load_probe,
    save_probe,
)
from megavid.plan.hardware import NUMBERS as HARDWARE_NUMBERS
from megavid.plan.hardware import Hardware, hardware, table


def test_table_holds_the_machines_that_the_command_line_promises() -> None:
    assert {"h100-80gb", "h200", "b200", "gb200", "a100-80gb"} <= set(table())


@pytest.mark.parametrize("name", sorted(table()))
def test_every_number_of_a_machine_has_a_source(name: str) -> None:
    machine = hardware(name)
    assert set(machine.source) == set(HARDWARE_NUMBERS)
    assert all(len(source) > 15 for source in machine.source.values())


def test_peaks_are_dense_and_memory_is_below_the_data_sheet() -> None:
    h100 = hardware("h100-80gb")
    assert h100.peak_of("bf16") == pytest.approx(989.4e12)
    assert h100.peak_of("fp8") == pytest.approx(2 * h100.peak_of("bf16"), rel=1e-3)
    assert h100.memory_bytes < 80 * 2**30 < hardware("h200").memory_bytes < 141e9 * 1.08


def test_unknown_machine_and_number_format_name_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"unknown hardware 'h100'; known: .*h100-80gb.*--gpu"):
        hardware("h100")
    with pytest.raises(ConfigError, match="'a100-80gb' has no dense peak for fp8; it has bf16, fp32"):
        hardware("a100-80gb").peak_of("fp8")


@pytest.mark.parametrize(
    ("group", "stride", "near"), [(8, 1, 8), (64, 1, 8), (16, 4, 2), (16, 8, 1), (4, 2, 4), (4, 64, 1)]
)
def test_ranks_per_domain_follow_the_stride(group: int, stride: int, near: int) -> None:
    assert hardware("h100-80gb").ranks_per_domain(group, stride) == near


def test_a_machine_without_rates_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs rates above 0"):
        Hardware(
            name="cpu", peak={"fp32": 1e11}, memory_bytes=1, memory_rate=0.0, nvlink_rate=1.0, nvlink_domain=1,
            network_rate=1.0,
        )  # fmt: skip


def test_every_number_of_the_calibration_has_a_source() -> None:
    calibration = gpu_calibration()
    assert set(NUMBERS) <= set(calibration.source)
    assert all(len(calibration.source[name]) > 15 for name in NUMBERS)


def test_fitted_numbers_are_few_and_stand_in_their_plausible_ranges() -> None:
    numbers = gpu_calibration().numbers()
    assert len(FREE) <= 5
    for name, (low, high) in FREE.items():
        assert low <= numbers[name] <= high, name
        assert "fit_calibration.py" in gpu_calibration().source[name]


def test_calibration_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "probe.json"
    gpu_calibration().save(path)
    assert load_calibration(path) == gpu_calibration()


def test_a_probe_must_fill_every_field() -> None:
    measured = json.loads(json.dumps({**vars(gpu_calibration()), "source": {}}))
    assert Calibration.from_probe({**measured, "is_asynchronous": False}).is_asynchronous is False
    with pytest.raises(ConfigError, match="lacks operator_s"):
        Calibration.from_probe({key: value for key, value in measured.items() if key != "operator_s"})
    with pytest.raises(ConfigError, match="unknown keys speed"):
        Calibration.from_probe({**measured, "speed": 1.0})
    with pytest.raises(ConfigError, match="operator_s = 'fast' must be a number"):
        Calibration.from_probe({**measured, "operator_s": "fast"})
    with pytest.raises(ConfigError, match=r"memory_efficiency = 0\.0 must be above 0"):
        Calibration.from_probe({**measured, "memory_efficiency": 0.0})
    with pytest.raises(ConfigError, match=r"stall_s = nan must be at least 0\.0"):
        Calibration.from_probe({**measured, "stall_s": math.nan})


def test_a_probed_machine_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "probe.json"
    machine = Hardware(
        name="cpu", peak={"fp32": 1e11}, memory_bytes=2**33, memory_rate=1e10, nvlink_rate=1e9, nvlink_domain=8,
        network_rate=1e9,
    )  # fmt: skip
    save_probe(path, machine, gpu_calibration())
    assert load_probe(path) == (machine, gpu_calibration())
    assert load_calibration(path) == gpu_calibration()
    assert set(PROBE_RANGES) <= set(NUMBERS)
    measured = replace(gpu_calibration(), crowding=1.2, calls={"send": CallCost(1e-3, 1e9)})
    save_probe(path, machine, measured)
    assert load_probe(path) == (machine, measured)
    for calls, reason in (
        ({"send": {"rate": 1e9}}, "run the probe again"),
        ({"send": {"rate": 0.0, "latency_s": 0.0}}, "rate = 0.0 of a collective must be above"),
    ):
        table = json.loads(path.read_text())
        table["calibration"]["calls"] = calls
        path.write_text(json.dumps(table))
        with pytest.raises(ConfigError, match=reason):
            load_probe(path)
    path.write_text(json.dumps({"hardware": {"name": "cpu"}, "calibration": {}}))
    with pytest.raises(ConfigError, match=r"hardware does not fit this version: .*peak"):
        load_probe(path)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="must hold the tables 'hardware' and 'calibration', got none"):
        load_probe(path)


def test_a_file_that_is_no_calibration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read calibration .*missing\.json"):
        load_calibration(tmp_path / "missing.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match="must be a JSON table, got list"):
        load_calibration(tmp_path / "list.json")


def test_time_and_hindcast_import_no_torch() -> None:
    code = "import sys, megavid.plan.time, megavid.plan.hindcast; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
