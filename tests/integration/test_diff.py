"""``megavid diff`` names what was altered on purpose: a weight, a latent, a choice of an expert, a gradient."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megavid.checkpoint import Checkpoint
from megavid.checkpoint.manifest import digest_text
from megavid.data.sample import Sample
from megavid.data.shard_writer import ShardWriter, write_dataset
from megavid.data.synthetic import SIZES, draw, scene_of, synthetic_captions
from megavid.data.text import SentencePieceEncoder, spec_of, train_sentencepiece
from megavid.data.tokenizer import DctTokenizer
from megavid.training.diff import parting_of
from tests.support.tiny_run import TINY
from tests.support.warm_parent import WarmParent

SHORT = (*TINY, "--train.global_batch_size", "2", "--train.steps", "4", "--checkpoint.interval_steps", "2",
         "--log.interval_steps", "1")  # fmt: skip


@pytest.fixture(scope="module")
def run(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    done = warm.run("train", "tiny", "--out", str(out), *SHORT)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_same_runs_agree(warm: WarmParent, run: Path, copy: Path) -> None:
    done = warm.run("diff", str(run), str(copy))
    assert (done.returncode, done.stderr) == (0, "")
    assert "the runs agree" in done.stdout


def alter_one_weight(folder: Path, name: str) -> None:
    """Flip a bit of the first number of a tensor, and make the hashes right again."""
    checkpoint = Checkpoint(folder)
    record = checkpoint.index.record(name)
    assert record is not None
    saved = record.boxes[0]
    content = bytearray((folder / saved.file).read_bytes())
    content[saved.start + 2] ^= 1
    (folder / saved.file).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][saved.file]["sha256"] = hashlib.sha256(content).hexdigest()
    text = (json.dumps(manifest, indent=1) + "\n").encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "manifest.sha256").write_bytes(digest_text(text))


def test_altered_weight_is_named_with_its_layer(warm: WarmParent, run: Path, copy: Path) -> None:
    alter_one_weight(copy / "checkpoints" / "step_00000002", "model/blocks.1.cross_attention.k.weight")
    done = warm.run("diff", str(run), str(copy))
    assert done.returncode == 1, done.stderr
    assert "first step  none differs" in done.stdout
    said = (
        "cause       weights: checkpoint of step 2: layer 1: model/blocks.1.cross_attention.k.weight differs in 1 of "
    )
    assert said in done.stdout
    # A run that goes on from there parts at the next step, for the same reason.
    went_on = warm.run("train", "tiny", "--out", str(copy), *SHORT, "--resume-step", "2")
    assert went_on.returncode == 0, went_on.stderr
    done = warm.run("diff", str(run), str(copy))
    assert "first step  3" in done.stdout
    assert said in done.stdout


def shards(folder: Path, altered: int = -1) -> Path:
    """Synthetic clips as shards; one latent of clip ``altered`` is another one."""
    folder.mkdir()
    tokenizer = DctTokenizer(32)
    text = SentencePieceEncoder(train_sentencepiece(synthetic_captions()[:50]), 16, 8)
    (folder / "text.model").write_bytes(text.model)
    with ShardWriter(folder, "shard_00000", tokenizer.spec) as writer:
        for index in range(12):
            scene = scene_of(1, index, SIZES[0])
            latents = tokenizer.encode(draw(scene, SIZES[0]))
            if index == altered:
                latents = latents.clone()
                latents[3, 0, 1, 2] += 1.0
            writer.add(Sample(f"clip{index}", latents, scene.caption, 4.0))
    write_dataset(folder, tokenizer.spec, spec_of(text, "text.model"), ["shard_00000"])
    return folder


def test_altered_latent_is_named_with_its_sample(warm: WarmParent, tmp_path: Path) -> None:
    outs = []
    for name, altered in (("sound", -1), ("altered", 5)):
        data = shards(tmp_path / f"{name}_shards", altered)
        outs.append(tmp_path / name)
        done = warm.run(
            "train", "tiny", "--out", str(outs[-1]), *SHORT, "--data.kind", "shards", "--data.path", str(data),
            "--train.steps", "6",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    done = warm.run("diff", str(outs[0]), str(outs[1]))
    assert done.returncode == 1, done.stderr
    assert "cause       data: sample shard_00000.tar:clip5, draw " in done.stdout
    assert ": 1 of " in done.stdout


def rewrite(file: Path, change: Callable[[dict[str, object]], None]) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows[2])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_flipped_top_k_is_told_from_a_wrong_gradient(run: Path, copy: Path) -> None:
    def other_norm(row: dict[str, object]) -> None:
        row["grad_norm"] = float(str(row["grad_norm"])) * 1.01

    rewrite(copy / "metrics.jsonl", other_norm)
    found = parting_of(run, copy)
    assert found.step == 3
    assert found.cause.startswith("gradient: the loss of step 3 is the same")

    def other_expert(row: dict[str, object]) -> None:
        counts = torch.tensor(row["layers"]["1"]["counts"])  # type: ignore[index]
        giver = int(counts[0].argmax())
        counts[0, giver] -= 1
        counts[0, (giver + 1) % counts.shape[1]] += 1
        row["layers"]["1"]["counts"] = counts.tolist()  # type: ignore[index]

    rewrite(copy / "router.jsonl", other_expert)
    found = parting_of(run, copy)
    assert found.cause.startswith("routing: layer 1: 1 of ")
    assert "(a flipped top-k)" in found.cause
    assert parting_of(run, copy, tolerance=0.1).step is None
