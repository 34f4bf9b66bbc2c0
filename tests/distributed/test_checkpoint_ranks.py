"""Real processes save and load together; a fork of their own each, as the ranks set limits and kill themselves."""

from pathlib import Path

import pytest

from tests.support.warm_parent import WarmParent


@pytest.mark.parametrize("case", ["reshard", "full_disk", "killed_rank"])
def test_checkpoint_of_real_ranks(warm: WarmParent, case: str, tmp_path: Path) -> None:
    result = warm.run_module("tests.distributed.checkpoint_cases", case, str(tmp_path / "checkpoints"))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
