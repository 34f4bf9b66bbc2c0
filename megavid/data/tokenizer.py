"""Video tokenizers: pixels to latents and back.

Owns the ``VideoTokenizer`` protocol, the embedded ``DctTokenizer`` (fixed numbers, nothing to download), the
adapter for Wan's VAE, and ``tokenizer_by_name``. A tokenizer is a pure function of its ``spec``; latents carry that
spec, and a model refuses another's. Does not read files of video (``video``) and knows no device but the one its
input is on.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megavid.data.dct_table import FIRST_FRAME, FRAME_GROUP, Row
from megavid.data.sample import Shape, TokenizerSpec
from megavid.errors import ConfigError, DataError

Frames = NDArray[np.uint8]
"""RGB video, [frames, height, width, 3] uint8."""

# BT.601, full range, as JPEG has it; Y, Cb, Cr from R, G, B.
RGB_TO_YCC = torch.tensor(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], dtype=torch.float64
)
YCC_TO_RGB = torch.tensor([[1.0, 0.0, 1.402], [1.0, -0.344136, -0.714136], [1.0, 1.772, 0.0]], dtype=torch.float64)


class VideoTokenizer(Protocol):
    """Encodes clips of 1 + temporal * k frames; the first frame becomes a latent frame of its own."""

    @property
    def spec(self) -> TokenizerSpec:
        """Name, version, channels, strides and scaling: what latents carry."""
        ...

    def encode(self, video_FHW3: Frames | Tensor, known: Sequence[int] | None = None) -> Tensor:
        """Latents of a clip.

        Args:
            video_FHW3: RGB, uint8, [1 + temporal * k, height, width, 3]; the sizes multiples of ``spec.spatial``.
            known: frames that are shown; mid-grey, exactly the middle of the range, stands for all others. None: all.

        Returns:
            Normalised latents [C, 1 + k, height / spatial, width / spatial], fp32, on the CPU.

        Raises:
            DataError: the shape is not one of those.
        """
        ...

    def decode(self, latents_CFHW: Tensor) -> Frames:
        """The clip of these latents: uint8 [1 + temporal * (F - 1), spatial * H, spatial * W, 3]."""
        ...


def latent_shape(spec: TokenizerSpec, frames: int, height: int, width: int) -> Shape:
    """Shape of the latents of a clip of ``frames`` frames of ``height`` x ``width`` pixels.

    Raises:
        DataError: the tokenizer has none for it.
    """
    if frames < 1 or (frames - 1) % spec.temporal:
        raise DataError(
            f"a clip has {frames} frames; tokenizer {spec.name} takes 1 + {spec.temporal}k "
            f"(1, {1 + spec.temporal}, {1 + 2 * spec.temporal}, ...); change --frames"
        )
    if min(height, width) < spec.spatial or height % spec.spatial or width % spec.spatial:
        raise DataError(
            f"a clip is {height}x{width} pixels; tokenizer {spec.name} takes multiples of {spec.spatial}; "
            "change --height and --width"
        )
    return spec.channels, 1 + (frames - 1) // spec.temporal, height // spec.spatial, width // spec.spatial


def psnr(video: Frames, other: Frames) -> float:
    """Peak signal-to-noise ratio of two clips of one shape, dB over all their pixels; infinite for equal ones."""
    error = np.mean((video.astype(np.float64) - other) ** 2)
    return math.inf if error == 0 else float(10 * np.log10(255.0**2 / error))


def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II, [frequency, place] fp64."""
    frequency = torch.arange(size, dtype=torch.float64)[:, None]
    place = torch.arange(size, dtype=torch.float64)[None, :]
    matrix = torch.cos(torch.pi * (2 * place + 1) * frequency / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


class DctTokenizer:
    """A fixed orthonormal 3D DCT of YCbCr video, low frequencies kept: 8x8 pixels, 4 frames, the first frame alone.

    The kept coefficients are those of largest expected energy over the three colour planes. A coefficient of
    deviation s becomes s^-1/2 times itself: full whitening would give high frequencies as much weight in the loss
    as the picture's layout. The first frame has its own statistics. Both kinds of latent frames have unit mean
    square in expectation. Where a channel can mean the same spatial frequency in the first frame and in the groups,
    it does.

    Reconstruction, 128x128, all frames, PSNR in dB at 16 / 32 / 48 channels (tests/unit/test_media_tokenizer.py):
    bigbuckbunny 27.0 / 29.5 / 31.3, bikes 26.6 / 29.8 / 31.7, carphone 28.3 / 31.2 / 33.2.

    Args:
        channels: latent channels, 1 to 64.

    Raises:
        ConfigError: another number of channels.
    """

    def __init__(self, channels: int = 32) -> None:
        if not 1 <= channels <= len(FRAME_GROUP):
            raise ConfigError(
                f"tokenizer dct has {channels} channels; it takes 1 to {len(FRAME_GROUP)}; change --tokenizer-channels"
            )
        self._spec = TokenizerSpec("dct", "1", channels, 8, 4, "deviation^0.5, first frame apart, unit mean square")
        group = FRAME_GROUP[:channels]
        first = _aligned(FIRST_FRAME[:channels], group)
        self._first_encode, self._first_decode = _basis(first, 1)
        self._group_encode, self._group_decode = _basis(group, 4)

    @property
    def spec(self) -> TokenizerSpec:
        """What latents carry."""
        return self._spec

    def encode(self, video_FHW3: Frames | Tensor, known: Sequence[int] | None = None) -> Tensor:
        """See ``VideoTokenizer.encode``."""
        video, shown_F = as_uint8(video_FHW3), _shown(len(video_FHW3), known)
        frames, height, width, _ = video.shape
        channels, latent_frames, rows, columns = latent_shape(self._spec, frames, height, width)
        latents = torch.empty(channels, latent_frames, rows, columns)
        for latent_frame in range(latent_frames):
            start, stop, encode, _ = self._group(latent_frame)
            blocks = video[start:stop].reshape(stop - start, rows, 8, columns, 8, 3).permute(1, 3, 0, 2, 4, 5)
            pixels = blocks.reshape(rows * columns, -1).float() / 255 - 0.5
            if known is not None:
                pixels *= shown_F[start:stop].repeat_interleave(8 * 8 * 3)
            latents[:, latent_frame] = (pixels @ encode).T.view(channels, rows, columns)
        return latents

    def decode(self, latents_CFHW: Tensor) -> Frames:
        """See ``VideoTokenizer.decode``."""
        channels, latent_frames, rows, columns = latents_CFHW.shape
        if channels != self._spec.channels:
            raise DataError(f"latents have {channels} channels, tokenizer dct decodes {self._spec.channels}")
        latents = latents_CFHW.detach().float().cpu()
        video = np.empty((1 + 4 * (latent_frames - 1), rows * 8, columns * 8, 3), np.uint8)
        for latent_frame in range(latent_frames):
            start, stop, _, decode = self._group(latent_frame)
            pixels = latents[:, latent_frame].reshape(channels, -1).T @ decode
            blocks = ((pixels + 0.5) * 255).round_().clamp_(0, 255).to(torch.uint8)
            picture = blocks.view(rows, columns, stop - start, 8, 8, 3).permute(2, 0, 3, 1, 4, 5)
            video[start:stop] = picture.reshape(stop - start, rows * 8, columns * 8, 3).numpy()
        return video

    def _group(self, latent_frame: int) -> tuple[int, int, Tensor, Tensor]:
        """First frame, frame after the last, and the two bases of one latent frame."""
        if latent_frame == 0:
            return 0, 1, self._first_encode, self._first_decode
        return 4 * latent_frame - 3, 4 * latent_frame + 1, self._group_encode, self._group_decode


def _shown(frames: int, known: Sequence[int] | None) -> Tensor:
    """1 for the frames that are shown, 0 for the others."""
    shown_F = torch.ones(frames) if known is None else torch.zeros(frames)
    shown_F[list(known or ())] = 1.0
    return shown_F


def as_uint8(video_FHW3: Frames | Tensor) -> Tensor:
    """Video as a CPU tensor, without a copy if it is writable.

    Raises:
        DataError: it is not uint8 [frames, height, width, 3].
    """
    if isinstance(video_FHW3, np.ndarray):
        # Pillow's arrays are read-only, which torch warns of.
        video = torch.from_numpy(np.require(video_FHW3, requirements="W"))
    else:
        video = video_FHW3.cpu()
    if video.dtype != torch.uint8 or video.dim() != 4 or video.shape[3] != 3:
        raise DataError(f"video must be uint8 [frames, height, width, 3], got {video.dtype} {tuple(video.shape)}")
    return video


def _aligned(first: tuple[Row, ...], group: tuple[Row, ...]) -> list[Row]:
    """Order the first frame's coefficients so that a channel has the group's spatial frequency where both kept it."""
    rest = {row[:4]: row for row in first}
    ordered = [rest.pop(row[:4], None) for row in group]
    left = iter(rest.values())
    return [next(left) if row is None else row for row in ordered]


def _basis(rows: list[Row] | tuple[Row, ...], temporal: int) -> tuple[Tensor, Tensor]:
    """Matrices that encode [temporal * 8 * 8 * 3 pixels -> channels] and decode, scaling included, fp32.

    Both are rounded from fp64 once, so encoding and decoding are one matrix product each.
    """
    time, space = dct_matrix(temporal), dct_matrix(8)
    scale = math.sqrt(sum(row[4] for row in rows) / len(rows))
    encode, decode = [], []
    for plane, t, y, x, deviation in rows:
        wave = torch.einsum("t,y,x->tyx", time[t], space[y], space[x])[..., None]
        gain = math.sqrt(deviation) * scale
        encode.append((wave * RGB_TO_YCC[plane]).flatten() / gain)
        decode.append((wave * YCC_TO_RGB[:, plane]).flatten() * gain)
    return torch.stack(encode, 1).float(), torch.stack(decode).float()


class WanVaeTokenizer:
    """Wan's VAE (diffusers' ``AutoencoderKLWan``) from a folder; 2.1 has 16 channels and 8x8, 2.2 has 48 and 16x16.

    Latents are the mean of the posterior, normalised by the ``latents_mean`` and ``latents_std`` of the VAE's
    config, as Wan was trained.

    Args:
        folder: holds ``config.json`` and the weights; often ``.../vae``.
        device: where to encode.
        dtype: Wan encodes in fp32.

    Raises:
        DataError: diffusers is missing, or the folder holds no such VAE.
    """

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        try:
            import diffusers
        except ImportError as error:
            raise DataError(
                f"tokenizer {folder} needs diffusers, which is not installed; pip install 'megavid[inference]'"
            ) from error
        config = vae_config(folder)
        try:
            # local_files_only: a misspelt folder must not turn into a download.
            self._vae: Any = diffusers.AutoencoderKLWan.from_pretrained(
                str(folder), dtype=dtype, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder} cannot be read as an AutoencoderKLWan: {error}".splitlines()[0]) from error
        self._vae.to(device).eval()
        mean, deviation = (torch.tensor(config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        self._mean, self._deviation = mean.to(device), deviation.to(device)
        self._device, self._dtype = device, dtype
        channels, spatial, temporal = (
            int(config.get(key, default))
            for key, default in (("z_dim", 16), ("scale_factor_spatial", 8), ("scale_factor_temporal", 4))
        )
        version = f"{channels}x{spatial}x{spatial}x{temporal}"
        self._spec = TokenizerSpec("wan_vae", version, channels, spatial, temporal, "latents_mean, latents_std")

    @property
    def spec(self) -> TokenizerSpec:
        """What latents carry."""
        return self._spec

    @torch.no_grad()
    def encode(self, video_FHW3: Frames | Tensor, known: Sequence[int] | None = None) -> Tensor:
        """See ``VideoTokenizer.encode``."""
        video, shown_F = as_uint8(video_FHW3), _shown(len(video_FHW3), known)
        latent_shape(self._spec, *video.shape[:3])
        pixels = video.permute(3, 0, 1, 2)[None].to(self._device, self._dtype) / 127.5 - 1
        if known is not None:
            pixels *= shown_F.to(pixels).view(-1, 1, 1)
        mode = self._vae.encode(pixels).latent_dist.mode().float()
        latents: Tensor = ((mode - self._mean) / self._deviation)[0].cpu()
        return latents

    @torch.no_grad()
    def decode(self, latents_CFHW: Tensor) -> Frames:
        """See ``VideoTokenizer.decode``."""
        latents = latents_CFHW[None].float().to(self._device) * self._deviation + self._mean
        pixels = self._vae.decode(latents.to(self._dtype)).sample[0].float()
        video: Frames = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
        return video


def vae_config(folder: Path) -> dict[str, Any]:
    """config.json of a Wan VAE.

    Raises:
        DataError: the folder has none, or it is another model's.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no readable config.json of a VAE ({error}); change --tokenizer") from error
    if config.get("_class_name") != "AutoencoderKLWan" or not {"latents_mean", "latents_std"} <= config.keys():
        raise DataError(
            f"{folder} holds a {config.get('_class_name')}, not an AutoencoderKLWan with latents_mean and latents_std"
        )
    return config


def tokenizer_by_name(name: str, channels: int | None = None, device: str = "cpu") -> VideoTokenizer:
    """The tokenizer of this name.

    Args:
        name: ``dct`` (32 channels), ``dct-N`` for N channels, or the folder of an ``AutoencoderKLWan``.
        channels: latent channels; None for the name's own.
        device: where a tokenizer with weights computes.

    Raises:
        ConfigError: no such name, or it has not that many channels.
        DataError: the folder cannot be used.
    """
    kind, _, number = name.partition("-")
    if kind == "dct" and (number == "" or number.isdecimal()):
        named = int(number) if number else channels or 32
        if channels not in (None, named):
            raise ConfigError(f"tokenizer {name} has {named} channels, not {channels}; name it dct-{channels}")
        return DctTokenizer(named)
    if not Path(name).is_dir():
        raise ConfigError(
            f"tokenizer {name!r} is unknown; it is dct, dct-N (N channels), or the folder of an AutoencoderKLWan"
        )
    tokenizer = WanVaeTokenizer(Path(name), device)
    if channels not in (None, tokenizer.spec.channels):
        raise ConfigError(f"tokenizer {name} has {tokenizer.spec.channels} channels, {channels} were asked for")
    return tokenizer


def tokenizer_of_spec(spec: TokenizerSpec, folder: str = "") -> VideoTokenizer:
    """The tokenizer that made latents of ``spec``, for decoding them.

    Args:
        spec: what the latents carry.
        folder: weights of a tokenizer that has some.

    Raises:
        ConfigError: its weights are needed and no folder was given.
        DataError: what was found is another tokenizer.
    """
    if spec.name == "dct":
        tokenizer: VideoTokenizer = DctTokenizer(spec.channels)
    elif folder:
        tokenizer = tokenizer_by_name(folder)
    else:
        raise ConfigError(f"latents of tokenizer {spec.name} need its weights to be decoded; pass --tokenizer FOLDER")
    tokenizer.spec.require_same(spec, folder or "this data")
    return tokenizer
