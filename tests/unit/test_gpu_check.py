"""tools/gpu_check.sh does not report success, nor an old page, where something is missing; python is a stub here."""

import importlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
OLD, NEW = "figures of another run\n", "figures of this run\n"
STUB = """#!/bin/sh
echo "needs kernels: $MEGAVID_NEEDS_KERNELS, $*" >>CALLS
case "$*" in
  *"FAILING"*) exit STATUS ;;
  *"gpu_check.py recipes"*) echo "tensorwise blockwise" ;;
  *"gpu_check.py page"*) echo "figures of this run" >"$5" ;;
esac
"""


class Run(NamedTuple):
    """How the script ended, what it printed, the page that it left and what it ran."""

    status: int
    printed: str
    page: str
    calls: str


def run(folder: Path, *options: str, failing: str, status: int = 1) -> Run:
    """The script in a folder of its own, where the command with ``failing`` in it ends with ``status``."""
    (folder / "tools").mkdir()
    (folder / "docs/benchmarks").mkdir(parents=True)
    shutil.copy(ROOT / "tools/gpu_check.sh", folder / "tools")
    page, stub, calls = folder / "docs/benchmarks/gpu_check.md", folder / "python", folder / "calls"
    page.write_text(OLD)
    stub.write_text(STUB.replace("CALLS", str(calls)).replace("FAILING", failing).replace("STATUS", str(status)))
    stub.chmod(0o755)
    environment = dict(os.environ) | {"PYTHON": str(stub), "OUT": str(folder / "out")}
    command = ["bash", str(folder / "tools/gpu_check.sh"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return Run(done.returncode, done.stdout, page.read_text(), calls.read_text())


def test_a_run_without_failures_leaves_its_page(tmp_path: Path) -> None:
    found = run(tmp_path, failing="no such command")
    assert found[:3] == (0, NEW, NEW)
    assert "needs kernels: 1, -m pytest -q tests/gpu" in found.calls
    for recipe in ("tensorwise", "blockwise"):  # those that the GPU multiplies in eight bits
        assert f"--layers 30 --fp8 {recipe} " in found.calls


def test_kernels_that_are_not_there_fail_the_run(tmp_path: Path) -> None:
    assert run(tmp_path, failing="gpu_check.py kernels").status == 1


def test_a_page_that_is_not_written_is_not_the_old_one(tmp_path: Path) -> None:
    assert run(tmp_path, failing="gpu_check.py page")[:3] == (1, "", OLD)


@pytest.mark.parametrize(("status", "ends"), [(1, 1), (2, 2)])
def test_only_status_2_says_that_there_is_no_device(tmp_path: Path, status: int, ends: int) -> None:
    found = run(tmp_path, failing="gpu_check.py device", status=status)
    assert (found.status, found.calls.count("\n")) == (ends, 1)


def test_a_dry_run_asks_for_no_kernels_and_ends_with_status_2(tmp_path: Path) -> None:
    found = run(tmp_path, "--dry-run", failing="gpu_check.py device", status=2)
    assert found[:3] == (2, NEW, OLD)
    assert "needs kernels: , -m pytest -q tests/gpu" in found.calls
    assert "gpu_check.py kernels" not in found.calls


def test_without_transformer_engine_its_steps_are_left_out(tmp_path: Path) -> None:
    found = run(tmp_path, failing="gpu_check.py te", status=2)
    assert found[:3] == (0, NEW, NEW)
    assert "--linears" not in found.calls
    assert "te_parity\tleft out" in (tmp_path / "out/steps.tsv").read_text()


def test_without_flash_attention_3_its_steps_are_left_out(tmp_path: Path) -> None:
    found = run(tmp_path, failing="gpu_check.py fa3", status=2)
    assert found[:3] == (0, NEW, NEW)
    assert "--attention flash_attn_3" not in found.calls
    assert "dense_fa3\tleft out" in (tmp_path / "out/steps.tsv").read_text()


def test_with_flash_attention_3_steps_in_fp8_are_timed_against_its_own_in_bf16(tmp_path: Path) -> None:
    calls = run(tmp_path, failing="no such command").calls
    assert calls.count("--attention flash_attn_3") == 3
    assert "--attention flash_attn_3 --fp8 tensorwise --fp8-attention --device cuda" in calls
    names = [line.split("step_")[-1] for line in calls.splitlines() if "flash_attn_3" in line]
    assert names == ["dense_fa3.json", "dense_fa3_tensorwise.json", "dense_fa3_tensorwise_attention.json"]


@pytest.mark.parametrize(
    ("has_fp8_forward", "words"),
    [
        (None, "was not timed: FlashAttention-3 cannot be used here"),
        (True, "FP8 with attention is 1.50 times as fast as bf16"),
        (False, "FP8 with attention turned back to wide numbers is 1.50 times as fast as bf16"),
    ],
)
def test_the_page_says_how_much_faster_attention_in_fp8_is_or_that_it_was_not_timed(
    tmp_path: Path, has_fp8_forward: bool | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    attention_line = importlib.import_module("gpu_check").attention_line
    if has_fp8_forward is not None:
        for name, seconds, is_narrow in (("", 3.0, False), ("_tensorwise_attention", 2.0, has_fp8_forward)):
            step = {"seconds": [seconds] * 3, "has_fp8_forward": is_narrow}
            (tmp_path / f"step_dense_fa3{name}.json").write_text(json.dumps(step))
    assert words in attention_line(tmp_path)


def test_with_transformer_engine_it_is_compared_and_trained(tmp_path: Path) -> None:
    calls = run(tmp_path, failing="no such command").calls
    assert "pytest -q -s -rs tests/gpu/test_te_cuda.py" in calls
    assert calls.count("--linears transformer_engine") == 2
