"""Image encoders: pictures to features, for models with an image branch.

Owns the ``ImageEncoder`` protocol, the embedded ``ColourEncoder`` (fixed numbers, nothing to download), and the adapter
for a CLIP vision tower (transformers) in a local folder. Which frames of a clip are shown to it is
``megavid.data.conditioning``'s.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megavid.data.sample import ConditionSpec
from megavid.data.tokenizer import Frames
from megavid.errors import ConfigError, DataError
from megavid.ops.philox import key_of, normal


class ImageEncoder(Protocol):
    """Encodes pictures into features of one shape."""

    @property
    def name(self) -> str:
        """Its kind, such as "colours"."""
        ...

    @property
    def version(self) -> str:
        """What else its features depend on, as short text."""
        ...

    @property
    def width(self) -> int:
        """Width of the features."""
        ...

    @property
    def length(self) -> int:
        """Tokens of one picture."""
        ...

    def encode(self, pictures: Sequence[Frames]) -> Tensor:
        """Features of RGB pictures [height, width, 3] uint8 of any sizes, one after another: [n * length, width] fp32.

        Raises:
            DataError: the encoder's files are missing.
        """
        ...


class ColourEncoder:
    """The mean colour of each cell of a picture through fixed random numbers, and where the cell lies.

    Args:
        width: width of the features.
        length: tokens of a picture: cells of the smallest square grid that has as many.
        seed: of the numbers.
    """

    name = "colours"

    def __init__(self, width: int, length: int, seed: int = 0) -> None:
        self._width, self._length, self._seed = width, length, seed
        self._side = math.isqrt(length - 1) + 1
        self._colours_3I = normal(key_of(seed, "image colour"), 0, 3 * width).view(3, width)
        self._places_LI = normal(key_of(seed, "image place"), 0, length * width).view(length, width)

    @property
    def version(self) -> str:
        """Its seed."""
        return str(self._seed)

    @property
    def width(self) -> int:
        """Width of the features."""
        return self._width

    @property
    def length(self) -> int:
        """Tokens of one picture."""
        return self._length

    def encode(self, pictures: Sequence[Frames]) -> Tensor:
        """See ``ImageEncoder.encode``."""
        return torch.cat([self._encode(picture) for picture in pictures])

    def _encode(self, picture: Frames) -> Tensor:
        pixels_CHW = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float() / 127.5 - 1
        cells = torch.nn.functional.adaptive_avg_pool2d(pixels_CHW, self._side).flatten(1).t()[: self._length]
        return cells @ self._colours_3I + 0.5 * self._places_LI


class ClipVisionEncoder:
    """A CLIP vision tower (transformers' ``CLIPVisionModel``) from a folder: its last hidden layer but one, as Wan 2.1
    reads it.

    Args:
        folder: holds ``config.json`` and the weights, often ``.../image_encoder``; the preprocessor's config beside it,
            or in ``image_processor`` next to it, if other than CLIP's.
        device: where to encode.

    Raises:
        DataError: transformers is missing, or the folder holds no such model.
    """

    name = "clip"

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        try:
            import transformers
        except ImportError as error:
            raise DataError(
                f"image encoder {folder} needs transformers, which is not installed; pip install 'megavid[inference]'"
            ) from error
        try:
            config = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} holds no readable config.json of an image encoder ({error})") from error
        if config.get("model_type") not in ("clip_vision_model", "clip"):
            raise DataError(f"{folder} holds a model of type {config.get('model_type')!r}, not a CLIP vision model")
        try:
            # local_files_only: a misspelt folder must not turn into a download.
            self._model: Any = transformers.CLIPVisionModel.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder} cannot be read as a CLIPVisionModel: {error}".splitlines()[0]) from error
        self._model.to(device).eval()
        vision: Any = self._model.config
        self._processor: Any = _processor(transformers, folder, int(vision.image_size))
        self._device = device
        self._width, self._length = int(vision.hidden_size), int((vision.image_size // vision.patch_size) ** 2 + 1)
        self._version = f"{vision.num_hidden_layers}x{vision.hidden_size}-{vision.image_size}"

    @property
    def version(self) -> str:
        """Layers, width and size of its pictures."""
        return self._version

    @property
    def width(self) -> int:
        """Width of the features."""
        return self._width

    @property
    def length(self) -> int:
        """Tokens of one picture: its patches, and one for the whole."""
        return self._length

    @torch.no_grad()
    def encode(self, pictures: Sequence[Frames]) -> Tensor:
        """See ``ImageEncoder.encode``."""
        pixels = self._processor(images=[np.asarray(picture) for picture in pictures], return_tensors="pt")
        hidden = self._model(pixels["pixel_values"].to(self._device), output_hidden_states=True).hidden_states[-2]
        features: Tensor = hidden.float().flatten(0, 1).cpu()
        return features


def _processor(transformers: Any, folder: Path, size: int) -> Any:
    """The preprocessor beside the model, else CLIP's own for pictures of its size."""
    for place in (folder, folder.parent / "image_processor"):
        if (place / "preprocessor_config.json").is_file():
            return transformers.CLIPImageProcessor.from_pretrained(str(place), local_files_only=True)
    return transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def image_encoder_by_name(name: str, device: str = "cpu") -> ImageEncoder:
    """The image encoder of this name.

    Args:
        name: ``colours-WIDTHxTOKENS``, or the folder of a CLIP vision model.
        device: where an encoder with weights computes.

    Raises:
        ConfigError: no such name.
        DataError: the folder cannot be used.
    """
    kind, _, size = name.partition("-")
    numbers = size.split("x")
    if kind == "colours" and len(numbers) == 2 and all(number.isdecimal() and int(number) > 0 for number in numbers):
        return ColourEncoder(int(numbers[0]), int(numbers[1]))
    if not Path(name).is_dir():
        raise ConfigError(
            f"image encoder {name!r} is unknown; it is colours-WIDTHxTOKENS, or the folder of a CLIP vision model"
        )
    return ClipVisionEncoder(Path(name), device)


def image_encoder_of_spec(spec: ConditionSpec, folder: str = "", device: str = "cpu") -> ImageEncoder:
    """The image encoder that made a data set's features.

    Args:
        spec: what the data set says of it.
        folder: where its weights are, if not where they were.
        device: where an encoder with weights computes.

    Raises:
        ConfigError: its folder is not there.
        DataError: what was found is another encoder.
    """
    if spec.image == ColourEncoder.name:
        encoder: ImageEncoder = ColourEncoder(spec.width, spec.length, int(spec.version))
    else:
        encoder = image_encoder_by_name(folder or spec.file, device)
    found = (encoder.name, encoder.version, encoder.width, encoder.length)
    if found != (spec.image, spec.version, spec.width, spec.length):
        raise DataError(
            f"image features were made by {spec.image} {spec.version} ({spec.length} tokens of width {spec.width}), "
            f"{folder or spec.file or 'what is here'} is {found[0]} {found[1]} ({found[3]} of {found[2]})"
        )
    return encoder
