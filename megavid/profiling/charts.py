"""Charts of a profile as inline SVG: bars, lines, areas and heat maps that need no script and no network.

Owns geometry. Colours are CSS classes of ``megavid.profiling.page``, so that light and dark share one drawing. Lengths
are units of a drawing ``WIDTH`` wide, which the page shows at its own width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

WIDTH = 1120
LABEL = 240
"""Room for labels on the left."""
VALUE = 170
"""Room for figures on the right."""
ROW = 26
BAR = 16


@dataclass
class Drawing:
    """An SVG that is being drawn."""

    height: float
    title: str
    items: list[str] = field(default_factory=list)

    def rect(self, x: float, y: float, width: float, height: float, kind: str, tip: str = "", extra: str = "") -> None:
        """A rectangle of CSS class ``kind``; ``tip`` shows under the pointer."""
        inner = f"<title>{escape(tip)}</title>" if tip else ""
        self.items.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" class="{kind}"{extra}>'
            f"{inner}</rect>"
        )

    def text(self, x: float, y: float, words: str, kind: str = "label", anchor: str = "start") -> None:
        """A line of text whose baseline is at ``y``."""
        self.items.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "axis") -> None:
        """A straight line."""
        self.items.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>')

    def path(self, points: Sequence[tuple[float, float]], kind: str, *, base: float | None = None) -> None:
        """A line through ``points``; with ``base`` the area down to it."""
        steps = " ".join(f"{'L' if number else 'M'}{x:.1f} {y:.1f}" for number, (x, y) in enumerate(points))
        if base is not None:
            steps += f" L{points[-1][0]:.1f} {base:.1f} L{points[0][0]:.1f} {base:.1f} Z"
        self.items.append(f'<path d="{steps}" class="{kind}"/>')

    def circle(self, x: float, y: float, radius: float, kind: str, tip: str) -> None:
        """A dot with a tip."""
        inner = f"<title>{escape(tip)}</title>"
        self.items.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{kind}">{inner}</circle>')

    def svg(self) -> str:
        """The whole."""
        head = f'<svg viewBox="0 0 {WIDTH} {self.height:.0f}" role="img" aria-label="{escape(self.title, quote=True)}">'
        return head + "".join(self.items) + "</svg>"


def seconds(value: float) -> str:
    """A time with three digits and a unit that fits."""
    if value == 0:
        return "0"
    if abs(value) >= 0.9995:
        return f"{value:.3g} s" if abs(value) < 1000 else f"{value:,.0f} s"
    return f"{value * 1e3:.3g} ms" if abs(value) >= 0.9995e-3 else f"{value * 1e6:.3g} us"


def binary(value: float) -> str:
    """A number of bytes with three digits and a unit that fits."""
    if value == 0:
        return "0"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.3g} {unit}" if abs(value) < 1000 else f"{value:.0f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


COLOURS: Mapping[str, str] = {
    "useful work at peak": "good", "kernel inefficiency": "work", "other operators": "work2", "recompute": "again",
    "pipeline bubble": "comm", "routing imbalance": "comm", "optimizer": "other", "input wait": "host",
    "host gaps": "host", "statistics and reports": "host", "no part": "bad",
}  # fmt: skip
"""Class of each bar of the waterfall; communication is "comm"."""


def waterfall_chart(bars: Sequence[Mapping[str, Any]], total_s: float) -> str:
    """Bars that each begin where the one above ended, from the useful work to the whole traced step."""
    shown = [bar for bar in bars if bar["seconds"] != 0 or bar["name"] in ("no part", "useful work at peak")]
    drawing = Drawing(ROW * (len(shown) + 1) + 14, "Waterfall from peak to achieved")
    room = WIDTH - LABEL - VALUE
    ends, at = [0.0], 0.0
    for bar in shown:
        at += bar["seconds"]
        ends.append(at)
    scale = room / max(*ends, total_s)
    at = 0.0
    for number, bar in enumerate(shown):
        y, value = 6 + ROW * number, bar["seconds"]
        left = min(at, at + value)
        tip = f"{bar['name']}: {seconds(value)}, {bar['share']:.1%} of the traced step. {bar['note']}."
        drawing.text(LABEL - 12, y + 13, bar["name"], anchor="end")
        kind = COLOURS.get(bar["name"], "comm")
        drawing.rect(LABEL + left * scale, y, max(abs(value) * scale, 1.5), BAR, kind, tip, ' rx="2"')
        at += value
        drawing.line(LABEL + at * scale, y, LABEL + at * scale, y + ROW + BAR, "join")
        drawing.text(WIDTH - 72, y + 13, seconds(value), "value", "end")
        drawing.text(WIDTH - 4, y + 13, f"{bar['share']:.1%}", "value", "end")
    y = 6 + ROW * len(shown)
    drawing.text(LABEL - 12, y + 13, "traced step", "label strong", "end")
    drawing.rect(LABEL, y, total_s * scale, BAR, "total", f"traced step: {seconds(total_s)}", ' rx="2"')
    drawing.text(WIDTH - 72, y + 13, seconds(total_s), "value strong", "end")
    drawing.text(WIDTH - 4, y + 13, "100.0%", "value strong", "end")
    return drawing.svg()


def stacked_chart(
    rows: Sequence[tuple[str, Sequence[tuple[str, str, float]], str]], title: str, *, highlight: str = ""
) -> str:
    """Horizontal stacked bars.

    Args:
        rows: (label, pieces as (class, name, seconds), figure on the right).
        title: for readers that do not see.
        highlight: label that is set in bold.
    """
    drawing = Drawing(ROW * len(rows) + 10, title)
    longest = max((sum(value for _, _, value in pieces) for _, pieces, _ in rows), default=0.0) or 1.0
    scale = (WIDTH - LABEL - VALUE) / longest
    for number, (label, pieces, figure) in enumerate(rows):
        y, x = 4 + ROW * number, float(LABEL)
        weight = " strong" if highlight and label == highlight else ""
        drawing.text(LABEL - 12, y + 13, label, "label" + weight, "end")
        for kind, name, value in pieces:
            if value > 0:
                drawing.rect(x, y, value * scale - (1 if value * scale > 3 else 0), BAR, kind,
                             f"{label}, {name}: {seconds(value)}")  # fmt: skip
                x += value * scale
        drawing.text(WIDTH - 4, y + 13, figure, "value" + weight, "end")
    return drawing.svg()


def pairs_chart(rows: Sequence[tuple[str, float | None, float]]) -> str:
    """Two thin bars a row: (label, predicted seconds or None, measured seconds)."""
    row, bar = 30.0, 10.0
    drawing = Drawing(row * len(rows) + 30, "Predicted against measured")
    longest = max(value for _, predicted, measured in rows for value in (predicted or 0.0, measured)) or 1.0
    scale = (WIDTH - LABEL - VALUE) / longest
    drawing.text(WIDTH - 90, 16, "predicted", "tick", "end")
    drawing.text(WIDTH - 4, 16, "measured", "tick", "end")
    for number, (label, predicted, measured) in enumerate(rows):
        y = 26 + row * number
        drawing.text(LABEL - 12, y + 15, label, "label", "end")
        if predicted is not None:
            drawing.rect(LABEL, y, max(predicted * scale, 1), bar, "again", f"{label}, predicted: {seconds(predicted)}")
        drawing.rect(
            LABEL, y + bar + 1, max(measured * scale, 1), bar, "work", f"{label}, measured: {seconds(measured)}"
        )
        drawing.text(WIDTH - 90, y + 15, "not" if predicted is None else seconds(predicted), "value", "end")
        drawing.text(WIDTH - 4, y + 15, seconds(measured), "value", "end")
    return drawing.svg()


def steps_chart(times: Mapping[str, Any]) -> str:
    """Every measured step as a dot, with median and the range of 5% to 95%."""
    values = times["all"]
    drawing, top, bottom, right = Drawing(210, "Step times"), 14.0, 172.0, WIDTH - VALUE
    high: float = max(values) * 1.08

    def height(value: float) -> float:
        return bottom - (bottom - top) * value / high

    drawing.rect(LABEL, height(times["p95"]), right - LABEL, height(times["p5"]) - height(times["p95"]), "band",
                 f"5% to 95%: {seconds(times['p5'])} to {seconds(times['p95'])}")  # fmt: skip
    for tick in ticks(high):
        drawing.line(LABEL, height(tick), right, height(tick), "grid")
        drawing.text(LABEL - 12, height(tick) + 4, seconds(tick), "tick", "end")
    drawing.line(LABEL, height(times["p50"]), right, height(times["p50"]), "median")
    drawing.text(right + 10, height(times["p50"]) + 4, f"median {seconds(times['p50'])}", "value")
    pitch = (right - LABEL) / len(values)
    points = [(LABEL + pitch * (number + 0.5), height(value)) for number, value in enumerate(values)]
    if len(points) > 1:
        drawing.path(points, "thin")
    for number, ((x, y), value) in enumerate(zip(points, values), 1):
        drawing.circle(x, y, 4 if len(values) <= 60 else 2, "dot", f"measured step {number}: {seconds(value)}")
    drawing.text(LABEL, 196, "step 1", "tick")
    drawing.text(right, 196, f"step {len(values)}", "tick", "end")
    return drawing.svg()


def ticks(high: float) -> list[float]:
    """Three to six round values from 0 up to ``high``."""
    if high <= 0:
        return [0.0]
    exponent, step = 1e-12, 1e-12
    while step * 5 < high:
        for factor in (1, 2, 5, 10):
            step = exponent * factor
            if step * 5 >= high:
                break
        else:
            exponent *= 10
    return [step * number for number in range(int(high / step) + 1)]


PHASES: Mapping[str, str] = {
    "input_wait": "host", "noise": "work2", "schedule": "work", "gradients": "comm", "statistics": "host",
    "optimizer": "other", "zero_gradients": "other", "average": "other", "reports": "host",
}  # fmt: skip
PHASE_NAMES: Mapping[str, str] = {"schedule": "forward and backward", "input_wait": "input wait"}


def memory_chart(timeline: Mapping[str, Any]) -> str:
    """Bytes in tensors over a traced step, above a strip that says what the step was doing."""
    at: list[float] = timeline["at_ms"]
    values: list[int] = timeline["bytes"]
    drawing, top, bottom, right = Drawing(254, "Memory timeline"), 14.0, 196.0, WIDTH - VALUE
    high: int = max(*values, 1)
    span: float = max(at[-1], *(phase["stop_ms"] for phase in timeline["phases"]))

    def place(milliseconds: float) -> float:
        return LABEL + (right - LABEL) * milliseconds / span

    def height(value: float) -> float:
        return bottom - (bottom - top) * max(value, 0) / (high * 1.05)

    for tick in _binary_ticks(high):
        drawing.line(LABEL, height(tick), right, height(tick), "grid")
        drawing.text(LABEL - 12, height(tick) + 4, binary(tick), "tick", "end")
    points = [(place(x), height(y)) for x, y in zip(at, values)]
    drawing.path(points, "area", base=bottom)
    drawing.path(points, "curve")
    peak = max(range(len(values)), key=values.__getitem__)
    drawing.circle(place(at[peak]), height(values[peak]), 4, "dot", f"highest: {binary(values[peak])}")
    drawing.text(right + 10, height(values[peak]) + 8, f"highest {binary(values[peak])}", "value")
    for phase in timeline["phases"]:
        name = PHASE_NAMES.get(phase["name"], phase["name"])
        x, width = place(phase["start_ms"]), place(phase["stop_ms"]) - place(phase["start_ms"])
        duration = seconds((phase["stop_ms"] - phase["start_ms"]) / 1e3)
        drawing.rect(x, bottom + 10, width - 1, 18, PHASES.get(phase["name"], "host"), f"{name}: {duration}")
        if width > 7.5 * len(name) + 8:
            drawing.text(x + width / 2, bottom + 23, name, "inside", "middle")
    drawing.text(LABEL, 246, "0", "tick")
    drawing.text(right, 246, seconds(span / 1e3), "tick", "end")
    return drawing.svg()


def _binary_ticks(high: float) -> list[float]:
    unit = 1.0
    while high / unit >= 1024:
        unit *= 1024
    return [tick * unit for tick in ticks(high / unit)]


def experts_chart(experts: Mapping[str, Any]) -> str:
    """Load of every expert (columns) in every layer (rows), over all tokens and for each noise bucket, side by side."""
    layers = experts["layers"]
    buckets = len(layers[0]["load_by_noise"])
    columns, gap, left = len(layers[0]["load"]), 18.0, 62.0
    panel = (WIDTH - left - gap * buckets) / (buckets + 1)
    cell, row = panel / columns, 22.0 if len(layers) <= 24 else 12.0
    drawing = Drawing(30 + row * len(layers) + 26, "Load of experts by layer and noise bucket")
    for place in range(buckets + 1):
        x = left + place * (panel + gap)
        drawing.text(
            x, 16, "all tokens" if place == 0 else f"noise {(place - 1) / buckets:.2g} to {place / buckets:.2g}"
        )
        for number, layer in enumerate(layers):
            loads = layer["load"] if place == 0 else layer["load_by_noise"][place - 1]
            y = 26 + row * number
            if place == 0:
                drawing.text(left - 8, y + row / 2 + 4, f"layer {layer['layer']}", "tick", "end")
            for expert, load in enumerate(loads):
                tip = f"layer {layer['layer']}, expert {expert}: {load:.2f} of the mean load"
                shade = f' fill-opacity="{min(load / 2.5, 1.0):.2f}"'
                drawing.rect(x + cell * expert, y, cell - 1, row - 1, "heat", tip, shade)
                if cell >= 24 and row >= 20:
                    drawing.text(x + cell * (expert + 0.5) - 0.5, y + row / 2 + 4, f"{load:.1f}", "cell", "middle")
        drawing.text(x, 26 + row * len(layers) + 16, "expert 0", "tick")
        drawing.text(x + panel, 26 + row * len(layers) + 16, str(columns - 1), "tick", "end")
    return drawing.svg()
