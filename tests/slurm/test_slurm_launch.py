"""`megavid launch slurm` on the local cluster: a chain of two jobs trains one run, and its log is followed."""

import subprocess
from pathlib import Path

from megavid.training.metrics import read_rows
from tests.support.slurm import SlurmCluster

FLAGS = (
    "--train.global_batch_size", "2", "--data.validation_samples", "2", "--log.tensorboard", "false",
    "--train.steps", "4", "--train.stop_at_step", "2",
)  # fmt: skip


def test_chain_is_queued_behind_each_other_and_followed(cluster: SlurmCluster, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*cluster.env["MEGAVID_COMMAND"].split(), "launch", "slurm", "tiny", "--out", str(out), "--nodes", "1"]
    job = ("--gpus-per-node", "1", "--chain", "2", "--time", "1:00:00", "--frames", "17", "--height", "96")
    done = subprocess.run(
        [*command, *job, "--width", "96", *FLAGS], env=cluster.env, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("COMPLETED, exit status 0") == 2
    assert "step      2/4" in done.stdout
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [1, 2]
