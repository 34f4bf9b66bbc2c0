"""``config.json`` of an inference folder as the model's shape and back.

Owns the meaning of its keys: diffusers' own for Wan, and those of the experts. The checks are the schema's.
"""

from collections.abc import Mapping
from typing import Any

from megavid.config.schema import ModelConfig, MoEConfig
from megavid.errors import ConfigError

CHOICES = {
    "family": ("wan", "wan_moe"),
    "activation": ("gelu", "swiglu"),
    "router": ("sigmoid", "softmax", "expert_choice"),
    "cross_attn_norm": (True,),
    "qk_norm": ("rms_norm_across_heads",),
    "weight_format": ("plain", "fp8_e4m3"),
}
"""Values of the keys that are names; what has one only is so in every published Wan."""


def model_of_config(config: Mapping[str, Any]) -> ModelConfig:
    """The shape that ``config.json`` describes.

    Raises:
        ConfigError: a value that the family does not have, or a shape that cannot be.
    """
    for key, choices in CHOICES.items():
        if config[key] not in choices:
            allowed = " or ".join(repr(choice) for choice in choices)
            raise ConfigError(f"config.json: {key} = {config[key]!r} must be {allowed}")
    first, second, third = config["patch_size"]
    out_channels = config["out_channels"] or config["in_channels"]
    has_image, positions = config["image_dim"] is not None, config["pos_embed_seq_len"] or 0
    image = {"image_size": config["image_dim"], "image_length": positions or 257, "image_positions": positions}
    return ModelConfig(
        family=config["family"],
        num_layers=config["num_layers"],
        hidden_size=config["num_attention_heads"] * config["attention_head_dim"],
        num_heads=config["num_attention_heads"],
        ffn_size=config["ffn_dim"],
        in_channels=config["in_channels"],
        out_channels=out_channels,
        patch_size=(first, second, third),
        text_size=config["text_dim"],
        text_length=config["text_length"],
        frequency_size=config["freq_dim"],
        norm_eps=config["eps"],
        latent_frame_rate=config["latent_frame_rate"],
        absolute_positions=config["absolute_positions"],
        task="i2v" if config["in_channels"] > 2 * out_channels else "t2v",
        **(image if has_image else {}),
        moe=_experts_of_config(config) if config["family"] == "wan_moe" else MoEConfig(),
    )


def _experts_of_config(config: Mapping[str, Any]) -> MoEConfig:
    return MoEConfig(
        num_experts=config["num_experts"],
        top_k=config["top_k"],
        expert_ffn_size=config["expert_ffn_dim"],
        shared_ffn_size=config["shared_ffn_dim"],
        activation=config["activation"],
        has_bias=config["has_bias"],
        router=config["router"],
        route_scale=config["route_scale"],
        num_groups=config["num_groups"],
        top_groups=config["top_groups"],
        dense_first=config["dense_first"],
        dense_last=config["dense_last"],
    )


def config_of_model(model: ModelConfig) -> dict[str, Any]:
    """The keys of ``config.json`` for a model of this shape."""
    moe = model.moe
    return {
        "patch_size": list(model.patch_size),
        "num_attention_heads": model.num_heads,
        "attention_head_dim": model.head_size,
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "text_dim": model.text_size,
        "freq_dim": model.frequency_size,
        "ffn_dim": model.ffn_size,
        "num_layers": model.num_layers,
        "eps": model.norm_eps,
        "image_dim": model.image_size or None,
        "added_kv_proj_dim": model.hidden_size if model.image_size else None,
        "pos_embed_seq_len": model.image_positions or None,
        "family": model.family,
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "expert_ffn_dim": moe.expert_ffn_size,
        "shared_ffn_dim": moe.shared_ffn_size,
        "activation": moe.activation,
        "has_bias": moe.has_bias,
        "router": moe.router,
        "route_scale": moe.route_scale,
        "num_groups": moe.num_groups,
        "top_groups": moe.top_groups,
        "dense_first": moe.dense_first,
        "dense_last": moe.dense_last,
        "absolute_positions": model.absolute_positions,
        "latent_frame_rate": model.latent_frame_rate,
        "text_length": model.text_length,
    }
