"""The hindcast: sources, adapters that agree with our own count, the error bound, and a fit that repeats."""

import pytest

from megavid.config.load import load_run
from megavid.plan.calibration import FREE, default_calibration
from megavid.plan.flops import model_flops
from megavid.plan.hindcast import REFIT_STEPS, cases, fit, hindcast, interval, rows, stored_errors, table_text
from megavid.plan.reference import ReferenceModel

WAN = ReferenceModel(
    layers=40, hidden=5120, heads=40, kv_heads=40, head_size=128, ffn=13824, is_gated=False, text_length=512,
    is_causal=False,
)  # fmt: skip


def test_every_row_names_its_source_and_its_layout_is_whole() -> None:
    runs = rows()
    assert len({run.name for run in runs}) == len(runs) >= 10
    for run in runs:
        assert run.title
        assert run.address.startswith("https://"), run.name
        assert run.gpus == run.tp * run.cp * run.pp * run.dp, run.name
        assert run.gpus % (run.ep * run.etp * run.pp) == 0, run.name
        assert run.global_batch == run.micro_batch * run.dp * run.microbatches, run.name


def test_rows_cover_what_the_planner_plans() -> None:
    runs = rows()
    assert sum(run.model == "wan_14b" for run in runs) >= 2
    assert {run.hardware for run in runs} >= {"h100-80gb", "b200", "gb200"}
    assert {"forced", "real"} <= {run.routing for run in runs}
    overlapped = {"ep" in run.overlap for run in runs if run.model == "deepseek_v3_14layers"}
    assert overlapped == {False, True}
    assert max(run.gpus for run in runs) >= 1024


def test_the_video_reference_counts_what_our_own_model_counts() -> None:
    own = model_flops(load_run("wan_14b", []).model, (37440,))
    blocks = own.total - own["embedders"] - own["modulation"] - own["head"]
    assert WAN.published_flops(37440, "full") == pytest.approx(blocks, rel=1e-12)
    # Megatron-Bridge's formula: 6.18 PFLOP a sample, 55.7% of it self-attention.
    assert WAN.published_flops(37440, "full") == pytest.approx(6.18e15, rel=0.005)
    assert own["self_attention"] / own.total == pytest.approx(0.557, abs=0.002)


def test_language_references_count_parameters_and_causal_attention() -> None:
    by_model = {case.run.model: case for case in cases()}
    # 2 * parameters a token and pass: Mixtral 8x22B has 39 B active ones, Qwen3 22 B, DeepSeek-V3 37 B.
    for name, active in (("mixtral_8x22b", 39e9), ("qwen3_235b_a22b", 22e9), ("deepseek_v3", 37e9)):
        case = by_model[name]
        tokens = case.run.global_batch * case.run.sequence / case.run.gpus
        assert case.flops_per_gpu / tokens / 6 == pytest.approx(active, rel=0.16), name


def test_two_published_figures_of_one_run_agree_with_the_count() -> None:
    """Qwen3-235B on 256 H100: 19.7 s a step and 245 TFLOP/s are published together, so they test the FLOPs."""
    case = next(case for case in cases() if case.run.name == "qwen3-235b-256xh100")
    assert case.flops_per_gpu / case.seconds == pytest.approx(245e12, rel=0.02)
    case = next(case for case in cases() if case.run.name == "qwen3-30b-16xh100")
    assert case.flops_per_gpu / case.seconds == pytest.approx(244.039e12, rel=0.02)
    case = next(case for case in cases() if case.run.name == "qwen3-235b-256xgb200")
    assert case.flops_per_gpu / case.seconds == pytest.approx(728e12, rel=0.02)


def test_left_out_rows_are_predicted_within_fifteen_percent_in_the_mean() -> None:
    found = hindcast()
    assert found.mean_error <= 0.15
    assert found.mean_family_error <= 0.15
    video = [abs(row.family_error) for row in found.rows if row.run.model == "wan_14b"]
    assert sum(video) / len(video) <= 0.20
    assert found.rows[0].error == pytest.approx(found.rows[0].published_s / found.rows[0].predicted_s - 1)


def test_the_stored_numbers_are_what_the_fit_finds() -> None:
    found = fit(cases(), default_calibration())
    for name, (low, high) in FREE.items():
        stored = default_calibration().numbers()[name]
        assert found.numbers()[name] == pytest.approx(stored, abs=0.01 * (high - low)), name
    errors = [row.family_error for row in hindcast().rows]
    assert errors == pytest.approx(list(stored_errors()), abs=0.01)


def test_the_fit_finds_its_way_from_elsewhere_and_repeats_to_the_last_bit() -> None:
    start = default_calibration().with_numbers(matrix_efficiency=0.6, estimated_glue_factor=1.0, routing_imbalance=1.5)
    found = fit(cases(), start)
    assert found == fit(cases(), start)
    for name, (low, high) in FREE.items():
        assert found.numbers()[name] == pytest.approx(default_calibration().numbers()[name], abs=0.03 * (high - low))


def test_nothing_of_a_row_enters_its_own_prediction() -> None:
    every, found = cases(), hindcast()
    case, row = next(
        (case, row) for case, row in zip(every, found.rows, strict=True) if case.run.name == "wan-14b-128xh100"
    )
    others = [other for other in every if other is not case]
    left_out = fit(others, found.calibration, REFIT_STEPS)
    assert case.predict(left_out).total == row.predicted_s
    assert case.predict(found.calibration).total != row.predicted_s
    strangers = [other for other in every if other.run.family != case.run.family]
    assert case.predict(fit(strangers, found.calibration, REFIT_STEPS)).total == row.family_s != row.predicted_s


def test_interval_holds_four_of_five_left_out_rows() -> None:
    low, high = interval(0.4)
    assert low < 0.4 < high
    assert interval(0.8) == pytest.approx((2 * low, 2 * high))
    inside = sum(low <= 0.4 / (1 + error) <= high for error in stored_errors()) / len(stored_errors())
    assert 0.75 <= inside <= 0.87
    assert interval(1.0, [-0.1, 0.0, 0.1])[0] == pytest.approx(1 / 1.08)


def test_table_prints_every_row_and_the_mean() -> None:
    text = table_text(hindcast())
    assert all(run.name in text for run in rows())
    assert f"row left out: {hindcast().mean_error:.1%}" in text
