"""What a layout refuses, and in which words; and that the layers of all chunks are the model's, in order."""

from dataclasses import replace
from typing import Any

import pytest

from megavid.config.schema import (
    DataConfig,
    DiffusionConfig,
    LogConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megavid.errors import ConfigError
from megavid.plan.layout import Layout, layers_of_chunk, layout_of


def config(**parallel: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(num_layers=6), parallel=ParallelConfig(**parallel), train=TrainConfig(), data=DataConfig()
    )


@pytest.mark.parametrize(
    ("world", "parallel", "words"),
    [
        (2, {"tensor": 3}, r"= 3 must divide the number of ranks = 2; change parallel\.\* or --ranks"),
        (4, {"expert": 3}, r"= 3 must divide the number of ranks = 4"),
        (3, {}, r"data parallel = 1 x 3 = 3 must divide train\.global_batch_size = 8"),
        (8, {"pipeline": 8}, r"= 8 must be at most model\.num_layers = 6"),
        (10, {"context": 5, "tensor": 2}, r"data\.pack_tokens = \d+ must be a multiple of .* x context = 10"),
        (3, {"context": 3, "context_strategy": "ulysses"}, r"'ulysses' needs parallel\.context = 3 to divide heads"),
        (2, {"context": 2, "context_strategy": "hybrid"}, r"'hybrid' needs a divisor of parallel\.context = 2 between"),
        (1, {"context_strategy": "ring"}, r"parallel\.context_strategy = 'ring' is read with parallel\.context above"),
        (2, {"tensor": 2, "sequence": False}, r"experts need sequence parallelism"),
        (16, {"expert": 16, "tensor": 2}, r"parallel\.expert = 16 must divide model\.moe\.num_experts = 8"),
    ],
)
def test_an_illegal_layout_says_what_got_limit_and_where(world: int, parallel: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        layout_of(config(**parallel), world)


def test_an_expert_for_some_noise_levels_draws_no_pictures_while_it_trains() -> None:
    half = replace(config(), diffusion=DiffusionConfig(sigma_min=0.9))
    assert layout_of(half, 1).world_size == 1
    with pytest.raises(ConfigError, match=r"needs all noise levels, .*\.sigma_min = 0\.9 to sigma_max = 1\.0"):
        layout_of(replace(half, log=LogConfig(sample_interval_steps=5)), 1)


def test_a_dense_model_has_no_experts_to_share() -> None:
    dense = replace(config(expert=2), model=ModelConfig(family="wan"))
    with pytest.raises(ConfigError, match=r"parallel\.expert = 2 .* model\.family = 'wan_moe'"):
        layout_of(dense, 2)


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (4, 1), (2, 2), (3, 2)])
def test_chunks_hold_every_layer_once_and_in_order(pp: int, vpp: int) -> None:
    layout = Layout(pp=pp, vpp=vpp)
    chunks = [layers_of_chunk(config().model, layout, rank, chunk) for chunk in range(vpp) for rank in range(pp)]
    assert [layer for layers in chunks for layer in layers] == list(range(6))
    sizes = [len(layers) for layers in chunks]
    assert max(sizes) - min(sizes) <= 1


def test_coordinates_are_those_of_the_axes_in_megatron_order() -> None:
    layout = Layout(tp=2, dp=2, pp=2, ep=2, etp=1, edp=2)
    places = [layout.coordinates(rank) for rank in range(8)]
    assert [place["tp"] for place in places] == [0, 1] * 4
    assert [place["dp"] for place in places] == [0, 0, 1, 1] * 2
    assert [place["ep"] for place in places] == [0, 1] * 4
    assert [place["edp"] for place in places] == [0, 0, 1, 1] * 2
    assert [place["pp"] for place in places] == [0] * 4 + [1] * 4
