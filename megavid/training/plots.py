"""Curves of a run as a picture: loss, validation loss and gradient norm against the step.

Owns how they look. Reads rows of metrics.jsonl and events.jsonl, so tools can draw any run folder; knows no torch.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullFormatter, StrMethodFormatter

from megavid.training.metrics import BEGINNINGS

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLORS = ("#2563eb", "#d97706", "#059669", "#9333ea")

Row = dict[str, object]


def plot_run(rows: Sequence[Row], events: Sequence[Row], file: Path, *, title: str = "") -> None:
    """Draw one run: loss with its running mean and validation losses above, gradient norm below."""
    figure, (top, bottom) = _axes()
    events = still_true(events)
    steps, losses = column(rows, "loss")
    top.plot(steps, losses, color=COLORS[0], alpha=0.25, linewidth=1)
    top.plot(steps, smooth(losses), color=COLORS[0], linewidth=2, label="training loss, running mean")
    for name, color in (("loss", COLORS[1]), ("ema_loss", COLORS[2])):
        label = "validation loss" + (", EMA weights" if name == "ema_loss" else "")
        steps_seen, values = column([e for e in events if e.get("event") == "validated"], name)
        if values:
            top.plot(steps_seen, values, "o-", color=color, linewidth=1.2, markersize=3.5, label=label)
    bottom.plot(*column(rows, "grad_norm"), color=COLORS[3], linewidth=1)
    for event in events:
        if event.get("event") == "resumed":
            _mark(top, event["step"], f"resumed as {event['layout']}")
    _finish(figure, top, bottom, title)
    figure.savefig(file, dpi=140)


def still_true(events: Sequence[Row]) -> list[Row]:
    """The events without those of steps that the run went back behind and took again."""
    kept: list[Row] = []
    for event in events:
        if event.get("event") in BEGINNINGS:
            kept = [row for row in kept if int(str(row["step"])) <= int(str(event["step"]))]
        kept.append(event)
    return kept


def plot_runs(runs: Sequence[tuple[str, Sequence[Row]]], file: Path, *, title: str = "") -> None:
    """Draw the loss and gradient norm of several runs over each other."""
    figure, (top, bottom) = _axes()
    for number, (name, rows) in enumerate(runs):
        color, line = COLORS[number % len(COLORS)], "-" if number == 0 else "--"
        top.plot(*column(rows, "loss"), line, color=color, linewidth=1.6, label=name)
        bottom.plot(*column(rows, "grad_norm"), line, color=color, linewidth=1.2)
    _finish(figure, top, bottom, title)
    figure.savefig(file, dpi=140)


def plot_restarts(rows: Sequence[Row], events: Sequence[Row], file: Path, *, title: str = "") -> None:
    """Draw loss above and MFU below (TFLOP/s a rank where no peak is known) over the steps, every restart marked.

    A restart is marked at the step that it went on from; the slow and the skipped steps around it are in the curves.
    """
    figure, (top, bottom) = _axes()
    top.plot(*column(rows, "loss"), color=COLORS[0], linewidth=1.2)
    name = "mfu" if column(rows, "mfu")[1] else "tflops_per_rank"
    bottom.set_yscale("linear")
    bottom.plot(*column(rows, name), color=COLORS[2], linewidth=1)
    restarts = [int(str(event["step"])) for event in events if event.get("event") == "resumed"]
    for number, step in enumerate(restarts):
        for axes in (top, bottom):
            label = f"restarts ({len(restarts)})" if number == 0 else None
            axes.axvline(step, color=COLORS[1], linewidth=1.0, linestyle=":", label=label)
    _finish(figure, top, bottom, title)
    bottom.set_ylabel("MFU" if name == "mfu" else "TFLOP/s a rank", color=INK)
    bottom.set_ylim(bottom=0)
    bottom.yaxis.set_major_formatter(StrMethodFormatter("{x:.0%}" if name == "mfu" else "{x:g}"))
    bottom.yaxis.set_minor_formatter(NullFormatter())
    figure.savefig(file, dpi=140)


def column(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have a number under ``name``."""
    pairs = [(row["step"], row.get(name)) for row in rows]
    kept = [
        (int(step), float(value)) for step, value in pairs if isinstance(value, (int, float)) and isinstance(step, int)
    ]
    return [step for step, _ in kept], [value for _, value in kept]


def smooth(values: Sequence[float], window: int = 0) -> list[float]:
    """Mean over the last ``window`` values (a fortieth of the run where 0), fewer at the beginning."""
    window = window or max(len(values) // 40, 5)
    total, means = 0.0, []
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means


class _PlainLogFormatter(LogFormatter):
    """Labels where matplotlib's own formatter has one, as 0.6 instead of 6e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _axes() -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=(8.5, 5.6), layout="constrained", facecolor="white")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for axes in (top, bottom):
        axes.set_yscale("log")
        axes.grid(True, which="major", color=GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(MUTED)
        axes.tick_params(colors=MUTED, which="both", labelsize=9)
        axes.set_axisbelow(True)
    return figure, (top, bottom)


def _mark(axes: Axes, step: object, text: str) -> None:
    assert isinstance(step, int)
    axes.axvline(step, color=MUTED, linewidth=0.8, linestyle=":")
    axes.annotate(
        text, (step, 1), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points",
        fontsize=8, color=MUTED,
    )  # fmt: skip


def _finish(figure: Figure, top: Axes, bottom: Axes, title: str) -> None:
    top.set_ylabel("loss (velocity, mean square)", color=INK)
    bottom.set_ylabel("gradient norm", color=INK)
    bottom.set_xlabel("step", color=INK)
    for axes in (top, bottom):
        axes.yaxis.set_major_formatter(_PlainLogFormatter())
        axes.yaxis.set_minor_formatter(_PlainLogFormatter(minor_thresholds=(1.2, 0.6)))
    if top.get_legend_handles_labels()[0]:
        top.legend(frameon=False, labelcolor=INK, fontsize=9)
    if title:
        figure.suptitle(title, color=INK, fontsize=12, x=0.01, ha="left")
