"""Fit numbers of a calibration to measured seconds: damped Gauss-Newton on log errors, deterministic, pure Python.

Owns the optimiser. The hindcast fits three numbers to published runs with it; a probe fits a machine's numbers to the
steps that it has timed.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from megavid.plan.calibration import Calibration

SMALL_ERROR = 0.1
"""Log error from which a fit counts an error linearly instead of squared, so that no outlier rules it."""
NUDGE = 0.01
"""Share of a number's range that it is moved by to see what depends on it."""


def fit_numbers(
    seconds_of: Callable[[Calibration], Sequence[float]],
    measured: Sequence[float],
    start: Calibration,
    ranges: Mapping[str, tuple[float, float]],
    *,
    weights: Sequence[float] | None = None,
    steps: int = 80,
) -> Calibration:
    """The numbers in ``ranges`` with which predictions come closest to what was measured; the others stay.

    Args:
        seconds_of: predictions of one calibration, one for each measurement.
        measured: seconds.
        start: where to start.
        ranges: lowest and highest plausible value by name.
        weights: of the measurements; None for equal ones.
        steps: at most.
    """
    names = list(ranges)

    def errors_of(numbers: Sequence[float]) -> list[float]:
        predicted = seconds_of(start.with_numbers(**dict(zip(names, numbers, strict=True))))
        return [math.log(ours / theirs) for ours, theirs in zip(predicted, measured, strict=True)]

    begin = [min(max(start.numbers()[name], low), high) for name, (low, high) in ranges.items()]
    found = _least_errors(errors_of, list(weights or [1.0] * len(measured)), begin, list(ranges.values()), steps)
    return start.with_numbers(**dict(zip(names, found, strict=True)))


def _least_errors(
    errors_of: Callable[[Sequence[float]], list[float]],
    weights: Sequence[float],
    numbers: list[float],
    ranges: Sequence[tuple[float, float]],
    steps: int,
) -> list[float]:
    damping = 1e-3
    errors = errors_of(numbers)
    for _ in range(steps):
        slopes = []
        for place, (low, high) in enumerate(ranges):
            nudge = NUDGE * (high - low)
            nudge = nudge if numbers[place] + nudge <= high else -nudge
            moved = [value + nudge * (other == place) for other, value in enumerate(numbers)]
            slopes.append([(after - before) / nudge for after, before in zip(errors_of(moved), errors, strict=True)])
        bent = [
            weight / math.sqrt(1.0 + (error / SMALL_ERROR) ** 2) for error, weight in zip(errors, weights, strict=True)
        ]
        tried = _step(slopes, errors, bent, damping, numbers, ranges)
        found = errors_of(tried)
        gain = _loss(errors, weights) - _loss(found, weights)
        if gain > 0:
            numbers, errors, damping = tried, found, damping / 3
        else:
            damping *= 10
        if 0 <= gain < 1e-9:
            break
    return numbers


def _loss(errors: Sequence[float], weights: Sequence[float]) -> float:
    """Pseudo-Huber: squared below ``SMALL_ERROR``, linear above."""
    bent = (math.sqrt(1.0 + (error / SMALL_ERROR) ** 2) - 1.0 for error in errors)
    return sum(weight * value for weight, value in zip(weights, bent, strict=True))


def _step(
    slopes: Sequence[Sequence[float]],
    errors: Sequence[float],
    weights: Sequence[float],
    damping: float,
    numbers: Sequence[float],
    ranges: Sequence[tuple[float, float]],
) -> list[float]:
    """Numbers after one step; those that would leave their range stay at its end, and the others move without them."""
    held: dict[int, float] = {}
    while True:
        free = [place for place in range(len(numbers)) if place not in held]
        moved = _solve([slopes[place] for place in free], errors, weights, damping, [ranges[p] for p in free])
        tried = {place: numbers[place] + by for place, by in zip(free, moved, strict=True)}
        outside = [p for p, value in tried.items() if not ranges[p][0] <= value <= ranges[p][1]]
        stuck = [p for p in outside if numbers[p] in ranges[p]]
        if not stuck:
            ended = {place: min(max(value, ranges[place][0]), ranges[place][1]) for place, value in tried.items()}
            return [{**held, **ended}[place] for place in range(len(numbers))]
        held |= {place: numbers[place] for place in stuck}


def _solve(
    slopes: Sequence[Sequence[float]],
    errors: Sequence[float],
    weights: Sequence[float],
    damping: float,
    ranges: Sequence[tuple[float, float]],
) -> list[float]:
    """Step of damped least squares: (J W J' + damping D) step = -J W errors, in units of each number's range."""
    size, scale = len(slopes), [high - low for low, high in ranges]
    scaled = [[value * unit for value in row] for row, unit in zip(slopes, scale, strict=True)]
    matrix = [
        [sum(a * b * w for a, b, w in zip(left, right, weights, strict=True)) for right in scaled] for left in scaled
    ]
    goal = [-sum(a * e * w for a, e, w in zip(row, errors, weights, strict=True)) for row in scaled]
    for place in range(size):
        matrix[place][place] += damping * (matrix[place][place] + 1e-6)
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(matrix[row][column]))
        matrix[column], matrix[pivot] = matrix[pivot], matrix[column]
        goal[column], goal[pivot] = goal[pivot], goal[column]
        for row in range(column + 1, size):
            factor = matrix[row][column] / matrix[column][column]
            goal[row] -= factor * goal[column]
            matrix[row] = [a - factor * b for a, b in zip(matrix[row], matrix[column], strict=True)]
    for row in reversed(range(size)):
        known = sum(matrix[row][other] * goal[other] for other in range(row + 1, size))
        goal[row] = (goal[row] - known) / matrix[row][row]
    return [value * unit for value, unit in zip(goal, scale, strict=True)]
