"""FLOPs in closed form against torch's own counter on models that are built and run; every difference is explained."""

from dataclasses import replace
from typing import Any

import pytest

from megavid.models.moe.tokens import NOISE_BUCKETS
from megavid.plan.adapters import trained_flops
from tests.support.plan_measured import Case, measure_on
from tests.support.ranks import RankPool

EXPERTS = {"num_experts": 4, "top_k": 2, "expert_ffn_size": 64, "shared_ffn_size": 32}
IMAGE = {"task": "i2v", "in_channels": 12, "out_channels": 4, "image_size": 24, "image_length": 5}
CASES = {
    "dense": Case(),
    "dense, several clips and padding, two packs": Case(clips=(48, 30, 6), packs=2),
    "dense, absolute positions off, other widths": Case(model={"absolute_positions": False, "ffn_size": 80}),
    "image branch": Case(model=IMAGE, clips=(48, 30, 6), packs=2),
    "image branch with positions": Case(model={**IMAGE, "image_positions": 5}),
    "known frames in the latents": Case(model={"task": "ti2v"}, clips=(48, 30), packs=2),
    "sigmoid": Case(family="wan_moe", moe=EXPERTS),
    "sigmoid, groups, no bias": Case(
        family="wan_moe", moe={**EXPERTS, "num_experts": 8, "num_groups": 4, "top_groups": 2, "has_bias": False}
    ),
    "softmax with losses": Case(
        family="wan_moe", moe={**EXPERTS, "router": "softmax", "aux_loss_weight": 0.1, "z_loss_weight": 0.1}
    ),
    "expert choice, several clips and padding": Case(
        family="wan_moe", moe={**EXPERTS, "router": "expert_choice"}, clips=(33, 20, 7), packs=2
    ),
    "swiglu, no shared expert, padding": Case(
        family="wan_moe", moe={**EXPERTS, "activation": "swiglu", "shared_ffn_size": 0}, clips=(50, 20)
    ),
    "swiglu, shared expert": Case(family="wan_moe", moe={**EXPERTS, "activation": "swiglu", "has_bias": False}),
}
REPEATED = {
    f"{name}, {recompute}": replace(CASES[name], parallel={"recompute": recompute})
    for name in ("dense", "image branch", "swiglu, no shared expert, padding")
    for recompute in ("selective", "full")
}
ADAPTED = {
    "adapters": Case(lora={"rank": 3}, clips=(48, 30, 18), packs=2),
    "adapters and an image branch": Case(lora={"rank": 3}, model=IMAGE, clips=(48, 48)),
}


@pytest.fixture(scope="module")
def counted(pool: RankPool) -> dict[str, dict[str, Any]]:
    wanted = CASES | REPEATED | ADAPTED
    answers = measure_on(pool, [("flops", (case,)) for case in wanted.values()])
    return dict(zip(wanted, answers, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_forward_pass_is_what_torch_counts(counted: dict[str, dict[str, Any]], name: str) -> None:
    case, answer = CASES[name], counted[name]
    planned, forward = dict(answer["planned"]), dict(answer["forward"])
    # Kernel calls inside of the attention operator, which the counter does not see, and by themselves:
    assert answer["self_attention"] == planned.pop("self_attention")
    assert forward.pop("aten._scaled_dot_product_flash_attention_for_cpu") == planned.pop("cross_attention")
    if case.family == "wan_moe":
        assert forward.pop("aten._grouped_mm") == planned.pop("experts")
    assert sum(forward.values()) - statistics_of(case) == sum(planned.values())


@pytest.mark.parametrize("name", CASES)
def test_backward_pass_is_twice_the_forward_pass_but_for_what_is_known(
    counted: dict[str, dict[str, Any]], name: str
) -> None:
    case, answer = CASES[name], counted[name]
    model, planned = case.config.model, answer["planned"]
    expected = 2 * sum(planned.values())
    # Flash attention computes its scores again: five products for two.
    expected += 0.5 * (planned["self_attention"] + planned["cross_attention"])
    # Nobody asks for gradients of patches, of prompts' features (unless a norm stands before) and of the timestep's
    # sines.
    clips, tokens = len(case.clips) * case.packs, case.pack_tokens * case.packs
    expected -= 2 * tokens * model.in_channels * model.patch_volume * model.hidden_size
    expected -= 2 * clips * model.text_length * model.text_size * model.hidden_size
    expected -= 2 * clips * model.timesteps_of_clip * model.frequency_size * model.hidden_size
    # Gradients of experts' biases are a product with the table of who belongs to whom.
    if case.family == "wan_moe" and model.moe.has_bias:
        moe, layers = model.moe, model.num_layers - model.moe.dense_first - model.moe.dense_last
        up = 2 if moe.activation == "swiglu" else 1
        matrices = 3 if moe.activation == "swiglu" else 2
        rows = planned["experts"] / (2 * matrices * model.hidden_size * moe.expert_ffn_size * layers)
        expected += 2 * rows * moe.num_experts * (up * moe.expert_ffn_size + model.hidden_size) * layers
    assert answer["backward"] == expected


@pytest.mark.parametrize("name", REPEATED)
def test_recomputation_adds_what_is_planned(counted: dict[str, dict[str, Any]], name: str) -> None:
    case, plain = REPEATED[name], counted[name.rpartition(", ")[0]]
    added = counted[name]["backward"] - plain["backward"]
    # A branch that is repeated stops before its statistics, but one of their two products comes with the choice.
    added -= statistics_of(case) if case.config.parallel.recompute == "full" else statistics_of(case) // 2
    assert added == counted[name]["recomputed"]


@pytest.mark.parametrize("name", ADAPTED)
def test_a_step_of_adapters_is_what_torch_counts(counted: dict[str, dict[str, Any]], name: str) -> None:
    case, answer = ADAPTED[name], counted[name]
    planned = answer["planned"]
    measured = sum(answer["forward"].values()) + answer["self_attention"] + answer["backward"]
    scores_again = 0.5 * (planned["self_attention"] + planned["cross_attention"])
    assert measured == trained_flops(case.config, case.clips * case.packs) + scores_again
    assert measured < 3 * sum(planned.values())  # frozen matrices have no gradient


def statistics_of(case: Case) -> int:
    """Not the model's: an expert layer counts tokens and scores by noise bucket with two products."""
    model = case.config.model
    moe_layers = sum(model.is_moe_layer(layer) for layer in range(model.num_layers))
    return moe_layers * 2 * 2 * NOISE_BUCKETS * case.pack_tokens * case.packs * model.moe.num_experts


def test_model_flops_leave_padding_out(counted: dict[str, dict[str, Any]]) -> None:
    answer = counted["dense, several clips and padding, two packs"]
    assert sum(answer["model"].values()) < sum(answer["planned"].values())
    assert answer["model"]["self_attention"] == answer["planned"]["self_attention"]
