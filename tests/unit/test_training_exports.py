"""What other systems get: the text of Prometheus' textfile collector, and the steps of a W&B run."""

import re
import sys
import types
from pathlib import Path
from typing import Any, cast

import pytest

from megavid.config.schema import LogConfig, RunConfig
from megavid.errors import ConfigError
from megavid.training import wandb_log
from megavid.training.callbacks import Run
from megavid.training.prometheus import HELP, prometheus_text
from megavid.training.run_dir import RunDir
from megavid.training.step import StepReport


def test_every_line_is_of_the_format() -> None:
    values: dict[str, float | None] = dict.fromkeys(HELP, 1.5)
    values |= {"loss": float("nan"), "grad_norm": float("inf"), "mfu": None, "skipped_steps_total": 3}
    text = prometheus_text(values, 'my "run"')
    lines = text.splitlines()
    assert text.endswith("\n")
    for line in lines:
        assert re.fullmatch(
            r'# (HELP|TYPE) megavid_[a-z_]+ .+|megavid_[a-z_]+\{run="my \\"run\\""\} (NaN|[+-]Inf|[0-9.e+-]+)', line
        ), line
    assert 'megavid_loss{run="my \\"run\\""} NaN' in lines
    assert 'megavid_grad_norm{run="my \\"run\\""} +Inf' in lines
    assert "# TYPE megavid_skipped_steps_total counter" in lines
    assert "megavid_mfu" not in text


def test_file_that_the_collector_would_not_read_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"log.prometheus = 'x.txt' must end in .prom"):
        LogConfig(prometheus="x.txt")


def test_restarts_of_a_folder_go_on_in_one_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, sent = [], []

    class Sent:
        def log(self, scalars: dict[str, float], step: int) -> None:
            sent.append((step, scalars))

        def finish(self) -> None:
            sent.append((-1, {}))

    def init(**named: Any) -> Sent:
        begun.append(named)
        return Sent()

    monkeypatch.setitem(sys.modules, "wandb", cast(types.ModuleType, types.SimpleNamespace(init=init)))
    monkeypatch.setattr(wandb_log, "scalars_of", lambda run, report: {"train/loss": 1.5})
    run = cast(Run, types.SimpleNamespace(run_dir=RunDir(tmp_path), config=RunConfig()))
    for _ in range(2):
        callback = wandb_log.WandbLog("videos")
        callback.before_training(run)
        callback.after_step(run, cast(StepReport, types.SimpleNamespace(step=7)))
        callback.after_training(run)
    assert begun[0] == begun[1]
    assert (begun[0]["project"], begun[0]["resume"], begun[0]["name"]) == ("videos", "allow", tmp_path.name)
    assert sent == 2 * [(7, {"train/loss": 1.5}), (-1, {})]


def test_wandb_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"log.wandb_project = 'videos' needs the package wandb"):
        wandb_log.check_wandb("videos")
    wandb_log.check_wandb("")
