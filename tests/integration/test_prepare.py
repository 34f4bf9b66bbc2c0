"""``megavid prepare`` and ``megavid inspect`` from end to end: clips in, shards out, again, shared, damaged."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megavid.cli.main import main
from megavid.data.captions import RESERVED_COLUMNS
from megavid.data.clips import ClipRules
from megavid.data.prepare import prepare
from megavid.data.prepare_shard import PrepareOptions
from megavid.data.shards import ShardSource
from megavid.data.text import text_encoder_of_spec
from megavid.data.tokenizer import psnr, tokenizer_of_spec
from megavid.data.video import read_frames, write_png, write_video
from megavid.errors import DataError
from megavid.parallel.rank_env import STEP_VARIABLES

RULES = ClipRules(((5, 32, 32),))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_PROCID", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Five videos of 12 frames, an image, and a file that is no video."""
    folder = tmp_path / "source"
    folder.mkdir()
    y, x = np.mgrid[0:48, 0:48]
    for number in range(5):
        frames = [
            np.stack([128 + 80 * np.sin((x + 3 * t) / (7 + number)), 2 * y + t, 60 + 30 * number + 0 * x], -1)
            for t in range(12)
        ]
        write_video(folder / f"video_{number}.mp4", np.stack(frames).clip(0, 255).astype(np.uint8), 8.0, crf=4)
        (folder / f"video_{number}.txt").write_text(f"waves of colour number {number}\n")
    write_png(folder / "image.png", np.full((40, 64, 3), 90, np.uint8))
    (folder / "broken.mp4").write_bytes(b"this is no video")
    return folder


