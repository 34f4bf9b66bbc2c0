"""Which checkpoint is meant, which stay, and what a killed run leaves."""

from pathlib import Path

import pytest

from megavid.checkpoint import latest, list_steps, resolve, tidy
from megavid.checkpoint.retention import kept
from megavid.config.schema import CheckpointConfig
from megavid.errors import CheckpointError
from tests.support.checkpoint_world import load_world, save_world


@pytest.mark.parametrize(
    ("steps", "newest", "keep_last", "keep_every", "expected"),
    [
        ([10], 10, 1, 0, {10}),
        ([10, 20, 30, 40], 40, 1, 0, {40}),
        ([10, 20, 30, 40], 40, 3, 0, {20, 30, 40}),
        ([10, 20, 30, 40], 40, 9, 0, {10, 20, 30, 40}),
        ([10, 20, 30, 40], 40, 1, 20, {20, 40}),
        ([10, 20, 30, 45], 45, 1, 20, {20, 45}),
        ([10, 20, 30, 40], 20, 1, 0, {20, 30, 40}),  # a run that went back to 10 and came to 20 again
        ([10, 20, 30, 40], 20, 2, 0, {10, 20, 30, 40}),
    ],
)
def test_kept(steps: list[int], newest: int, keep_last: int, keep_every: int, expected: set[int]) -> None:
    assert kept(steps, newest=newest, keep_last=keep_last, keep_every=keep_every) == expected


def test_saver_keeps_the_last_and_every_nth(tmp_path: Path) -> None:
    config = CheckpointConfig(keep_last=2, keep_every=3)
    save_world(tmp_path, steps=range(1, 9), tp=1, dp=2, config=config)
    assert list_steps(tmp_path) == [3, 6, 7, 8]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", *(f"step_0000000{n}" for n in (3, 6, 7, 8))]
    load_world(tmp_path / "step_00000003", 3, tp=1, dp=1)


def test_step_saved_again_replaces_the_former_one(tmp_path: Path) -> None:
    save_world(tmp_path, steps=(1, 2), tp=1, dp=1)
    (tmp_path / "step_00000002" / "run.toml").unlink()
    save_world(tmp_path, steps=(2,), tp=2, dp=1)
    load_world(tmp_path / "step_00000002", 2, tp=1, dp=1)
    assert list_steps(tmp_path) == [1, 2]
    assert not list(tmp_path.glob("*.replaced"))


def test_resolve_takes_a_run_its_checkpoints_their_latest_or_one(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*run"):
        resolve(tmp_path / "run")
    save_world(checkpoints, steps=(1, 2), tp=1, dp=1)
    newest = checkpoints / "step_00000002"
    assert resolve(tmp_path / "run") == resolve(checkpoints) == resolve(newest) == newest
    assert resolve(checkpoints / "step_00000001") == checkpoints / "step_00000001"
    assert resolve(checkpoints / "latest") == newest
    with pytest.raises(CheckpointError, match="not finished"):
        resolve(checkpoints / "step_00000003.partial")
    (checkpoints / "latest").write_text("step_00000001\n")
    assert resolve(checkpoints) == checkpoints / "step_00000001"
    (checkpoints / "latest").unlink()  # killed before the first pointer was written
    assert latest(checkpoints) == newest


def test_tidy_removes_what_was_not_finished_and_nothing_else(tmp_path: Path) -> None:
    save_world(tmp_path, steps=(1, 2, 3), tp=1, dp=1)
    (tmp_path / "step_00000004.partial").mkdir()
    (tmp_path / "step_00000004.partial" / "rank_00000.safetensors").write_bytes(b"x")
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000001.removed")
    (tmp_path / "step_00000003").rename(tmp_path / "step_00000003.replaced")
    (tmp_path / "latest.new").write_text("step_0")
    (tmp_path / "notes.partial").mkdir()
    assert latest(tmp_path) == tmp_path / "step_00000003.replaced"  # readable even before it is tidied
    load_world(tmp_path / "step_00000003.replaced", 3, tp=1, dp=1)
    tidy(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "notes.partial", "step_00000002", "step_00000003"]
    assert latest(tmp_path) == tmp_path / "step_00000003"
