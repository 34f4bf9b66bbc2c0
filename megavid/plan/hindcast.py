"""The hindcast: published runs predicted by the same time model, how wrong it is, and what that says of a prediction.

Owns the fit of the few free numbers of the calibration, the errors of runs that the fit did not see, and the interval
around a prediction. The runs themselves are in ``hindcast.toml``. Pure Python: everything repeats to the last bit.
"""

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from megavid.plan.calibration import FREE, Calibration, gpu_calibration
from megavid.plan.critical_path import Stage, StepTime, step_time_of
from megavid.plan.fitting import fit_numbers
from megavid.plan.hardware import Hardware, hardware, table
from megavid.plan.kernels import Machine
from megavid.plan.reference import PublishedRun, ReferenceModel, Source
from megavid.plan.reference_stage import stages_of

REFIT_STEPS = 3
"""Steps of a fit with rows left out; it starts at the fit on all rows."""
LEAST_RUNS = 8
"""Published runs on one generation of accelerators from which on the interval is that of their errors alone."""
INTERVAL_SHARE = 0.8
"""Share of the left-out rows whose published figure lies inside the interval of its prediction."""


@dataclass(frozen=True)
class Case:
    """A published run, ready to be timed.

    Attributes:
        run: the row.
        family: its model, whatever its layers, accelerator and source; such rows are left out together.
        stages: its pipeline stages on the critical path.
        machine: accelerator.
        seconds: published, of a step.
        flops_per_gpu: model FLOPs of a step and GPU; half of a causal attention matrix counted.
    """

    run: PublishedRun
    family: str
    stages: tuple[Stage, ...]
    machine: Hardware
    seconds: float
    flops_per_gpu: float

    def predict(self, calibration: Calibration) -> StepTime:
        """Time of its step."""
        schedule = self.run.schedule(calibration.routing_imbalance)
        return step_time_of(self.stages, schedule, Machine(self.machine, calibration))

    def mfu(self, seconds: float) -> float:
        """Share of the dense bf16 peak."""
        return self.flops_per_gpu / seconds / self.machine.peak_of("bf16")


@dataclass(frozen=True)
class Row:
    """One line of the hindcast.

    Attributes:
        run: the published run.
        published_s: seconds of its step.
        predicted_s: by the calibration that was fitted on the other rows.
        family_s: by one that was fitted on the other models.
        publisher_s: by one that was fitted on the rows that others published.
        published_mfu: share of the dense bf16 peak.
        predicted_mfu: likewise, of ``predicted_s``.
        parts: seconds of ``predicted_s`` by part.
    """

    run: PublishedRun
    published_s: float
    predicted_s: float
    family_s: float
    publisher_s: float
    published_mfu: float
    predicted_mfu: float
    parts: dict[str, float]

    @property
    def error(self) -> float:
        """Predicted over published throughput, less one: above 0 where the prediction is too fast."""
        return self.published_s / self.predicted_s - 1.0

    @property
    def family_error(self) -> float:
        """As ``error``, with all rows of the model left out of the fit."""
        return self.published_s / self.family_s - 1.0

    @property
    def publisher_error(self) -> float:
        """As ``error``, with all rows of the publisher left out of the fit."""
        return self.published_s / self.publisher_s - 1.0


@dataclass(frozen=True)
class Hindcast:
    """All rows and what they say together.

    Attributes:
        rows: in the order of the file.
        families: models among them.
        calibration: fitted on all of them.
    """

    rows: tuple[Row, ...]
    families: int
    calibration: Calibration

    @property
    def mean_error(self) -> float:
        """Mean absolute error of the rows, each left out of the fit."""
        return sum(abs(row.error) for row in self.rows) / len(self.rows)

    @property
    def mean_family_error(self) -> float:
        """Mean absolute error with all rows of a row's model left out."""
        return sum(abs(row.family_error) for row in self.rows) / len(self.rows)

    @property
    def mean_publisher_error(self) -> float:
        """Mean absolute error with all rows of a row's publisher left out."""
        return sum(abs(row.publisher_error) for row in self.rows) / len(self.rows)

    def errors(self) -> dict[str, list[float]]:
        """Errors with the publisher left out, by accelerator: what ``calibration.toml`` keeps."""
        found: dict[str, list[float]] = {}
        for row in self.rows:
            found.setdefault(row.run.hardware, []).append(row.publisher_error)
        return found

    @property
    def worst(self) -> Row:
        """The row with the largest error."""
        return max(self.rows, key=lambda row: abs(row.error))


@cache
def cases() -> tuple[Case, ...]:
    """Every published run of ``hindcast.toml``, its work counted."""
    text = tomllib.loads(resources.files("megavid.plan").joinpath("hindcast.toml").read_text(encoding="utf-8"))
    models = {name: ReferenceModel(**entry) for name, entry in text["model"].items()}
    sources = {name: Source(**entry) for name, entry in text["source"].items()}
    found = []
    for entry in text["run"]:
        lists = {key: tuple(entry.get(key, ())) for key in ("overlap", "recompute_modules")}
        run = PublishedRun(**{**entry, **lists, "source": sources[entry["source"]]})
        model, machine = models[run.model], hardware(run.hardware)
        family = model.family or run.model
        flops = model.published_flops(run.sequence, "half") * run.global_batch / run.gpus
        found.append(Case(run, family, stages_of(run, model, machine), machine, run.published_seconds(model), flops))
    return tuple(found)


def rows() -> tuple[PublishedRun, ...]:
    """The published runs."""
    return tuple(case.run for case in cases())