def options(shard_sources: int = 2, *, encode_text: bool = False, max_bad: int = 10) -> PrepareOptions:
    return PrepareOptions(
        RULES, "dct-16", text_width=16, text_length=12, encode_text=encode_text, shard_sources=shard_sources,
        max_bad=max_bad,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_clips_become_samples(source: Path, tmp_path: Path) -> None:
    report = prepare(source, tmp_path / "out", options())
    assert report.dataset is not None
    assert report.dataset.samples == 11
    bad = [item for shard in report.shards for item in shard.bad]
    assert [Path(item.file).name for item in bad] == ["broken.mp4"]
    shards = ShardSource(tmp_path / "out")
    assert {bucket.shape: len(bucket) for bucket in shards.buckets} == {(16, 1, 4, 4): 1, (16, 2, 4, 4): 10}
    samples = [shards.read(index) for index in range(len(shards))]
    sample = next(s for s in samples if str(s.meta["source"]).endswith("video_3.mp4") and s.meta["start_s"])
    assert sample.caption == "waves of colour number 3"
    assert sample.frame_rate == 2.0
    assert sample.meta["start_s"] == 0.625
    encoder = text_encoder_of_spec(shards.text, tmp_path / "out")
    assert sample.meta["text_ids"] == encoder.ids(sample.caption)
    real = np.stack([frame[:, :] for frame in read_frames(source / "video_3.mp4")])[5:10]
    decoded = tokenizer_of_spec(shards.tokenizer).decode(sample.latents_CFHW)
    assert abs(float(real.mean()) - float(decoded.mean())) < 3
    assert psnr(decoded[:1], decoded[1:2]) < 60  # it moves


def test_what_a_shard_says_of_a_sample_is_refused_as_a_column(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", replace(options(16), known="first", image_encoder="colours-8x4"))
    with tarfile.open(tmp_path / "out" / "shard_00000.tar") as tar:
        members = [tar.extractfile(member) for member in tar if member.name.endswith(".json")]
        said = {key for member in members if member is not None for key in json.loads(member.read())}
    assert said == {*RESERVED_COLUMNS, "caption", "start_s"}


def test_features_of_captions_can_be_stored(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", options(encode_text=True))
    shards = ShardSource(tmp_path / "out")
    encoder = text_encoder_of_spec(shards.text, tmp_path / "out")
    for index in range(len(shards)):
        sample = shards.read(index)
        if sample.caption:
            assert sample.text_LD is not None
            expected = encoder.encode([sample.caption])[0].bfloat16()
            assert torch.equal(sample.text_LD, expected[: len(sample.text_LD)])
            assert float(expected[len(sample.text_LD) :].abs().sum()) == 0
        else:
            assert sample.text_LD is None


def test_a_second_call_keeps_what_is_finished(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(source, out, options())
    before, times = contents(out), {file.name: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    # What a killed run leaves: a half-written shard, and one that is finished but has no report.
    (out / "shard_00001.tar.partial").write_bytes(b"half")
    (out / "shard_00001.report.json").unlink()
    (out / "shard_00002.tar").write_bytes((out / "shard_00002.tar").read_bytes()[:1000])
    (out / "dataset.json").unlink()
    prepare(source, out, options())
    assert contents(out) == before
    after = {file.name: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    assert after["shard_00000.tar"] == times["shard_00000.tar"]
    assert after["shard_00001.tar"] != times["shard_00001.tar"]


def test_ranks_write_what_one_writes(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "one", options())
    shares = [prepare(source, tmp_path / "three", options(), rank=rank, num_ranks=3) for rank in (1, 0, 2)]
    assert [share.dataset is None for share in shares] == [True, True, False]
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_processes_write_what_one_writes(source: Path, tmp_path: Path) -> None:
    done = []
    prepare(source, tmp_path / "one", options(4))
    prepare(source, tmp_path / "two", options(4), processes=2, on_progress=lambda count, total: done.append(count))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert done == [0] + [-1] * 7


def test_other_options_or_captions_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(source, out, options())
    with pytest.raises(DataError, match="other items or with other options"):
        prepare(source, out, options(encode_text=True))
    (source / "video_0.txt").write_text("something else")
    with pytest.raises(DataError, match="was trained on other captions"):
        prepare(source, out, options())


def test_too_many_bad_items_stop_it(source: Path, tmp_path: Path) -> None:
    (source / "broken_too.mp4").write_bytes(b"nor this")
    for _ in range(2):  # running it again forgives nothing
        with pytest.raises(DataError, match="2 items cannot be used, more than --max-bad 1"):
            prepare(source, tmp_path / "out", options(1, max_bad=1))
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "broken.mp4").write_bytes(b"this is no video")
    with pytest.raises(DataError, match="no clip was made"):
        prepare(tmp_path / "source", tmp_path / "out", options())


def test_commands(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    arguments = ["prepare", str(source), "--out", out, "--bucket", "5x32x32", "--tokenizer", "dct-16"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "11 of 7 videos and images, 1 left out" in printed
    assert "10 x latents 16x2x4x4" in printed
    assert main(["inspect", out]) == 0
    printed = capsys.readouterr().out
    assert "dct version 1: 16 channels" in printed
    assert "11 of 11 samples checked are as written" in printed
    assert "waves of colour number 3" in printed
    assert (tmp_path / "out" / "contact_sheet.png").exists()


def test_inspect_finds_a_flipped_byte(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    prepare(source, out, options(16))
    tar = out / "shard_00000.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    assert main(["inspect", str(out)]) == 2
    captured = capsys.readouterr()
    assert "1 damaged" in captured.out
    assert captured.err.splitlines()[-1].startswith("megavid: error:")
    assert "shard_00000.tar:" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "SOURCE"], "required: --out"),
        (["prepare", "SOURCE", "--out", "x", "--frames", "16"], "16 frames; tokenizer dct takes 1 + 4k"),
        (["prepare", "SOURCE", "--out", "x", "--height", "100"], "100x96 pixels"),
        (["prepare", "SOURCE", "--out", "x", "--bucket", "17x96"], "must be FRAMESxHEIGHTxWIDTH"),
        (["prepare", "SOURCE", "--out", "x", "--text-encoder", "clip"], "'clip' is not sentencepiece"),
        (["prepare", "SOURCE", "--out", "x", "--rank", "1"], "go together"),
        (["prepare", "SOURCE", "--out", "x", "--rank", "2", "--num-ranks", "2"], "must be from 0 to 1"),
        (["prepare", "SOURCE", "--out", "x", "--stride", "-1"], "--stride -1 must be at least 0"),
        (["prepare", "SOURCE/none", "--out", "x"], "does not exist"),
        (["inspect", "SOURCE/none"], "does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    source: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([argument.replace("SOURCE", str(source)) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megavid: error:")]
    assert len(lines) == 1
    assert message in lines[0]


def test_slurm_arrays_are_found(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    for task in ("1", "2"):
        assert not (out / "dataset.json").exists()
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        assert main(["prepare", str(source), "--out", str(out), "--bucket", "5x32x32", "--shard-sources", "3"]) == 0
    assert json.loads((out / "dataset.json").read_text())["samples"] == 11


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
            "SLURM_NTASKS = 8, but this process was not started by srun",
        ),
        (
            {"ID": "5", "MIN": "5", "MAX": "17", "COUNT": "2"},
            "2 tasks from 5 to 17, which leave numbers out",
        ),
    ],
)
def test_slurm_jobs_that_would_leave_work_to_nobody_are_refused(
    source: Path, tmp_path: Path, environ: dict[str, str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in STEP_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name if name.startswith("SLURM") else f"SLURM_ARRAY_TASK_{name}", value)
    assert main(["prepare", str(source), "--out", str(tmp_path / "out"), "--bucket", "5x32x32"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
