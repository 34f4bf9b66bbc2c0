"""What a run has to remember beside its tensors: the content of state.json.

Owns the record and its JSON. Random numbers need no state: noise, order and initialisation are functions of the seed
and of counters that follow from ``step``.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

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
    """

    step: int = 0
    updates: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    tokens: int = 0
    clips: int = 0

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
        counters = {}
        for field in dataclasses.fields(cls):
            value = table.get(field.name)
            if not isinstance(value, int):
                raise CheckpointError(f"state.json has {field.name} = {value!r}, which must be a whole number")
            counters[field.name] = value
        return cls(**counters)
