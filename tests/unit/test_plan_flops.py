"""FLOPs in closed form: the published convention, and how the parts of a run add up."""

import pytest

from megavid.config.load import load_run
from megavid.errors import ConfigError
from megavid.plan.flops import (
    PARTS,
    Flops,
    expert_rows,
    forward_flops,
    model_flops,
    recompute_flops,
    stage_flops,
)
from megavid.plan.layout import layout_of
from megavid.plan.workload import Workload, tokens_of_clip, workload_of_clip, workload_of_run


def megatron_bridge_wan(tokens: int, *, layers: int, width: int, ffn: int, text: int) -> tuple[float, float]:
    """Megatron-Bridge's count for Wan, forward and backward of one sample: (all, self-attention's products).

    Blocks only: no embedders, timestep, modulation or head, which are under 0.1% of it.
    """
    attention = 4 * tokens * tokens * width
    projections = 8 * tokens * width * width
    cross = 4 * tokens * width * width + 4 * text * width * width + 4 * tokens * text * width
    forward = layers * (attention + projections + cross + 4 * tokens * width * ffn)
    return 3.0 * forward, 3.0 * layers * attention


def test_wan_14b_is_the_published_count() -> None:
    model = load_run("wan_14b", []).model
    ours = model_flops(model, [37440])
    assert ours.total == pytest.approx(6.18e15, rel=1e-3)
    assert ours["self_attention"] / ours.total == pytest.approx(0.557, abs=5e-4)
    total, attention = megatron_bridge_wan(37440, layers=40, width=5120, ffn=13824, text=512)
    assert ours["self_attention"] == attention
    blocks = ours - Flops({part: ours[part] for part in ("embedders", "modulation", "head")})
    assert blocks.total == total
    assert total / ours.total > 0.9995


def test_parts_are_those_that_are_named() -> None:
    for preset in ("wan_1b", "wan_moe_30b_a3b", "wan_moe_100b_a20b"):
        found = forward_flops(load_run(preset, []).model, [1000, 24], padding=7)
        assert set(found.parts) <= set(PARTS)
        assert found.total == sum(found[part] for part in PARTS)


def test_clips_of_a_pack_only_add_up_outside_of_attention() -> None:
    model = load_run("wan_moe_7b_a2b", []).model
    two, one = forward_flops(model, [600, 400]), forward_flops(model, [1000])
    assert two["self_attention"] / one["self_attention"] == pytest.approx(0.6**2 + 0.4**2)
    assert two["experts"] == one["experts"]
    apart = forward_flops(model, [600]) + forward_flops(model, [400])
    assert two.total == pytest.approx(apart.total, rel=1e-12)


def test_experts_count_active_rows() -> None:
    model = load_run("wan_moe_30b_a3b", []).model
    assert expert_rows(model, [100, 7]) == 107 * 5
    choice = load_run("wan_moe_30b_a3b", ["--model.moe.router", "expert_choice"]).model
    # 96 experts take ceil(100 x 5 / 96) = 6 tokens of the first clip and one of the second.
    assert expert_rows(choice, [100, 7]) == 96 * (6 + 1)


@pytest.mark.parametrize("preset", ["wan_14b", "wan21_i2v_14b", "wan22_ti2v_5b", "wan_moe_7b_a2b"])
def test_stages_add_up_to_the_model_and_what_ranks_do_alike(preset: str) -> None:
    flags = ["--parallel.pipeline", "2", "--parallel.tensor", "2", "--parallel.virtual_pipeline", "2"]
    config = load_run(preset, [*flags, "--parallel.expert", "1"])
    layout, clips = layout_of(config, 4), [900, 300]
    stages = [stage_flops(config.model, layout, stage, clips) for stage in range(2)]
    found, model = stages[0] + stages[1], forward_flops(config.model, clips)
    alike = ("embedders", "modulation")
    for part in PARTS:
        if part not in alike:
            assert found[part] == pytest.approx(model[part], rel=1e-12), part
    assert found["modulation"] == 2 * 2 * 2 * model["modulation"]  # stages x chunks x tensor-parallel ranks


def test_recompute_leaves_attention_out_where_it_is_kept() -> None:
    model = load_run("wan_14b", []).model
    assert recompute_flops(model, [37440], "none").total == 0
    full, selective = (recompute_flops(model, [37440], mode) for mode in ("full", "selective"))
    assert selective["self_attention"] == 0
    assert full.total - selective.total == full["self_attention"] == forward_flops(model, [37440])["self_attention"]


def test_tokens_of_a_clip_are_those_of_wan() -> None:
    assert tokens_of_clip((1, 2, 2), 81, 480, 832) == 32760
    assert tokens_of_clip((1, 2, 2), 81, 720, 1280) == 75600
    config = load_run("wan_14b", ["--parallel.tensor", "1", "--parallel.context", "8"])
    workload = workload_of_clip(config, 81, 480, 832)
    assert (workload.clip_tokens, workload.pack_tokens, workload.padding) == ((32760,), 32832, 72)
    assert workload_of_run(config).padding == 0


@pytest.mark.parametrize(
    ("size", "message"),
    [((80, 480, 832), "--frames 80 .* set 77"), ((81, 481, 832), "--height 481"), ((81, 480, 8), "--width 8")],
)
def test_clips_that_the_tokenizer_cannot_take_are_refused(size: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tokens_of_clip((1, 2, 2), *size)


def test_a_workload_must_fit_its_pack() -> None:
    with pytest.raises(ConfigError, match=r"more than a pack of 10; raise data\.pack_tokens"):
        Workload((8, 8), 10, 1, "two clips")
