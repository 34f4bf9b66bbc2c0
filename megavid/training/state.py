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
    """

    step: int = 0
    updates: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    tokens: int = 0
    clips: int = 0
    losses: list[float] = field(default_factory=list)

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
            if known.name == "losses":  # checkpoints of before it was kept have none
                counters[known.name] = [float(loss) for loss in value] if isinstance(value, list) else []
                continue
            if not isinstance(value, int):
                raise CheckpointError(f"state.json has {known.name} = {value!r}, which must be a whole number")
            counters[known.name] = value
        return cls(**counters)
