"""Every layout there and back, for every variant that diffusers' own class has: tensors bitwise, configs equal."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from megavid.checkpoint.convert import open_model, write_model
from tests.support.wan_folders import VARIANTS, assert_same_files, save_wan, tiny_wan


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_diffusers_to_megavid_and_back_is_bitwise(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    save_wan(tmp_path / "a", variant, dtype=dtype)
    write_model(open_model(tmp_path / "a"), tmp_path / "b", to="megavid")
    write_model(open_model(tmp_path / "b"), tmp_path / "c", to="diffusers")
    assert_same_files(tmp_path / "c", tmp_path / "a")


def test_diffusers_loads_what_was_written(tmp_path: Path) -> None:
    save_wan(tmp_path / "a", "i2v of 2.1", shard="100KB")
    write_model(open_model(tmp_path / "a"), tmp_path / "b", to="diffusers", max_shard_bytes=100_000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "b").state_dict()
    for name, tensor in tiny_wan("i2v of 2.1").state_dict().items():
        assert torch.equal(loaded[name], tensor), name
