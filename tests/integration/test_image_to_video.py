"""Image to video from end to end: prepare, train with pictures on the way, fine-tune, and sample from a picture."""

from pathlib import Path

import numpy as np
import pytest

from megavid.data.synthetic import draw, scene_of
from megavid.data.tokenizer import DctTokenizer
from megavid.data.video import fit_frame, read_frames, read_image, write_png, write_video
from megavid.training.metrics import read_rows
from megavid.training.plots import column
from megavid.training.run_dir import RunDir
from tests.support.warm_parent import WarmParent

FLAGS = (
    "--train.steps", "2", "--train.global_batch_size", "2", "--data.validation_samples", "6", "--log.sample_steps", "2",
    "--log.sample_interval_steps", "2", "--log.validation_interval_steps", "2", "--model.num_layers", "3",
    "--model.out_channels", "16",
)  # fmt: skip
I2V = ("--model.task", "i2v", "--model.in_channels", "36", "--model.image_size", "12", "--model.image_length", "5")
TI2V = ("--model.task", "ti2v", "--model.in_channels", "16")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten videos with captions, and a still image."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(10):
        scene = scene_of(3, number, (9, 64, 64))
        write_video(folder / f"{number}.mp4", draw(scene, (9, 64, 64)), 16.0)
        (folder / f"{number}.txt").write_text(scene.caption)
    write_png(folder / "still.png", draw(scene_of(3, 99, (1, 64, 64)), (1, 64, 64))[0])
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture of another size than the clips."""
    file = tmp_path / "picture.png"
    write_png(file, draw(scene_of(4, 0, (1, 80, 96)), (1, 80, 96))[0])
    return file


def distance_to_picture(video: Path, picture: Path) -> float:
    """Root mean square of the first frame's distance to the picture as the tokenizer gives it back, in levels."""
    frame = next(iter(read_frames(video))).astype(float)
    fitted = fit_frame(read_image(picture)[0], *frame.shape[:2])
    tokenizer = DctTokenizer(16)
    seen = tokenizer.decode(tokenizer.encode(fitted[None]))[0].astype(float)
    return float(np.sqrt(np.mean((frame - seen) ** 2)))


def test_ti2v_trains_on_plain_clips_and_a_sample_begins_with_the_picture(
    warm: WarmParent, tmp_path: Path, picture: Path
) -> None:
    out = tmp_path / "run"
    done = warm.run("train", "tiny", "--out", str(out), *FLAGS, *TI2V, "--ranks", "2", "--parallel.context", "2")
    assert done.returncode == 0, done.stderr
    assert {"sampled", "validated"} <= {event["event"] for event in RunDir(out).events()}
    args = ("sample", str(out), "--prompt", "a red circle", "--steps", "2", "--frames", "9")
    for name, image in (("with", ("--image", str(picture))), ("without", ())):
        done = warm.run(*args, *image, "--out", str(tmp_path / f"{name}.mp4"))
        assert done.returncode == 0, done.stderr
    assert distance_to_picture(tmp_path / "with.mp4", picture) < 6  # what compression of the video leaves
    assert distance_to_picture(tmp_path / "without.mp4", picture) > 30


def test_i2v_is_prepared_trained_and_sampled(warm: WarmParent, tmp_path: Path, clips: Path, picture: Path) -> None:
    shards, out = tmp_path / "shards", tmp_path / "run"
    done = warm.run(
        "prepare", str(clips), "--out", str(shards), "--bucket", "9x64x64", "--tokenizer", "dct-16", "--known", "first",
        "--image-encoder", "colours-12x5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    inspected = warm.run("inspect", str(shards))
    assert "known      first; 5 image tokens of width 12 (colours)" in inspected.stdout
    flags = (*FLAGS, *I2V, "--data.kind", "shards", "--data.path", str(shards))
    done = warm.run("train", "tiny", "--out", str(out), *flags)
    assert done.returncode == 0, done.stderr
    assert len(column(read_rows(out / "metrics.jsonl"), "loss")[1]) == 2
    assert (out / "samples/step_00000002.png").is_file()
    args = ("sample", str(out), "--prompt", "x", "--steps", "2", "--out", str(tmp_path / "clip.mp4"))
    done = warm.run(*args, "--image", str(picture))
    assert done.returncode == 0, done.stderr
    assert len(list(read_frames(tmp_path / "clip.mp4"))) == 9
    for images, said in (
        ((), "model.task = 'i2v' and --known first: it takes --image FILE, got 0 pictures"),
        (("--image", str(picture), "--last-image", str(picture)), "it takes --image FILE, got 2 pictures"),
        (("--last-image", str(picture)), "needs --image FILE: the first frame"),
        (("--image", str(tmp_path / "none.png")), "none.png"),
    ):
        refused = warm.run(*args, *images)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert said in refused.stderr


def test_prepare_refuses_rules_and_encoders_in_one_line(warm: WarmParent, tmp_path: Path, clips: Path) -> None:
    for flags, said in (
        (("--known", "last"), "--known 'last' must be one of first, first_last, first-N (N frames)"),
        (("--known", "first", "--image-encoder", "clip"), "image encoder 'clip' is unknown"),
        (("--image-encoder", "colours-4x4"), "--image-encoder colours-4x4 needs --known"),
    ):
        refused = warm.run("prepare", str(clips), "--out", str(tmp_path / "out"), *flags)
        assert refused.returncode == 2
        assert said in refused.stderr


def test_one_expert_of_some_noise_levels_trains_and_does_not_sample_alone(warm: WarmParent, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = warm.run(
        "train", "tiny", "--out", str(out), "--train.steps", "2", "--train.global_batch_size", "2",
        "--log.worst_samples", "9", "--diffusion.sigma_min", "0.9", "--diffusion.flow_shift", "5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (worst,) = [event for event in RunDir(out).events() if event["event"] == "worst_samples"]
    assert all(0.9 <= clip["sigma"] <= 1 for clip in worst["clips"])
    refused = warm.run("sample", str(out), "--prompt", "x", "--out", str(tmp_path / "x.mp4"))
    assert refused.returncode == 2
    assert "is trained on noise levels 0.9 to 1 only" in refused.stderr
