"""What models are given of a clip: known frames, Wan's mask, their latents, image features; against diffusers' own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megavid.config.load import load_run
from megavid.config.schema import ModelConfig, RunConfig
from megavid.data.build import build_source
from megavid.data.conditioning import (
    given_of,
    known_frames,
    known_latent_frames,
    mask_channels,
    pictures_of,
    with_known,
)
from megavid.data.images import ClipVisionEncoder, ColourEncoder, image_encoder_by_name, image_encoder_of_spec
from megavid.data.sample import BadSample, ConditionSpec, Sample
from megavid.data.shard_format import read_dataset
from megavid.data.shard_writer import ShardWriter, write_dataset
from megavid.data.shards import ShardSource
from megavid.data.tokenizer import DctTokenizer, Frames, VideoTokenizer, WanVaeTokenizer
from megavid.errors import ConfigError, DataError
from tests.support.data_stubs import TEXT
from tests.support.loading import loader_of

I2V = ModelConfig(
    in_channels=36, out_channels=16, task="i2v", image_size=12, image_length=5, text_size=24, text_length=20
)
TI2V = ModelConfig(in_channels=16, out_channels=16, task="ti2v", text_size=24, text_length=20)


def video(frames: int = 9, height: int = 32, width: int = 32) -> Frames:
    return np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny AutoencoderKLWan with random weights."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.0, 2.0],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pipeline") / "vae"
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(params=["dct", "wan vae"])
def tokenizer(request: pytest.FixtureRequest, vae_folder: Path) -> VideoTokenizer:
    return DctTokenizer(16) if request.param == "dct" else WanVaeTokenizer(vae_folder)


@pytest.mark.parametrize(
    ("rule", "frames", "known", "pictures"),
    [
        ("first", 9, (0,), (0,)),
        ("first_last", 9, (0, 8), (0, 8)),
        ("first-5", 9, (0, 1, 2, 3, 4), (0,)),
        ("first", 1, (), ()),
        ("first_last", 1, (), ()),
        ("first-9", 9, (), ()),
        ("first-17", 9, (), ()),
    ],
)
def test_a_rule_names_frames_and_never_all_of_them(
    rule: str, frames: int, known: tuple[int, ...], pictures: tuple[int, ...]
) -> None:
    assert known_frames(rule, frames) == known
    assert pictures_of(rule, known) == pictures


@pytest.mark.parametrize("rule", ["", "last", "first-", "first-0", "first-x", "first_first"])
def test_what_is_no_rule_is_refused(rule: str) -> None:
    with pytest.raises(ConfigError, match=r"must be one of first, first_last, first-N"):
        known_frames(rule, 9)


def test_latent_frames_are_known_where_all_their_frames_are() -> None:
    assert known_latent_frames((0,), 3, 4) == (0,)
    assert known_latent_frames((0, 8), 3, 4) == (0,)
    assert known_latent_frames((0, 1, 2, 3, 4), 3, 4) == (0, 1)
    assert known_latent_frames((0, 5, 6, 7, 8), 3, 4) == (0, 2)
    assert known_latent_frames((0, 1), 3, 1) == (0, 1)
    assert known_latent_frames((), 3, 4) == ()


def condition_of_diffusers(folder: Path, frames: Frames, *, has_last: bool) -> Tensor:
    """Mask and latents as diffusers' image-to-video pipeline makes them."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline

    vae = AutoencoderKLWan.from_pretrained(folder)
    pipeline: Any = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler()
    )
    first, last = (torch.from_numpy(frames[n]).permute(2, 0, 1)[None].float() / 127.5 - 1 for n in (0, -1))
    _, condition = pipeline.prepare_latents(
        first, 1, 4, *frames.shape[1:3], num_frames=len(frames), dtype=torch.float32, device="cpu",
        generator=torch.Generator().manual_seed(0), last_image=last if has_last else None,
    )  # fmt: skip
    found: Tensor = condition[0]
    return found


