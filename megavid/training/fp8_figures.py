"""How well the layers in FP8 are rounded: underflow, overflow and error of every operand, over all ranks.

Owns the steps at which layers are watched, and the figures' way to every rank. The sums are ``megavid.models.fp8``'s.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from megavid.config.schema import RunConfig
from megavid.models.fp8 import FIGURES, watched_of
from megavid.ops.fp8_linear import ROLES
from megavid.parallel.engine import Engine


class Rounding(NamedTuple):
    """Figures of one operand over one step.

    Attributes:
        underflow: share of the numbers that are not 0 which became 0.
        overflow: share of them that were too large and became the largest number.
        error: norm of the rounding error over the norm of the numbers.
    """

    underflow: float
    overflow: float
    error: float


Fp8Figures = Mapping[str, Mapping[str, Rounding]]
"""By layer (its first matrix's name in model space, or attention's) and operand; empty where nothing was watched."""


def is_watched(config: RunConfig, step: int) -> bool:
    """Whether the layers are watched in ``step``."""
    interval = config.log.fp8_interval_steps
    return config.precision.fp8 != "off" and interval > 0 and step % interval == 0


@contextmanager
def watching(engine: "Engine[Any]", is_on: bool) -> Iterator[None]:
    """While entered, every layer in FP8 adds up its figures, if ``is_on``."""
    watched = watched_of(engine.chunks) if is_on else []
    for layer in watched:
        layer.seen = torch.zeros(len(ROLES), len(FIGURES), dtype=torch.float64, device=engine.mesh.device)
    try:
        yield
    finally:
        for layer in watched:
            layer.kept, layer.seen = layer.seen, None


def figures_of(engine: "Engine[Any]") -> Fp8Figures:
    """What was seen since ``watching`` was entered last, of all layers of the model, the same on every rank.

    Numbers that several ranks hold (weights, tokens that tensor-parallel ranks share) count once for each of them:
    every figure is a ratio.

    Ranks: collective over the world.
    """
    watched = watched_of(engine.chunks)
    empty = torch.zeros(0, len(ROLES), len(FIGURES), dtype=torch.float64, device=engine.mesh.device)
    sums = torch.stack([layer.kept for layer in watched if layer.kept is not None]) if watched else empty
    sums = engine.mesh.sum(sums, over="tp_dp_cp").cpu()
    mine = {
        layer.name: {operand: rounding_of(row) for operand, row in zip(layer.operands, rows.tolist())}
        for layer, rows in zip(watched, sums)
    }
    joined: dict[str, dict[str, Rounding]] = {}
    for found in engine.mesh.all_gather_object(mine):
        joined.update(found)
    return joined


def worst_rounding(figures: Fp8Figures) -> dict[str, float]:
    """The worst operand of all layers by each figure, for a row of metrics.jsonl."""
    found = [rounding for layer in figures.values() for rounding in layer.values()]
    if not found:
        return {}
    return {name: max(row[place] for row in found) for place, name in enumerate(Rounding._fields)}


def rounding_rows(figures: Fp8Figures) -> dict[str, dict[str, dict[str, float]]]:
    """Every layer for fp8.jsonl."""
    return {name: {role: row._asdict() for role, row in layer.items()} for name, layer in figures.items()}


def rounding_of(sums: Sequence[float]) -> Rounding:
    """Figures from the sums of one operand, ``megavid.models.fp8.FIGURES``."""
    numbers, underflow, overflow, error, size = sums
    count = max(numbers, 1.0)
    relative = (error / size) ** 0.5 if size > 0 else 0.0
    return Rounding(*(float(f"{value:.4g}") for value in (underflow / count, overflow / count, relative)))
