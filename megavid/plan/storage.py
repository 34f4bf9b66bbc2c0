"""What the data of a run costs: bytes of video, latents and text, the rate at which a job reads them, and money.

Owns the arithmetic of ``megavid plan --data`` and the reading of ``prices.toml``, the one place with prices and encoder
times, each with its source and date. How long a step takes comes from the caller. Bytes are decimal (1 PB = 10^15)
except where a store bills otherwise.
"""

import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from megavid.config.schema import require
from megavid.errors import ConfigError

VIDEO_BYTES = 5e6
"""Bytes of one clip as compressed video where nobody says otherwise: the field's round figure."""
FEATURE_BYTES = 2
"""Text features are stored in bf16."""
ID_BYTES = 4
"""Token ids are stored in 32 bits."""
MONTH_HOURS = 730.0

LatentDtype = Literal["bf16", "fp8"]
LATENT_BYTES: Mapping[LatentDtype, int] = {"bf16": 2, "fp8": 1}


@dataclass(frozen=True, slots=True)
class Store:
    """List prices of one object store.

    Attributes:
        name: product and region.
        read: when the prices were read, year and month.
        source: where.
        gigabyte: bytes of the gigabyte that it bills.
        storage: tiers of the price of a gigabyte and month: (gigabytes up to which it counts or 0, price).
        egress: likewise of a gigabyte that leaves the store's network.
        put_per_million: price of a million writes.
        get_per_million: price of a million reads.
    """

    name: str
    read: str
    source: str
    gigabyte: int
    storage: tuple[tuple[float, float], ...]
    egress: tuple[tuple[float, float], ...]
    put_per_million: float
    get_per_million: float

    def storage_month(self, num_bytes: float) -> float:
        """Dollars a month for holding this much."""
        return _tiered(self.storage, num_bytes / self.gigabyte)

    def egress_once(self, num_bytes: float) -> float:
        """Dollars for reading this much once, in one month, from outside the store's network."""
        return _tiered(self.egress, num_bytes / self.gigabyte)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A video tokenizer's sizes, and what encoding costs.

    Attributes:
        key: pixels by pixels by frames of one latent position, such as ``8x8x4``.
        name: whose it is.
        spatial: pixels of one latent position along height and width.
        temporal: frames of one latent frame, the first alone.
        channels: latent channels.
        gpu: what ``frame_720p_s`` was measured on, a row of the table of GPU prices.
        frame_720p_s: GPU seconds for one frame of 1280x720; 0 where nothing is published.
        source: where that stands.
    """

    key: str
    name: str
    spatial: int
    temporal: int
    channels: int
    gpu: str
    frame_720p_s: float
    source: str

    def latent_numbers(self, frames: int, height: int, width: int) -> int:
        """Numbers in the latents of a clip of this size in pixels; sizes that it does not divide are rounded up."""
        latent_frames = 1 + -(-(frames - 1) // self.temporal)
        return self.channels * latent_frames * -(-height // self.spatial) * -(-width // self.spatial)

    def encode_s(self, frames: int, height: int, width: int) -> float:
        """GPU seconds to encode such a clip, by its pixels; 0 where nothing is published."""
        return self.frame_720p_s * frames * (height * width) / (1280 * 720)


@dataclass(frozen=True, slots=True)
class GpuHour:
    """The price of an hour of one GPU, when and where it was read."""

    hour: float
    read: str
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """What ``--data`` asks about.

    Attributes:
        clips: clips in all.
        frames: frames of one clip.
        height: pixels.
        width: pixels.
        text_length: text tokens of a caption (L).
        text_size: width of the text features.
        latents_of_clip: latents kept of each clip: 2 where those of its known frames stand beside its own.
        image_numbers: numbers of one clip's image features; 0 for none.
        video_bytes: bytes of one clip as compressed video.
        epochs: times that the run reads every clip.
        months: how long the data is kept.
        encode_gpu_s: GPU seconds to encode one clip; 0 for the published time of the tokenizer.
        gpu_hour: dollars of a GPU hour; 0 for the table's.
    """

    clips: int
    frames: int
    height: int
    width: int
    text_length: int
    text_size: int
    latents_of_clip: int = 1
    image_numbers: int = 0
    video_bytes: float = VIDEO_BYTES
    epochs: float = 1.0
    months: float = 1.0
    encode_gpu_s: float = 0.0
    gpu_hour: float = 0.0

    @property
    def features_bytes(self) -> int:
        """Bytes of one caption's features."""
        return self.text_length * self.text_size * FEATURE_BYTES

    @property
    def ids_bytes(self) -> int:
        """Bytes of one caption's token ids."""
        return self.text_length * ID_BYTES

    def latent_numbers(self, tokenizer: Tokenizer) -> int:
        """Numbers of one clip's latents, those of its known frames included."""
        return tokenizer.latent_numbers(self.frames, self.height, self.width) * self.latents_of_clip

    def sizes(self) -> dict[str, float]:
        """Bytes of one clip in every form that may be stored: video, latents of every tokenizer and dtype, features."""
        found: dict[str, float] = {"video": self.video_bytes}
        for tokenizer in tokenizers():
            numbers = self.latent_numbers(tokenizer)
            found |= {latent_name(tokenizer, dtype): numbers * width for dtype, width in LATENT_BYTES.items()}
        found |= {"text features bf16": self.features_bytes, "text ids": self.ids_bytes}
        return found | ({"image features bf16": self.image_numbers * FEATURE_BYTES} if self.image_numbers else {})


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of stored data: bytes and money for all clips.

    Attributes:
        name: such as ``latents 8x8x4 bf16``.
        clip_bytes: of one clip.
        total_bytes: of all.
        storage_month: dollars a month.
        write_once: dollars of the requests that write it, one for each clip.
        read_epoch: dollars of the requests of one epoch, one for each clip.
        egress_epoch: dollars for one epoch read from outside the store's network.
    """

    name: str
    clip_bytes: float
    total_bytes: float
    storage_month: float
    write_once: float
    read_epoch: float
    egress_epoch: float


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Latents kept against latents made again in every epoch, for one tokenizer and dtype.

    Attributes:
        name: of the latents.
        encode_gpu_s: GPU seconds of one clip.
        encode_gpu_hours: of all clips, once.
        encode_cost: dollars of that.
        keep_cost: dollars that keeping the latents for ``months`` and reading them in every epoch costs more than
            reading video.
        epochs: epochs from which on keeping is cheaper; infinite where it never is, 0 where encoding has no price.
        source: of the time.
    """

    name: str
    encode_gpu_s: float
    encode_gpu_hours: float
    encode_cost: float
    keep_cost: float
    epochs: float
    source: str


