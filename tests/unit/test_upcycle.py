"""Upcycling on one device: the dense function at step 0, what is read, and what is refused."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megavid.checkpoint.upcycle import Upcycling, upcycled
from megavid.config.load import load_run
from megavid.config.schema import ModelConfig
from megavid.errors import ConfigError
from megavid.models.moe.router import Router
from megavid.models.moe.tokens import TokenInfo
from megavid.ops import moe_math
from megavid.ops.grouped_experts import ExpertWeights, grouped_experts
from megavid.plan.parameters import count, tensors
from tests.support.lazy import memory_model, meta_model, value_of

EXPERTS, TOKENS = 8, 40
DENSE = ModelConfig(family="wan", num_layers=3, hidden_size=24, num_heads=2, ffn_size=32, text_size=8, text_length=4)
LEGAL = [
    (granularity, top_k)
    for granularity in (1, 2, 4)
    for top_k in range(granularity, EXPERTS + 1, granularity)
    if top_k > 1
]


def make(granularity: int, top_k: int, **keys: Any) -> Upcycling:
    return Upcycling(**{"num_experts": EXPERTS, "granularity": granularity, "top_k": top_k, **keys})


def feed_forward(x: Tensor, read: Mapping[str, Tensor], name: str) -> Tensor:
    """GELU-tanh feed-forward of one device, dense or one expert."""
    hidden = torch.nn.functional.linear(x, read[f"{name}.up.weight"], read[f"{name}.up.bias"])
    hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
    return torch.nn.functional.linear(hidden, read[f"{name}.down.weight"], read[f"{name}.down.bias"])


def layer_of(model: ModelConfig, read: Mapping[str, Tensor], x_TD: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """The expert layer of block 1 on one device: the real router, and the real experts in order of their number."""
    router = Router(model.moe, nn.Parameter(read["blocks.1.moe.router.weight"].to(x_TD.dtype)), token_group=None)
    if bias_E is not None:
        assert router.expert_bias is not None
        router.expert_bias += bias_E
    clip_T = torch.zeros(len(x_TD), dtype=torch.int64)
    with torch.no_grad():
        routing = router(x_TD, TokenInfo(clip_T, clip_T, 1, torch.tensor([len(x_TD)]), 0.0))
        token_S, expert_S = routing.map_TE.T.nonzero().flip(1).unbind(1)
        stacked = {
            part: torch.stack([read[f"blocks.1.moe.experts.{e}.{part}"] for e in range(model.moe.num_experts)])
            for part in ("up.weight", "up.bias", "down.weight", "down.bias")
        }
        weights = ExpertWeights(
            stacked["up.weight"], stacked["down.weight"], up_bias_eM=stacked["up.bias"],
            down_bias_eD=stacked["down.bias"],
        )  # fmt: skip
        rows = grouped_experts(x_TD[token_S], routing.map_TE.sum(0), weights, routing.probs_TE[token_S, expert_S])
    return torch.zeros_like(x_TD).index_add_(0, token_S, rows)


def gap_of(how: Upcycling, dtype: torch.dtype, bias_E: Tensor | None = None) -> float:
    """Largest difference between the upcycled and the dense feed-forward, relative to the largest output."""
    dense = memory_model(DENSE, dtype)
    found = upcycled(dense.source, how)
    x_TD = value_of("x", (TOKENS, DENSE.hidden_size)).mul(DENSE.hidden_size**0.5).to(dtype)
    got = layer_of(found.config, {name: tensor.read() for name, tensor in found.tensors.items()}, x_TD, bias_E)
    want = feed_forward(x_TD, dense.values, "blocks.1.ffn")
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("granularity", "top_k"), LEGAL)
def test_an_upcycled_layer_is_the_dense_feed_forward(
    granularity: int, top_k: int, router: Any, dtype: torch.dtype, tolerance: float
) -> None:
    for noise in (1.0, 0.1, 2.0):
        assert gap_of(make(granularity, top_k, router=router, noise=noise), dtype) < tolerance


@pytest.mark.parametrize(("granularity", "top_k"), LEGAL)
def test_a_balancing_bias_that_is_equal_within_a_copy_leaves_the_function(granularity: int, top_k: int) -> None:
    how = make(granularity, top_k)
    bias_E = value_of("bias", (how.copies,)).float().repeat_interleave(granularity)
    assert gap_of(how, torch.float64, bias_E) < 1e-12


def test_a_bias_that_tells_the_parts_of_a_copy_apart_does_not() -> None:
    """The test above can fail."""
    assert gap_of(make(2, 2), torch.float64, torch.tensor([1.0, 0, 0, 0, 0, 1.0, 0, 0])) > 1e-2


@pytest.mark.parametrize("where", ["up.weight", "down.weight", "down.bias"])
def test_what_is_scaled_otherwise_is_not_the_dense_function(where: str) -> None:
    """Scaling the experts' weights inside the nonlinearity, as megatron-core's upcycling does, is far off."""
    dense = memory_model(DENSE)
    found = upcycled(dense.source, make(2, 4))
    is_scaled = re.compile(rf"blocks\.1\.moe\.experts\.\d+\.{where}").fullmatch
    read = {name: tensor.read() * (2 if is_scaled(name) else 1) for name, tensor in found.tensors.items()}
    x_TD = value_of("x", (TOKENS, DENSE.hidden_size)) * 5
    want = feed_forward(x_TD, dense.values, "blocks.1.ffn")
    assert (layer_of(found.config, read, x_TD) - want).abs().max() > 1e-2 * want.abs().max()


@pytest.mark.parametrize(("granularity", "top_k"), LEGAL)
def test_copies_that_tie_are_still_taken_whole(granularity: int, top_k: int) -> None:
    scores_TE = torch.randint(0, 3, (200, EXPERTS // granularity)).double().repeat_interleave(granularity, dim=1)
    ids_TK = moe_math.top_experts(scores_TE, top_k)
    taken = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, ids_TK, True).view(200, -1, granularity)
    assert (taken.all(-1) | ~taken.any(-1)).all()


def test_rows_of_a_copy_are_equal_and_those_of_copies_differ() -> None:
    found = upcycled(memory_model(DENSE).source, make(2, 4, seed=5, noise=0.5)).tensors
    rows_E = found["blocks.1.moe.router.weight"].read()
    assert rows_E.dtype == torch.float32
    assert torch.equal(rows_E[::2], rows_E[1::2])
    assert len(rows_E.unique(dim=0)) == 4
    assert rows_E.std() == pytest.approx(0.5 * 24**-0.5, rel=0.2)
    again, other_layer, other_seed = (
        upcycled(memory_model(DENSE).source, make(2, 4, seed=seed, noise=0.5)).tensors[
            f"blocks.{layer}.moe.router.weight"
        ]
        for seed, layer in ((5, 1), (5, 0), (6, 1))
    )
    assert torch.equal(again.read(), rows_E)
    assert not torch.equal(other_layer.read(), rows_E)
    assert not torch.equal(other_seed.read(), rows_E)


def test_every_dense_number_arrives_in_every_copy() -> None:
    """Put the experts of each copy side by side: the dense matrices, bitwise."""
    dense = memory_model(DENSE, torch.bfloat16)
    found = upcycled(dense.source, make(4, 8)).tensors
    for copy in range(2):
        names = [f"blocks.2.moe.experts.{4 * copy + part}" for part in range(4)]
        for matrix, dim in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1)):
            whole = torch.cat([found[f"{name}.{matrix}"].read() for name in names], dim)
            assert torch.equal(whole, dense.values[f"blocks.2.ffn.{matrix}"])
        bias = torch.stack([found[f"{name}.down.bias"].read() for name in names])
        assert torch.equal(bias.sum(0), dense.values["blocks.2.ffn.down.bias"])


def test_all_other_tensors_are_the_dense_ones_and_layers_may_stay_dense() -> None:
    dense = memory_model(DENSE)
    found = upcycled(dense.source, make(2, 2, dense_first=1, dense_last=1))
    assert [found.config.is_moe_layer(layer) for layer in range(3)] == [False, True, False]
    same = {name for name in found.tensors if ".moe." not in name}
    assert same == {name for name in dense.values if not name.startswith("blocks.1.ffn")}
    assert all(found.tensors[name] is dense.source.tensors[name] for name in same)
    assert torch.equal(found.tensors["blocks.1.moe.router.expert_bias"].read(), torch.zeros(EXPERTS))


@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
def test_blocks_of_every_tensor_are_those_of_the_whole(router: str) -> None:
    dense = memory_model(DENSE)
    for name, tensor in upcycled(dense.source, make(4, 4, router=router)).tensors.items():
        whole = tensor.read()
        assert tuple(whole.shape) == tensor.shape, name
        assert whole.dtype == tensor.dtype
        assert torch.equal(torch.cat(list(tensor.blocks(max_bytes=7 * 8))), whole.view(-1))
        # Bytes that are no longer all those of a source's tensor must not be taken for them.
        assert (tensor.key == "") == all(tensor is not whole for whole in dense.source.tensors.values())


def test_a_matrix_that_is_cut_by_columns_is_read_once_for_all_its_experts() -> None:
    dense = memory_model(DENSE)
    found = upcycled(dense.source, make(4, 4)).tensors
    assert set(dense.read.values()) == {0}
    for tensor in found.values():
        list(tensor.blocks(max_bytes=64))
    for name, count_read in dense.read.items():
        # Rows of `up` are read where an expert needs them: once for each of the two copies.
        times = 2 if ".ffn.up" in name else EXPERTS if name.endswith("ffn.down.bias") else 1
        assert count_read == times * dense.values[name].numel(), name


def test_wan_14b_becomes_wan_moe_100b_a20b() -> None:
    dense, flagship = load_run("wan_14b", []).model, load_run("wan_moe_100b_a20b", []).model
    result = upcycled(meta_model(dense).source, Upcycling(num_experts=64, top_k=8, granularity=4))
    found = result.tensors
    assert result.config == flagship
    counts = count(result.config)
    assert (f"{counts.total / 1e9:.2f}", f"{counts.active / 1e9:.2f}") == ("99.26", "19.97")
    shapes = {tensor.name: tensor.shape for tensor in tensors(flagship)}
    biases = {f"blocks.{layer}.moe.router.expert_bias": (64,) for layer in range(40)}
    assert {name: tensor.shape for name, tensor in found.items()} == shapes | biases
    assert sum(torch.Size(found[name].shape).numel() for name in shapes) == counts.total
    # Reading gives those shapes too, for one layer of the forty that are alike.
    for name in (name for name in shapes if name.startswith("blocks.7.moe.experts")):
        assert tuple(found[name].read().shape) == shapes[name]


REFUSED = [
    ({"num_experts": 6, "granularity": 4, "top_k": 4}, "--granularity 4 must divide --experts 6"),
    ({"granularity": 4, "top_k": 6}, "--top-k 6 must be a multiple of --granularity 4"),
    ({"granularity": 4, "top_k": 2}, "--top-k 2 must be a multiple of --granularity 4"),
    ({"top_k": 9}, "at most --experts 8"),
    ({"granularity": 3, "num_experts": 9, "top_k": 3}, "--granularity 3 must divide the dense model's ffn_size = 32"),
    ({"granularity": 0, "top_k": 2}, "--granularity 0 must be at least 1"),
    ({"top_k": 1}, "--top-k 1 cannot give the dense function"),
    ({"top_k": 1, "router": "softmax"}, "--top-k 1 cannot give the dense function"),
    ({"router": "expert_choice"}, "--router expert_choice cannot give the dense function"),
    ({"noise": 0.0}, "--noise 0.0 must be above 0"),
    ({"noise": 3.0}, "--noise 3.0 must be above 0, .* at most 2"),
    ({"dense_first": 2, "dense_last": 1}, "leaves no expert layer"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_would_not_be_the_dense_function_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        upcycled(memory_model(DENSE).source, make(**{"granularity": 1, "top_k": 2, **keys}))


def test_experts_are_not_upcycled_again() -> None:
    experts = upcycled(memory_model(DENSE).source, make(2, 2))
    with pytest.raises(ConfigError, match="needs a dense model"):
        upcycled(experts, make(2, 2))
