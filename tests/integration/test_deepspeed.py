"""A run under DeepSpeed as people start it: quiet, and one run with its native twin, which takes it over half way."""

import importlib.util
import json
from pathlib import Path

import pytest

from megavid.training.metrics import read_rows
from megavid.training.plots import column
from tests.support import tolerance
from tests.support.tiny_run import TINY
from tests.support.warm_parent import WarmParent

FLAGS = (*TINY, "--ranks", "2", "--train.global_batch_size", "4", "--train.steps", "4")


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed; pip install 'megavid[deepspeed]' runs this",
)
def test_run_begins_under_deepspeed_and_goes_on_under_megatron(warm: WarmParent, tmp_path: Path) -> None:
    out, native = tmp_path / "run", tmp_path / "native"
    zero = ("--train.backend", "deepspeed", "--deepspeed.zero_stage", "3", "--train.stop_at_step", "2")
    done = warm.run("train", "tiny", "--out", str(out), *FLAGS, *zero)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "DeepSpeed" not in done.stdout
    parameters = [row["parameters"] for row in json.loads((out / "ranks.json").read_text())]
    done = warm.run("train", "tiny", "--out", str(out), *FLAGS)
    assert done.returncode == 0, done.stderr
    done = warm.run("train", "tiny", "--out", str(native), *FLAGS)
    assert done.returncode == 0, done.stderr
    assert parameters == [row["parameters"] for row in json.loads((native / "ranks.json").read_text())]
    for name, limit in (("loss", tolerance.LOSS_FP32), ("grad_norm", tolerance.GRAD_NORM_FP32)):
        ours, theirs = (column(read_rows(folder / "metrics.jsonl"), name)[1] for folder in (out, native))
        assert ours == pytest.approx(theirs, rel=limit)
        assert len(ours) == 4


def test_what_it_cannot_do_is_one_line(warm: WarmParent, tmp_path: Path) -> None:
    for flags, said in (
        (("--parallel.expert", "2"), "parallel.expert = 2 needs train.backend = 'megatron'"),
        (("--parallel.tensor", "2"), "parallel.tensor = 2 needs train.backend = 'megatron'"),
        (("--precision.dtype", "bf16"), "precision.dtype = 'bf16' needs train.backend = 'megatron'"),
        (("--precision.fp8", "tensorwise"), "precision.fp8 = 'tensorwise' needs train.backend = 'megatron'"),
        (("--precision.linears", "transformer_engine"), "'transformer_engine' needs train.backend = 'megatron'"),
    ):
        refused = warm.run(
            "train", "tiny", "--out", str(tmp_path / "no"), *FLAGS, "--train.backend", "deepspeed", *flags
        )
        assert refused.returncode == 2
        assert said in refused.stderr
        assert refused.stderr.count("\n") == 1
    alone = warm.run("train", "tiny", "--out", str(tmp_path / "no"), *FLAGS, "--deepspeed.zero_stage", "3")
    assert alone.returncode == 2
    assert "deepspeed.zero_stage = 3 is read with train.backend = 'deepspeed' only" in alone.stderr
