"""The hindcast: sources, adapters that agree with our own count, the error bound, and a fit that repeats."""

from dataclasses import replace

import pytest

from megavid.config.load import load_run
from megavid.errors import ConfigError
from megavid.plan.calibration import FREE, gpu_calibration
from megavid.plan.flops import model_flops
from megavid.plan.hardware import Hardware, hardware
from megavid.plan.hindcast import (
    LEAST_RUNS,
    REFIT_STEPS,
    cases,
    evidence,
    fit,
    hindcast,
    rows,
    stored_errors,
    table_text,
)
from megavid.plan.reference import PublishedRun, ReferenceModel
from megavid.plan.reference_stage import SIZE, stages_of

WAN = ReferenceModel(
    layers=40, hidden=5120, heads=40, kv_heads=40, head_size=128, ffn=13824, is_gated=False, text_length=512,
    is_causal=False,
)  # fmt: skip


def test_every_row_names_its_source_and_its_layout_is_whole() -> None:
    runs = rows()
    assert len({run.name for run in runs}) == len(runs) >= 10
    for run in runs:
        assert run.source.publisher
        assert run.source.title
        assert run.source.address.startswith("https://"), run.name
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
    assert found.mean_publisher_error <= 0.15
    video = [abs(row.family_error) for row in found.rows if row.run.model == "wan_14b"]
    assert sum(video) / len(video) <= 0.20
    assert found.rows[0].error == pytest.approx(found.rows[0].published_s / found.rows[0].predicted_s - 1)


def test_the_stored_numbers_are_what_the_fit_finds() -> None:
    found = fit(cases(), gpu_calibration())
    for name, (low, high) in FREE.items():
        stored = gpu_calibration().numbers()[name]
        assert found.numbers()[name] == pytest.approx(stored, abs=0.01 * (high - low)), name
    errors = hindcast().errors()
    assert errors.keys() == stored_errors().keys()
    for name, row in errors.items():
        assert row == pytest.approx(list(stored_errors()[name]), abs=0.01), name


def test_the_fit_finds_its_way_from_elsewhere_and_repeats_to_the_last_bit() -> None:
    start = gpu_calibration().with_numbers(
        matrix_efficiency=0.6, estimated_glue_factor=1.0, routing_imbalance=1.5, expert_overlap=0.1
    )
    found = fit(cases(), start)
    assert found == fit(cases(), start)
    for name, (low, high) in FREE.items():
        assert found.numbers()[name] == pytest.approx(gpu_calibration().numbers()[name], abs=0.03 * (high - low))


def test_nothing_of_a_row_enters_its_own_prediction() -> None:
    every, found = cases(), hindcast()
    case, row = next(
        (case, row) for case, row in zip(every, found.rows, strict=True) if case.run.name == "wan-14b-128xh100"
    )
    others = [other for other in every if other is not case]
    left_out = fit(others, found.calibration, REFIT_STEPS)
    assert case.predict(left_out).total == row.predicted_s
    assert case.predict(found.calibration).total != row.predicted_s
    strangers = [other for other in every if other.family != case.family]
    assert case.predict(fit(strangers, found.calibration, REFIT_STEPS)).total == row.family_s != row.predicted_s
    others = [other for other in every if other.run.source.publisher != case.run.source.publisher]
    assert case.predict(fit(others, found.calibration, REFIT_STEPS)).total == row.publisher_s != row.family_s


def test_a_model_is_left_out_whole_and_so_is_a_publisher() -> None:
    every = cases()
    families = {case.run.name: case.family for case in every}
    qwen = [name for name in families if name.startswith("qwen3-235b")]
    assert len(qwen) == 17
    assert {families[name] for name in qwen} == {"qwen3_235b_a22b"}
    assert families["deepseek-14layers-64xh100"] == families["deepseek-v3-256xgb200"] == "deepseek_v3"
    publishers = {case.run.source.publisher for case in every}
    assert publishers == {"dgx-cloud", "megatron-bridge", "megatron-lm", "model-zoo"}
    overlapped = {case.family for case in every if "ep" in case.run.overlap}
    assert len(overlapped) >= 3, "expert_overlap is fitted, so that no model may be alone in telling it"


RUN = PublishedRun(
    name="a run", source=rows()[0].source, model="", hardware="h100-80gb", gpus=16, sequence=1000, global_batch=8,
    tp=2, ep=8,
)  # fmt: skip
QWEN = ReferenceModel(
    layers=3, hidden=4096, heads=64, kv_heads=4, head_size=128, experts=128, top_k=8, expert_ffn=1536, has_qk_norm=True,
)  # fmt: skip


