"""``megavid train --precision.fp8``: trains, reports every layer, goes on bitwise, and refuses what it cannot do."""

from pathlib import Path

from megavid.training.metrics import read_rows
from tests.support.tiny_run import TINY
from tests.support.warm_parent import Command, WarmParent

FLAGS = (
    *TINY, "--precision.fp8", "delayed", "--log.fp8_interval_steps", "2", "--train.global_batch_size", "2",
    "--checkpoint.interval_steps", "2", "--train.steps", "4",
)  # fmt: skip


def train(warm: WarmParent, out: Path, *args: str) -> Command:
    return warm.run("train", "tiny", "--out", str(out), *FLAGS, *args)


def test_a_run_in_fp8_reports_its_layers_and_goes_on_bitwise(warm: WarmParent, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for out, flags in ((straight, ()), (stopped, ("--train.stop_at_step", "2")), (stopped, ())):
        done = train(warm, out, *flags)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    rows, again = read_rows(straight / "metrics.jsonl"), read_rows(stopped / "metrics.jsonl")
    assert [(row["loss"], row["grad_norm"]) for row in again] == [(row["loss"], row["grad_norm"]) for row in rows]
    figures = read_rows(straight / "fp8.jsonl")
    assert figures == read_rows(stopped / "fp8.jsonl")
    assert [row["step"] for row in figures] == [2, 4]
    for row in figures:
        layers = row["layers"]
        assert isinstance(layers, dict)
        assert {"blocks.1.self_attention.q", "blocks.1.cross_attention.q", "blocks.1.moe.experts.down"} <= layers.keys()
        assert all(0.01 < layer["weight"]["error"] < 0.05 for layer in layers.values())
    assert ["fp8" in row for row in rows] == [False, True, False, True]


def test_what_cannot_be_in_fp8_is_refused_in_one_line(warm: WarmParent, tmp_path: Path) -> None:
    for flags, words in (
        (("--precision.fp8_skip_first", "2"), "leaves none of model.num_layers = 3 in FP8"),
        (("--precision.fp8", "blockwise"), "model.hidden_size = 32 to be a multiple of 128"),
        (("--precision.linears", "transformer_engine"), "precision.fp8 = 'delayed' needs precision.linears = 'native'"),
    ):
        refused = train(warm, tmp_path / "new", *flags)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert words in refused.stderr
        assert not (tmp_path / "new").exists()
