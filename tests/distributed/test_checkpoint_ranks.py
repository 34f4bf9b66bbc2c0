"""Real processes save and load together; a fresh interpreter each, as the ranks set limits and kill themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("case", ["reshard", "full_disk", "killed_rank"])
def test_checkpoint_of_real_ranks(case: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.distributed.checkpoint_cases", case, str(tmp_path / "checkpoints")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
