"""The hindcast: published runs predicted by the same time model, how wrong it is, and what that says of a prediction.

Owns the fit of the few free numbers of the calibration, the errors of runs that the fit did not see, and the interval
around a prediction. The runs themselves are in ``hindcast.toml``. Pure Python: everything repeats to the last bit.
"""

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from megavid.plan.calibration import FREE, Calibration, default_calibration
from megavid.plan.critical_path import Stage, StepTime, step_time_of
from megavid.plan.fitting import fit_numbers
from megavid.plan.hardware import Hardware, hardware
from megavid.plan.kernels import Machine
from megavid.plan.reference import PublishedRun, ReferenceModel
from megavid.plan.reference_stage import stages_of

REFIT_STEPS = 3
"""Steps of a fit with a row or a family left out; it starts at the fit on all rows."""
INTERVAL_SHARE = 0.8
"""Share of the left-out rows whose published figure lies inside the interval of its prediction."""


@dataclass(frozen=True)
class Case:
    """A published run, ready to be timed.

    Attributes:
        run: the row.
        stages: its pipeline stages on the critical path.
        machine: accelerator.
        seconds: published, of a step.
        flops_per_gpu: model FLOPs of a step and GPU; half of a causal attention matrix counted.
    """

    run: PublishedRun
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
        family_s: by one that was fitted on the other families.
        published_mfu: share of the dense bf16 peak.
        predicted_mfu: likewise, of ``predicted_s``.
        parts: seconds of ``predicted_s`` by part.
    """

    run: PublishedRun
    published_s: float
    predicted_s: float
    family_s: float
    published_mfu: float
    predicted_mfu: float
    parts: dict[str, float]

    @property
    def error(self) -> float:
        """Predicted over published throughput, less one: above 0 where the prediction is too fast."""
        return self.published_s / self.predicted_s - 1.0

    @property
    def family_error(self) -> float:
        """As ``error``, with the whole family left out of the fit."""
        return self.published_s / self.family_s - 1.0


@dataclass(frozen=True)
class Hindcast:
    """All rows and what they say together.

    Attributes:
        rows: in the order of the file.
        calibration: fitted on all of them.
    """

    rows: tuple[Row, ...]
    calibration: Calibration

    @property
    def mean_error(self) -> float:
        """Mean absolute error of the rows, each left out of the fit."""
        return sum(abs(row.error) for row in self.rows) / len(self.rows)

    @property
    def mean_family_error(self) -> float:
        """Mean absolute error with a row's whole family left out."""
        return sum(abs(row.family_error) for row in self.rows) / len(self.rows)

    @property
    def worst(self) -> Row:
        """The row with the largest error."""
        return max(self.rows, key=lambda row: abs(row.error))


@cache
def cases() -> tuple[Case, ...]:
    """Every published run of ``hindcast.toml``, its work counted."""
    table = tomllib.loads(resources.files("megavid.plan").joinpath("hindcast.toml").read_text(encoding="utf-8"))
    models = {name: ReferenceModel(**entry) for name, entry in table["model"].items()}
    found = []
    for entry in table["run"]:
        run = PublishedRun(**{**entry, "overlap": tuple(entry.get("overlap", ()))})
        model, machine = models[run.model], hardware(run.hardware)
        flops = model.published_flops(run.sequence, "half") * run.global_batch / run.gpus
        found.append(Case(run, stages_of(run, model, machine), machine, run.published_seconds(model), flops))
    return tuple(found)


def rows() -> tuple[PublishedRun, ...]:
    """The published runs."""
    return tuple(case.run for case in cases())


@cache
def hindcast() -> Hindcast:
    """Predict every row from the others: some hundred small fits, a few seconds."""
    every = cases()
    fitted = fit(every, default_calibration())
    families = {
        family: fit([case for case in every if case.run.family != family], fitted, REFIT_STEPS)
        for family in dict.fromkeys(case.run.family for case in every)
    }
    lines = []
    for case in every:
        left_out = fit([other for other in every if other is not case], fitted, REFIT_STEPS)
        time = case.predict(left_out)
        lines.append(
            Row(
                run=case.run,
                published_s=case.seconds,
                predicted_s=time.total,
                family_s=case.predict(families[case.run.family]).total,
                published_mfu=case.mfu(case.seconds),
                predicted_mfu=case.mfu(time.total),
                parts=dict(time.parts),
            )
        )
    return Hindcast(tuple(lines), fitted)


def interval(prediction: float, errors: Sequence[float] | None = None) -> tuple[float, float]:
    """Where the true figure lies in four of five cases, after the errors of rows that the fit did not see.

    Args:
        prediction: a throughput, a rate or an MFU (not a time).
        errors: of the hindcast, as ``Row.family_error``; None for those that ``calibration.toml`` keeps.
    """
    known = sorted(errors if errors is not None else stored_errors())
    tail = (1.0 - INTERVAL_SHARE) / 2
    return prediction / (1.0 + _quantile(known, 1.0 - tail)), prediction / (1.0 + _quantile(known, tail))


@cache
def stored_errors() -> tuple[float, ...]:
    """Errors of the last fit, each family left out, as written by ``tools/fit_calibration.py``."""
    text = resources.files("megavid.plan").joinpath("calibration.toml").read_text(encoding="utf-8")
    return tuple(tomllib.loads(text)["errors"]["left_out"])


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def table_text(found: Hindcast) -> str:
    """The table that ``megavid plan --hindcast`` prints."""
    lines = [
        f"{'run':38s} {'step s':>8s} {'predicted':>9s} {'MFU':>6s} {'predicted':>9s} {'error':>7s} {'family out':>10s}"
    ]
    for row in found.rows:
        lines.append(
            f"{row.run.name:38s} {row.published_s:8.2f} {row.predicted_s:9.2f} {row.published_mfu:6.1%} "
            f"{row.predicted_mfu:9.1%} {row.error:+7.1%} {row.family_error:+10.1%}"
        )
    low, high = interval(1.0, [row.family_error for row in found.rows])
    numbers = ", ".join(f"{name} {found.calibration.numbers()[name]:.4g}" for name in FREE)
    lines += [
        "",
        f"{len(found.rows)} runs, {len({row.run.family for row in found.rows})} families. Every prediction is made by "
        "numbers that were fitted on the other rows.",
        f"mean absolute error, row left out: {found.mean_error:.1%}; family left out: {found.mean_family_error:.1%}; "
        f"worst: {found.worst.run.name} {found.worst.error:+.1%}",
        f"interval of a prediction: {low:.2f} to {high:.2f} times it",
        f"fitted on all rows: {numbers}",
    ]
    return "\n".join(lines)


# The fit


def fit(seen: Sequence[Case], start: Calibration, steps: int = 80) -> Calibration:
    """The free numbers that predict ``seen`` best: families weigh the same.

    Args:
        seen: rows to fit.
        start: where to start; its other numbers stay.
        steps: at most.
    """
    sizes: dict[str, int] = {}
    for case in seen:
        sizes[case.run.family] = sizes.get(case.run.family, 0) + 1
    weights = [1.0 / sizes[case.run.family] for case in seen]
    return fit_numbers(
        lambda calibration: [case.predict(calibration).total for case in seen],
        [case.seconds for case in seen],
        start,
        FREE,
        weights=weights,
        steps=steps,
    )
