"""Rung 4 of the parity ladder: experts in every layout of 1, 2, 4 and 8 ranks equal those of one device.

Outputs, input gradients, every weight gradient and the statistics; dispatch then combine is the identity; no token is
lost; experts without tokens; all tokens to one expert; padding goes nowhere; both dispatchers; recomputation.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ladder() -> tuple[list[str], list[str], str]:
    """Cases wanted, cases done, and what the ranks said on stderr; they run once for all sizes."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.distributed.moe_cases"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = done.stdout.splitlines()
    wanted, finished = ([line[5:] for line in lines if line.startswith(word)] for word in ("want ", "done "))
    return wanted, finished, done.stderr[-6000:]


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_experts_in_every_layout_equal_those_of_one_device(
    ladder: tuple[list[str], list[str], str], num_ranks: int
) -> None:
    wanted, finished, errors = ladder
    mine = [name for name in wanted if name.startswith(f"{num_ranks} ")]
    assert mine, errors
    left = [name for name in mine if name not in finished]
    assert left == [], f"first left: {left[0]}\n{errors}"
