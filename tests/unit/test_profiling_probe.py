"""The probe's arithmetic: seconds to rates, rates to the planner's files, and numbers back from generated steps."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megavid.cli import plan, profile
from megavid.errors import ConfigError
from megavid.plan.calibration import PROBE_RANGES, Calibration, CallCost, load_calibration, load_probe, save_probe
from megavid.plan.hardware import Hardware
from megavid.profiling.links import (
    LARGE_BYTES,
    OVERLAPPED,
    SEGMENTS,
    SMALL_BYTES,
    WAITED,
    Links,
    cost_of,
    links_of,
    name_of,
    sent_bytes,
)
from megavid.profiling.probe import (
    LONG_KEYS,
    SHORT_KEYS,
    Kernels,
    fit_to_steps,
    half_keys,
    hardware_of,
    median_seconds,
    predicted_seconds,
    start_of,
    worst_misfit,
)
from megavid.training.probe_run import PROBE_CASES, Case
from tools.bench_prediction import CASES, CROWDED, Found, table, verdict

KERNELS = Kernels(
    product_rate=80e9, copy_rate=16e9, long_attention=60e9, short_attention=45e9, backward_ratio=0.8, operator_s=5e-6
)
COSTS = {
    **{kind: CallCost(8e-5, 2e9) for kind in WAITED},
    **{name_of(kind, is_beside=True): CallCost(2e-5, 4e9) for kind in OVERLAPPED},
    "all_to_all": CallCost(5e-5, 3e9),
    "reduce_scatter": CallCost(9e-5, 1e9),
}
LINKS = Links(COSTS, crowding=1.1)


def machine() -> tuple[Hardware, Calibration]:
    return hardware_of(KERNELS, LINKS, "cpu"), start_of(KERNELS, LINKS, "cpu")


class FakeClock:
    """Seconds that pass by being asked to, one amount after another."""

    def __init__(self, *amounts: float) -> None:
        self.now, self.amounts = 0.0, itertools.cycle(amounts)

    def __call__(self) -> float:
        return self.now

    def run(self) -> None:
        self.now += next(self.amounts)


def test_the_median_does_not_see_the_warm_up_or_an_interruption() -> None:
    clock = FakeClock(50.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0)
    assert median_seconds(clock.run, 12.0, clock) == 1.0


def test_a_slow_call_is_timed_three_times_whatever_the_limit() -> None:
    clock = FakeClock(5.0)
    assert median_seconds(clock.run, 0.1, clock) == 5.0
    assert clock.now == 20.0  # one to warm up


NAMES = [(kind, size, False) for kind in WAITED for size in (SMALL_BYTES, LARGE_BYTES)] + [
    (kind, size, True) for kind in OVERLAPPED for size in (SMALL_BYTES, LARGE_BYTES)
]


def chains(costs: dict[str, CallCost], *, plain: float, alone: float, ranks: int = 2) -> list[float]:
    """Seconds of one round of chains on a machine whose collectives cost exactly this."""
    found = [alone, plain]
    for kind, size, is_beside in NAMES:
        cost = costs[name_of(kind, is_beside=is_beside)]
        call_s = cost.latency_s * math.log2(ranks) + sent_bytes(kind, size, ranks) / cost.rate
        found.append(plain + SEGMENTS * call_s)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_links_are_what_collectives_add_to_the_computation_between_them(ranks: int) -> None:
    usual = chains(COSTS, plain=0.022, alone=0.02, ranks=ranks)
    interrupted = [10 * seconds for seconds in usual]
    links = links_of([usual, interrupted, usual], NAMES, ranks)
    assert links.crowding == pytest.approx(1.1)
    assert set(links.calls) == set(COSTS)
    for name, cost in links.calls.items():
        assert cost.rate == pytest.approx(COSTS[name].rate), name
        small_s = sent_bytes(name.split()[0], SMALL_BYTES, ranks) / COSTS[name].rate / math.log2(ranks)
        assert cost.latency_s == pytest.approx(COSTS[name].latency_s + small_s), name
    assert links.rate == pytest.approx(5 / (3 / 2e9 + 1 / 3e9 + 1 / 1e9))
    assert links.alltoall_ratio == 1.0
    assert links.latency_s == links.calls["all_reduce"].latency_s


def test_what_a_computation_hides_costs_little_and_never_less_than_nothing() -> None:
    hidden = cost_of("send", -1e-4, -2e-4, 2)
    assert hidden.latency_s == 0.0
    assert LARGE_BYTES / hidden.rate < 2e-6
    assert links_of([chains(COSTS, plain=0.02, alone=0.021)], NAMES, 2).crowding == 1.0  # noise: none is faster


def test_bytes_of_a_collective_are_those_that_the_plan_counts() -> None:
    assert [sent_bytes(kind, 1024, 4) for kind in WAITED] == [1536, 768, 768, 768, 1024]


@pytest.mark.parametrize("half", [0.0, 40.0, 700.0])
def test_half_keys_is_where_attention_is_half_as_fast(half: float) -> None:
    long, short = (keys / (keys + half) for keys in (LONG_KEYS, SHORT_KEYS))
    assert half_keys(long, short) == pytest.approx(half, abs=1e-9)
    assert half_keys(1.0, 1.5) == 0.0  # faster on short ones: noise


def test_the_planners_attention_is_as_fast_as_the_measured_one() -> None:
    calibration = machine()[1]
    for keys, rate in ((LONG_KEYS, KERNELS.long_attention), (SHORT_KEYS, KERNELS.short_attention)):
        filled = keys / (keys + calibration.attention_half_keys)
        assert calibration.attention_efficiency * filled * KERNELS.product_rate == pytest.approx(rate)


def generated(truth: Calibration, noise: Callable[[int], float] = lambda number: 1.0) -> tuple[list, Hardware]:
    hardware = machine()[0]
    steps = [case.timed(math.nan) for case in PROBE_CASES]
    seconds = predicted_seconds(steps, hardware, truth)
    found = [replace(step, seconds=value * noise(i)) for i, (step, value) in enumerate(zip(steps, seconds))]
    return found, hardware


def test_the_fit_finds_the_numbers_that_generated_the_steps() -> None:
    start = machine()[1]
    truth = start.with_numbers(
        matrix_efficiency=0.7,
        attention_efficiency=0.55,
        glue_factor=0.6,
        operator_s=1.4e-5,
        step_s=0.004,
    )
    steps, hardware = generated(truth)
    fitted = fit_to_steps(hardware, start, steps, expected_weight=0.0)
    for name in PROBE_RANGES:
        assert fitted.numbers()[name] == pytest.approx(truth.numbers()[name], rel=0.02), name
        assert "fitted to 8 timed steps" in fitted.source[name]
    assert worst_misfit(hardware, fitted, steps) < 1e-3
    assert fitted.attention_half_keys == start.attention_half_keys
    # Drawn to what kernels and links reach alone, numbers differ; what is predicted of other steps hardly does.
    drawn = fit_to_steps(hardware, start, steps)
    cases = [case.timed(math.nan) for case in CASES]
    pairs = zip(predicted_seconds(cases, hardware, drawn), predicted_seconds(cases, hardware, truth), strict=True)
    assert max(abs(ours / theirs - 1) for ours, theirs in pairs) < 0.1


@pytest.mark.parametrize("interrupted", PROBE_CASES, ids=lambda case: case.name)
def test_one_interrupted_case_moves_no_prediction_far(interrupted: Case) -> None:
    start = machine()[1]
    truth = start.with_numbers(matrix_efficiency=0.7, glue_factor=0.6, operator_s=1.4e-5, step_s=0.004)
    noise = [1.03, 0.97, 1.02, 0.98, 1.01, 1.02, 0.98, 0.99]
    noise[PROBE_CASES.index(interrupted)] = 1.8
    steps, hardware = generated(truth, noise.__getitem__)
    fitted = fit_to_steps(hardware, start, steps)
    cases = [case.timed(math.nan) for case in CASES]
    pairs = zip(predicted_seconds(cases, hardware, fitted), predicted_seconds(cases, hardware, truth), strict=True)
    assert max(abs(ours / theirs - 1) for ours, theirs in pairs) < 0.15


def test_what_is_judged_is_no_case_of_the_probe_and_covers_the_axes() -> None:
    probed = [case.config for case in PROBE_CASES]
    shapes = {(c.model.num_layers, c.model.hidden_size, c.data.pack_tokens) for c in probed}
    for case in (*CASES, *CROWDED):
        config = case.config
        assert config not in probed
        assert (config.model.num_layers, config.model.hidden_size, config.data.pack_tokens) not in shapes, case.name
    assert len({case.name for case in (*CASES, *CROWDED, *PROBE_CASES)}) == len(CASES) + len(CROWDED) + len(PROBE_CASES)
    axes = {(case.layout.tp, case.layout.pp, case.layout.cp, case.layout.ep) for case in CASES}
    assert axes >= {(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)}
    assert {case.config.parallel.recompute for case in CASES} == {"none", "selective", "full"}
    assert {case.ranks for case in PROBE_CASES} == {1}
    assert {case.ranks for case in CASES} == {1, 2}
    assert {case.ranks for case in CROWDED} == {4}


def test_the_verdict_is_of_the_median_and_of_the_worst() -> None:
    assert verdict([0.1, 0.2, 0.35]) == (
        "PASS: |predicted / measured - 1| over 3 cases: median 20.0% (limit 20%), worst 35.0% (limit 35%)", True
    )  # fmt: skip
    assert verdict([0.1, 0.21, 0.3])[1] is False
    assert verdict([0.1, 0.1, 0.36])[1] is False


def test_a_row_is_of_medians() -> None:
    found = {case.name: Found(1.1, [2.0, 2.2, 50.0]) for case in CASES}
    assert found[CASES[0].name].ratio == pytest.approx(0.5)
    rows = table(CASES, found).splitlines()
    assert len(rows) == len(CASES) + 2
    assert rows[2].endswith("| 5 x 384 | 320 x 1 | 1.1000 | 2.2000 | 0.50 |")


def test_the_planner_plans_with_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "probe.json"
    hardware, calibration = machine()
    save_probe(path, hardware, calibration)
    assert load_probe(path) == (hardware, calibration)
    assert load_calibration(path) == calibration
    asked = [
        "tiny",
        "--world-size",
        "2",
        "--calibration",
        str(path),
        "--json",
        "--frames=9",
        "--height=64",
        "--width=64",
    ]
    assert plan.main(asked) == 0
    slow = json.loads(capsys.readouterr().out)["step_time_s"]
    save_probe(path, replace(hardware, peak={"fp32": 160e9}), calibration)
    assert plan.main(asked) == 0
    assert json.loads(capsys.readouterr().out)["step_time_s"] < slow


def test_bad_files_and_arguments_are_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    asked = ["tiny", "--world-size", "2", "--calibration", str(bad)]
    with pytest.raises(ConfigError, match=r"^cannot read calibration .*bad\.json: .*$"):
        plan.main(asked)
    with pytest.raises(ConfigError, match=r"--gpu GPU is missing: .*; or --calibration FILE of a probe"):
        plan.main(asked[:3])
    with pytest.raises(ConfigError, match="--probe FILE takes no other argument, got 'tiny'"):
        profile.main(["tiny", "--probe", str(tmp_path / "probe.json")])
    with pytest.raises(ConfigError, match="must name a file in a folder that exists"):
        profile.main(["--probe", str(tmp_path / "missing" / "probe.json")])