@pytest.mark.parametrize("rule", ["first", "first_last"])
def test_mask_and_latents_are_those_of_diffusers(vae_folder: Path, rule: str) -> None:
    frames, tokenizer = video(), WanVaeTokenizer(vae_folder)
    bare = Sample("clip", tokenizer.encode(frames), "", 4.0)
    model = ModelConfig(in_channels=12, out_channels=4, task="i2v")
    given = given_of(with_known(bare, frames, rule, tokenizer, None), model, 4)
    assert given.channels_CFHW is not None
    wanted = condition_of_diffusers(vae_folder, frames, has_last=rule == "first_last")
    torch.testing.assert_close(given.channels_CFHW, wanted, rtol=0, atol=1e-5)
    assert wanted[:4].unique().tolist() == [0.0, 1.0]


def test_a_mask_folds_frames_of_video_into_channels() -> None:
    mask = mask_channels((0, 6), (3, 2, 2), 4)[:, :, 0, 0]
    assert mask.t().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]


def test_the_first_latent_frame_is_of_the_first_frame_alone(tokenizer: VideoTokenizer) -> None:
    frames = video()
    alone, whole = tokenizer.encode(frames[:1]), tokenizer.encode(frames)
    torch.testing.assert_close(alone[:, 0], whole[:, 0], rtol=0, atol=1e-6)
    known = tokenizer.encode(frames, (0,))
    torch.testing.assert_close(known[:, 0], whole[:, 0], rtol=0, atol=1e-6)
    assert not torch.allclose(known[:, 1], whole[:, 1], atol=1e-4)
    assert torch.equal(tokenizer.encode(frames, range(9)), whole)


def test_grey_is_the_middle_between_two_numbers_of_a_pixel(tokenizer: VideoTokenizer) -> None:
    below, above = (tokenizer.encode(np.full((5, 32, 32, 3), level, np.uint8)) for level in (127, 128))
    grey = tokenizer.encode(video(5), ())
    torch.testing.assert_close(grey, (below + above) / 2, rtol=0, atol=1e-3)
    if tokenizer.spec.name == "dct":
        assert not grey.any()


def test_ti2v_is_given_latent_frames_of_any_data_set() -> None:
    latents = torch.zeros(16, 3, 4, 4)
    assert given_of(Sample("clip", latents, "", 4.0), TI2V, 4).frames == (0,)
    assert given_of(Sample("still", latents[:, :1], "", 4.0), TI2V, 4).frames == ()
    longer = Sample("clip", latents, "", 4.0, known=(0, 1, 2, 3, 4))
    assert given_of(longer, TI2V, 4).frames == (0, 1)
    assert given_of(longer, replace(TI2V, task="t2v"), 4) == given_of(Sample("x", latents, "", 4.0), ModelConfig(), 4)


def test_i2v_without_latents_of_known_frames_is_refused() -> None:
    with pytest.raises(DataError, match=r"^clip carries no latents of its known frames, .* with --known first$"):
        given_of(Sample("clip", torch.zeros(16, 3, 4, 4), "", 4.0), I2V, 4)


# Image features


def test_colours_tell_pictures_and_places_apart() -> None:
    encoder = ColourEncoder(12, 5)
    one, other = encoder.encode([video(1)[0]]), encoder.encode([video(2)[0]])
    assert one.shape == (5, 12)
    assert not torch.equal(one, other)
    assert torch.equal(encoder.encode([video(1)[0], video(2)[0]]), torch.cat((one, other)))
    assert torch.equal(image_encoder_by_name("colours-12x5").encode([video(1)[0]]), one)
    with pytest.raises(ConfigError, match=r"image encoder 'colour-12' is unknown; it is colours-WIDTHxTOKENS, or"):
        image_encoder_by_name("colour-12")


