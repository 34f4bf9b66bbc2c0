"""Rung 4 of the parity ladder: experts in every layout of 1, 2, 4 and 8 ranks equal those of one device.

Outputs, input gradients, every weight gradient and the statistics; dispatch then combine is the identity; no token is
lost; experts without tokens; all tokens to one expert; padding goes nowhere; both dispatchers; recomputation.
"""

import pytest

from tests.support.warm_parent import WarmParent


@pytest.fixture(scope="module")
def ladder(warm: WarmParent) -> tuple[list[str], list[str], str]:
    """Cases wanted, cases done, and what the ranks said on stderr; they run once for all sizes."""
    done = warm.run_module("tests.distributed.moe_cases")
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
