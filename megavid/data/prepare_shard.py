"""The work on one shard of ``megavid prepare``: its items become samples in files, and a report beside them.

Owns what a shard is made of and how (``ShardTask``), the encoders of a process, what is left out of a shard and why,
and whether one is finished already. Which items make which shard is ``megavid.data.prepare``'s.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path

from megavid.data.captions import SourceItem
from megavid.data.clips import ClipRules, PixelClip, clips_of_item
from megavid.data.conditioning import with_known
from megavid.data.images import ImageEncoder, image_encoder_by_name
from megavid.data.sample import Sample, TextSpec
from megavid.data.shard_format import read_json, to_json_bytes, write_aside
from megavid.data.shard_writer import ShardWriter, finished_shard, shard_name
from megavid.data.text import TextEncoder, text_encoder_of_spec
from megavid.data.tokenizer import VideoTokenizer, psnr, tokenizer_by_name
from megavid.errors import DataError

_MEASURED_CLIPS = 8
"""Clips of a shard whose reconstruction is measured: decoding costs as much as encoding."""


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """How a data set is made.

    Attributes:
        rules: clips of a video.
        tokenizer: name for ``tokenizer_by_name``.
        tokenizer_channels: latent channels; None for the tokenizer's own.
        text_encoder: "sentencepiece", or the folder of a UMT5 or T5.
        text_width: width of the features (sentencepiece).
        text_length: text tokens of a caption.
        encode_text: store features of each caption, instead of its token ids only.
        shard_sources: videos and images of one shard.
        max_bad: items that cannot be used before it stops; counted in each rank.
        device: where tokenizers and encoders with weights compute.
        known: rule of the frames that models are given (``megavid.data.conditioning``); "" for none.
        image_encoder: name for ``image_encoder_by_name``, of the pictures among them; "" for none.
    """

    rules: ClipRules
    tokenizer: str = "dct"
    tokenizer_channels: int | None = None
    text_encoder: str = "sentencepiece"
    text_width: int = 64
    text_length: int = 32
    encode_text: bool = False
    shard_sources: int = 256
    max_bad: int = 100
    device: str = "cpu"
    known: str = ""
    image_encoder: str = ""


@dataclass(frozen=True, slots=True)
class BadItem:
    """A video or image that was left out, and why."""

    file: str
    reason: str


@dataclass(slots=True)
class ShardReport:
    """What was made of one shard's items."""

    fingerprint: str
    """Of the items and of how they were encoded."""
    sources: int = 0
    samples: int = 0
    bad: list[BadItem] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    """Reconstruction, dB, of the first clips."""

    @classmethod
    def from_json(cls, values: Mapping[str, object], file: Path) -> "ShardReport":
        """Read back.

        Raises:
            DataError: it is not a report.
        """
        match values:
            case {
                "fingerprint": str(fingerprint), "sources": int(sources), "samples": int(samples), "bad": [*bad],
                "psnr": [*psnr_of_clips],
            }:  # fmt: skip
                left_out = []
                for entry in bad:
                    match entry:
                        case {"file": str(name), "reason": str(reason)}:
                            left_out.append(BadItem(name, reason))
                measured = [value for value in psnr_of_clips if isinstance(value, float)]
                return cls(fingerprint, sources, samples, left_out, measured)
        raise DataError(f"{file} is damaged; delete it and run the same command again")


@dataclass(frozen=True, slots=True)
class ShardTask:
    """Everything that the work on one shard needs, in a form that another process takes.

    Attributes:
        number: of the shard.
        items: videos and images that it is made of.
        out: the data set's folder.
        options: how.
        text: the text encoder.
        fingerprint: of the items and of how they are encoded.
    """

    number: int
    items: tuple[SourceItem, ...]
    out: Path
    options: PrepareOptions
    text: TextSpec
    fingerprint: str


