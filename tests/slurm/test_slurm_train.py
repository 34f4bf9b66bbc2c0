"""The shipped train.sbatch on a real Slurm cluster of four nodes: the curve of one process."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megavid.training.metrics import read_rows
from megavid.training.plots import column
from tests.support.slurm import SlurmCluster
from tests.support.tolerance import LOSS_FP32
from tests.support.warm_parent import WarmParent

EXAMPLES = Path(__file__).parents[2] / "examples" / "slurm"
FLAGS = (
    "--train.steps", "4", "--train.global_batch_size", "4", "--checkpoint.interval_steps", "2",
    "--data.validation_samples", "4", "--log.tensorboard", "false",
)  # fmt: skip


def packed_environment(tmp_path: Path) -> Path:
    """A tar of a Python environment; its packages are those of this one."""
    venv = tmp_path / "venv"
    packages = Path("lib") / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (venv / packages).mkdir(parents=True)
    (venv / packages / "real.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (venv / "bin").mkdir()
    (venv / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    (venv / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
    subprocess.run(["tar", "-C", str(venv), "-cf", str(tmp_path / "venv.tar"), "."], check=True)
    return tmp_path / "venv.tar"


def test_two_nodes_train_the_curve_of_one_process(cluster: SlurmCluster, warm: WarmParent, tmp_path: Path) -> None:
    """Their Python environment is unpacked on each node first."""
    alone = warm.run("train", "tiny", "--out", str(tmp_path / "alone"), *FLAGS)
    assert alone.returncode == 0, alone.stderr
    out = tmp_path / "run"
    job = cluster.submit(
        EXAMPLES / "train.sbatch", "tiny", "--out", str(out), *FLAGS, "--parallel.tensor", "2",
        options=("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"),
        env={"MEGAVID_STAGE": str(packed_environment(tmp_path)), "MEGAVID_NODE_CACHE": str(tmp_path / "node")},
    )  # fmt: skip
    assert cluster.wait_end(job) == "COMPLETED", cluster.log(job)
    ours, theirs = (column(read_rows(folder / "metrics.jsonl"), "loss")[1] for folder in (out, tmp_path / "alone"))
    assert len(ours) == 4
    assert ours == pytest.approx(theirs, rel=LOSS_FP32)
    assert f"ranks by srun: {tmp_path}/node/env-" in cluster.log(job)
    hosts = [row["rank"] for row in json.loads((out / "ranks.json").read_text())]
    assert hosts == [0, 1, 2, 3]
