"""Folders of tiny Wan transformers with random weights, made by diffusers' own class, for every variant there is."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

TINY: dict[str, Any] = {
    "num_attention_heads": 4, "attention_head_dim": 12, "text_dim": 8, "freq_dim": 16, "ffn_dim": 96, "num_layers": 2,
}  # fmt: skip
IMAGE = {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 48}
VARIANTS: dict[str, dict[str, Any]] = {
    "t2v": {},
    "i2v of 2.1": IMAGE,
    "first-last-frame": {**IMAGE, "pos_embed_seq_len": 514},
    "i2v of 2.2": {"in_channels": 36},
    "ti2v": {"in_channels": 48, "out_channels": 48},
    "patches of 2 frames": {"patch_size": (2, 2, 1), "in_channels": 6, "out_channels": 6},
}
"""What diffusers' class is given, by variant."""


def tiny_wan(variant: str = "t2v", seed: int = 0, **options: Any) -> WanTransformer3DModel:
    """A model with random numbers in every tensor, those that begin at zero or one too; ``options`` override."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = WanTransformer3DModel(**{**TINY, **VARIANTS[variant], **options})
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def save_wan(
    folder: Path, variant: str = "t2v", *, dtype: torch.dtype = torch.float32, shard: str = "10GB", **options: Any
) -> Path:
    """diffusers' own folder of ``tiny_wan``."""
    tiny_wan(variant, **options).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_files(got: Path, want: Path) -> None:
    """Both folders hold the same tensors, bitwise, and their configs say the same."""
    one, other = tensors_in(got), tensors_in(want)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name
    assert config_in(got) == config_in(want)


def config_in(folder: Path) -> dict[str, Any]:
    """config.json without the notes of its writer."""
    fields = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in fields.items() if not key.startswith("_") or key == "_class_name"}


def edit_tensors(file: Path, change: Any) -> None:
    """Write a safetensors file anew, its tensors changed in place by ``change``; its metadata stays."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata)