def finished_report(task: ShardTask) -> ShardReport | None:
    """The report of a shard that is finished and was made from these items in this way; None if it is to be made.

    Raises:
        DataError: it was made in another way.
    """
    file = _report_file(task)
    if not file.exists():
        return None
    values = read_json(file)
    if values.get("fingerprint") != task.fingerprint:
        raise DataError(
            f"{task.out / shard_name(task.number)} was made from other items or with other options; "
            "choose another --out, or delete that folder"
        )
    report = ShardReport.from_json(values, file)
    is_whole = report.samples == 0 or finished_shard(task.out, shard_name(task.number)) is not None
    return report if is_whole else None


def _report_file(task: ShardTask) -> Path:
    return task.out / f"{shard_name(task.number)}.report.json"


def make_shard(task: ShardTask, on_item: Callable[[], None] = lambda: None) -> ShardReport:
    """Encode the items of one shard and write it; a shard without any clip has a report and no files.

    Raises:
        DataError: too many items are bad.
        StorageError: storage failed.
    """
    report = ShardReport(task.fingerprint, len(task.items))
    samples = _samples(task, report, on_item)
    first = next(samples, None)
    if first is not None:
        tokenizer = tokenizer_for(task.options)
        has_known = bool(task.options.known)
        with ShardWriter(task.out, shard_name(task.number), tokenizer.spec, has_known=has_known) as writer:
            for sample in chain((first,), samples):
                writer.add(sample)
                report.samples += 1
    else:
        task.out.mkdir(parents=True, exist_ok=True)
    write_aside(_report_file(task), to_json_bytes(asdict(report)))
    return report


def _samples(task: ShardTask, report: ShardReport, on_item: Callable[[], None]) -> Iterator[Sample]:
    """Samples of the items; what cannot be read goes to the report."""
    offset = task.number * task.options.shard_sources
    for number, item in enumerate(task.items, offset):
        try:
            # All clips of an item or none: a video that breaks in the middle is not to be trusted before it.
            samples = [
                _sample(task, item, clip, f"{number:09d}_{place:05d}", report)
                for place, clip in enumerate(clips_of_item(item, task.options.rules))
            ]
        except DataError as error:
            report.bad.append(BadItem(str(item.file), str(error)))
            if len(report.bad) > task.options.max_bad:
                raise DataError(
                    f"{len(report.bad)} items cannot be used, more than --max-bad {task.options.max_bad}; "
                    f"the last: {error}"
                ) from error
            samples = []
        yield from samples
        on_item()


def _sample(task: ShardTask, item: SourceItem, clip: PixelClip, key: str, report: ShardReport) -> Sample:
    tokenizer = tokenizer_for(task.options)
    latents = tokenizer.encode(clip.video).bfloat16()
    if len(report.psnr) < _MEASURED_CLIPS:
        report.psnr.append(min(99.0, psnr(clip.video, tokenizer.decode(latents))))
    encoder = _text_encoder(task.text, task.out, task.options.device)
    text_LD = None
    if task.options.encode_text and item.caption:
        features_LD = encoder.encode([item.caption])[0]
        used = int(features_LD.abs().sum(1).nonzero().max()) + 1
        text_LD = features_LD[:used].bfloat16()
    frames, height, width, _ = clip.video.shape
    meta = {
        **item.fields,
        "source": str(item.file),
        "start_s": round(clip.start_s, 6),
        "frames": frames,
        "height": height,
        "width": width,
        "video_frame_rate": clip.frame_rate,
        "text_ids": encoder.ids(item.caption),
    }
    sample = Sample(key, latents, item.caption, clip.frame_rate / tokenizer.spec.temporal, text_LD, meta)
    if not task.options.known:
        return sample
    return with_known(sample, clip.video, task.options.known, tokenizer, image_encoder_for(task.options))


@cache
def tokenizer_for(options: PrepareOptions) -> VideoTokenizer:
    """The video tokenizer, one a process."""
    return tokenizer_by_name(options.tokenizer, options.tokenizer_channels, options.device)


@cache
def image_encoder_for(options: PrepareOptions) -> ImageEncoder | None:
    """The image encoder, one a process; None where none is asked for."""
    return image_encoder_by_name(options.image_encoder, options.device) if options.image_encoder else None


@cache
def _text_encoder(text: TextSpec, out: Path, device: str) -> TextEncoder:
    return text_encoder_of_spec(text, out, device)
