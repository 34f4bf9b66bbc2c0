"""``megavid prepare``: videos, images and captions become shards of latents.

Owns the work of one shard, what is done already, the ranks' shares, and the end. Files: those of ``shard_format``;
``text.model``, the vocabulary; and ``NAME.report.json`` of each shard: from what it was made and what was left out.

Shard n is made of items n * shard_sources to (n + 1) * shard_sources - 1 of the source, so ranks and Slurm array tasks
share the work by arithmetic: rank r of R makes shards r, r + R, ... Every rank may be started again at any time. A
shard that is finished and was made from the same items in the same way is kept. Whoever finds every shard finished
writes dataset.json.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import torch

from megavid.data.captions import SourceItem, read_source
from megavid.data.clips import ClipRules, PixelClip, clips_of_item
from megavid.data.conditioning import condition_spec, require_rule, with_known
from megavid.data.images import ImageEncoder, image_encoder_by_name
from megavid.data.sample import ConditionSpec, Sample, TextSpec, TokenizerSpec
from megavid.data.shard_format import (
    DATASET_FILE,
    DatasetInfo,
    hash_of,
    read_dataset,
    read_json,
    to_json_bytes,
    write_aside,
)
from megavid.data.shard_writer import ShardWriter, finished_shard, shard_name, write_dataset
from megavid.data.text import (
    SentencePieceEncoder,
    TextEncoder,
    Umt5Encoder,
    spec_of,
    text_encoder_of_spec,
    train_sentencepiece,
)
from megavid.data.tokenizer import VideoTokenizer, latent_shape, psnr, tokenizer_by_name
from megavid.errors import ConfigError, DataError, StorageError

VOCABULARY_FILE = "text.model"
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
class PrepareReport:
    """The end of ``prepare``: the shards' reports, and the data set if every shard is finished."""

    shards: tuple[ShardReport, ...]
    num_shards: int
    dataset: DatasetInfo | None


@dataclass(frozen=True, slots=True)
class _Task:
    """Everything that the work on one shard needs, in a form that another process takes."""

    number: int
    items: tuple[SourceItem, ...]
    out: Path
    options: PrepareOptions
    text: TextSpec
    fingerprint: str


