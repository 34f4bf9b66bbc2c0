"""``megavid profile`` as people call it, on one and two ranks: its figures, its files, its page in a browser."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megavid.config.load import load_run
from megavid.ops.compiled import why_not_compiled
from megavid.ops.regions import PREFIX
from megavid.profiling.attribution import SCHEDULE, STEP, inside
from megavid.profiling.page import page
from megavid.profiling.trace import read_trace
from tests.support.browser import look
from tests.support.page_check import charts, needs, schemes
from tests.support.warm_parent import Command, WarmParent

SHORT = ("--steps", "2", "--warmup", "1", "--trace-steps", "1", "--train.global_batch_size", "2")


@pytest.fixture(scope="module")
def one_rank(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of ``tiny`` on one rank, with selective recomputation."""
    out = tmp_path_factory.mktemp("one") / "profile"
    done = warm.run("profile", "tiny", "--out", str(out), *SHORT, "--parallel.recompute", "selective")
    assert_ended_well(done)
    return out


@pytest.fixture(scope="module")
def two_ranks(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Command]:
    """One on two ranks that share the experts, with both kinds of routing, every trace kept."""
    out = tmp_path_factory.mktemp("two") / "profile"
    flags = ("--ranks", "2", "--parallel.expert", "2", "--routing", "both", "--traces", "all")
    done = warm.run("profile", "tiny", "--out", str(out), *SHORT, *flags)
    assert_ended_well(done)
    return out, done


def assert_ended_well(done: Command) -> None:
    assert done.returncode == 0, done.stderr
    # The command silences this one before it imports torch, which the warm parent has imported long ago.
    assert [line for line in done.stderr.splitlines() if "CPUAllocator.cpp" not in line] == []


