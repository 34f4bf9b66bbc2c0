"""From a checkpoint to a pipeline that serves it: the frames of ``megavid sample`` and of diffusers' WanPipeline."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from torch import Tensor

from megavid.checkpoint.convert import open_model, write_model
from megavid.cli.main import main
from megavid.cli.sample import main as sample_main
from megavid.cli.sample import parse
from megavid.cli.sample_served import sample_served, size_of
from megavid.cli.served import ServedOptions, open_served
from megavid.diffusion.guidance import pack_prompts
from megavid.errors import MegavidError
from megavid.ops.patches import unpatchify
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layout_of
from megavid.training.sample_run import SampleJob, load_engine
from megavid.training.sampling import Prompt, SamplerSettings, sample_latents
from tests.support.inference_world import with_moe
from tests.support.ranks import RankPool
from tests.support.tiny_pipeline import (
    CHANNELS,
    IMAGE_WIDTH,
    SIZE,
    TEXT_LENGTH,
    TEXT_WIDTH,
    save_base,
    save_checkpoint,
    save_image_encoder,
    save_transformer,
)

PIXEL = 1e-3
"""How near frames must be, in pixels from 0 to 1."""
PROMPT, NEGATIVE, SEED, STEPS, GUIDANCE = "a red ball moves left", "ugly", 5, 4, 3.0
MODELS = {"dense": with_moe("wan", absolute=False).model, "experts": with_moe(router="softmax").model}


def shaped(name: str) -> Any:
    return replace(
        MODELS[name], in_channels=CHANNELS, out_channels=CHANNELS, text_size=TEXT_WIDTH, text_length=TEXT_LENGTH
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base; and of each model transformer, checkpoint, and the pipeline that ``megavid convert`` makes of it."""
    root = tmp_path_factory.mktemp("served")
    save_base(root / "base")
    for name in MODELS:
        save_transformer(root / name / "transformer", shaped(name))
        save_checkpoint(root / name / "checkpoint", root / name / "transformer", root / "base")
        assert not main([
            "convert", str(root / name / "checkpoint"), str(root / name / "pipeline"),
            "--to", "diffusers", "--pipeline", str(root / "base"),
        ])  # fmt: skip
    return root


def arguments(folder: Path, out: Path) -> list[str]:
    return [
        str(folder), "--prompt", PROMPT, "--negative", NEGATIVE, "--seed", str(SEED), "--steps", str(STEPS),
        "--guidance", str(GUIDANCE), "--out", str(out), "--frames", str(SIZE.frames), "--height", str(SIZE.height),
        "--width", str(SIZE.width), "--fps", str(SIZE.frame_rate),
    ]  # fmt: skip


def start_noise() -> Tensor:
    """What ``megavid sample`` starts from, as WanPipeline takes it."""
    grid, features = (2, 2, 3), torch.zeros(1, TEXT_LENGTH, TEXT_WIDTH)
    packs = pack_prompts(features, features[0], grids=[grid], frame_rate=4.0, pack_tokens=12, guidance=1.0)
    return unpatchify(packs.start_noise(CHANNELS * 4, SEED)[0], grid, (1, 2, 2))[None]


def frames_of_pipeline(folder: Path, kind: Any = WanPipeline, **options: Any) -> Any:
    """What diffusers serves, [frames, height, width, 3] from 0 to 1."""
    pipeline = kind.from_pretrained(folder, dtype={"text_encoder": torch.bfloat16, "default": torch.float32})
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        prompt=PROMPT, negative_prompt=NEGATIVE, height=SIZE.height, width=SIZE.width, num_frames=SIZE.frames,
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=start_noise(),
        **{"max_sequence_length": TEXT_LENGTH, **options},
    )  # fmt: skip
    return result.frames[0]


def decoded(base: Path, latents: Tensor) -> Any:
    """Frames of latents, not rounded, by the pipeline's own VAE."""
    pipeline = WanPipeline.from_pretrained(base, dtype=torch.float32)
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1)
        for v in (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std)
    )
    with torch.no_grad():
        video = pipeline.vae.decode(latents[None] * std + mean, return_dict=False)[0]
    return pipeline.video_processor.postprocess_video(video)[0]


def trained_latents(checkpoint: str, vae: str) -> Tensor:
    """Job: latents that the trainer's own model gives."""
    job = SampleJob.of(parse([*arguments(Path(checkpoint), Path("x.mp4")), "--tokenizer", vae]), 1)
    settings = SamplerSettings(STEPS, GUIDANCE, SEED, negative=NEGATIVE)
    with Mesh.open(layout_of(job.config, 1)) as mesh:
        engine = load_engine(job.checkpoint, job.config, mesh)
        (latents,) = sample_latents(engine, job.kit, [Prompt(PROMPT, job.size)], settings)
    return latents


def served_latents(folder: Path, *options: str) -> Tensor:
    request = parse([*arguments(folder, Path("x.mp4")), *options])
    served = open_served(folder, ServedOptions(), request.sampler, torch.device("cpu"))
    (latents,) = sample_served(served, request, size_of(served, request), torch.device("cpu"))
    return latents


