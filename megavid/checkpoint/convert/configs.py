"""``config.json`` of a model in another layout, and the ``ModelConfig`` that says the same.

Owns both directions for diffusers' WanTransformer3DModel, our inference class and the original Wan repositories. A key
that is not known here is refused: a setting that is not converted would be lost without a word.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megavid import __version__
from megavid.checkpoint.convert.lazy import LazyTensor
from megavid.config.load import from_table
from megavid.config.schema import ModelConfig
from megavid.errors import CheckpointError, ConfigError

Layout = Literal["diffusers", "inference", "original", "megavid"]
"""How weights are named and laid out on disk."""

CLASSES: dict[str, Layout] = {
    "WanTransformer3DModel": "diffusers",
    "MegavidTransformer3DModel": "inference",
    "WanModel": "original",
}
"""``_class_name`` of a config.json, and whose it is."""

_ROPE_LENGTH = 1024
_QK_NORM = "rms_norm_across_heads"
_IMAGE_LENGTH = 257  # tokens of one picture
_TEXT_LENGTH = 512  # beside an image branch the classes of others take all but the last 512 tokens for the picture
_FRAME_RATES = {"ti2v": 6.0}  # Wan 2.2's 5B model is of 24 frames a second, all others of 16; 4 in a latent frame
_ORIGINAL_IMAGE_SIZE = 1280
_ORIGINAL_TEXT_SIZE = 4096

_DIFFUSERS_DEFAULTS: dict[str, Any] = {
    "patch_size": [1, 2, 2], "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824, "num_layers": 40, "cross_attn_norm": True,
    "qk_norm": _QK_NORM, "eps": 1e-6, "image_dim": None, "added_kv_proj_dim": None, "rope_max_seq_len": _ROPE_LENGTH,
    "pos_embed_seq_len": None,
}  # fmt: skip
"""Every key of diffusers' class, with what the class takes where it is not given."""
_INFERENCE_DEFAULTS: dict[str, Any] = {
    **_DIFFUSERS_DEFAULTS, "family": "wan_moe", "num_experts": 8, "top_k": 2, "expert_ffn_dim": 256,
    "shared_ffn_dim": 0, "activation": "gelu", "has_bias": True, "router": "sigmoid", "route_scale": 1.0,
    "num_groups": 1, "top_groups": 1, "dense_first": 1, "dense_last": 1, "absolute_positions": False,
    "latent_frame_rate": 4.0, "text_length": 512, "weight_format": "plain",
}  # fmt: skip
_ORIGINAL_DEFAULTS: dict[str, Any] = {
    "model_type": "t2v", "patch_size": [1, 2, 2], "text_len": 512, "in_dim": 16, "dim": 2048, "ffn_dim": 8192,
    "freq_dim": 256, "text_dim": 4096, "out_dim": 16, "num_heads": 16, "num_layers": 32, "window_size": [-1, -1],
    "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip

_EXPERTS: dict[str, str] = {
    "num_experts": "num_experts", "top_k": "top_k", "expert_ffn_dim": "expert_ffn_size",
    "shared_ffn_dim": "shared_ffn_size", "activation": "activation", "has_bias": "has_bias", "router": "router",
    "route_scale": "route_scale", "num_groups": "num_groups", "top_groups": "top_groups", "dense_first": "dense_first",
    "dense_last": "dense_last",
}  # fmt: skip
"""Keys of the inference class for experts, and their names in ``model.moe``."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a config.json does not say of a model, as a conversion.json beside it does; ``table`` is its ModelConfig."""

    table: Mapping[str, Any]

    def get(self, key: str, default: Any) -> Any:
        """The recorded value of a key of ``model``, or ``default``."""
        return self.table.get(key, default)


def layout_of_class(fields: Mapping[str, Any], where: str) -> Layout:
    """Whose config.json this is.

    Raises:
        CheckpointError: of a class that is not converted.
    """
    name = fields.get("_class_name", "WanModel" if "dim" in fields else None)
    if not isinstance(name, str) or name not in CLASSES:
        raise CheckpointError(f"{where} is of a {name}; convert reads {', '.join(CLASSES)}")
    return CLASSES[name]


def model_of(
    fields: Mapping[str, Any], tensors: Mapping[str, LazyTensor], recorded: Recorded, where: str
) -> ModelConfig:
    """The model that a config.json describes.

    Args:
        fields: its content.
        tensors: of the source; the original files leave sizes to their tensors' shapes.
        recorded: what an earlier conversion wrote down.
        where: the file, for messages.

    Raises:
        CheckpointError: a key is unknown, or says something that megavid's model is not.
    """
    layout = layout_of_class(fields, where)
    try:
        if layout == "original":
            return _of_original(fields, tensors, recorded, where)
        return _of_diffusers(fields, recorded, where, is_inference=layout == "inference")
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def beyond_wan(model: ModelConfig) -> str:
    """What the model has that neither diffusers' class nor the original one has; "" for nothing."""
    if model.family != "wan":
        return "experts"
    if model.absolute_positions:
        return "absolute_positions"
    if model.image_size and model.text_length != _TEXT_LENGTH:
        return f"image branch beside text_length = {model.text_length}, only beside {_TEXT_LENGTH}"
    return ""


def config_json(model: ModelConfig, layout: Layout) -> dict[str, Any]:
    """The config.json of ``model`` in a layout.

    Raises:
        ConfigError: the layout has no such model.
    """
    if layout == "original":
        return _original_json(model)
    diffusers = _diffusers_json(model)
    if layout == "diffusers":
        if what := beyond_wan(model):
            raise ConfigError(f"diffusers' WanTransformer3DModel has no {what}; the inference class has")
        return diffusers
    experts = asdict(model.moe)
    moe = {key: experts[name] for key, name in _EXPERTS.items()}
    return {
        **diffusers,
        "_class_name": "MegavidTransformer3DModel",
        "family": model.family,
        **moe,
        "absolute_positions": model.absolute_positions,
        "latent_frame_rate": model.latent_frame_rate,
        "text_length": model.text_length,
    }


# diffusers' and ours


def _of_diffusers(fields: Mapping[str, Any], recorded: Recorded, where: str, *, is_inference: bool) -> ModelConfig:
    given = _complete(fields, _INFERENCE_DEFAULTS if is_inference else _DIFFUSERS_DEFAULTS, where)
    width = given["num_attention_heads"] * given["attention_head_dim"]
    image_size, positions = given["image_dim"] or 0, given["pos_embed_seq_len"] or 0
    _require(given, where, cross_attn_norm=True, qk_norm=_QK_NORM, rope_max_seq_len=_ROPE_LENGTH)
    _require(given, where, added_kv_proj_dim=width if image_size else None)
    out_channels = given["out_channels"] or given["in_channels"]
    task = recorded.get("task", _task(given["in_channels"], out_channels))
    table: dict[str, Any] = {
        "family": "wan",
        "num_layers": given["num_layers"],
        "hidden_size": width,
        "num_heads": given["num_attention_heads"],
        "ffn_size": given["ffn_dim"],
        "in_channels": given["in_channels"],
        "out_channels": out_channels,
        "patch_size": given["patch_size"],
        "text_size": given["text_dim"],
        "text_length": recorded.get("text_length", 512),
        "frequency_size": given["freq_dim"],
        "norm_eps": given["eps"],
        "latent_frame_rate": recorded.get("latent_frame_rate", _FRAME_RATES.get(task, 4.0)),
        "task": task,
        "image_size": image_size,
    }
    if image_size:
        length = positions or recorded.get("image_length", _IMAGE_LENGTH)
        table |= {"image_length": length, "image_positions": positions}
    if is_inference:
        _require(given, where, weight_format="plain")
        table |= {key: given[key] for key in ("family", "absolute_positions", "latent_frame_rate", "text_length")}
        table["moe"] = {**recorded.get("moe", {}), **{name: given[key] for key, name in _EXPERTS.items()}}
    return from_table(ModelConfig, table, where)


def _diffusers_json(model: ModelConfig) -> dict[str, Any]:
    return {
        "_class_name": "WanTransformer3DModel",
        "_megavid_version": __version__,
        "added_kv_proj_dim": model.hidden_size if model.image_size else None,
        "attention_head_dim": model.head_size,
        "cross_attn_norm": True,
        "eps": model.norm_eps,
        "ffn_dim": model.ffn_size,
        "freq_dim": model.frequency_size,
        "image_dim": model.image_size or None,
        "in_channels": model.in_channels,
        "num_attention_heads": model.num_heads,
        "num_layers": model.num_layers,
        "out_channels": model.out_channels,
        "patch_size": list(model.patch_size),
        "pos_embed_seq_len": model.image_positions or None,
        "qk_norm": _QK_NORM,
        "rope_max_seq_len": _ROPE_LENGTH,
        "text_dim": model.text_size,
    }


def _task(in_channels: int, out_channels: int) -> str:
    """What a model without further word is for: Wan's own shapes tell."""
    if in_channels != out_channels:
        return "i2v"
    return "ti2v" if in_channels == 48 else "t2v"


# The original files


def _of_original(
    fields: Mapping[str, Any], tensors: Mapping[str, LazyTensor], recorded: Recorded, where: str
) -> ModelConfig:
    given = _complete(fields, _ORIGINAL_DEFAULTS, where)
    _require(given, where, qk_norm=True, cross_attn_norm=True, window_size=[-1, -1])
    kind = given["model_type"]
    if kind not in ("t2v", "i2v", "ti2v", "flf2v"):
        raise CheckpointError(f"{where}: model_type = {kind!r} is not converted; t2v, i2v, flf2v and ti2v are")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    # Sizes that the makers leave out of their config; Wan 2.2's image-to-video has no image branch under the same name.
    image = shapes.get("img_emb.proj.0.weight", (0,))[0]
    positions = shapes.get("img_emb.emb_pos", (1, 0))[1]
    patch = shapes.get("patch_embedding.weight", (0, 0, *given["patch_size"]))[2:]
    table: dict[str, Any] = {
        "family": "wan",
        "num_layers": given["num_layers"],
        "hidden_size": given["dim"],
        "num_heads": given["num_heads"],
        "ffn_size": given["ffn_dim"],
        "in_channels": given["in_dim"],
        "out_channels": given["out_dim"],
        "patch_size": list(patch) if len(patch) == 3 else given["patch_size"],
        "text_size": shapes.get("text_embedding.0.weight", (0, given["text_dim"]))[-1],
        "text_length": given["text_len"],
        "frequency_size": given["freq_dim"],
        "norm_eps": given["eps"],
        "latent_frame_rate": recorded.get("latent_frame_rate", _FRAME_RATES.get(kind, 4.0)),
        "task": "i2v" if kind == "flf2v" else kind,
        "image_size": image,
    }
    if image:
        table |= {"image_length": positions or _IMAGE_LENGTH, "image_positions": positions}
    return from_table(ModelConfig, table, where)


def _original_json(model: ModelConfig) -> dict[str, Any]:
    if what := beyond_wan(model):
        raise ConfigError(
            f"--to original: the original layout holds dense Wan models, it has no {what}; use --to diffusers"
        )
    if model.image_size not in (0, _ORIGINAL_IMAGE_SIZE):
        raise ConfigError(
            f"--to original: model.image_size = {model.image_size}, but the original class has "
            f"{_ORIGINAL_IMAGE_SIZE} only"
        )
    given: dict[str, Any] = {}
    if model.text_size != _ORIGINAL_TEXT_SIZE:
        given["text_dim"] = model.text_size
    if model.patch_size != (1, 2, 2):
        given["patch_size"] = list(model.patch_size)
    return {
        "_class_name": "WanModel",
        "_megavid_version": __version__,
        "dim": model.hidden_size,
        "eps": model.norm_eps,
        "ffn_dim": model.ffn_size,
        "freq_dim": model.frequency_size,
        "in_dim": model.in_channels,
        "model_type": "flf2v" if model.image_positions else model.task,
        "num_heads": model.num_heads,
        "num_layers": model.num_layers,
        "out_dim": model.out_channels,
        "text_len": model.text_length,
        **given,
    }


# Checks


def _complete(fields: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys of ``fields`` over the defaults; keys that begin with _ are notes of the writer."""
    unknown = [key for key in fields if key not in defaults and not key.startswith("_")]
    if unknown:
        near = difflib.get_close_matches(unknown[0], defaults, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CheckpointError(
            f"{where}: unknown key {unknown[0]!r} = {fields[unknown[0]]!r}, so it would be lost{hint}"
        )
    return {key: fields.get(key, default) for key, default in defaults.items()}


def _require(given: Mapping[str, Any], where: str, **wanted: Any) -> None:
    for key, value in wanted.items():
        got = list(given[key]) if isinstance(given[key], tuple) else given[key]
        if got != value:
            raise CheckpointError(f"{where}: {key} = {got!r}, but megavid's model has {value!r} only")
