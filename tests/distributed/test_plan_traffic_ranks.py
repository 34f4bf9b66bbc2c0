"""Traffic that meta tensors cannot show, because it needs the router's choice: the plan against four real ranks."""

from dataclasses import replace
from typing import Any

import pytest

from megavid.config.schema import PrecisionConfig
from megavid.plan.layout import layout_of
from tests.distributed.test_schedule import planned, sent, with_microbatches
from tests.support.meta_world import real_calls
from tests.support.ranks import RankPool
from tests.support.tiny_world import tiny_config

CHOICE = {"router": "expert_choice"}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "allgather dispatcher": ({}, {"tensor": 2, "expert": 2, "dispatcher": "allgather"}),
    "allgather dispatcher, full": (
        {"shared_ffn_size": 0},
        {"tensor": 2, "expert": 4, "dispatcher": "allgather", "recompute": "full"},
    ),
    "allgather dispatcher, selective": (
        {},
        {"tensor": 2, "expert": 2, "dispatcher": "allgather", "recompute": "selective"},
    ),
    "softmax with losses": ({"router": "softmax", "aux_loss_weight": 0.1}, {"tensor": 2, "recompute": "selective"}),
    "expert choice over tp and cp": (CHOICE, {"tensor": 2, "context": 2, "recompute": "full"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_real_ranks_send_what_is_planned(pool: RankPool, name: str) -> None:
    moe, parallel = LAYOUTS[name]
    config = with_microbatches(tiny_config(moe=moe, **parallel), 4, 2)
    layout = layout_of(config, 4)
    for rank, calls in enumerate(pool.run(4, real_calls, config, 4)):
        assert sent(calls, rank) == pytest.approx(planned(config, layout, rank), rel=1e-12)


FP8: dict[str, dict[str, Any]] = {
    "tensorwise": {"tensor": 2, "context": 2, "expert": 2, "recompute": "full"},
    "delayed": {"tensor": 2, "recompute": "selective"},
}


@pytest.mark.parametrize("recipe", FP8)
def test_real_ranks_in_fp8_tell_each_other_what_is_planned(pool: RankPool, recipe: str) -> None:
    config = with_microbatches(tiny_config(moe={"expert_ffn_size": 64, "shared_ffn_size": 64}, **FP8[recipe]), 4, 2)
    model = replace(config.model, hidden_size=64, ffn_size=128)
    config = replace(config, model=model, precision=PrecisionConfig(fp8=recipe))
    layout = layout_of(config, 4)
    for rank, calls in enumerate(pool.run(4, real_calls, config, 4)):
        assert sent(calls, rank) == pytest.approx(planned(config, layout, rank), rel=1e-12)