@pytest.mark.parametrize("name", MODELS)
def test_pipeline_trainer_and_sample_give_the_same_frames(pool: RankPool, folders: Path, name: str) -> None:
    folder = folders / name
    want = frames_of_pipeline(folder / "pipeline")
    assert want.std() > 0.02
    (trained,) = pool.run(1, trained_latents, str(folder / "checkpoint"), str(folders / "base" / "vae"))
    served = served_latents(folder / "pipeline")
    for latents in (trained, served):
        frames = decoded(folders / "base", latents)
        assert np.abs(frames - want).max() < PIXEL, np.abs(frames - want).max()
    torch.testing.assert_close(served, trained, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def pair(folders: Path) -> Path:
    """A pipeline of two transformers, the first for timesteps from 875."""
    save_transformer(folders / "low", shaped("experts"), seed=1)
    assert not main([
        "convert", str(folders / "experts" / "checkpoint"), str(folders / "pair"), "--to", "diffusers",
        "--second", str(folders / "low"), "--boundary", "0.875", "--pipeline", str(folders / "base"),
    ])  # fmt: skip
    return folders / "pair"


def test_two_transformers_switch_where_diffusers_switches(folders: Path, pair: Path) -> None:
    frames = decoded(folders / "base", served_latents(pair))
    want = frames_of_pipeline(pair)
    assert np.abs(frames - want).max() < PIXEL
    alone = frames_of_pipeline(folders / "experts" / "pipeline")
    assert np.abs(alone - want).max() > 10 * PIXEL


def test_the_boundary_itself_is_of_the_high_noise_transformer(pair: Path) -> None:
    served = open_served(pair, ServedOptions(), "unipc", torch.device("cpu"))
    assert served.boundary == 875.0
    assert [served.at(t) is served.model for t in (999.0, 875.0, 874.0, 1.0)] == [True, True, False, False]


def test_pipeline_and_transformer_alone_give_one_clip_from_the_command_line(folders: Path, tmp_path: Path) -> None:
    base = folders / "base"
    alone = ["--tokenizer", str(base / "vae"), "--text-encoder", str(base / "text_encoder"), "--shift", "3"]
    sheets = []
    for name, options in (("pipeline", []), ("transformer", alone)):
        argv = ["sample", *arguments(folders / "experts" / name, tmp_path / f"{name}.mp4"), "--sheet", "--gif"]
        assert not main([*argv, *options])
        assert all((tmp_path / f"{name}.{kind}").stat().st_size > 0 for kind in ("mp4", "gif"))
        sheets.append((tmp_path / f"{name}.png").read_bytes())
    assert sheets[0] == sheets[1]


@pytest.mark.parametrize("task", ["i2v", "i2v of 2.1", "i2v of 2.1, short text", "ti2v"])
def test_a_picture_begins_the_clip_as_in_diffusers(folders: Path, tmp_path: Path, task: str) -> None:
    """Mask and known latents in further channels, with CLIP's features too (Wan 2.1) or without, or the first latent
    frame clean at timestep 0.
    """
    folder = tmp_path / "pipeline"
    shutil.copytree(folders / "dense" / "pipeline", folder)
    edit(folder / "model_index.json", _class_name="WanImageToVideoPipeline", expand_timesteps=task == "ti2v")
    if task == "i2v":
        shutil.rmtree(folder / "transformer")
        save_transformer(folder / "transformer", replace(shaped("experts"), in_channels=3 * CHANNELS, task="i2v"))
        edit(folder / "model_index.json", transformer=["megavid.inference", "MegavidTransformer3DModel"])
    # diffusers' own class takes all before 512 tokens for the picture, so that with a short text ours is written.
    length = 512 if task == "i2v of 2.1" else TEXT_LENGTH
    if "2.1" in task:
        save_image_encoder(folder)
        known = {"in_channels": 2 * CHANNELS + 4, "task": "i2v", "image_size": IMAGE_WIDTH}
        save_transformer(tmp_path / "transformer", replace(shaped("dense"), text_length=length, **known))
        shutil.rmtree(folder / "transformer")
        write_model(open_model(tmp_path / "transformer"), folder / "transformer", to="diffusers")
        kind = "WanTransformer3DModel" if length == 512 else "MegavidTransformer3DModel"
        edit(folder / "model_index.json", transformer=["diffusers" if length == 512 else "megavid.inference", kind])
        assert json.loads((folder / "transformer" / "config.json").read_text())["_class_name"] == kind
    picture = np.random.default_rng(0).integers(0, 256, (SIZE.height, SIZE.width, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    want = frames_of_pipeline(
        folder, WanImageToVideoPipeline, image=Image.fromarray(picture), max_sequence_length=length
    )
    frames = decoded(folders / "base", served_latents(folder, "--image", str(tmp_path / "picture.png")))
    assert np.abs(frames - want).max() < PIXEL
    other = decoded(folders / "base", served_latents(folder, "--image", str(grey_picture(tmp_path))))
    assert np.abs(other - want).max() > 2 * PIXEL
    if task == "i2v of 2.1":
        shutil.rmtree(folder / "image_encoder")
        with pytest.raises(MegavidError, match=r"has an image branch; pass its image encoder: --image-encoder DIR"):
            served_latents(folder, "--image", str(tmp_path / "picture.png"))


def grey_picture(folder: Path) -> Path:
    Image.new("RGB", (SIZE.width, SIZE.height), (90, 90, 90)).save(folder / "grey.png")
    return folder / "grey.png"


def test_pictures_that_the_model_does_not_read_are_refused(folders: Path, tmp_path: Path) -> None:
    argv = arguments(folders / "dense" / "pipeline", tmp_path / "x.mp4")
    with pytest.raises(MegavidError, match=r"for task t2v: it takes no --image, got 1 pictures"):
        sample_main([*argv, "--image", str(grey_picture(tmp_path))])


@pytest.mark.parametrize("name", MODELS)
def test_the_block_of_the_page_serves_a_folder(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "inference.md").read_text()
    block = page.partition("```python\n")[2].partition("```")[0]
    given = 'folder, size = "served", {"height": 480, "width": 832, "num_frames": 81}'
    assert given in block
    tiny = f"folder, size = {str(folders / name / 'pipeline')!r}, {{'height': 32, 'width': 48, 'num_frames': 5}}"
    monkeypatch.chdir(tmp_path)
    exec(compile(block.replace(given, tiny).replace("steps=30", "steps=2"), "docs/inference.md", "exec"), {})
    assert (tmp_path / "ball.gif").stat().st_size > 0


def edit(file: Path, **change: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def pickled(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


DAMAGE = {
    "no vae": (lambda p: shutil.rmtree(p / "vae"), r"lacks the folders vae; megavid convert --pipeline BASE"),
    "pickled text encoder": (
        lambda p: pickled(p / "text_encoder"), r"holds no \*.safetensors \(only model.bin, and pickled weights are not"
    ),
    "pickled transformer": (lambda p: pickled(p / "transformer"), r"only diffusion_pytorch_model.bin, and pickled"),
    "other pipeline": (
        lambda p: edit(p / "model_index.json", _class_name="FluxPipeline"), r"is of a FluxPipeline; sampled are WanPip"
    ),
    "other scheduler": (
        lambda p: edit(p / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler"),
        r"is of a DDIMScheduler, not what --sampler unipc does; pass --shift X",
    ),
    "other solver": (
        lambda p: edit(p / "scheduler" / "scheduler_config.json", solver_order=3), r"solver_order = 3, but megavid's"
    ),
    "no boundary": (
        lambda p: (shutil.copytree(p / "transformer", p / "transformer_2"),
                   edit(p / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])),
        r"boundary_ratio = None must be between 0 and 1",
    ),
    "other transformer": (
        lambda p: edit(p / "transformer" / "config.json", _class_name="FluxTransformer"), r"is of a FluxTransformer"
    ),
    "wider transformer": (
        lambda p: edit(p / "transformer" / "config.json", ffn_dim=128), r"cannot be read as a WanTransformer3D"
    ),
    "more layers": (lambda p: edit(p / "transformer" / "config.json", num_layers=5), r"missing keys: blocks.4"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_pipeline_is_refused_in_one_line(folders: Path, tmp_path: Path, what: str) -> None:
    damage, message = DAMAGE[what]
    shutil.copytree(folders / "dense" / "pipeline", tmp_path / "pipeline")
    damage(tmp_path / "pipeline")
    with pytest.raises(MegavidError, match=message) as caught:
        sample_main([*arguments(tmp_path / "pipeline", tmp_path / "x.mp4")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.mp4").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"says nothing of --tokenizer, --text-encoder, --shift; pass them"),
        (
            ["--tokenizer", "dct-8", "--text-encoder", "BASE", "--shift", "3"],
            r"predicts 4 channels, its video tok",
        ),
        (["--ranks", "2"], r"--ranks is for training checkpoints"),
        (["--weights", "ema"], r"--weights is for training checkpoints"),
        (["--parallel.tensor", "2"], r"--parallel.\* is for training checkpoints"),
        (["--tokenizer", "dct-4", "--text-encoder", "nowhere", "--shift", "3"], r"--text-encoder nowhere is neither"),
    ],
)
def test_a_transformer_alone_needs_what_it_does_not_say(
    folders: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    options = [str(folders / "base" / "text_encoder") if option == "BASE" else option for option in options]
    with pytest.raises(MegavidError, match=message):
        sample_main([*arguments(folders / "experts" / "transformer", tmp_path / "x.mp4"), *options])


def test_a_training_checkpoint_refuses_what_it_brings(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(MegavidError, match=r"--shift 3.0 is for the folder of a transformer"):
        sample_main([*arguments(folders / "dense" / "checkpoint", tmp_path / "x.mp4"), "--shift", "3"])
