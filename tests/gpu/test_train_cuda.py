"""A run on one GPU: random numbers and curve are those of a CPU rank, and a resumed run is the same run.

Each test starts the command line as a user does, because a process has either GPU ranks or CPU ranks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megavid.ops.philox import key_of, normal_box

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run(folder: Path, *options: str, gpu: bool = True) -> list[dict[str, float]]:
    environment = dict(os.environ) | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    command = [sys.executable, "-m", "megavid", "train", "tiny", "--out", str(folder), "--train.steps", "6", *options]
    subprocess.run(command, env=environment, check=True, timeout=300)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_random_numbers_are_bitwise_those_of_the_cpu() -> None:
    boxes = [normal_box(key_of(1, "x"), (300, 257), (3, 5), (200, 100), device) for device in ("cpu", "cuda")]
    assert torch.equal(boxes[0], boxes[1].cpu())


def test_loss_curve_on_the_gpu_is_that_of_the_cpu(tmp_path: Path) -> None:
    on_gpu, on_cpu = run(tmp_path / "gpu"), run(tmp_path / "cpu", gpu=False)
    for mine, reference in list(zip(on_gpu, on_cpu))[:3]:
        assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_deterministic_run_resumes_bitwise(tmp_path: Path, dtype: str) -> None:
    options = ("--train.deterministic", "true", "--precision.dtype", dtype)
    whole = run(tmp_path / "whole", *options)
    run(tmp_path / "halves", *options, "--train.stop_at_step", "3")
    halves = run(tmp_path / "halves", *options)
    assert [row["loss"] for row in halves] == [row["loss"] for row in whole]
    assert [row["grad_norm"] for row in halves] == [row["grad_norm"] for row in whole]
