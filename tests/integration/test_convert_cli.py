"""``megavid convert`` as people call it: what it prints, where it ends, and what can be done with the result."""

from pathlib import Path

import pytest

from megavid.checkpoint.convert import open_model
from megavid.cli import convert_verify, main
from tests.support.wan_folders import assert_same_files, edit_tensors, save_wan
from tests.support.warm_parent import WarmParent


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer in diffusers' layout."""
    return save_wan(tmp_path_factory.mktemp("wan") / "transformer")


def test_a_model_is_verified_block_by_block_and_comes_back_as_it_was(
    wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["convert", str(wan), str(tmp_path / "in"), "--to", "megavid", "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == ["place", "block 0", "block 1", "velocity"]
    assert all(float(line.split()[-1]) < 1e-5 for line in lines[1:-1])
    assert lines[-1].startswith(f"wrote {tmp_path / 'in'}: ")
    for src, dst in (("in", "original"), ("original", "diffusers")):
        assert main.main(["convert", str(tmp_path / src), str(tmp_path / dst), "--to", dst]) == 0
    assert_same_files(tmp_path / "diffusers", wan)


def test_a_model_that_computes_something_else_does_not_appear(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_wan(tmp_path / "other")
    file = other / "diffusion_pytorch_model.safetensors"
    edit_tensors(file, lambda tensors: tensors["blocks.1.attn1.to_v.weight"].mul_(1.01))
    load_served = convert_verify.load_served
    monkeypatch.setattr(convert_verify, "load_served", lambda source: load_served(open_model(other)))
    assert main.main(["convert", str(wan), str(tmp_path / "dst"), "--to", "megavid", "--verify"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megavid: error:")]
    assert "--verify: the models differ from block 1 on" in line
    assert list(tmp_path.iterdir()) == [other]


def test_what_cannot_be_is_one_line_and_writes_nothing(warm: WarmParent, wan: Path, tmp_path: Path) -> None:
    save_wan(tmp_path / "deeper", num_layers=3)
    pair = ("--to", "diffusers", "--second", str(tmp_path / "deeper"), "--boundary", "0.9")
    for arguments, said in (
        (pair, "the two experts are different models: num_layers = 2 in"),
        (("--to", "diffusers", "--boundary", "0.9"), "stands between two experts"),
        (("--to", "original", "--verify", "--optimizer"), "--optimizer goes from megavid to megavid only"),
    ):
        refused = warm.run("convert", str(wan), str(tmp_path / "dst"), *arguments)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert said in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["deeper"]


def test_converted_weights_say_what_it_takes_to_sample_them(warm: WarmParent, wan: Path, tmp_path: Path) -> None:
    assert warm.run("convert", str(wan), str(tmp_path / "dst"), "--to", "megavid").returncode == 0
    done = warm.run("sample", str(tmp_path / "dst"), "--prompt", "x", "--out", str(tmp_path / "x.mp4"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "carries no sampling.json" in done.stderr
    assert f"megavid convert {tmp_path / 'dst'} DST --to diffusers --pipeline BASE" in done.stderr
