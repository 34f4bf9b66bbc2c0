"""diffusers' Wan beside ours: tiny models with random weights, their tensors in model space, and their velocity.

The names are written out once more here, on purpose: a second reading of both models that conversion's tables can be
held against.
"""

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from megavid.config.schema import ModelConfig
from megavid.models.inputs import ModelInput
from megavid.ops.patches import patchify, unpatchify

RENAMED = (
    ("condition_embedder.time_embedder.linear_1", "time_embedder.up"),
    ("condition_embedder.time_embedder.linear_2", "time_embedder.down"),
    ("condition_embedder.time_proj", "time_embedder.projection"),
    ("condition_embedder.text_embedder.linear_1", "text_embedder.up"),
    ("condition_embedder.text_embedder.linear_2", "text_embedder.down"),
    ("condition_embedder.image_embedder.norm1", "image_embedder.norm_in"),
    ("condition_embedder.image_embedder.norm2", "image_embedder.norm_out"),
    ("condition_embedder.image_embedder.pos_embed", "image_embedder.positions"),
    ("condition_embedder.image_embedder.ff", "image_embedder"),
    ("patch_embedding", "patch_embedder"),
    ("proj_out", "head.projection"),
    ("attn1", "self_attention"),
    ("attn2", "cross_attention"),
    ("add_k_proj", "image_k"),
    ("add_v_proj", "image_v"),
    ("norm_added_k", "image_k_norm"),
    ("norm_q", "q_norm"),
    ("norm_k", "k_norm"),
    ("to_out.0", "out"),
    ("to_", ""),
    ("net.0.proj", "up"),
    ("net.2", "down"),
    ("norm2", "cross_norm"),
)


def tiny_diffusers(model: ModelConfig) -> WanTransformer3DModel:
    """diffusers' model of the same shape, its weights random."""
    torch.manual_seed(3)
    twin = WanTransformer3DModel(
        patch_size=model.patch_size, num_attention_heads=model.num_heads, attention_head_dim=model.head_size,
        in_channels=model.in_channels, out_channels=model.out_channels, text_dim=model.text_size,
        freq_dim=model.frequency_size, ffn_dim=model.ffn_size, num_layers=model.num_layers, eps=model.norm_eps,
        image_dim=model.image_size or None, added_kv_proj_dim=model.hidden_size if model.image_size else None,
        pos_embed_seq_len=model.image_positions or None,
    )  # fmt: skip
    for name, parameter in twin.named_parameters():
        if parameter.dim() == 1 or "pos_embed" in name:  # biases, norms and positions are zeros and ones when new
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return twin.eval()


def name_in_model_space(name: str) -> str:
    """A tensor's name, of diffusers' here."""
    if name == "scale_shift_table":
        return "head.modulation"
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours)
    return name.replace("scale_shift_table", "modulation")


def in_model_space(twin: WanTransformer3DModel, model: ModelConfig) -> dict[str, Tensor]:
    """The weights by their names and in their shapes in model space."""
    found = {}
    for name, tensor in twin.state_dict().items():
        ours = name_in_model_space(name)
        if ours == "patch_embedder.weight":
            tensor = tensor.flatten(1)
        elif ours.startswith("head.projection."):  # channels are last there, first here
            tensor = tensor.unflatten(0, (model.patch_volume, model.out_channels)).transpose(0, 1).flatten(0, 1)
        elif ours.endswith(("modulation", "positions")):
            tensor = tensor[0]
        found[ours] = tensor
    return found


@torch.no_grad()
def velocity(twin: WanTransformer3DModel, model: ModelConfig, inputs: ModelInput) -> Tensor:
    """What diffusers' model says to packs, clip by clip, [B, T, P]; zero in the padding."""
    out = inputs.patches_BTP.new_zeros(*inputs.patches_BTP.shape[:2], model.out_channels * model.patch_volume)
    number = 0
    for row, pack in enumerate(inputs.packs):
        for clip in pack.clips:
            window = slice(clip.start, clip.start + clip.tokens)
            timestep_T = inputs.timestep_R[inputs.row_BT[row, window]]
            given: dict[str, Any] = {}
            if inputs.has_image_G is not None and inputs.has_image_G[number]:
                assert inputs.image_GLI is not None
                image_LI = inputs.image_GLI[number]
                # First-last-frame models take the two images as a batch of two.
                given["encoder_hidden_states_image"] = image_LI.unflatten(0, (2 if model.image_positions else 1, -1))
            latents_CFHW = unpatchify(inputs.patches_BTP[row, window], clip.grid, model.patch_size)
            answer = twin(
                latents_CFHW[None], timestep_T[None] if model.task == "ti2v" else timestep_T[:1],
                inputs.text_GLD[number][None], **given,
            ).sample  # fmt: skip
            out[row, window] = patchify(answer[0], model.patch_size)
            number += 1
    return out