def repeated(model: ReferenceModel, *modules: str, layers: float = 0.0) -> tuple[dict[str, float], float]:
    """Parts that are computed again, and bytes of memory-bound operators that are."""
    run = replace(RUN, recompute_modules=modules, recompute_layers=layers)
    (stage,) = stages_of(run, model, hardware("h100-80gb"))
    again = dict(stage.recompute)
    return {part: share for part, share in again.items() if share and part != "glue"}, again["glue"] * (
        stage.glue_bytes / 3
    )


def test_what_is_computed_again_follows_from_the_names_of_the_modules() -> None:
    own, rows_of_experts = 500, 500 * 8
    # Two norms read and write the width; an activation reads gate and up and writes one.
    norms, activation = 3 * SIZE * 4 * 4096 * own, 3 * SIZE * 3 * 1536 * rows_of_experts
    permutation = 3 * SIZE * 4096 * (6 * rows_of_experts + 5 * own)
    assert repeated(QWEN) == ({}, 0.0)
    parts, glue = repeated(QWEN, "layernorm", "moe_act")
    assert (parts, glue) == ({}, pytest.approx(norms + activation))
    parts, glue = repeated(QWEN, "layernorm", "moe")
    assert parts == {"experts": 1.0, "router": 1.0, "shared_expert": 1.0}
    assert glue == pytest.approx(norms + activation + permutation)
    parts, glue = repeated(QWEN, layers=0.5)
    assert set(parts.values()) == {0.5}
    assert glue > 0.5 * (norms + activation + permutation)
    latent = next(case for case in cases() if case.run.name == "deepseek-v3-256xgb200")
    up = 1536 * 128 * 192 + 512 * 128 * (128 + 128)
    others = 7168 * (1536 + 576) + 128 * 128 * 7168
    assert latent.stages[0].recompute["projections"] == pytest.approx(up / (up + others))
    with pytest.raises(ConfigError, match="published run 'a run': unknown recompute module 'layernorms'"):
        repeated(QWEN, "layernorms")


def test_the_interval_holds_four_of_five_runs_of_the_same_generation() -> None:
    for name in ("h100-80gb", "b200"):
        basis = evidence(hardware(name))
        low, high = basis.interval(0.4)
        assert low < high
        assert basis.interval(0.8) == pytest.approx((2 * low, 2 * high))
        inside = sum(low <= 0.4 / (1 + error) <= high for error in basis.errors) / len(basis.errors)
        assert 0.7 <= inside <= 0.9, name
    assert evidence(hardware("b200"), {"gb200": [-0.1, 0.0, 0.1] * 3}).interval(1.0)[0] == pytest.approx(1 / 1.1)


def test_the_interval_says_which_runs_it_is_of() -> None:
    runs = {name: sum(run.hardware == name for run in rows()) for name in ("h100-80gb", "b200", "gb200", "gb300")}
    assert evidence(hardware("h100-80gb")).text == f"{runs['h100-80gb']} published runs on Hopper"
    assert evidence(hardware("h200")).text == f"{runs['h100-80gb']} published runs on Hopper, none of them on h200"
    blackwell = runs["b200"] + runs["gb200"] + runs["gb300"]
    assert blackwell >= LEAST_RUNS
    assert evidence(hardware("b200")).text == f"{blackwell} published runs on Blackwell"
    everything = f"all {len(rows())} published runs, none of them on a100-80gb"
    assert evidence(hardware("a100-80gb")).text == everything
    few = evidence(hardware("gb200"), {"gb200": [0.1] * 3, "h100-80gb": [0.0] * 9})
    assert (len(few.errors), few.text) == (12, "all 12 published runs")
    probed = Hardware(
        name="my cpu", peak={"fp32": 1e11}, memory_bytes=2**33, memory_rate=1e10, nvlink_rate=1e9, nvlink_domain=8,
        network_rate=1e9,
    )  # fmt: skip
    assert evidence(probed).text.endswith("none of them on my cpu")


def test_table_prints_every_row_and_the_mean() -> None:
    text = table_text(hindcast())
    assert all(run.name in text for run in rows())
    assert f"{hindcast().mean_error:.1%} with the row left out" in text
    assert f"{hindcast().mean_publisher_error:.1%} with all of its publisher" in text
    assert "(40 published runs on Hopper, none of them on h200)" in text