def test_clip_features_are_those_of_diffusers_pipeline(tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    shape = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14
    )
    model = CLIPVisionModel(shape).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    model.save_pretrained(tmp_path / "image_encoder")
    processor.save_pretrained(tmp_path / "image_processor")
    encoder = ClipVisionEncoder(tmp_path / "image_encoder")
    assert (encoder.width, encoder.length) == (24, 5)
    pictures = [video(1, 40, 48)[0], video(2, 40, 48)[0]]
    pipeline: Any = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(),
        image_encoder=model, image_processor=processor,
    )  # fmt: skip
    with torch.no_grad():
        wanted = pipeline.encode_image([Image.fromarray(picture) for picture in pictures], "cpu")
    torch.testing.assert_close(encoder.encode(pictures), wanted.flatten(0, 1), rtol=0, atol=1e-5)
    spec = ConditionSpec("first", encoder.name, encoder.version, 24, 5, str(tmp_path / "image_encoder"))
    assert image_encoder_of_spec(spec).width == 24
    with pytest.raises(
        DataError, match=r"^image features were made by clip .* \(5 tokens of width 32\), .* \(5 of 24\)$"
    ):
        image_encoder_of_spec(replace(spec, width=32))


# Shards


def sample(number: int, frames: int, images: ColourEncoder | None) -> Sample:
    tokenizer, pixels = DctTokenizer(16), video(frames)
    bare = Sample(f"clip_{number}", tokenizer.encode(pixels).bfloat16(), "a caption", 4.0, None, {"licence": "CC0"})
    return with_known(bare, pixels, "first", tokenizer, images)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    images, spec = ColourEncoder(12, 5), DctTokenizer(16).spec
    with ShardWriter(tmp_path, "shard_00000", spec, has_known=True) as writer:
        for number, frames in enumerate((9, 1, 9)):
            writer.add(sample(number, frames, images))
    write_dataset(tmp_path, spec, TEXT, ["shard_00000"], ConditionSpec("first", "colours", "0", 12, 5))
    return tmp_path


def test_what_samples_carry_of_known_frames_comes_back_bitwise(shards: Path) -> None:
    source = ShardSource(shards)
    assert source.condition == ConditionSpec("first", "colours", "0", 12, 5)
    assert read_dataset(shards).to_json()["version"] == 2
    for index in range(3):
        found = source.read(index)
        wanted = sample(int(found.key[-1]), 9 if found.shape[1] > 1 else 1, ColourEncoder(12, 5))
        assert found.known == wanted.known == ((0,) if found.shape[1] > 1 else ())
        assert found.condition_CFHW is not None
        assert wanted.condition_CFHW is not None
        assert torch.equal(found.condition_CFHW, wanted.condition_CFHW)
        assert (found.image_LI is None) == (wanted.image_LI is None) == (found.shape[1] == 1)
        if found.image_LI is not None and wanted.image_LI is not None:
            assert torch.equal(found.image_LI, wanted.image_LI.bfloat16())
        assert found.meta["licence"] == "CC0"
        assert {"known", "image_shape"}.isdisjoint(found.meta)
    assert not list(source.verify())
    without = ShardSource(shards, reads_known=False).read(0)
    assert (without.known, without.condition_CFHW, without.image_LI) == ((), None, None)


def test_a_flipped_bit_in_known_frames_is_seen(shards: Path) -> None:
    source = ShardSource(shards)
    record = source._shard(0)[1][2]
    for member, name in ((3, "condition"), (4, "image")):
        content = bytearray((shards / "shard_00000.tar").read_bytes())
        content[int(record["offset"][member])] ^= 1
        (shards / "shard_00000.tar").write_bytes(content)
        with pytest.raises(BadSample, match=rf"{name} at byte \d+ differs from its hash"):
            ShardSource(shards).read(2)
        content[int(record["offset"][member])] ^= 1
        (shards / "shard_00000.tar").write_bytes(content)


def test_a_shard_has_known_frames_in_all_its_samples_or_in_none(tmp_path: Path) -> None:
    spec = DctTokenizer(16).spec
    with ShardWriter(tmp_path, "shard_00000", spec) as writer:
        with pytest.raises(DataError, match=r"clip_0 must carry latents of its known frames, .* if the others"):
            writer.add(sample(0, 9, None))
        writer.add(replace(sample(0, 9, None), condition_CFHW=None))


