"""The shipped train.sbatch on a real Slurm cluster of four nodes: the curve of one process, whatever happens to it."""

import json
from pathlib import Path

import pytest

from megavid.training.metrics import read_rows
from megavid.training.plots import column
from tests.support.slurm import SlurmCluster
from tests.support.tolerance import LOSS_FP32
from tests.support.warm_parent import WarmParent

EXAMPLES = Path(__file__).parents[2] / "examples" / "slurm"
FLAGS = (
    "--train.steps", "8", "--train.global_batch_size", "4", "--checkpoint.interval_steps", "2",
    "--data.validation_samples", "4", "--log.tensorboard", "false",
)  # fmt: skip


def rows(out: Path) -> list[tuple[object, ...]]:
    return [(row["step"], row["loss"], row["grad_norm"], row["tokens"]) for row in read_rows(out / "metrics.jsonl")]


def test_two_nodes_train_the_curve_of_one_process(cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "commands").mkdir()
    with WarmParent(tmp_path / "commands") as warm:
        alone = warm.run("train", "tiny", "--out", str(tmp_path / "alone"), *FLAGS)
    assert alone.returncode == 0, alone.stderr
    out = tmp_path / "run"
    job = cluster.submit(
        EXAMPLES / "train.sbatch", "tiny", "--out", str(out), *FLAGS, "--parallel.tensor", "2",
        options=("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"),
    )  # fmt: skip
    assert cluster.wait_end(job) == "COMPLETED", cluster.log(job)
    ours, theirs = (column(read_rows(folder / "metrics.jsonl"), "loss")[1] for folder in (out, tmp_path / "alone"))
    assert len(ours) == 8
    assert ours == pytest.approx(theirs, rel=LOSS_FP32)
    hosts = [row["rank"] for row in json.loads((out / "ranks.json").read_text())]
    assert hosts == [0, 1, 2, 3]
