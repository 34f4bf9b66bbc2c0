"""Ten faults of tools/kill_loop.py, each with its resume; the whole loop is run by hand (docs/reliability.md)."""

from pathlib import Path

from tests.support.kill_loop import KillLoop, table
from tests.support.warm_parent import WarmParent


def test_ten_random_kills_lose_nothing_and_resume_bitwise(warm: WarmParent, tmp_path: Path) -> None:
    loop = KillLoop(warm, tmp_path, seed=11)
    loop.run(0, 10)
    assert len(loop.outcomes) == 10
    assert len({outcome.kind for outcome in loop.outcomes}) >= 3, table(loop.outcomes)
    assert sum(outcome.status != 0 for outcome in loop.outcomes) >= 9  # stale reads alone may be got over
