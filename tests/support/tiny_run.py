"""The smallest run that has every part, and how tests look at its ranks from outside."""

import json
import time
from pathlib import Path

from tests.support.warm_parent import Command

TINY = (
    "--model.num_layers", "3", "--model.hidden_size", "32", "--model.num_heads", "2", "--model.ffn_size", "64",
    "--model.moe.expert_ffn_size", "32", "--model.moe.shared_ffn_size", "0", "--model.moe.num_experts", "4",
    "--model.text_size", "16", "--model.text_length", "8", "--log.tensorboard", "false",
    "--data.validation_samples", "0", "--log.interval_steps", "100",
)  # fmt: skip
"""Flags that make preset ``tiny`` a model of some ten thousand weights."""


def rank_pids(out: Path) -> list[int]:
    """Processes of the ranks of the last start."""
    return [row["pid"] for row in json.loads((out / "ranks.json").read_text())]


def wait_for_step(command: Command, out: Path, step: int, timeout_s: float = 120.0) -> None:
    """Until the run has a row of ``step``."""
    deadline = time.monotonic() + timeout_s
    file = out / "metrics.jsonl"
    while not file.exists() or f'"step": {step},' not in file.read_text():
        assert command.poll() is None, command.stderr
        assert time.monotonic() < deadline, command.stdout
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether it runs; one that has ended but that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def assert_ended(pids: list[int]) -> None:
    """No process is left behind."""
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, [pid for pid in pids if is_running(pid)]
        time.sleep(0.05)
