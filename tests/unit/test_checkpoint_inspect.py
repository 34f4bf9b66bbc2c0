"""The page that ``megavid inspect`` prints of a checkpoint."""

from pathlib import Path

from megavid.checkpoint.inspect import describe
from tests.support.checkpoint_world import save_world


def test_describe_says_tensors_layout_config_and_hashes(tmp_path: Path) -> None:
    save_world(tmp_path / "run" / "checkpoints", steps=(3,))
    text = describe(tmp_path / "run")
    lines = [line.split() for line in text.splitlines()]
    assert ["step", "3"] in lines
    assert ["layout", "dp2", "tp2", "(4", "ranks)"] in lines
    assert any(line[:4] == ["model", "experts", "F32", "8x6x10"] and line[-1] == "1920" for line in lines)
    assert ["buffer", "count", "I64", "scalar", "1", "8"] in lines
    assert "model: 5 tensors, 900 numbers, 3.516 KiB" in text
    assert "all sizes and SHA-256 hashes as in the manifest" in text
    assert "samples = 24" in text
    assert "steps = 7" in text