@cache
def hindcast() -> Hindcast:
    """Predict every row from the others: some seventy small fits, a few seconds."""
    every = cases()
    fitted = fit(every, gpu_calibration())
    families = _fits_without(lambda case: case.family, fitted)
    publishers = _fits_without(lambda case: case.run.source.publisher, fitted)
    lines = []
    for case in every:
        time = case.predict(fit([other for other in every if other is not case], fitted, REFIT_STEPS))
        lines.append(
            Row(
                run=case.run,
                published_s=case.seconds,
                predicted_s=time.total,
                family_s=case.predict(families[case.family]).total,
                publisher_s=case.predict(publishers[case.run.source.publisher]).total,
                published_mfu=case.mfu(case.seconds),
                predicted_mfu=case.mfu(time.total),
                parts=dict(time.parts),
            )
        )
    return Hindcast(tuple(lines), len(families), fitted)


def _fits_without(group_of: Callable[[Case], str], fitted: Calibration) -> dict[str, Calibration]:
    """For every group of rows, the numbers fitted on all the others."""
    every = cases()
    groups = dict.fromkeys(map(group_of, every))
    return {group: fit([case for case in every if group_of(case) != group], fitted, REFIT_STEPS) for group in groups}


# What it says of a prediction


@dataclass(frozen=True)
class Evidence:
    """Published runs whose errors bound a prediction.

    Attributes:
        errors: predicted over published throughput less one, the publisher left out of the fit.
        text: which runs they are, in words.
    """

    errors: tuple[float, ...]
    text: str

    def interval(self, prediction: float) -> tuple[float, float]:
        """Where the true figure lies if it is off as four of five of these runs are.

        Args:
            prediction: a throughput, a rate or an MFU (not a time).
        """
        tail, ordered = (1.0 - INTERVAL_SHARE) / 2, sorted(self.errors)
        return prediction / (1.0 + _quantile(ordered, 1.0 - tail)), prediction / (1.0 + _quantile(ordered, tail))


def evidence(machine: Hardware, errors: Mapping[str, Sequence[float]] | None = None) -> Evidence:
    """The runs on accelerators of the same generation, where they are enough; else all of them.

    Args:
        machine: what is planned for.
        errors: by accelerator, as ``Hindcast.errors``; None for those that ``calibration.toml`` keeps.
    """
    known = stored_errors() if errors is None else errors
    alike = [name for name, other in table().items() if machine.generation and other.generation == machine.generation]
    near = [error for name in alike for error in known.get(name, ())]
    missing = "" if machine.name in known else f", none of them on {machine.name}"
    if len(near) >= LEAST_RUNS:
        return Evidence(tuple(near), f"{len(near)} published runs on {machine.generation.capitalize()}{missing}")
    everything = [error for row in known.values() for error in row]
    return Evidence(tuple(everything), f"all {len(everything)} published runs{missing}")


@cache
def stored_errors() -> Mapping[str, Sequence[float]]:
    """Errors of the last fit by accelerator, each publisher left out, as ``tools/fit_calibration.py`` wrote them."""
    text = resources.files("megavid.plan").joinpath("calibration.toml").read_text(encoding="utf-8")
    found: dict[str, list[float]] = tomllib.loads(text)["errors"]
    return found


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def table_text(found: Hindcast) -> str:
    """The table that ``megavid plan --hindcast`` prints."""
    lines = [
        f"{'':38s} {'step, s':>8s} {'':>9s} {'MFU':>6s} {'':>9s} {'error, left out of the fit:':>28s}",
        f"{'run':38s} {'publ.':>8s} {'predicted':>9s} {'publ.':>6s} {'predicted':>9s} {'row':>8s} {'model':>8s} "
        f"{'publisher':>10s}",
    ]
    for row in found.rows:
        lines.append(
            f"{row.run.name:38s} {row.published_s:8.2f} {row.predicted_s:9.2f} {row.published_mfu:6.1%} "
            f"{row.predicted_mfu:9.1%} {row.error:+8.1%} {row.family_error:+8.1%} {row.publisher_error:+10.1%}"
        )
    numbers = ", ".join(f"{name} {found.calibration.numbers()[name]:.4g}" for name in FREE)
    publishers = len({row.run.source.publisher for row in found.rows})
    lines += [
        "",
        f"{len(found.rows)} runs of {found.families} models by {publishers} publishers. Every prediction is made by "
        "numbers that were fitted on other rows.",
        f"mean absolute error: {found.mean_error:.1%} with the row left out, {found.mean_family_error:.1%} with all "
        f"rows of its model, {found.mean_publisher_error:.1%} with all of its publisher",
        f"worst row: {found.worst.run.name} {found.worst.error:+.1%}",
        *_interval_lines(found),
        f"fitted on all rows: {numbers}",
    ]
    return "\n".join(lines)


def _interval_lines(found: Hindcast) -> list[str]:
    """Interval of a prediction for each machine of the table; machines with the same runs share a line."""
    machines: dict[tuple[str, float, float], list[str]] = {}
    for machine in table().values():
        basis = evidence(machine, found.errors())
        machines.setdefault((basis.text, *basis.interval(1.0)), []).append(machine.name)
    return [
        f"interval of a throughput on {', '.join(names)}: {low:.2f} to {high:.2f} times the prediction ({text})"
        for (text, low, high), names in machines.items()
    ]


# The fit


def fit(seen: Sequence[Case], start: Calibration, steps: int = 80) -> Calibration:
    """The free numbers that predict ``seen`` best: models weigh the same.

    Args:
        seen: rows to fit.
        start: where to start; its other numbers stay.
        steps: at most.
    """
    sizes: dict[str, int] = {}
    for case in seen:
        sizes[case.family] = sizes.get(case.family, 0) + 1
    weights = [1.0 / sizes[case.family] for case in seen]
    return fit_numbers(
        lambda calibration: [case.predict(calibration).total for case in seen],
        [case.seconds for case in seen],
        start,
        FREE,
        weights=weights,
        steps=steps,
    )
