"""Adapters that diffusers and PEFT made, merged by us and by them; and those that cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from megavid.checkpoint.convert import adapter
from megavid.checkpoint.convert.adapter import ADAPTER, open_adapter
from megavid.checkpoint.convert.job import ConvertJob, ConvertRequest
from megavid.checkpoint.convert.source import open_model
from megavid.checkpoint.convert.write import write_model
from megavid.cli.convert import main
from megavid.errors import CheckpointError, ConfigError
from tests.support.adapter_run import adapter_run
from tests.support.wan_folders import edit_tensors, save_wan, tensors_in, tiny_wan

MODULES = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "ffn.net.0.proj", "ffn.net.2"]


def adapted(folder: Path, variant: str = "t2v", **options: Any) -> Any:
    """A model of diffusers with a random adapter, which is saved in ``folder`` by its own method."""
    torch.manual_seed(5)
    model = tiny_wan(variant)
    config = {"r": 4, "lora_alpha": 6, "target_modules": MODULES, **options}
    model.add_adapter(LoraConfig(**config), adapter_name="style")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_lora_adapter(str(folder), adapter_name="style")
    return model


@pytest.mark.parametrize(
    ("variant", "options", "factor"),
    [
        ("t2v", {}, 1.0),
        ("i2v of 2.1", {}, 0.5),
        (
            "t2v",
            {"use_rslora": True, "alpha_pattern": {"attn1.to_q": 3, "to_q": 9}, "rank_pattern": {"ffn.net.2": 2}},
            1.0,
        ),
    ],
)
def test_merging_gives_what_diffusers_fuses(
    tmp_path: Path, variant: str, options: dict[str, Any], factor: float
) -> None:
    save_wan(tmp_path / "base", variant)
    model = adapted(tmp_path / "adapter", variant, **options)
    request = ConvertRequest(
        tmp_path / "base", tmp_path / "out", "diffusers", lora=str(tmp_path / "adapter"), lora_scale=factor
    )
    ConvertJob.of(request).run()
    model.fuse_lora(lora_scale=factor)
    model.unload_lora()
    got, want, base = tensors_in(tmp_path / "out"), model.state_dict(), tensors_in(tmp_path / "base")
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-6, atol=1e-6)
    changed = {name for name in got if not torch.equal(got[name], base[name])}
    assert changed == {name for name in base if name.endswith(tuple(f"{module}.weight" for module in MODULES))}
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert any("lora_A" in name for name in record["source"]["tensors"])


def test_a_file_without_metadata_has_scale_one_or_its_own_alpha(tmp_path: Path) -> None:
    save_wan(tmp_path / "base")
    adapted(tmp_path)
    file = tmp_path / ADAPTER
    tensors = {f"transformer.{name}": tensor for name, tensor in load_file(file).items()}
    tensors["transformer.blocks.1.attn2.to_v.alpha"] = torch.tensor(2.0)
    save_file(tensors, file)
    pairs = open_adapter(file, open_model(tmp_path / "base").config).pairs
    assert {name: pair.scale for name, pair in pairs.items() if pair.scale != 1.0} == {
        "blocks.1.cross_attention.v": 0.5
    }


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["blocks.0.attn1.to_x.lora_A.weight"] = tensors.pop("blocks.0.attn1.to_q.lora_A.weight")


def lose_b(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["blocks.0.attn1.to_q.lora_B.weight"]


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors["blocks.0.attn1.to_q.lora_A.weight"] = torch.zeros(4, 7)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (rename, "blocks.0.attn1.to_"),
        (lose_b, r"attn1.to_q.lora_A.weight but no .*to_q.lora_B"),
        (narrow, r"attn1.to_q has A \[4, 7\]"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "tensor extra"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(tmp_path: Path, change: Any, told: str) -> None:
    save_wan(tmp_path / "base")
    adapted(tmp_path)
    edit_tensors(tmp_path / ADAPTER, change)
    with pytest.raises(CheckpointError, match=told):
        ConvertJob.of(ConvertRequest(tmp_path / "base", tmp_path / "out", "megavid", lora=str(tmp_path)))
    assert not (tmp_path / "out").exists()


def exported(tmp_path: Path, *args: str) -> Path:
    """What ``convert --to lora`` makes of a run of adapters."""
    assert main([str(tmp_path / "run"), str(tmp_path / "lora"), "--to", "lora", *args]) == 0
    return tmp_path / "lora" / ADAPTER


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A checkpoint of a run of adapters without a moving average."""
    write_model(open_model(save_wan(tmp_path / "src")), tmp_path / "base", to="megavid")
    return adapter_run(tmp_path / "run" / "checkpoints", tmp_path / "base")


def test_damaged_adapters_of_a_run_are_not_exported(tmp_path: Path, run: Path) -> None:
    (file,) = run.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=file.name):
        exported(tmp_path)
    assert not (tmp_path / "lora").exists()


def test_a_killed_export_leaves_nothing_that_stands_in_the_way(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(adapter, "replace_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            exported(tmp_path)
    assert open_adapter(exported(tmp_path), open_model(tmp_path / "base").config).pairs
    assert sorted(path.name for path in tmp_path.glob("lora*")) == ["lora"]
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [ADAPTER]


def test_an_average_that_a_run_of_adapters_has_not_is_one_line(tmp_path: Path, run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no moving average \(optimizer\.ema_decay = 0\)"):
        exported(tmp_path, "--ema")


def test_other_kinds_of_adapters_and_options_that_do_nothing_are_refused(tmp_path: Path) -> None:
    save_wan(tmp_path / "base")
    adapted(tmp_path, use_dora=True)
    with pytest.raises(CheckpointError, match="use_dora"):
        ConvertJob.of(ConvertRequest(tmp_path / "base", tmp_path / "out", "megavid", lora=str(tmp_path)))
    with pytest.raises(ConfigError, match="--lora-scale 2 needs --lora"):
        ConvertJob.of(ConvertRequest(tmp_path / "base", tmp_path / "out", "megavid", lora_scale=2.0))
