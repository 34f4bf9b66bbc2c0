"""The closed form of parameter counts: published totals, and every layout holds the model once."""

import pytest

from megavid.config.load import load_run, preset_names
from megavid.plan.layout import layout_of
from megavid.plan.parameters import PARTS, count, count_rank, tensors


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [
        ("wan_1b", 1.42e9, 1.42e9),
        ("wan_14b", 14.29e9, 14.29e9),
        ("wan21_i2v_14b", 16.39e9, 16.39e9),
        ("wan22_i2v_a14b_low", 14.29e9, 14.29e9),
        ("wan22_ti2v_5b", 5.00e9, 5.00e9),
        ("wan_moe_100b_a20b", 99.26e9, 19.97e9),
        ("wan_moe_30b_a3b", 30.4e9, 2.9e9),
        ("wan_moe_7b_a2b", 6.9e9, 2.4e9),
    ],
)
def test_presets_have_their_published_size(preset: str, total: float, active: float) -> None:
    counts = count(load_run(preset, []).model)
    assert counts.total == pytest.approx(total, rel=4e-3)
    assert counts.active == pytest.approx(active, rel=4e-3)


def test_wan_1b_by_hand() -> None:
    width, ffn = 1536, 8960
    attention = 4 * (width * width + width) + 2 * width
    block = 6 * width + 2 * attention + 2 * width + 2 * width * ffn + ffn + width
    embedders = (64 + 1) * width + (256 + 1) * width + (width + 1) * width + (width + 1) * 6 * width
    embedders += (4096 + 1) * width + (width + 1) * width
    head = 2 * width + (width + 1) * 64
    assert count(load_run("wan_1b", []).model).total == 30 * block + embedders + head


def test_names_are_unique_and_parts_complete() -> None:
    model = load_run("tiny", []).model
    names = [tensor.name for tensor in tensors(model)]
    assert len(names) == len(set(names))
    counts = count(model)
    assert tuple(counts.by_part) == PARTS
    assert all(counts.by_part.values())
    assert counts.total == sum(tensor.numel for tensor in tensors(model))


LAYOUTS = [
    (1, []),
    (2, ["--parallel.tensor", "2"]),
    (4, ["--parallel.pipeline", "2"]),
    (8, ["--parallel.pipeline", "2", "--parallel.virtual_pipeline", "2", "--parallel.expert", "4"]),
    (8, ["--parallel.tensor", "2", "--parallel.pipeline", "2", "--parallel.expert", "2"]),
    (8, ["--parallel.tensor", "4", "--parallel.expert", "2", "--parallel.expert_tensor", "2"]),
    (8, ["--parallel.expert", "8"]),
    (4, ["--parallel.pipeline", "4"]),
]


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(("world_size", "items"), LAYOUTS)
def test_unique_shards_of_all_ranks_are_the_model(world_size: int, items: list[str], swiglu: bool) -> None:
    extra = ["--model.moe.activation", "swiglu", "--model.moe.has_bias", "false"] if swiglu else []
    config = load_run("tiny", items + extra)
    layout = layout_of(config, world_size)
    ranks = [count_rank(config.model, layout, rank) for rank in range(world_size)]
    assert sum(rank.unique for rank in ranks) == count(config.model).total
    assert all(rank.held == sum(rank.by_part.values()) for rank in ranks)
    # Every data-parallel replica could train alone: together its ranks hold at least the model.
    assert all(sum(rank.by_part[part] for rank in ranks) >= count(config.model).by_part[part] for part in PARTS)


def test_one_rank_holds_everything_once() -> None:
    config = load_run("tiny", [])
    rank = count_rank(config.model, layout_of(config, 1), 0)
    assert (rank.unique, rank.replicated) == (count(config.model).total, 0)


@pytest.mark.parametrize("preset", [name for name in preset_names() if name.startswith("wan")])
def test_large_presets_sum_up_at_scale(preset: str) -> None:
    config = load_run(preset, ["--train.global_batch_size", "1024"])
    world_size = 64
    layout = layout_of(config, world_size)
    unique = sum(count_rank(config.model, layout, rank).unique for rank in range(world_size))
    assert unique == count(config.model).total
