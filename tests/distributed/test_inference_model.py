"""The served model against the trainer's, from the same tensors; and its experts over ranks against one rank."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megavid.config.schema import ModelConfig, RunConfig
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
    from megavid.inference import MegavidTransformer3DModel

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
