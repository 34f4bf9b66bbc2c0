"""Every layout there and back, for every variant that diffusers' own class has: tensors bitwise, configs equal."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from megavid.checkpoint.convert import open_model, write_model
from tests.support.wan_folders import VARIANTS, assert_same_files, save_wan, tensors_in, tiny_wan


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_diffusers_to_megavid_and_back_is_bitwise(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    save_wan(tmp_path / "a", variant, dtype=dtype)
    write_model(open_model(tmp_path / "a"), tmp_path / "b", to="megavid")
    write_model(open_model(tmp_path / "b"), tmp_path / "c", to="diffusers")
    assert_same_files(tmp_path / "c", tmp_path / "a")


@pytest.mark.parametrize("variant", VARIANTS)
def test_original_names_are_those_that_diffusers_renames(tmp_path: Path, variant: str) -> None:
    """Not our tables backwards: diffusers' own reader of the original files gives the tensors that were converted."""
    # The original class knows image features of one width only.
    width = {"image_dim": 1280} if "image_dim" in VARIANTS[variant] else {}
    wanted = tiny_wan(variant, **width).state_dict()
    write_model(open_model(save_wan(tmp_path / "a", variant, **width)), tmp_path / "b", to="original")
    got = convert_wan_transformer_to_diffusers(tensors_in(tmp_path / "b"))
    if variant == "first-last-frame":  # the one name that diffusers' reader leaves as it is
        got["condition_embedder.image_embedder.pos_embed"] = got.pop("img_emb.emb_pos")
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


def test_diffusers_loads_what_was_written(tmp_path: Path) -> None:
    save_wan(tmp_path / "a", "i2v of 2.1", shard="100KB")
    write_model(open_model(tmp_path / "a"), tmp_path / "b", to="diffusers", max_shard_bytes=100_000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "b").state_dict()
    for name, tensor in tiny_wan("i2v of 2.1").state_dict().items():
        assert torch.equal(loaded[name], tensor), name
