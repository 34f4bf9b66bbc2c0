"""metrics.jsonl and the tool that compares two of them."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import numpy as np
import pytest

from megavid.errors import DataError
from megavid.training import reports
from megavid.training.callbacks import Run
from megavid.training.metrics import MetricsFile, cut_after, read_rows
from megavid.training.plots import smooth, still_true
from megavid.training.run_dir import RunDir


def load_tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


loss_compare = load_tool("loss_compare")


def write(file: Path, steps: range, factor: float = 1.0) -> None:
    with MetricsFile(file) as metrics:
        for step in steps:
            metrics.write({"step": step, "loss": factor / step, "grad_norm": 1.0})


def test_rows_after_the_loaded_step_are_cut_and_earlier_ones_stay_byte_for_byte(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, range(1, 6))
    before = file.read_bytes()
    assert cut_after(file, 3) == 3
    assert before.startswith(file.read_bytes())
    write(file, range(4, 6))
    assert file.read_bytes() == before


def test_a_row_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, range(1, 4))
    with file.open("a") as handle:
        handle.write('{"step": 4, "lo')
    assert cut_after(file, 9) == 3
    assert [row["step"] for row in read_rows(file)] == [1, 2, 3]


def test_cutting_a_missing_file_is_nothing(tmp_path: Path) -> None:
    assert cut_after(tmp_path / "metrics.jsonl", 3) == 0


def test_a_foreign_row_is_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(DataError, match="row 2 is not a row of a run"):
        cut_after(file, 2)


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    row = {"loss": math.nan, "table": {"norm": [math.inf, 0.5]}, "kept": 1}
    with MetricsFile(tmp_path / "m.jsonl") as metrics:
        metrics.write(row)
    assert read_rows(tmp_path / "m.jsonl") == [{"loss": None, "table": {"norm": [None, 0.5]}, "kept": 1}]


def test_smooth_is_the_mean_of_the_last_values() -> None:
    assert smooth([1.0, 3.0, 5.0, 7.0], window=2) == [1.0, 2.0, 4.0, 6.0]


def test_events_of_steps_that_were_taken_again_are_left_out() -> None:
    rows = [("started", 0), ("validated", 2), ("validated", 4), ("resumed", 2), ("validated", 4)]
    rows += [("rolled_back", 3), ("validated", 4)]
    kept = still_true([{"event": name, "step": step, "place": n} for n, (name, step) in enumerate(rows)])
    assert [event["place"] for event in kept] == [0, 1, 3, 5, 6]


def test_the_plot_is_drawn_at_checkpoints_once_a_minute_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, drawn = [100.0], list[float]()
    monkeypatch.setattr(reports, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(reports.LossPlot, "_draw", lambda *_: drawn.append(clock[0]))
    run = cast(Run, SimpleNamespace(run_dir=RunDir(tmp_path)))
    run.run_dir.metrics_file.write_text("a row\n")
    plot = reports.LossPlot()
    plot.before_training(run)
    for clock[0] in (110.0, 159.0, 161.0, 162.0, 220.0, 221.5):
        plot.before_save(run)
    plot.after_training(run)
    assert drawn == [161.0, 221.5, 221.5]


def test_loss_compare_names_the_first_step_and_the_worst(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, bump in (("a", 0.0), ("b", 1e-3)):
        (tmp_path / name).mkdir()
        rows = [{"step": s, "loss": 1.0 + (bump * s if s > 2 else 0), "grad_norm": 2.0} for s in range(1, 6)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    plot = tmp_path / "plot.png"
    assert loss_compare.main([*folders, "--tolerance", "1e-4", "--plot", str(plot)]) == 1
    said = capsys.readouterr().out
    assert "loss: first differs at step 3; worst relative difference 0.00498 at step 5, over 0.0001" in said
    assert "grad_norm: bitwise the same" in said
    assert plot.stat().st_size > 10_000
    assert loss_compare.main([*folders, "--tolerance", "1e-2"]) == 0
    assert loss_compare.main([*folders, "--steps", "2"]) == 0


def test_loss_compare_counts_a_missing_loss_as_a_difference(tmp_path: Path) -> None:
    for name, loss in (("a", None), ("b", 1.0)):
        (tmp_path / name).write_text(json.dumps({"step": 1, "loss": loss, "grad_norm": 1.0}) + "\n")
    assert loss_compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--tolerance", "1"]) == 1
    assert loss_compare.main([str(tmp_path / "a"), str(tmp_path / "a")]) == 0


def test_loss_compare_without_a_curve_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert loss_compare.main([str(tmp_path), str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_demo_report_marks_the_nearest_real_clip() -> None:
    report = load_tool("demo_report")
    real = [np.full((1, 8, 8, 3), value, np.uint8) for value in (10, 200)]
    other_size = np.full((1, 8, 16, 3), 10, np.uint8)
    rows = report.matrix([real[1] - 5, real[0] + 3], [*real, other_size])
    assert [report.nearest(row) for row in rows] == [1, 0]
    assert math.isnan(rows[0][2])
    assert rows[1][0] == pytest.approx(20 * math.log10(255 / 3))
    assert "34.15*" in report.table([row[:2] for row in rows])
