"""``megavid upcycle`` as people call it: a dense run becomes experts, which train on from the same loss.

Commands are forked from a process that has imported everything; one dense run is shared.
"""

import json
from pathlib import Path

import pytest
import torch

from megavid.checkpoint.convert import open_model
from megavid.cli import main
from megavid.training.metrics import read_rows
from tests.support.warm_parent import WarmParent

FLAGS = (
    "--train.global_batch_size", "2", "--data.validation_samples", "4", "--checkpoint.interval_steps", "0",
    "--optimizer.warmup_steps", "0",
)  # fmt: skip
HOW = ("--experts", "8", "--top-k", "4", "--granularity", "2")


@pytest.fixture(scope="module")
def dense(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run of three steps, with a moving average."""
    out = tmp_path_factory.mktemp("dense") / "run"
    done = warm.run("train", "tiny", "--out", str(out), *FLAGS, "--train.steps", "3", "--model.family", "wan")
    assert done.returncode == 0, done.stderr
    return out


def validated(out: Path) -> list[float]:
    """Validation loss after each step."""
    return [float(str(row["loss"])) for row in read_rows(out / "events.jsonl") if row["event"] == "validated"]


def test_an_upcycled_run_begins_with_the_dense_loss(warm: WarmParent, dense: Path, tmp_path: Path) -> None:
    done = warm.run("upcycle", str(dense), str(tmp_path / "experts"), *HOW, "--dense-first", "1")
    assert done.returncode == 0, done.stderr
    assert "moving average" in done.stdout
    assert "--train.init_from" in done.stdout
    # A rate too small to move a weight: what is validated is step 0. The batches of a step may differ, as packs are
    # filled by what clips cost in this model.
    flags = (*FLAGS, "--train.steps", "1", "--log.validation_interval_steps", "1", "--optimizer.learning_rate", "1e-30")
    losses = []
    for preset, start in ((dense / "run.toml", dense), (tmp_path / "experts/run.toml", tmp_path / "experts")):
        out = tmp_path / f"run {len(losses)}"
        done = warm.run("train", str(preset), "--out", str(out), *flags, "--train.init_from", str(start))
        assert done.returncode == 0, done.stderr
        assert "train.init_from" not in done.stdout
        losses += validated(out)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_start_with_another_route_scale_is_told(warm: WarmParent, dense: Path, tmp_path: Path) -> None:
    experts = tmp_path / "experts"
    assert warm.run("upcycle", str(dense), str(experts), *HOW).returncode == 0
    flags = (*FLAGS, "--train.steps", "1", "--train.init_from", str(experts), "--model.moe.route_scale", "1.0")
    done = warm.run("train", str(experts / "run.toml"), "--out", str(tmp_path / "run"), *flags)
    assert done.returncode == 0, done.stderr
    assert "model.moe.route_scale is 2.0 there, 1.0 here" in done.stdout


def test_every_layout_holds_the_same_model(warm: WarmParent, dense: Path, tmp_path: Path) -> None:
    for to in ("megavid", "diffusers"):
        done = warm.run("upcycle", str(dense), str(tmp_path / to), *HOW, "--to", to, "--weights", "model")
        assert done.returncode == 0, done.stderr
        assert "moving average" not in done.stdout
    one, other = open_model(tmp_path / "megavid"), open_model(tmp_path / "diffusers")
    assert one.config == other.config
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor.read(), other.tensors[name].read()), name
    config = json.loads((tmp_path / "diffusers" / "config.json").read_text())
    assert (config["_class_name"], config["route_scale"]) == ("MegavidTransformer3DModel", 2.0)
    whole = open_model(dense).tensors["blocks.3.ffn.down.weight"].read()
    parts = [one.tensors[f"blocks.3.moe.experts.{expert}.down.weight"].read() for expert in (6, 7)]
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("SRC",), "two folders are needed, DENSE and DST; got 1: SRC"),
        (("SRC", "DST", "--experts", "8", "--top-k", "4"), "--granularity is missing"),
        (("SRC", "DST", *HOW, "--nosie", "1"), "unknown argument --nosie"),
        (("SRC", "DST", *HOW, "--to", "original"), "--to original must be one of megavid, diffusers"),
        (("SRC", "DST", *HOW, "--weights", "best"), "--weights best must be one of ema, model"),
        (("SRC", "DST", *HOW, "--max-shard-size", "5XB"), "--max-shard-size 5XB must be a size"),
        (("SRC", "DST", *HOW), "SRC does not exist"),
    ],
)
def test_bad_arguments_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main.main(["upcycle", *arguments]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("megavid: error: ")
    assert message in stderr
    assert stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_refused_upcycling_writes_nothing(warm: WarmParent, dense: Path, tmp_path: Path) -> None:
    how = ("--experts", "8", "--top-k", "3", "--granularity", "2")
    done = warm.run("upcycle", str(dense), str(tmp_path / "experts"), *how)
    assert done.returncode == 2
    assert "--top-k 3 must be a multiple of --granularity 2" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["upcycle", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--experts", "--top-k", "--granularity", "--router", "--dense-first", "--noise", "--to"):
        assert option in text
