"""tools/bench_fp8.py judges the runs that are there, and takes no number of steps that it can never finish."""

import json
from pathlib import Path

import pytest

from tools.bench_fp8 import TRIALS, main


@pytest.mark.parametrize(("delayed", "status"), [(1.01, 0), (1.1, 1)])
def test_a_run_above_what_it_is_allowed_is_the_exit_status(tmp_path: Path, delayed: float, status: int) -> None:
    for trial in TRIALS:
        row = {"event": "validated", "step": 300, "loss": delayed if trial.recipe == "delayed" else 1.0}
        (tmp_path / trial.name).mkdir()
        (tmp_path / trial.name / "events.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["--out", str(tmp_path)]) == status


def test_steps_without_a_validation_at_the_last_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path), "--steps", "200"])
    assert not list(tmp_path.iterdir())