@dataclass(frozen=True, slots=True)
class ReadRate:
    """What a job must read so that no step waits.

    Attributes:
        name: what is read.
        rank_rate: bytes/s of one rank.
        job_rate: bytes/s of all ranks together, each reading for itself, as the loader does.
        unique_rate: bytes/s with every clip counted once: what a cache for the ranks of one replica leaves.
    """

    name: str
    rank_rate: float
    job_rate: float
    unique_rate: float


def kinds(data: DataSet, store: Store) -> tuple[Kind, ...]:
    """Everything that may be stored for these clips."""
    millions = data.clips / 1e6
    return tuple(
        Kind(
            name=name,
            clip_bytes=size,
            total_bytes=size * data.clips,
            storage_month=store.storage_month(size * data.clips),
            write_once=store.put_per_million * millions,
            read_epoch=store.get_per_million * millions,
            egress_epoch=store.egress_once(size * data.clips),
        )
        for name, size in data.sizes().items()
    )


def break_evens(data: DataSet, store: Store) -> tuple[BreakEven, ...]:
    """Encode once and keep, or encode in every epoch: where the two cost the same, for each kind of latents.

    Video is kept either way. Keeping costs storage for ``data.months`` and a write of each clip; what is read in an
    epoch differs by size only where egress is paid, and that is left out: the job is taken to stand beside its store.
    """
    found = []
    for tokenizer in tokenizers():
        once = tokenizer.encode_s(data.frames, data.height, data.width)
        seconds = data.encode_gpu_s or once * data.latents_of_clip
        hours = seconds * data.clips / 3600
        cost = hours * (data.gpu_hour or gpu_hour(tokenizer.gpu).hour)
        numbers = data.latent_numbers(tokenizer)
        for dtype, width in LATENT_BYTES.items():
            stored = numbers * width * data.clips
            keep = store.storage_month(stored) * data.months + store.put_per_million * data.clips / 1e6
            # One encoding is paid either way: k epochs cost k encodings, or one and the keeping.
            epochs = 1 + keep / cost if cost else 0.0
            source = "--encode-gpu-s" if data.encode_gpu_s else tokenizer.source
            found.append(BreakEven(latent_name(tokenizer, dtype), seconds, hours, cost, keep, epochs, source))
    return tuple(found)


