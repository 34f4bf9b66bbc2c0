"""The scalars of TensorBoard for Weights & Biases, where its package is installed.

Owns the run's identity there: restarts of one folder go on in one W&B run. What W&B does offline and with a lost
network is its own; nothing of it reaches the loss.
"""

import dataclasses
import importlib
import importlib.util
import uuid
from typing import Any

from megavid.errors import ConfigError
from megavid.training.callbacks import Callback, Run, scalars_of
from megavid.training.run_dir import write_whole
from megavid.training.step import StepReport


def check_wandb(project: str) -> None:
    """Refuse a project without the package.

    Raises:
        ConfigError: it is not installed.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"log.wandb_project = {project!r} needs the package wandb: pip install wandb, or leave it empty"
        )


class WandbLog(Callback):
    """Sends each step's scalars (rank 0). Steps taken again after a restart are dropped there: its steps only rise."""

    def __init__(self, project: str) -> None:
        """Name the project."""
        self.project = project

    def before_training(self, run: Run) -> None:
        """Begin the W&B run, or go on with the one that this folder began."""
        file = run.run_dir.path / "wandb_id"
        if not file.exists():
            write_whole(file, uuid.uuid4().hex[:12])
        package: Any = importlib.import_module("wandb")
        self.run = package.init(
            project=self.project,
            id=file.read_text(),
            name=run.run_dir.path.resolve().name,
            dir=str(run.run_dir.path),
            resume="allow",
            config=dataclasses.asdict(run.config),
        )

    def after_step(self, run: Run, report: StepReport) -> None:
        """Send the scalars."""
        self.run.log(scalars_of(run, report), step=report.step)

    def after_training(self, run: Run) -> None:
        """Send what is left."""
        self.run.finish()