# Batches


def run_of(model: ModelConfig, **data: object) -> RunConfig:
    config = load_run("tiny", ["--data.validation_samples", "2", "--train.global_batch_size", "4"])
    return replace(config, model=replace(model, family="wan"))


def batches_of(config: RunConfig) -> list[Any]:
    with loader_of(config, dp_rank=0, dp_size=1) as loader:
        return next(loader)


def test_synthetic_clips_give_i2v_everything_that_it_reads() -> None:
    config = run_of(I2V)
    source = build_source(config)
    batches, again = batches_of(config), batches_of(config)
    kinds = set()
    for batch, same in zip(batches, again, strict=True):
        assert torch.equal(batch.condition_BTP, same.condition_BTP)
        assert torch.equal(batch.image_GLI, same.image_GLI)
        assert batch.condition_BTP.shape[2] == 20 * 4
        for number, clip in enumerate(batch.clips):
            row = next(row for row, pack in enumerate(batch.packs) if clip in pack.clips)
            window = slice(clip.start, clip.start + clip.tokens)
            mask_TP, latents_TP = batch.condition_BTP[row, window].split((16, 64), dim=1)
            first = clip.grid[1] * clip.grid[2]
            is_video = clip.grid[0] > 1
            kinds.add(is_video)
            assert bool(batch.has_image_G[number]) == is_video
            assert bool(batch.image_GLI[number].any()) == is_video
            assert (mask_TP[:first] == is_video).all()
            assert not mask_TP[first:].any()
            wanted = batch.clean_BTP[row, window][:first] * is_video
            torch.testing.assert_close(latents_TP[:first], wanted, rtol=0, atol=1e-6)
            assert not latents_TP[first:].any()
            assert clip.known == ()
    assert kinds == {True, False}
    assert source.condition.image_tokens == 5


def test_synthetic_clips_of_ti2v_know_their_first_frame() -> None:
    batches = batches_of(run_of(TI2V))
    for batch in batches:
        assert batch.condition_BTP is batch.image_GLI is batch.has_image_G is None
        assert [clip.known for clip in batch.clips] == [(0,) if clip.grid[0] > 1 else () for clip in batch.clips]
        known = sum(clip.known_tokens for clip in batch.clips)
        assert batch.num_unknown_tokens == batch.num_tokens - known


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 37}, r"^model\.in_channels = 37 must be 36 with model\.task = 'i2v': .* the 4 frames that"),
        (
            {"image_length": 9, "image_positions": 9},
            r"^model\.image_length = 9 must be even with data\.kind = 'synthetic'",
        ),
    ],
)
def test_models_that_synthetic_clips_cannot_feed_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_source(run_of(replace(I2V, **change)))


def test_shards_without_what_i2v_reads_are_refused(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = replace(I2V, text_size=TEXT.width, text_length=TEXT.length)
    config = run_of(model)
    config = replace(config, data=replace(config.data, kind="shards", path=str(shards)))
    assert build_source(config).condition.known == "first"
    wider = replace(config, model=replace(model, image_size=16))
    with pytest.raises(
        DataError, match=r"carries 5 image tokens of width 12, but .* = 5 x 16; prepare .* --image-encoder"
    ):
        build_source(wider)
    plain = tmp_path_factory.mktemp("plain")
    spec = DctTokenizer(16).spec
    with ShardWriter(plain, "shard_00000", spec) as writer:
        writer.add(replace(sample(0, 9, None), condition_CFHW=None))
    write_dataset(plain, spec, TEXT, ["shard_00000"])
    assert read_dataset(plain).to_json()["version"] == 1
    with pytest.raises(DataError, match=r"carries no latents of known frames, .* with --known first$"):
        build_source(replace(config, data=replace(config.data, path=str(plain))))