def read_rates(
    data: DataSet, *, clips_per_step: float, step_time_s: float, ranks: int, replicas: int
) -> tuple[ReadRate, ...]:
    """The rate at which each kind of input must arrive, the clips of a step in the time of a step.

    Args:
        data: sizes of one clip.
        clips_per_step: clips of one optimizer step, of all ranks.
        step_time_s: seconds of a step.
        ranks: ranks of the job.
        replicas: data-parallel replicas; every rank of a replica reads all its clips.
    """
    rates = []
    for name, size in data.sizes().items():
        unique = size * clips_per_step / step_time_s
        rates.append(ReadRate(name, unique / replicas, unique / replicas * ranks, unique))
    return tuple(rates)


def latent_name(tokenizer: Tokenizer, dtype: LatentDtype) -> str:
    """How reports call latents of this kind."""
    return f"latents {tokenizer.key} {dtype}"


# The table


def store(name: str) -> Store:
    """Prices of an object store.

    Raises:
        ConfigError: it is not in the table.
    """
    row = _row("store", name, "--store")
    return Store(
        name=row["name"],
        read=row["read"],
        source=row["source"],
        gigabyte=row["gigabyte"],
        storage=tuple((float(limit), price) for limit, price in row["storage"]),
        egress=tuple((float(limit), price) for limit, price in row["egress"]),
        put_per_million=row["put_per_million"],
        get_per_million=row["get_per_million"],
    )


def store_names() -> tuple[str, ...]:
    """Object stores that have prices."""
    return tuple(_table()["store"])


def tokenizers() -> tuple[Tokenizer, ...]:
    """Video tokenizers of the table."""
    return tuple(Tokenizer(key=key, **row) for key, row in _table()["tokenizer"].items())


def gpu_hour(name: str) -> GpuHour:
    """The price of an hour of a GPU.

    Raises:
        ConfigError: it has none.
    """
    return GpuHour(**_row("gpu", name, "--gpu-hour"))


@functools.cache
def _table() -> dict[str, Any]:
    return tomllib.loads((resources.files("megavid.plan") / "prices.toml").read_text(encoding="utf-8"))


def _row(kind: str, name: str, flag: str) -> dict[str, Any]:
    table = _table()[kind]
    if name not in table:
        raise ConfigError(f"{flag} {name}: no such row of megavid/plan/prices.toml; there are {', '.join(table)}")
    row: dict[str, Any] = table[name]
    return row


def _tiered(tiers: Sequence[tuple[float, float]], gigabytes: float) -> float:
    """Each gigabyte at the price of the tier that it falls into."""
    require(gigabytes >= 0, f"{gigabytes} gigabytes have no price; give at least 0")
    cost, below = 0.0, 0.0
    for limit, price in tiers:
        upper = gigabytes if not limit else min(limit, gigabytes)
        cost += max(0.0, upper - below) * price
        below = max(below, upper)
    return cost
