"""report.html: one file that a browser opens without a network, in light or dark, and shows what report.json says.

Owns words, tables and colours; the drawings are ``megavid.profiling.charts``'. No figure is computed here that is not a
sum or a share of figures of the report.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from megavid.profiling.attribution import NOBODY
from megavid.profiling.charts import (
    binary,
    experts_chart,
    memory_chart,
    pairs_chart,
    seconds,
    stacked_chart,
    steps_chart,
    waterfall_chart,
)
from megavid.profiling.waterfall import AXES

Row = Mapping[str, Any]

LEGENDS: Mapping[str, Sequence[tuple[str, str]]] = {
    "parts": (
        ("work", "forward, operators"), ("good", "backward, operators"), ("again", "recompute"),
        ("other", "update and statistics"), ("comm", "communication"), ("host", "host: no operator runs"),
    ),
    "prediction": (("again", "predicted"), ("work", "measured")),
    "ranks": (("work", "works"), ("comm", "waits for other ranks")),
}  # fmt: skip
SMALL = 0.005
"""Share of a step below which a part has no bar of its own."""
MOST_RANKS = 48
"""Ranks that the page shows: those that work longest; report.json has all."""


def page(report: Row) -> str:
    """The whole page."""
    style = resources.files("megavid.profiling").joinpath("page.css").read_text(encoding="utf-8")
    title = f"megavid profile: {report['preset']}, {report['layout']}"
    body = [_head(report, title), _tiles(report), *(_run(report, run) for run in report["runs"]), _foot(report)]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{style}</style></head>",
            "<body><main>",
            *body,
            "</main></body></html>",
            "",
        ]
    )


def _head(report: Row, title: str) -> str:
    model = report["model"]
    experts = f", {model['experts']} experts, top {model['top_k']}" if model["experts"] else ""
    facts = [
        f"{_count(model['parameters'])} parameters ({_count(model['active_parameters'])} active)"
        f", {model['layers']} layers of width {model['hidden_size']}{experts}",
        f"{report['ranks']} rank{'s' * (report['ranks'] > 1)} ({report['layout']}), {report['precision']}, "
        f"recompute {report['recompute']}, {report['packs_per_step']} packs of {report['pack_tokens']:,} tokens a step",
        f"{report['device_name']}, threads of a rank: {report['threads_per_rank']}, {report['host']}, {report['time']}",
        f"peak of a rank: {_tflops(report['peak']['flops_per_s_per_rank'])}, {report['peak']['source']}",
    ]
    return (
        f"<header><h1>{escape(title)}</h1>"
        + "".join(f"<p>{escape(fact)}</p>" for fact in facts)
        + f"<p><code>{escape(report['command'])}</code></p></header>"
    )


def _tiles(report: Row) -> str:
    """The figures that matter, a row for each kind of routing."""
    rows = []
    for run in report["runs"]:
        times = run["step_time_s"]
        tiles = (
            ("MFU", f"{run['mfu']:.1%}", "forward and backward of the clips"),
            ("HFU", f"{run['hfu']:.1%}", "with padding and recompute"),
            ("TFLOP/s a rank", f"{run['tflops_per_rank']:.3g}", f"{run['hardware_tflops_per_rank']:.3g} in hardware"),
            ("tokens/s", f"{run['tokens_per_s']:,.0f}", f"{run['clips_per_s']:.3g} clips/s, all ranks"),
            ("step, median", seconds(times["p50"]), f"5% to 95%: {seconds(times['p5'])} to {seconds(times['p95'])}"),
            ("packs are full to", f"{run['pack_fill']:.1%}", f"{run['tokens_per_step']:,.0f} tokens a step"),
        )
        cells = "".join(
            f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>'
            for name, value, note in tiles
        )
        rows.append(f'<h2 class="run">{_kind(run)}</h2><div class="tiles" id="tiles-{run["routing"]}">{cells}</div>')
    return "".join(rows)


def _kind(run: Row) -> str:
    if run["routing"] == "forced":
        return "Forced balance: every expert gets the same load (not training)"
    return "Real routing" if run["experts"] else "Measured"


def _run(report: Row, run: Row) -> str:
    kind = run["routing"]
    heading = f"<h2 class='run'>{_kind(run)}: where the time goes</h2>" if len(report["runs"]) > 1 else ""
    charts = [
        heading,
        _figure(
            f"waterfall-{kind}", "From peak to achieved", waterfall_chart(run["waterfall"], run["traced_step_s"]),
            "A traced step, mean over ranks. The first bar is the useful work at the peak; every other bar is time on "
            f"top of it. Traced steps took {1 + run['trace_overhead']:.2f} times a measured one, which MFU is from.",
            _table(("", "seconds", "share", "what it is"),
                   [(b["name"], seconds(b["seconds"]), f"{b['share']:.2%}", b["note"]) for b in run["waterfall"]]),
        ),
        _figure(
            f"parts-{kind}", "Time of every part", stacked_chart(_part_bars(run["parts"]), "Time of every part"),
            "The same traced step by part; communication by axis, beside the parts that it serves. Parts below "
            f"{SMALL:.1%} of the step share a bar; the table has each of them, by phase and group.",
            _parts_table(run["parts"]), legend="parts",
        ),
        _figure(
            f"steps-{kind}", "Step times", steps_chart(run["step_time_s"]),
            "Measured steps, without the profiler; the slowest rank of each.", _steps_table(run),
        ),
    ]  # fmt: skip
    if "prediction" in run:
        charts.append(_prediction(kind, run["prediction"]))
    if run["experts"]:
        charts.append(
            _figure(
                f"experts-{kind}", "Load of experts", experts_chart(run["experts"]),
                "Tokens of each expert over the mean of its layer, 1.0 is balanced. Busiest anywhere: "
                f"{run['experts']['worst_max_load']:.2f}.", _experts_table(run["experts"]),
            )
        )  # fmt: skip
    charts += [_memory(kind, run["memory"]), _ranks(kind, run)]
    return "".join(charts)


def _figure(name: str, title: str, svg: str, words: str, table: str = "", *, legend: str = "") -> str:
    keys = "".join(f'<span><i class="{kind}"></i>{escape(key)}</span>' for kind, key in LEGENDS.get(legend, ()))
    legend_row = f'<p class="legend">{keys}</p>' if keys else ""
    details = f"<details><summary>table</summary>{table}</details>" if table else ""
    return (
        f'<figure id="chart-{name}"><figcaption><h3>{escape(title)}</h3><p>{escape(words)}</p></figcaption>'
        f"{legend_row}{svg}{details}</figure>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _part_bars(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, str, float]], str]]:
    """Parts, longest first, as pieces forward, backward, recompute, update, communication, host."""
    kinds = {"forward": "work", "backward": "good", "recompute": "again", "step": "other", "communication": "comm"}
    parts: dict[str, dict[tuple[str, str], float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        phase = row["phase"]
        name = _part_name(phase, AXES.get(row["part"], row["part"]) if phase == "communication" else row["part"])
        work, host = row["operators_s"], row["host_s"]
        if phase == "communication":
            work, host = work + host, 0.0
        parts[name][kinds[phase], phase] += work
        parts[name]["host", "host"] += host
    _join_small(parts)
    order = [*kinds.values(), "host"]
    bars = []
    for name, pieces in parts.items():
        ordered = sorted(pieces.items(), key=lambda piece: order.index(piece[0][0]))
        bars.append((name, [(kind, phase, value) for (kind, phase), value in ordered], seconds(sum(pieces.values()))))
    return sorted(bars, key=lambda bar: -sum(value for _, _, value in bar[1]))


def _join_small(parts: dict[str, dict[tuple[str, str], float]]) -> None:
    """Make one of the parts that would not be seen; what belongs to no part stays by itself."""
    least = SMALL * sum(sum(pieces.values()) for pieces in parts.values())
    small = [name for name, pieces in parts.items() if sum(pieces.values()) < least and name != "no part"]
    if len(small) < 2:
        return
    joined: dict[tuple[str, str], float] = defaultdict(float)
    for name in small:
        for piece, value in parts.pop(name).items():
            joined[piece] += value
    parts[f"{len(small)} smaller parts"] = joined


def _part_name(phase: str, part: str) -> str:
    if part == NOBODY:
        return "no part"
    return f"communication: {part}" if phase == "communication" else part.replace("_", " ")


def _parts_table(rows: Sequence[Row]) -> str:
    return _table(
        ("part", "phase", "operators", "host", "FLOPs a rank", "reached"),
        [
            (
                _part_name(row["phase"], row["part"]),
                row["phase"],
                seconds(row["operators_s"]),
                seconds(row["host_s"]),
                f"{row['flops_per_rank']:.3g}" if row["flops_per_rank"] else "",
                _tflops(row["tflops_per_s"] * 1e12) if row["tflops_per_s"] else "",
            )
            for row in rows
        ],
    )


def _steps_table(run: Row) -> str:
    times = run["step_time_s"]
    rows = [(name, seconds(value)) for name, value in times.items() if name != "all"]
    rows.append(("waiting for data", seconds(run["data_wait_s"])))
    rows += [(f"in collectives over {axis}", seconds(value)) for axis, value in (run["comm_wait_s"] or {}).items()]
    return _table(("a measured step", ""), rows)


def _experts_table(experts: Row) -> str:
    buckets = range(len(experts["layers"][0]["tokens"]))
    return _table(
        ("layer", "busiest", *(f"noise bucket {bucket}" for bucket in buckets)),
        [
            (str(row["layer"]), f"{row['max_load']:.2f}", *(f"{max(loads):.2f}" for loads in row["load_by_noise"]))
            for row in experts["layers"]
        ],
    )


def _prediction(kind: str, prediction: Row) -> str:
    rows = [(row["part"].replace("_", " "), row["predicted_s"], row["measured_s"]) for row in prediction["parts"]]
    table = [
        (name, "not predicted" if predicted is None else seconds(predicted), seconds(measured))
        for name, predicted, measured in rows
    ]
    words = (
        f"Predicted for {prediction['machine']} by the calibration '{prediction['calibration']}', for "
        f"{prediction['workload']}. The whole step is held against the median measured step, parts against a traced "
        "one. A wait for a busy rank is measured where the rank waits, and predicted where the work is."
    )
    words += "".join(f" {note}." for note in prediction["notes"])
    return _figure(
        f"prediction-{kind}", "Predicted against measured", pairs_chart(rows), words,
        _table(("part", "predicted", "measured"), table), legend="prediction",
    )  # fmt: skip


def _memory(kind: str, memory: Row) -> str:
    held, timeline = memory["held_bytes"], memory["timeline"]
    kept = ", ".join(f"{name} {binary(value)}" for name, value in held.items())
    words = (
        f"Rank {memory['worst_rank']}, the one with the highest peak ({binary(memory['peak_bytes'])}). "
        f"Held all the time: {kept}. "
    )
    if timeline is None or not timeline["at_ms"]:
        words += "The trace has no allocations."
        return f"<figure><figcaption><h3>Memory</h3><p>{escape(words)}</p></figcaption></figure>"
    words += (
        "The curve is what torch has allocated on the GPU."
        if timeline["is_absolute"]
        else "The curve is bytes in tensors that were made since the trace began; what is held comes on top."
    )
    return _figure(f"memory-{kind}", "Memory over a step", memory_chart(timeline), words)


def _ranks(kind: str, run: Row) -> str:
    slow = run["slowest"]
    ranks = sorted(run["ranks"], key=lambda row: -row["busy_s"])
    shown = ranks[:MOST_RANKS]
    bars = [
        (f"rank {row['rank']}", [("work", "works", row["busy_s"]), ("comm", "waits", row["waiting_s"])],
         f"works {seconds(row['busy_s'])}")
        for row in shown
    ]  # fmt: skip
    words = (
        f"Slowest: rank {slow['rank']} on {slow['host']}, {slow['over_median']:.1%} over the median rank. Ranks wait "
        "for each other, so all steps take the same time; the slowest is the one that works longest and waits least."
        if len(ranks) > 1
        else f"One rank ({slow['host']}): nobody to wait for."
    )
    if len(ranks) > len(shown):
        words += f" The {len(shown)} slowest of {len(ranks)} are shown."
    table = _table(
        ("rank", "host", "place", "measured step", "works", "waits for ranks", "waits for data", "peak memory"),
        [
            (
                str(row["rank"]), row["host"], " ".join(f"{axis}{at}" for axis, at in row["coordinates"].items()),
                seconds(row["step_time_s"]), seconds(row["busy_s"]), seconds(row["waiting_s"]),
                seconds(row["data_wait_s"]), f"{row['memory_peak_gib']:.3g} GiB",
            )
            for row in shown
        ],
    )  # fmt: skip
    svg = stacked_chart(bars, "Ranks", highlight=f"rank {slow['rank']}" if len(ranks) > 1 else "")
    return _figure(f"ranks-{kind}", "Ranks", svg, words, table, legend="ranks")


def _foot(report: Row) -> str:
    files = ", ".join(report["files"])
    traces = f"Beside this page: {files} (open traces in ui.perfetto.dev or chrome://tracing). " if files else ""
    versions = f"megavid {report['megavid']}, torch {report['torch']}. All figures: report.json."
    return f"<footer><p>{escape(traces + versions)}</p></footer>"


def _count(number: float) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"


def _tflops(flops_per_s: float) -> str:
    if flops_per_s >= 1e11:
        return f"{flops_per_s / 1e12:.3g} TFLOP/s"
    return f"{flops_per_s / 1e9:.3g} GFLOP/s"
