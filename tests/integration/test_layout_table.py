"""A run that goes on with fewer and more ranks takes the layout that its preset names for that number."""

import json
from pathlib import Path

import pytest

from megavid.training.metrics import read_rows
from megavid.training.plots import column
from tests.support.tiny_run import TINY
from tests.support.tolerance import LOSS_FP32
from tests.support.warm_parent import WarmParent

TOML = """\
base = "tiny"
[layouts.2]
tensor = 2
[layouts.4]
pipeline = 2
expert = 2
[layouts.8]
tensor = 2
pipeline = 2
expert = 2
"""
FLAGS = (*TINY, "--model.num_layers", "4", "--train.global_batch_size", "4")


def test_run_on_four_two_and_eight_ranks_has_one_curve(warm: WarmParent, tmp_path: Path) -> None:
    preset, out = tmp_path / "run.toml", tmp_path / "run"
    preset.write_text(TOML)
    for ranks, last in ((4, 2), (2, 4), (8, 6)):
        done = warm.run(
            "train", str(preset), "--out", str(out), "--ranks", str(ranks), *FLAGS, "--train.steps", str(last)
        )
        assert done.returncode == 0, done.stderr
    alone = warm.run("train", "tiny", "--out", str(tmp_path / "alone"), *FLAGS, "--train.steps", "6")
    assert alone.returncode == 0, alone.stderr
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    layouts = [event["layout"] for event in events if event["event"] in ("started", "resumed")]
    assert layouts == ["dp2 pp2 ep2", "dp1 tp2+sp", "dp2 tp2+sp pp2 ep2"]
    ours, theirs = (column(read_rows(folder / "metrics.jsonl"), "loss")[1] for folder in (out, tmp_path / "alone"))
    assert len(ours) == 6
    assert ours == pytest.approx(theirs, rel=LOSS_FP32)
