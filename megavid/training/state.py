"""What a run has to remember beside its tensors: the content of state.json.

Owns the record and its JSON. Random numbers need no state: noise, order and initialisation are functions of the seed
and of counters that follow from ``step``.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch

import megavid
from megavid.errors import CheckpointError

FORMAT = 1
"""Version of state.json; raised when an older reader would go wrong."""


@dataclass(slots=True)
class TrainState:
    """Counters of a run; the loop advances them.

    Attributes:
        step: optimizer steps taken, skipped ones too; the next one is ``step + 1``.
        updates: updates that Adam made, which skipped steps are not; for its bias correction.
        skipped: steps that were skipped for a loss or gradient that was not finite.
        bad_in_a_row: of these, the last ones without a good step between.
        tokens: tokens of clips seen, padding left out.
        clips: clips seen.
        losses: the last ``train.spike_window`` losses of steps that were not skipped: what a spike is told by.
        rollbacks: (step that the run went back to, step of the spike) of each time that it did.
        left_out: steps whose samples were left out by that, in all.
    """

    step: int = 0
    updates: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    tokens: int = 0
    clips: int = 0
    losses: list[float] = field(default_factory=list)
    rollbacks: list[tuple[int, int]] = field(default_factory=list)
    left_out: int = 0

    @property
    def data_step(self) -> int:
        """Steps whose samples were seen or left out: those of the next step are of ``data_step + 1``."""
        return self.step + self.left_out

    def go_back_from(self, later: "TrainState") -> None:
        """Make this, loaded from a checkpoint, the state of a run that goes back to it from ``later``."""
        self.rollbacks = [*later.rollbacks, (self.step, later.step)]
        self.left_out = later.data_step - self.step

    def is_before(self, later: "TrainState") -> bool:
        """Whether the run that stands at ``later`` came by here: not where it went back behind this since."""
        since = later.rollbacks[len(self.rollbacks) :]
        is_same_run = later.rollbacks[: len(self.rollbacks)] == self.rollbacks
        return is_same_run and self.step <= later.step and all(self.step < to for to, _ in since)

    def loss_limit(self, factor: float, window: int) -> float:
        """The loss above which the next step is a spike; infinite while too few are known, or where ``factor`` is 0."""
        if not factor or len(self.losses) < window:
            return math.inf
        return factor * statistics.median(self.losses[-window:])

    def to_json(self, *, seed: int, loader: Mapping[str, object]) -> dict[str, object]:
        """The whole of state.json.

        Args:
            seed: of the run; with ``step`` it is the whole random state.
            loader: what the loader wants to be given back beside the step.
        """
        return {
            "format": FORMAT,
            **dataclasses.asdict(self),
            "random": {"generator": "philox4x32-10", "seed": seed},
            "loader": dict(loader),
            "versions": {"megavid": megavid.__version__, "torch": str(torch.__version__)},
        }

    @classmethod
    def from_json(cls, table: Mapping[str, object]) -> Self:
        """Read the counters back.

        Raises:
            CheckpointError: the table is of another format or lacks a counter.
        """
        if table.get("format") != FORMAT:
            raise CheckpointError(f"state.json has format = {table.get('format')}, this megavid reads {FORMAT}")
        counters: dict[str, Any] = {}
        for known in dataclasses.fields(cls):
            value = table.get(known.name)
            # Checkpoints of before these were kept have none.
            if known.name == "losses":
                counters[known.name] = [float(loss) for loss in value] if isinstance(value, list) else []
                continue
            if known.name == "rollbacks":
                counters[known.name] = [(int(to), int(at)) for to, at in value] if isinstance(value, list) else []
                continue
            if known.name == "left_out" and value is None:
                continue
            if not isinstance(value, int):
                raise CheckpointError(f"state.json has {known.name} = {value!r}, which must be a whole number")
            counters[known.name] = value
        return cls(**counters)