def report_of(out: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((out / "report.json").read_text())
    return table


def bars_of(run: dict[str, Any]) -> dict[str, float]:
    return {bar["name"]: bar["seconds"] for bar in run["waterfall"]}


def assert_adds_up(report: dict[str, Any], run: dict[str, Any]) -> None:
    """Every second has one owner, at most 5% of them has none, and rates follow from times."""
    assert run["unattributed"] <= 0.05
    bars = bars_of(run)
    assert sum(bars.values()) == pytest.approx(run["traced_step_s"], rel=1e-6)
    parts = sum(row["operators_s"] + row["host_s"] for row in run["parts"])
    assert parts == pytest.approx(run["traced_step_s"], rel=1e-6)
    assert bars["no part"] <= 0.05 * run["traced_step_s"]
    assert min(seconds for name, seconds in bars.items() if name != "kernel inefficiency") >= 0
    times = run["step_time_s"]
    assert times["min"] <= times["p5"] <= times["p50"] <= times["p95"] <= times["max"]
    peak = report["peak"]["flops_per_s_per_rank"]
    assert run["mfu"] == pytest.approx(run["tflops_per_rank"] * 1e12 / peak)
    assert 0 < run["mfu"] <= run["hfu"]
    assert run["tokens_per_s"] == pytest.approx(run["tokens_per_step"] / times["mean"])


def test_one_rank_adds_up_and_names_its_peak(one_rank: Path) -> None:
    report = report_of(one_rank)
    (run,) = report["runs"]
    assert_adds_up(report, run)
    assert run["routing"] == "real"
    assert report["peak"]["is_measured"]
    assert "measured in this run" in report["peak"]["source"]
    assert run["comm_wait_s"] == {}
    bars = bars_of(run)
    assert bars["recompute"] > 0
    assert not any(name.startswith("exposed communication") for name in bars)
    assert run["hfu"] > run["mfu"] * 1.1  # selective recomputation is a fifth of the work or more
    phases = {(row["phase"], row["part"]) for row in run["parts"]}
    for part in ("self_attention", "cross_attention", "projections", "dense_ffn", "experts", "shared_expert", "router",
                 "dispatch", "norms", "rotary", "residuals", "embedders", "modulation", "head", "loss"):  # fmt: skip
        assert {("forward", part), ("backward", part)} <= phases, part
    for part in ("noise", "token_index", "timestep_features", "attention_plan", "routing_statistics"):
        assert ("forward", part) in phases, part
    for part in ("self_attention", "cross_attention", "projections", "dense_ffn", "experts", "norms"):
        assert ("recompute", part) in phases, part
    of_step = ("input_wait", "batch", "zero_gradients", "gradients", "optimizer", "average", "statistics")
    assert {("step", part) for part in of_step} | {("backward", "autograd"), ("backward", "accumulate")} <= phases


INSIDE = {
    "self_attention": {"projections", "norms", "rotary"},
    "cross_attention": {"projections", "norms"},
    "head": {"norms"},
    "modulation": {"timestep_features"},
    "optimizer": {"average"},
}
"""Parts that may stand inside another."""


def test_no_part_is_a_residual_of_others(one_rank: Path) -> None:
    """A region around half the model would take all that nobody named: a part holds what belongs to it, or nothing."""
    trace = read_trace(one_rank / "trace_real_rank0.json.gz")
    (step,) = [piece for piece in trace.slices if piece.name == PREFIX + STEP]
    stack: list[tuple[int, str]] = []
    holds: dict[str, set[str]] = {}
    for piece in inside(trace.slices, step)[1:]:
        while stack and stack[-1][0] <= piece.start_ns:
            stack.pop()
        is_region = piece.name.startswith(PREFIX)
        name = piece.name.removeprefix(PREFIX).partition("/")[0] if is_region else ""
        if is_region and stack:
            holds.setdefault(stack[-1][1], set()).add(name)
        if is_region or piece.name.startswith("autograd::engine"):
            stack.append((piece.stop_ns, name))  # a node's own name is "": what it holds is recomputation
    recomputed = holds.pop("")
    assert "experts" in recomputed
    assert {"autograd", "experts", "rotary", "gradients"} <= holds.pop(SCHEDULE)
    assert {part: inner for part, inner in holds.items() if not inner <= INSIDE.get(part, set()) | {part}} == {}


def test_folder_holds_what_the_help_says(one_rank: Path) -> None:
    report = report_of(one_rank)
    names = {path.name for path in one_rank.iterdir() if path.name != ".lock"}
    assert names == {"report.json", "report.html", "run.toml", "steps.jsonl", "trace_real_rank0.json.gz"}
    assert report["files"] == ["trace_real_rank0.json.gz"]
    assert report["ops"] == ("reference" if why_not_compiled() else "compiled")  # what "auto" took
    trace = json.loads(gzip.decompress((one_rank / "trace_real_rank0.json.gz").read_bytes()))
    assert sum(event.get("name") == "megavid/step" for event in trace["traceEvents"]) == 1
    assert load_run(str(one_rank / "run.toml"), []).parallel.recompute == "selective"


def test_two_ranks_name_axes_ranks_and_both_kinds_of_routing(two_ranks: tuple[Path, Command]) -> None:
    out, done = two_ranks
    report = report_of(out)
    real, forced = report["runs"]
    for run in (real, forced):
        assert_adds_up(report, run)
        bars = bars_of(run)
        assert bars["exposed communication: ep"] + bars["routing imbalance"] > 0
        assert run["comm_wait_s"]["ep"] > 0
        assert [row["rank"] for row in run["ranks"]] == [0, 1]
        # Waiting is what the trace has in collectives, and all else is work: two sums that are made apart.
        waiting = sum(row["host_s"] for row in run["parts"] if row["phase"] == "communication")
        assert sum(row["waiting_s"] for row in run["ranks"]) / 2 == pytest.approx(waiting, rel=1e-6)
        assert min(row["waiting_s"] for row in run["ranks"]) > 0
        assert sum(row["busy_s"] for row in run["ranks"]) / 2 == pytest.approx(run["traced_step_s"] - waiting, rel=1e-6)
        busiest = max(run["ranks"], key=lambda row: row["busy_s"])
        assert run["slowest"]["rank"] == busiest["rank"]
    assert (real["routing"], forced["routing"]) == ("real", "forced")
    assert real["experts"]["worst_max_load"] > 1.2
    assert forced["experts"]["worst_max_load"] < 1.02
    assert {len(row["load_by_noise"]) for row in real["experts"]["layers"]} == {4}
    assert report["files"] == [f"trace_{kind}_rank{rank}.json.gz" for kind in ("forced", "real") for rank in (0, 1)]
    assert "real routing, 2 steps: MFU" in done.stdout
    assert "forced routing, 2 steps: MFU" in done.stdout
    assert re.search(r"slowest rank: [01] on ", done.stdout)


CHARTS = ("waterfall", "parts", "steps", "experts", "memory", "ranks")


def test_page_stands_alone_and_its_drawings_hold_their_words(two_ranks: tuple[Path, Command]) -> None:
    """What needs no browser, so that it is looked at everywhere; the tests below are skipped where there is none."""
    html = (two_ranks[0] / "report.html").read_text()
    assert needs(html) == []
    found = charts(html)
    assert set(found) == {f"chart-{chart}-{kind}" for chart in CHARTS for kind in ("real", "forced")}
    for name, chart in found.items():
        assert chart.shapes >= 1, f"{name} shows nothing"
        assert chart.texts >= 2, name
        assert chart.outside == [], name
    used, light, dark = schemes(html)
    assert used == light == dark


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        ("<main>", '<main><img src="https://example.org/a.png">', "https://example.org/a.png"),
        ("<style>", "<style>@import 'more.css';", "@import"),
        ("</main>", "<script>1</script></main>", "<script>"),
        ("</main>", "</main></div>", "</div> closes nothing"),
    ],
)
def test_page_that_does_not_stand_alone_is_told(
    two_ranks: tuple[Path, Command], before: str, after: str, wanted: str
) -> None:
    html = (two_ranks[0] / "report.html").read_text().replace(before, after, 1)
    assert any(wanted in told for told in needs(html))


