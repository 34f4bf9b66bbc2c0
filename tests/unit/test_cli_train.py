"""`megavid train` before any rank starts: what it tells the user."""

from pathlib import Path

from megavid.cli.train import check
from megavid.config.load import load_run


def test_shards_that_a_preset_of_procedural_clips_does_not_read_are_named(tmp_path: Path) -> None:
    (told,) = check(load_run("tiny", ["--data.path", "my_shards"]), tmp_path / "run", "cpu")
    assert "data.path = 'my_shards' is not read" in told
    assert "--data.kind shards" in told
    assert check(load_run("tiny", []), tmp_path / "run", "cpu") == []
