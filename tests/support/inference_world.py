"""A trained model's tensors under the names of an inference folder, written out by hand, and calls of both models.

Owns what the served model is compared with: the trainer's on one rank.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megavid.config.schema import ModelConfig, RunConfig
from megavid.models.inputs import ModelInput
from megavid.models.runner import build_engine, velocity_of
from megavid.ops.packs import Clip, Pack
from megavid.ops.patches import patchify, unpatchify
from megavid.ops.philox import key_of, normal
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layout_of
from tests.support.tiny_world import assemble, held, initialize, tiny_config

RENAMED = [
    (r"^patch_embedder\.", "patch_embedding."),
    (r"^time_embedder\.up\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedder\.down\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_embedder\.projection\.", "condition_embedder.time_proj."),
    (r"^text_embedder\.up\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedder\.down\.", "condition_embedder.text_embedder.linear_2."),
    (r"^head\.projection\.", "proj_out."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.self_attention\.", ".attn1."),
    (r"\.cross_attention\.", ".attn2."),
    (r"\.(q|k|v)\.(weight|bias)$", r".to_\1.\2"),
    (r"\.out\.(weight|bias)$", r".to_out.0.\1"),
    (r"\.(q|k)_norm\.", r".norm_\1."),
    (r"\.cross_norm\.", ".norm2."),
    (r"\.ffn\.up\.", ".ffn.net.0.proj."),
    (r"\.ffn\.down\.", ".ffn.net.2."),
    (r"\.moe\.", ".ffn."),
]


def renamed(name: str) -> str:
    """Name in an inference folder of a tensor in model space, experts not yet stacked."""
    for pattern, to in RENAMED:
        name = re.sub(pattern, to, name)
    return name


def to_inference(weights: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """State of ``MegavidTransformer3DModel`` from tensors in model space."""
    state, stacks = {}, {}
    for name, tensor in weights.items():
        new = renamed(name)
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", new):
            stacks.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
            continue
        if new == "patch_embedding.weight":
            tensor = tensor.view(tensor.shape[0], model.in_channels, *model.patch_size)
        if new.startswith("proj_out."):  # channels last
            parts = tensor.unflatten(0, (model.out_channels, model.patch_volume))
            tensor = parts.transpose(0, 1).flatten(0, 1)
        if new.endswith("scale_shift_table"):
            tensor = tensor.unsqueeze(0)
        state[new] = tensor.contiguous()
    for name, parts in stacks.items():
        state[name] = torch.stack([parts[expert] for expert in range(len(parts))])
    return state


@dataclass(frozen=True)
class Call:
    """What a model is called with: B clips of one size."""

    latents: Tensor
    timestep: Tensor
    """[B], or per latent frame [B, F]."""
    text: Tensor
    latent_frame_rate: float = 4.0


def call_of(model: ModelConfig, *, per_frame: bool = False, frame_rate: float = 4.0, seed: int = 0) -> Call:
    """Two clips of 3 x 8 x 12 latents."""
    generator = torch.Generator().manual_seed(seed)
    timestep = torch.tensor([937.0, 250.5])
    if per_frame:
        timestep = timestep.unsqueeze(1).repeat(1, 3)
        timestep[:, 0] = 0.0
    return Call(
        torch.randn(2, model.in_channels, 3, 8, 12, generator=generator),
        timestep,
        torch.randn(2, model.text_length, model.text_size, generator=generator),
        frame_rate,
    )


def trained_velocity(config: RunConfig, call: Call) -> tuple[dict[str, Tensor], Tensor]:
    """Job: the trainer's weights in model space, and its velocity [B, C, F, H, W], on one rank."""
    model = config.model
    with Mesh.open(layout_of(config, 1)) as mesh:
        engine = build_engine(config, mesh, with_optimizer=False)
        initialize(engine)
        for fragment in engine.weight_fragments("model"):  # a fresh bias is zero and a fresh norm one: hide nothing
            fragment.data.add_(0.1 * normal(key_of("jitter", fragment.name), 0, fragment.data.numel()))
        engine.load_finished()
        weights = {
            name.removeprefix("model/"): w for name, w in assemble([held(engine.weight_fragments("model"))]).items()
        }
        generator = torch.Generator().manual_seed(5)
        for chunk in engine.chunks:
            for name, buffer in chunk.training_buffers():
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
                weights[name] = buffer.clone()
        batch, _, *size = call.latents.shape
        grid = tuple(extent // patch for extent, patch in zip(size, model.patch_size))
        tokens = grid[0] * grid[1] * grid[2]
        packs = tuple(
            Pack((Clip(draw=n, sample=n, start=0, grid=grid, frame_rate=call.latent_frame_rate),), tokens)
            for n in range(batch)
        )
        rows = call.timestep.numel() // batch
        row_BT = torch.arange(batch)[:, None] * rows + torch.arange(tokens)[None] // (tokens // rows)
        inputs = ModelInput(
            packs=packs,
            patches_BTP=torch.stack([patchify(clip, model.patch_size) for clip in call.latents]),
            timestep_R=call.timestep.flatten(),
            row_BT=row_BT,
            text_GLD=call.text,
        )
        velocity_BTP = velocity_of(engine, inputs)
        velocity = torch.stack([unpatchify(clip, grid, model.patch_size) for clip in velocity_BTP])
    return weights, velocity


def with_moe(family: str = "wan_moe", absolute: bool = True, **moe: Any) -> RunConfig:
    """``tiny_config`` with other experts."""
    config = tiny_config(family, moe=moe)
    return replace(config, model=replace(config.model, absolute_positions=absolute))