def prepare(
    source: Path,
    out: Path,
    options: PrepareOptions,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    processes: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PrepareReport:
    """Make this rank's shards of a data set.

    Args:
        source: see ``captions.read_source``.
        out: the data set's folder.
        options: how.
        rank: 0 to num_ranks - 1.
        num_ranks: how many processes or machines share the work; each is given the same source and options.
        processes: processes that this rank starts.
        on_progress: called with the items that are done, and all items of this rank.

    Raises:
        ConfigError: an option that cannot be.
        DataError: the source cannot be used, too many items are bad, or ``out`` holds another data set.
        StorageError: storage failed.
    """
    if not 0 <= rank < num_ranks:
        raise ConfigError(f"--rank {rank} must be from 0 to {num_ranks - 1} with --num-ranks {num_ranks}")
    items = read_source(source)
    tokenizer = _tokenizer(options)
    for size in options.rules.buckets:
        latent_shape(tokenizer.spec, *size)
    condition = _condition(options)
    text = _text_spec(items, out, options)
    tasks = _tasks(items, out, options, text, tokenizer.spec)
    mine = tasks[rank::num_ranks]
    total, done = sum(len(task.items) for task in mine), 0
    todo: list[_Task] = []
    reports: dict[int, ShardReport] = {}
    for task in mine:
        kept = _finished_report(task)
        if kept is None:
            todo.append(task)
        else:
            reports[task.number] = kept
            done += len(task.items)
    on_progress(done, total)
    bad = 0
    for number, report in _run(todo, processes, lambda: on_progress(-1, total)):
        reports[number] = report
        bad += len(report.bad)
        if bad > options.max_bad:
            last = report.bad[-1]
            raise DataError(
                f"{bad} items cannot be used, more than --max-bad {options.max_bad}; the last: {last.reason}"
            )
    dataset = _finish(tasks, out, tokenizer.spec, text, condition)
    return PrepareReport(tuple(reports[number] for number in sorted(reports)), len(tasks), dataset)


def _run(tasks: Sequence[_Task], processes: int, on_item: Callable[[], None]) -> Iterator[tuple[int, ShardReport]]:
    """Do the tasks here, or in ``processes`` others; ``on_item`` is called for each item that is done."""
    if processes <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield task.number, _make_shard(task, on_item)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        futures = {pool.submit(_make_shard, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                report = future.result()
                for _ in futures[future].items:
                    on_item()
                yield futures[future].number, report
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def _tokenizer(options: PrepareOptions) -> VideoTokenizer:
    return tokenizer_by_name(options.tokenizer, options.tokenizer_channels, options.device)


@cache
def _image_encoder(options: PrepareOptions) -> ImageEncoder | None:
    return image_encoder_by_name(options.image_encoder, options.device) if options.image_encoder else None


def _condition(options: PrepareOptions) -> ConditionSpec:
    """What samples will carry of known frames.

    Raises:
        ConfigError: no such rule or encoder, or an encoder without known frames to show it.
    """
    if not options.known:
        if options.image_encoder:
            raise ConfigError(f"--image-encoder {options.image_encoder} needs --known: the frames that it is shown")
        return ConditionSpec()
    require_rule(options.known, "--known")
    folder = Path(options.image_encoder)
    file = str(folder.resolve()) if options.image_encoder and folder.is_dir() else ""
    return condition_spec(options.known, _image_encoder(options), file)


@cache
def _text_encoder(text: TextSpec, out: Path, device: str) -> TextEncoder:
    return text_encoder_of_spec(text, out, device)


def _text_spec(items: Sequence[SourceItem], out: Path, options: PrepareOptions) -> TextSpec:
    """The text encoder; a vocabulary is trained on all captions and written, the same by every rank."""
    if options.text_encoder != "sentencepiece":
        folder = Path(options.text_encoder)
        if not folder.is_dir():
            raise ConfigError(
                f"--text-encoder {options.text_encoder!r} is not sentencepiece, nor the folder of a UMT5 or T5"
            )
        return spec_of(Umt5Encoder(folder, options.text_length, options.device), str(folder.resolve()))
    model = train_sentencepiece(item.caption for item in items)
    file = out / VOCABULARY_FILE
    try:
        if not file.exists():
            out.mkdir(parents=True, exist_ok=True)
            # A name of its own: other ranks write the same file at the same time.
            partial = file.with_name(f"{file.name}.{os.uname().nodename}.{os.getpid()}.partial")
            partial.write_bytes(model)
            partial.replace(file)
        is_same = file.read_bytes() == model
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error.strerror or error}") from error
    if not is_same:
        raise DataError(
            f"{file} was trained on other captions, so {out} holds another data set; choose another --out or delete it"
        )
    encoder = SentencePieceEncoder(model, options.text_width, options.text_length)
    return spec_of(encoder, VOCABULARY_FILE)


def _tasks(
    items: Sequence[SourceItem], out: Path, options: PrepareOptions, text: TextSpec, tokenizer: TokenizerSpec
) -> list[_Task]:
    how = {
        "rules": asdict(options.rules),
        "tokenizer": asdict(tokenizer),
        "text": asdict(text),
        "encode_text": options.encode_text,
        "shard_sources": options.shard_sources,
    }
    if options.known:
        how["condition"] = asdict(_condition(options))
    tasks = []
    for number, first in enumerate(range(0, len(items), options.shard_sources)):
        part = tuple(items[first : first + options.shard_sources])
        what = [[str(item.file), item.caption, item.start_s, item.end_s, dict(item.fields)] for item in part]
        tasks.append(_Task(number, part, out, options, text, hash_of(to_json_bytes({"how": how, "items": what}))))
    return tasks


def _report_file(task: _Task) -> Path:
    return task.out / f"{shard_name(task.number)}.report.json"


def _finished_report(task: _Task) -> ShardReport | None:
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


def _make_shard(task: _Task, on_item: Callable[[], None] = lambda: None) -> ShardReport:
    """Encode the items of one shard and write it; a shard without any clip has a report and no files."""
    report = ShardReport(task.fingerprint, len(task.items))
    samples = _samples(task, report, on_item)
    first = next(samples, None)
    if first is not None:
        tokenizer = _tokenizer(task.options)
        has_known = bool(task.options.known)
        with ShardWriter(task.out, shard_name(task.number), tokenizer.spec, has_known=has_known) as writer:
            for sample in chain((first,), samples):
                writer.add(sample)
                report.samples += 1
    else:
        task.out.mkdir(parents=True, exist_ok=True)
    write_aside(_report_file(task), to_json_bytes(asdict(report)))
    return report


def _samples(task: _Task, report: ShardReport, on_item: Callable[[], None]) -> Iterator[Sample]:
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


def _sample(task: _Task, item: SourceItem, clip: PixelClip, key: str, report: ShardReport) -> Sample:
    tokenizer = _tokenizer(task.options)
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
    return with_known(sample, clip.video, task.options.known, tokenizer, _image_encoder(task.options))


def _finish(
    tasks: Sequence[_Task], out: Path, tokenizer: TokenizerSpec, text: TextSpec, condition: ConditionSpec
) -> DatasetInfo | None:
    """Write dataset.json if every shard of every rank is finished."""
    reports = [_finished_report(task) for task in tasks]
    names = [shard_name(task.number) for task, report in zip(tasks, reports) if report and report.samples]
    if any(report is None for report in reports):
        return None
    if not names:
        raise DataError(f"no clip was made; the first item: {next(r.bad[0].reason for r in reports if r and r.bad)}")
    try:
        return write_dataset(out, tokenizer, text, names, condition)
    except StorageError:
        # Two ranks that end at once write the same file; the slower one finds its partial file renamed already.
        if (out / DATASET_FILE).exists():
            return read_dataset(out)
        raise
