"""Adapters as people train, resume, sample, convert and serve them, from one base of two steps."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from megavid.checkpoint.convert.adapter import ADAPTER, PREFIX
from megavid.training.metrics import read_rows
from megavid.training.plots import column
from tests.support.tiny_run import TINY
from tests.support.warm_parent import Command, WarmParent

DENSE = (
    "train", "tiny", *TINY, "--model.family", "wan", "--model.absolute_positions", "false", "--train.steps", "4",
    "--train.global_batch_size", "2", "--checkpoint.interval_steps", "2",
)  # fmt: skip
LORA = ("--lora.rank", "4", "--lora.alpha", "8", "--optimizer.learning_rate", "0.01")
TENSOR = ("--ranks", "2", "--parallel.tensor", "2")


@pytest.fixture(scope="module")
def base(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run of two steps of four."""
    out = tmp_path_factory.mktemp("lora") / "base"
    assert warm.run(*DENSE, "--out", str(out), "--train.stop_at_step", "2").returncode == 0
    return out


def adapt(warm: WarmParent, out: Path, base: Path, *args: str) -> Command:
    return warm.run(*DENSE, "--out", str(out), *LORA, "--train.init_from", str(base), *args)


@pytest.fixture(scope="module")
def run(warm: WarmParent, base: Path) -> Path:
    """A run of four steps of adapters on two ranks, stopped once on the way."""
    out = base.parent / "run"
    for stop in ("2", "0"):
        done = adapt(warm, out, base, *TENSOR, "--train.stop_at_step", stop)
        assert done.returncode == 0, done.stderr
    return out


def losses(out: Path) -> list[float]:
    return column(read_rows(out / "metrics.jsonl"), "loss")[1]


def assert_refused(done: Command, *words: str) -> None:
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("megavid: error: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def test_a_run_that_stopped_goes_on_as_if_it_had_not(warm: WarmParent, base: Path, run: Path) -> None:
    straight = base.parent / "straight"
    assert adapt(warm, straight, base, *TENSOR).returncode == 0
    assert losses(straight) == losses(run)
    assert len(losses(run)) == 4
    one, other = (load_file(folder / ADAPTER) for folder in (straight, run))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert set(one) == {name for name in one if name.startswith(PREFIX)}


def test_a_checkpoint_holds_adapters_and_names_its_base(base: Path, run: Path) -> None:
    (folder,) = (path for path in (run / "checkpoints").iterdir() if path.name.endswith("4"))
    index = json.loads((folder / "index.json").read_text())
    assert all("lora_" in name for name in index["tensors"])
    named = json.loads((folder / "base.json").read_text())
    assert named["folder"] == str((base / "checkpoints" / "step_00000002").resolve())
    assert named["weights"] == "ema"


def test_the_merged_model_is_the_base_with_the_adapter(warm: WarmParent, base: Path, run: Path, tmp_path: Path) -> None:
    for command in (
        (str(base), str(tmp_path / "base"), "--ema"),
        (str(run), str(tmp_path / "merged"), "--ema"),
        (str(tmp_path / "base"), str(tmp_path / "by_file"), "--lora", str(run), "--verify"),
    ):
        done = warm.run("convert", *command, "--to", "diffusers")
        assert done.returncode == 0, done.stderr
        assert ("adapters of 30 matrices are merged" in done.stdout) == (command[1] != str(tmp_path / "base"))
    assert warm.run("convert", str(run), str(tmp_path / "alone"), "--to", "lora", "--ema").returncode == 0
    assert (tmp_path / "alone" / ADAPTER).read_bytes() == (run / ADAPTER).read_bytes()
    torch.manual_seed(0)
    model = WanTransformer3DModel.from_pretrained(tmp_path / "base")
    given = {
        "hidden_states": torch.randn(1, model.config.in_channels, 2, 4, 4), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 8, 16),
    }  # fmt: skip
    with torch.no_grad():
        bare = model(**given).sample
        model.load_lora_adapter(str(run), weight_name=ADAPTER)
        want = model(**given).sample
        assert (want - bare).abs().max() > 1e-3 * want.abs().max()
        for folder in ("merged", "by_file"):
            got = WanTransformer3DModel.from_pretrained(tmp_path / folder)(**given).sample
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_sampling_is_that_of_the_merged_model(warm: WarmParent, run: Path, tmp_path: Path) -> None:
    assert warm.run("convert", str(run), str(tmp_path / "merged"), "--ema", "--to", "megavid").returncode == 0
    clips = []
    for folder in (run, tmp_path / "merged"):
        out = tmp_path / f"{folder.name}.mp4"
        done = warm.run("sample", str(folder), "--prompt", "a red circle", "--out", str(out), "--steps", "2")
        assert done.returncode == 0, done.stderr
        clips.append(out.read_bytes())
    assert clips[0] == clips[1]


def test_what_cannot_be_is_one_line(warm: WarmParent, base: Path, run: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert_refused(warm.run(*DENSE, *LORA, "--out", out), "lora.rank = 4 needs", "--train.init_from")
    assert_refused(warm.run(*DENSE, "--out", out, "--train.init_from", str(run)), "holds adapters only", "convert")
    assert_refused(warm.run("plan", "tiny", "--world-size", "8", "--gpu", "h100-80gb", *LORA), "lora.rank = 4")
    assert_refused(warm.run("convert", str(base), out, "--to", "lora"), "has no adapters")
    assert_refused(warm.run(*DENSE, "--out", out, "--lora.targets", "router"), "lora.targets", "self_attention")


def test_a_base_that_moved_is_found_and_another_one_is_refused(
    warm: WarmParent, base: Path, run: Path, tmp_path: Path
) -> None:
    away, out = tmp_path / "away", tmp_path / "out"
    shutil.copytree(base, away)
    assert adapt(warm, out, away, "--train.stop_at_step", "2").returncode == 0
    moved = away.rename(tmp_path / "moved")
    done = adapt(warm, out, away)
    assert_refused(done, "the model that these adapters were trained on is missing", str(away))
    assert adapt(warm, out, moved).returncode == 0
    assert losses(out) == pytest.approx(losses(run), rel=1e-5)