def test_words_that_leave_a_drawing_are_told() -> None:
    text = '<text x="{x}" y="{y}" class="label" text-anchor="{anchor}">routing imbalance</text>'
    places = {
        (10, 20, "start"): True, (10, 20, "end"): False, (99, 20, "start"): False, (100, 20, "middle"): True,
        (10, 5, "start"): False, (10, 39, "start"): False,
    }  # fmt: skip
    for (x, y, anchor), is_inside in places.items():
        words = text.format(x=x, y=y, anchor=anchor)
        html = f'<figure id="one"><svg viewBox="0 0 200 40">{words}<rect/></svg></figure>'
        assert (charts(html)["one"].outside == []) is is_inside, (x, y, anchor)


def assert_readable(file: Path, scheme: Any, expected: set[str]) -> None:
    seen = look(file, scheme)
    assert set(seen.figures) == expected
    for name, figure in seen.figures.items():
        assert figure["drawn"] >= 1, f"{name} shows nothing"
        assert figure["width"] > 900, name
        assert figure["height"] > 25, name
        assert figure["clashes"] == [], name
        assert figure["outside"] == [], name
        assert figure["smallest"] >= 11, name
    assert seen.page_width <= seen.window_width
    assert seen.contrast > 10
    assert sum(seen.paper) > 600 if scheme == "light" else sum(seen.paper) < 150
    assert seen.fetched == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_shows_every_chart_in_a_browser(two_ranks: tuple[Path, Command], scheme: str) -> None:
    expected = {f"chart-{chart}-{kind}" for chart in CHARTS for kind in ("real", "forced")}
    assert_readable(two_ranks[0] / "report.html", scheme, expected)


def test_page_of_a_large_job_stays_readable(two_ranks: tuple[Path, Command], tmp_path: Path) -> None:
    """As many layers, experts and ranks as the flagship has."""
    report = report_of(two_ranks[0])
    run = report["runs"][0]
    report["runs"] = [run]
    layer, rank = run["experts"]["layers"][0], run["ranks"][0]
    load = [0.5 + expert % 5 * 0.25 for expert in range(64)]
    run["experts"]["layers"] = [
        {**layer, "layer": number, "load": load, "load_by_noise": [load] * 4} for number in range(40)
    ]
    run["ranks"] = [{**rank, "rank": number, "host": f"node{number // 8:04}"} for number in range(1024)]
    run["step_time_s"]["all"] = [1.0 + number % 7 / 10 for number in range(500)]
    parts = [{"part": name, "predicted_s": 1.25, "measured_s": 1.5} for name in ("whole step", "communication: tensor")]
    parts.append({"part": "statistics and reports", "predicted_s": None, "measured_s": 0.001})
    names = {"machine": "h100-80gb", "calibration": "gpu", "workload": "1 clip in a pack, 32760 tokens", "notes": []}
    run["prediction"] = {**names, "parts": parts}
    (tmp_path / "report.html").write_text(page(report))
    assert (tmp_path / "report.html").stat().st_size < 4 << 20
    expected = {f"chart-{chart}-real" for chart in (*CHARTS, "prediction")}
    assert {name: chart.outside for name, chart in charts((tmp_path / "report.html").read_text()).items()} == {
        name: [] for name in expected
    }
    assert_readable(tmp_path / "report.html", "light", expected)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--parallel.tensor", "3"), "must divide the number of ranks"),
        (("--parallel.tensr", "2"), "did you mean 'parallel.tensor'?"),
        (("--steps", "0"), "--steps 0 must be a whole number, at least 1"),
        (("--routing", "balanced"), "--routing balanced must be one of real, forced, both"),
        (("--traces", "few"), "--traces few must be one of none, one, all"),
        (("--memory-snapshot",), "--memory-snapshot needs CUDA"),
        (("--calibration", "/nowhere.json"), "cannot read calibration /nowhere.json"),
        (("--routing", "both", "--model.family", "wan"), "--routing both needs a model with experts"),
        (("--data.kind", "shards", "--data.path", "/nowhere"), "/nowhere"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    warm: WarmParent, tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    refused = warm.run("profile", "tiny", "--out", str(tmp_path / "new"), *flags)
    assert said in refused.stderr
    assert refused.stderr.startswith("megavid: error: ")
    assert refused.stderr.count("\n") == 1
    assert refused.returncode in (2, 3)
    assert not (tmp_path / "new" / "report.json").exists()


def test_training_run_is_not_overwritten(warm: WarmParent, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    refused = warm.run("profile", "tiny", "--out", str(tmp_path))
    assert refused.returncode == 2
    assert "holds a training run; name another folder" in refused.stderr
