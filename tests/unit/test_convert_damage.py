"""A source that is not whole, or not what it says: named, refused, and nothing is written."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megavid.checkpoint.convert import open_model, write_model
from megavid.errors import CheckpointError, ConfigError
from megavid.inference import MegavidTransformer3DModel
from tests.support.tiny_world import tiny_config
from tests.support.wan_folders import edit_tensors, save_wan

FILE = "diffusion_pytorch_model.safetensors"
NAME = "blocks.1.attn2.to_k.weight"


def refused(src: Path, dst: Path, match: str, to: str = "megavid") -> None:
    """Converting fails with ``match`` and leaves no trace."""
    before = sorted(dst.parent.iterdir())
    with pytest.raises(CheckpointError, match=match):
        write_model(open_model(src), dst, to=to)
    assert sorted(dst.parent.iterdir()) == before


def edited(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    src = save_wan(tmp_path / "src")
    edit_tensors(src / FILE, change)
    return src


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    src = edited(tmp_path, lambda tensors: tensors.pop(NAME))
    refused(src, tmp_path / "dst", f"missing: {NAME}")


@pytest.mark.parametrize("name", ["experts.up.weight", "experts.down.bias"])
def test_missing_expert_is_named(tmp_path: Path, name: str) -> None:
    src, stack = tmp_path / "src", f"blocks.1.ffn.{name}"
    MegavidTransformer3DModel.of_model(tiny_config("wan_moe").model).save_pretrained(src)
    edit_tensors(src / FILE, lambda tensors: tensors.update({stack: tensors[stack][:-1].contiguous()}))
    refused(src, tmp_path / "dst", stack)


def test_checkpoint_without_one_expert_is_refused(tmp_path: Path) -> None:
    src = tmp_path / "src"
    MegavidTransformer3DModel.of_model(tiny_config("wan_moe").model).save_pretrained(src)
    source, name = open_model(src), "blocks.2.moe.experts.3.down.weight"
    rest = {key: tensor for key, tensor in source.tensors.items() if key != name}
    for to in ("megavid", "diffusers"):
        with pytest.raises(CheckpointError, match=name):
            write_model(replace(source, tensors=rest), tmp_path / "dst", to=to)
    assert sorted(tmp_path.iterdir()) == [src]


def test_renamed_tensor_is_named_with_what_it_may_be(tmp_path: Path) -> None:
    src = edited(tmp_path, lambda tensors: tensors.update({"blocks.1.attn2.to_kk.weight": tensors.pop(NAME)}))
    refused(src, tmp_path / "dst", rf"missing: {NAME} \(is it blocks.1.attn2.to_kk.weight\?\); unexpected: .*to_kk")


def test_unexpected_tensor_is_named(tmp_path: Path) -> None:
    src = edited(tmp_path, lambda tensors: tensors.update({"lora.up": torch.zeros(2)}))
    refused(src, tmp_path / "dst", "unexpected: lora.up")


def test_every_wrong_tensor_is_listed(tmp_path: Path) -> None:
    src = edited(tmp_path, lambda tensors: (tensors.pop(NAME), tensors.pop("proj_out.bias")))
    refused(src, tmp_path / "dst", f"missing: {NAME}, proj_out.bias")


def test_other_shape_is_named(tmp_path: Path) -> None:
    src = edited(tmp_path, lambda tensors: tensors.update({NAME: tensors[NAME][:-1].contiguous()}))
    refused(src, tmp_path / "dst", rf"{NAME} has shape \[47, 48\], expected \[48, 48\]")


def test_transposed_matrix_is_named(tmp_path: Path) -> None:
    name = "blocks.0.ffn.net.2.weight"
    src = edited(tmp_path, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    refused(src, tmp_path / "dst", rf"{name} has shape \[96, 48\], expected \[48, 96\]")


@pytest.mark.parametrize("cut", [1, 100, 200_000])
def test_truncated_file_is_named(tmp_path: Path, cut: int) -> None:
    src = save_wan(tmp_path / "src")
    size = (src / FILE).stat().st_size
    os.truncate(src / FILE, size - cut)
    refused(src, tmp_path / "dst", rf"{FILE} has {size - cut} bytes and ends within tensor \S+, .* cut off")


def test_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src")
    source = open_model(src)
    os.truncate(src / FILE, (src / FILE).stat().st_size - 10)
    with pytest.raises(CheckpointError, match=f"{FILE} ends 10 bytes early"):
        write_model(source, tmp_path / "dst", to="megavid")
    assert sorted(os.listdir(tmp_path)) == ["src"]


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src", shard="100KB")
    shard = sorted(src.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 8)
    refused(src, tmp_path / "dst", rf"{shard.name} .* ends within tensor")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src", shard="100KB")
    shard = sorted(src.glob("*.safetensors"))[1]
    shard.unlink()
    refused(src, tmp_path / "dst", f"{shard.name} is missing")


def test_index_of_another_model_is_refused(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src", shard="100KB")
    (path,) = src.glob("*.index.json")
    index = json.loads(path.read_text())
    index["weight_map"]["ghost.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    refused(src, tmp_path / "dst", "ghost.weight is in the index but in no file")


def test_file_with_a_hole_is_refused(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src")
    content = (src / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[NAME]["data_offsets"][0] += 4
    text = json.dumps(header).encode()
    (src / FILE).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    refused(src, tmp_path / "dst", f"{NAME} lies at bytes")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("qk_norm", "rms_norm", "qk_norm = 'rms_norm', but megavid's model has 'rms_norm_across_heads' only"),
        ("window", 3, "unknown key 'window' = 3"),
        ("num_layers", 3, "missing: blocks.2"),
        ("num_layers", "two", "num_layers must be int"),
        ("_class_name", "WanVACETransformer3DModel", "is of a WanVACETransformer3DModel"),
    ],
)
def test_config_that_says_otherwise_is_refused(tmp_path: Path, key: str, value: object, match: str) -> None:
    src = save_wan(tmp_path / "src")
    fields = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**fields, key: value}))
    refused(src, tmp_path / "dst", match)


def test_a_short_text_beside_a_picture_is_not_written_for_classes_that_have_no_word_for_it(tmp_path: Path) -> None:
    source = open_model(save_wan(tmp_path / "src", "i2v of 2.1", image_dim=1280))
    short = replace(source, run=replace(source.run, model=replace(source.config, text_length=77)))
    with pytest.raises(ConfigError, match="no image branch beside text_length = 77, only beside 512; use --to diff"):
        write_model(short, tmp_path / "dst", to="original")
    write_model(short, tmp_path / "dst", to="diffusers")
    assert json.loads((tmp_path / "dst/config.json").read_text())["_class_name"] == "MegavidTransformer3DModel"


def flip(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("to", ["diffusers", "original"])
def test_changed_bytes_of_a_converted_folder_are_named(tmp_path: Path, to: str) -> None:
    src = save_wan(tmp_path / "src")
    write_model(open_model(src), tmp_path / "one", to=to)
    flip(tmp_path / "one" / FILE, (tmp_path / "one" / FILE).stat().st_size - 2)
    name = "proj_out" if to == "diffusers" else "head.head"
    refused(tmp_path / "one", tmp_path / "dst", rf"tensor {name}\S* has SHA-256 .* its conversion.json says")


def test_changed_hash_is_named(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src")
    write_model(open_model(src), tmp_path / "one", to="diffusers")
    path = tmp_path / "one" / "conversion.json"
    record = json.loads(path.read_text())
    digest = record["target"]["tensors"][NAME][2]
    path.write_text(path.read_text().replace(digest, "0" * 64))
    refused(tmp_path / "one", tmp_path / "dst", "do not add up")


def test_changed_bytes_of_a_checkpoint_are_refused(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src")
    write_model(open_model(src), tmp_path / "one", to="megavid")
    flip(tmp_path / "one" / "rank_00000.safetensors", -2 + (tmp_path / "one/rank_00000.safetensors").stat().st_size)
    refused(tmp_path / "one", tmp_path / "dst", "rank_00000.safetensors has SHA-256", to="diffusers")


def test_existing_target_is_refused_and_left_alone(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    with pytest.raises(ConfigError, match="dst exists; nothing is overwritten"):
        write_model(open_model(src), tmp_path / "dst", to="megavid")
    assert list((tmp_path / "dst").iterdir()) == []


def test_numbers_beyond_fp16_are_named(tmp_path: Path) -> None:
    src = edited(tmp_path, lambda tensors: tensors[NAME].view(-1)[5].fill_(1e6))
    with pytest.raises(CheckpointError, match=r"cross_attention.k.weight has numbers beyond fp16's 65,504"):
        write_model(open_model(src), tmp_path / "dst", to="megavid", dtype=torch.float16)
    assert sorted(os.listdir(tmp_path)) == ["src"]


def test_pickles_are_never_read(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src")
    (src / FILE).rename(src / "diffusion_pytorch_model.bin")
    refused(src, tmp_path / "dst", "is a pickle, which is never read")
