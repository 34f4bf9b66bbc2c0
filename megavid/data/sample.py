"""What the data package speaks of: a sample, who encoded it, the bucket it is in, and a source of samples.

Owns these records and the ``ClipSource`` protocol; the sources themselves are ``synthetic`` and ``shards``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megavid.errors import DataError

Shape = tuple[int, int, int, int]
"""Channels, frames, height and width of latents."""
Indices = NDArray[np.int64]


class BadSample(DataError):
    """One damaged clip. The reader quarantines it by name and goes on with another one."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """Which tokenizer made latents. Latents of two specs that differ must not meet in one model."""

    name: str
    version: str
    channels: int
    """Latent channels."""
    spatial: int
    """Pixels of one latent position, along height and width."""
    temporal: int
    """Video frames of one latent frame, the first alone."""
    scaling: str
    """How latents were normalised, as text."""

    def require_same(self, other: "TokenizerSpec", what: str) -> None:
        """Refuse latents of ``other``.

        Args:
            other: what is at hand.
            what: where it comes from, such as the folder; it begins the message.

        Raises:
            DataError: a field differs.
        """
        for name, mine in asdict(self).items():
            if (theirs := asdict(other)[name]) != mine:
                raise DataError(
                    f"{what}: latents were made with tokenizer {name} = {theirs!r}, this needs {mine!r}; "
                    "prepare the data again with the tokenizer of the model"
                )


@dataclass(frozen=True, slots=True)
class TextSpec:
    """Which text encoder goes with a data set."""

    name: str
    version: str
    width: int
    """Width of its features."""
    length: int
    """Text tokens of a caption (L)."""
    file: str = ""
    """Its model file or folder; relative paths lie in the data set's folder."""


@dataclass(frozen=True, slots=True)
class ConditionSpec:
    """What the samples of a data set carry for models that are given frames of a clip."""

    known: str = ""
    """Rule of the known frames (``megavid.data.conditioning``); "" for none: samples carry no latents of them."""
    image: str = ""
    """Image encoder; "" for none: samples carry no image features."""
    version: str = ""
    """Its version."""
    width: int = 0
    """Width of its features."""
    length: int = 0
    """Image tokens of one picture."""
    file: str = ""
    """Its folder, if it has one."""

    @property
    def image_tokens(self) -> int:
        """Image tokens of one clip."""
        return self.length * (2 if self.known == "first_last" else 1)


@dataclass(frozen=True)
class Sample:
    """One clip or image.

    Attributes:
        key: name in its shard.
        latents_CFHW: normalised latents, bf16 or fp32.
        caption: empty for a sample without one.
        frame_rate: latent frames per second; of no effect for an image.
        text_LD: features of the caption where they were encoded ahead, [at most L, width]; zero padded by the loader.
        meta: source, licence, size, filter fields: JSON values.
        known: frames of video that models may be given, where the data set was prepared with them.
        condition_CFHW: latents of the clip with mid-grey in place of all other frames, as ``latents_CFHW``.
        image_LI: image features of the known pictures, [image tokens, width]; None for a clip without one.
    """

    key: str
    latents_CFHW: Tensor
    caption: str
    frame_rate: float
    text_LD: Tensor | None = None
    meta: Mapping[str, object] = field(default_factory=dict)
    known: tuple[int, ...] = ()
    condition_CFHW: Tensor | None = None
    image_LI: Tensor | None = None

    @property
    def shape(self) -> Shape:
        """Channels, frames, height, width."""
        channels, frames, height, width = self.latents_CFHW.shape
        return channels, frames, height, width


@dataclass(frozen=True)
class Bucket:
    """All samples of one latent shape, as runs of neighbouring indices, so that a billion samples take a table of runs.

    Attributes:
        shape: latent shape.
        starts: first sample index of each run, ascending.
        ends: members up to and with each run, cumulated; the last is the size of the bucket.
    """

    shape: Shape
    starts: Indices
    ends: Indices

    def __len__(self) -> int:
        return int(self.ends[-1])

    def samples(self, members: Indices) -> Indices:
        """Sample indices of ``members`` (0 to len - 1), same shape."""
        run = np.searchsorted(self.ends, members, side="right")
        return self.starts[run] + members - np.where(run > 0, self.ends[run - 1], 0)

    def member(self, index: int) -> int:
        """Place in this bucket of the sample with ``index``, which must be in it."""
        run = int(np.searchsorted(self.starts, index, side="right")) - 1
        return index - int(self.starts[run]) + (int(self.ends[run - 1]) if run > 0 else 0)


def buckets_of_runs(runs: Sequence[tuple[Shape, int]]) -> tuple[Bucket, ...]:
    """Buckets, by ascending shape, of samples that lie in index order as runs of (shape, count)."""
    starts: dict[Shape, list[int]] = {}
    counts: dict[Shape, list[int]] = {}
    at = 0
    for shape, count in runs:
        if count:
            starts.setdefault(shape, []).append(at)
            counts.setdefault(shape, []).append(count)
        at += count
    return tuple(
        Bucket(shape, np.array(starts[shape], np.int64), np.cumsum(counts[shape], dtype=np.int64))
        for shape in sorted(starts)
    )


class ClipSource(Protocol):
    """Samples by index. Shapes are known without reading; reading may find a damaged one."""

    @property
    def name(self) -> str:
        """What it is, for messages: a folder, or "synthetic"."""
        ...

    @property
    def tokenizer(self) -> TokenizerSpec:
        """Who made the latents."""
        ...

    @property
    def text(self) -> TextSpec:
        """The text encoder that goes with the captions."""
        ...

    @property
    def condition(self) -> ConditionSpec:
        """What samples carry beside latents and captions."""
        ...

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Every sample once, by shape."""
        ...

    def __len__(self) -> int: ...

    def shape(self, index: int) -> Shape:
        """Latent shape of a sample, without reading it."""
        ...

    def sample_name(self, index: int) -> str:
        """Name for logs and errors, without reading it."""
        ...

    def read(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            BadSample: it is damaged.
            StorageError: storage failed; not a matter of this sample.
        """
        ...

    def close(self) -> None:
        """Close open files."""
        ...


def to_bytes(latents: Tensor) -> bytes:
    """Raw little-endian bf16 of a tensor, in row-major order."""
    return latents.detach().to(torch.bfloat16).contiguous().view(torch.uint16).cpu().numpy().tobytes()


def from_bytes(payload: bytes, shape: Sequence[int]) -> Tensor:
    """The inverse of ``to_bytes``: a bf16 tensor that owns its memory."""
    return torch.frombuffer(bytearray(payload), dtype=torch.bfloat16).reshape(tuple(shape))
