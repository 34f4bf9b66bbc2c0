"""The served model against the trainer's, from the same tensors; and its experts over ranks against one rank."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megavid.config.schema import ModelConfig, RunConfig
from megavid.errors import ConfigError, DataError
from megavid.inference import MegavidTransformer3DModel, load_expert_parallel
from tests.support import tolerance
from tests.support.inference_world import Call, call_of, to_inference, trained_velocity, with_moe
from tests.support.ranks import RankPool

MODELS = {
    "dense": with_moe("wan"),
    "dense, no absolute places": with_moe("wan", absolute=False),
    "sigmoid": with_moe(route_scale=2.5),
    "sigmoid, groups": with_moe(num_experts=8, top_k=2, num_groups=4, top_groups=2),
    "sigmoid, top-1, no bias, no shared": with_moe(top_k=1, has_bias=False, shared_ffn_size=0),
    "softmax, SwiGLU": with_moe(router="softmax", activation="swiglu"),
    "softmax, SwiGLU, no bias": with_moe(router="softmax", activation="swiglu", has_bias=False),
    "expert choice": with_moe(router="expert_choice"),
    "expert choice, SwiGLU, no shared": with_moe(router="expert_choice", activation="swiglu", shared_ffn_size=0),
    "experts in every layer": with_moe(dense_first=0, dense_last=0),
}


def served(model: ModelConfig, weights: dict[str, Tensor]) -> Any:
    made = MegavidTransformer3DModel.of_model(model).eval()
    made.load_state_dict(to_inference(weights, model), strict=True)
    return made


@torch.no_grad()
def velocity_of(model: Any, call: Call) -> Tensor:
    timestep = call.timestep
    if timestep.ndim == 2:  # per token
        timestep = timestep.repeat_interleave(call.latents.shape[-2] * call.latents.shape[-1] // 4, dim=1)
    options = {"latent_frame_rate": call.latent_frame_rate}
    result: Tensor = model(call.latents, timestep, call.text, attention_kwargs=options).sample
    return result


def close(got: Tensor, want: Tensor) -> None:
    gap, scale = (got - want).abs().max().item(), want.abs().max().item()
    assert gap <= tolerance.LAYER_FP32 * scale, f"off by {gap:.1e} of {scale:.1e}"


@pytest.mark.parametrize("name", MODELS)
def test_served_model_equals_the_trained_one(pool: RankPool, name: str) -> None:
    config: RunConfig = MODELS[name]
    call = call_of(config.model)
    ((weights, want),) = pool.run(1, trained_velocity, config, call)
    close(velocity_of(served(config.model, weights), call), want)


@pytest.mark.parametrize("name", ["dense", "sigmoid"])
def test_timesteps_of_frames_and_frame_rates_are_the_trained_ones(pool: RankPool, name: str) -> None:
    config = MODELS[name]
    call = call_of(config.model, per_frame=True, frame_rate=3.0)
    ((weights, want),) = pool.run(1, trained_velocity, config, call)
    model = served(config.model, weights)
    close(velocity_of(model, call), want)
    other_rate = Call(call.latents, call.timestep, call.text)
    assert (velocity_of(model, other_rate) - want).abs().max() > 1e-3


SPREAD = {
    "sigmoid": with_moe(num_experts=8, has_bias=False).model,
    "softmax, SwiGLU": with_moe(router="softmax", activation="swiglu").model,
    "expert choice": with_moe(router="expert_choice").model,
}


def random_model(shape: ModelConfig) -> Any:
    torch.manual_seed(3)
    model = MegavidTransformer3DModel.of_model(shape).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def own_call(shape: ModelConfig, rank: int) -> Call:
    """A clip of another size on every rank."""
    call = call_of(shape, seed=rank)
    return replace(call, latents=call.latents[:, :, : 3 - rank])


def spread_velocity(shape: ModelConfig, inputs: Any, folder: str, fp8: bool) -> tuple[int, Tensor]:
    """Job: numbers in the weights that this rank holds, and its velocity."""
    group = dist.group.WORLD
    if folder:
        model = load_expert_parallel(folder, group, inputs=inputs, dtype=torch.float32)
    else:
        model = random_model(shape)
        if fp8:
            model.quantize_fp8_()
        model.shard_experts_(group, inputs)
    call = own_call(shape, dist.get_rank()) if inputs == "own" else call_of(shape)
    return sum(p.numel() for p in model.parameters()), velocity_of(model, call)


@pytest.mark.parametrize("inputs", ["same", "own"])
@pytest.mark.parametrize("name", SPREAD)
def test_experts_over_two_ranks_equal_one_rank(pool: RankPool, name: str, inputs: Any) -> None:
    shape = SPREAD[name]
    whole = random_model(shape)
    experts = sum(p.numel() for n, p in whole.named_parameters() if ".experts." in n)
    total = sum(p.numel() for p in whole.parameters())
    for rank, (held, velocity) in enumerate(pool.run(2, spread_velocity, shape, inputs, "", False)):
        call = own_call(shape, rank) if inputs == "own" else call_of(shape)
        close(velocity, velocity_of(whole, call))
        assert held == total - experts // 2


def test_each_rank_reads_its_own_experts_of_a_folder(pool: RankPool, tmp_path: Path) -> None:
    shape = SPREAD["softmax, SwiGLU"]
    whole = random_model(shape)
    whole.save_pretrained(tmp_path, max_shard_size="100KB")
    want = velocity_of(whole, call_of(shape))
    for _, velocity in pool.run(2, spread_velocity, shape, "same", str(tmp_path), False):
        close(velocity, want)


def test_experts_in_eight_bits_spread_over_ranks(pool: RankPool) -> None:
    shape = SPREAD["sigmoid"]
    whole = random_model(shape).quantize_fp8_()
    want = velocity_of(whole, call_of(shape))
    for _, velocity in pool.run(2, spread_velocity, shape, "same", "", True):
        close(velocity, want)


def what_is_refused(shape: ModelConfig, folder: str) -> list[str]:
    """Job: the errors of a model without experts, of a group that does not divide them, and of a damaged folder."""
    said = []
    for refused in (
        lambda: random_model(with_moe("wan").model).shard_experts_(dist.group.WORLD),
        lambda: random_model(shape).shard_experts_(dist.group.WORLD),
        lambda: load_expert_parallel(folder, dist.group.WORLD),
    ):
        with pytest.raises((ConfigError, DataError)) as caught:
            refused()
        said.append(str(caught.value))
    return said


def test_what_cannot_be_spread_is_refused_in_one_line(pool: RankPool, tmp_path: Path) -> None:
    random_model(SPREAD["sigmoid"]).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["blocks.1.ffn.experts.up.weight"]
    save_file(state, file)
    odd = with_moe(num_experts=5).model
    for said in pool.run(2, what_is_refused, odd, str(tmp_path)):
        assert "needs experts; this model's family is wan" in said[0]
        assert "2 expert ranks must divide num_experts = 5" in said[1]
        assert 'Missing key(s) in state_dict: "blocks.1.ffn.experts.up.weight"' in said[2]
        assert all("\n" not in line for line in said)
