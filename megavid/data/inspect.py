"""What ``megavid inspect`` says and shows of a data set of shards.

Owns the text and the choice of clips for the contact sheet. Everything is read through ``ShardSource``, as training
reads it.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megavid.data.pictures import contact_sheet
from megavid.data.sample import ConditionSpec, Sample
from megavid.data.shards import ShardSource
from megavid.data.tokenizer import Frames, VideoTokenizer, tokenizer_of_spec
from megavid.errors import DataError

_CAPTIONS = 8


@dataclass(frozen=True, slots=True)
class ShardInspection:
    """What was found.

    Attributes:
        text: the page.
        bad: one line for each damaged sample.
        sheet: contact sheet of decoded latents, [height, width, 3]; None if the tokenizer's weights are not at hand.
    """

    text: str
    bad: tuple[str, ...]
    sheet: Frames | None


def inspect_shards(
    folder: Path,
    *,
    tokenizer_folder: str = "",
    clips: int = 12,
    max_verified: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ShardInspection:
    """Look at a data set: counts, buckets, captions, tokenizer, hashes, decoded latents.

    Args:
        folder: the data set.
        tokenizer_folder: weights of a tokenizer that has some.
        clips: clips of the contact sheet, evenly spread over the buckets.
        max_verified: samples whose hashes are checked, evenly spread; None for all.
        on_progress: called with samples checked and samples to check.

    Raises:
        DataError: it is no data set, or a shard is missing or truncated.
        StorageError: storage failed.
    """
    source = ShardSource(folder)
    try:
        bad = _verify(source, max_verified, on_progress)
        shown = _chosen(source, clips)
        statistics = _latent_lines(shown)
        sheet = _sheet(shown, source, tokenizer_folder)
        lines = [*_head(source), "", *_bucket_lines(source), "", *statistics, "", *_caption_lines(source), ""]
        checked = len(source) if max_verified is None else min(len(source), max_verified)
        lines.append(f"hashes     {checked - len(bad)} of {checked} samples checked are as written, {len(bad)} damaged")
        lines += [f"  damaged  {line}" for line in bad]
        return ShardInspection("\n".join(lines), tuple(bad), sheet)
    finally:
        source.close()


def _verify(source: ShardSource, limit: int | None, on_progress: Callable[[int, int], None]) -> list[str]:
    numbers = _spread(len(source), len(source) if limit is None else limit)
    bad = []
    for done, index in enumerate(numbers, 1):
        error = source.verify_sample(index)
        if error is not None:
            bad.append(str(error))
        on_progress(done, len(numbers))
    return bad


def _spread(length: int, wanted: int) -> list[int]:
    """At most ``wanted`` numbers from 0 to length - 1, evenly spread."""
    count = min(length, wanted)
    return [int(number) for number in np.linspace(0, length - 1, count).round()] if count else []


def _chosen(source: ShardSource, clips: int) -> list[Sample]:
    """Sound samples of every bucket, from all over it."""
    share = max(1, clips // len(source.buckets))
    shown = []
    for bucket in source.buckets:
        for member in _spread(len(bucket), share):
            index = int(bucket.samples(np.array([member]))[0])
            try:
                shown.append(source.read(index))
            except DataError:
                continue  # counted by _verify
    return shown[:clips]


def _head(source: ShardSource) -> list[str]:
    info = source.info
    size = sum(shard.tar_bytes + shard.index_bytes for shard in info.shards)
    tokenizer, text = info.tokenizer, info.text
    return [
        f"data set   {source.folder}",
        f"samples    {len(source)} in {len(info.shards)} shards, {size / 1e6:.2f} MB",
        f"tokenizer  {tokenizer.name} version {tokenizer.version}: {tokenizer.channels} channels, "
        f"{tokenizer.spatial}x{tokenizer.spatial} pixels x {tokenizer.temporal} frames; scaling: {tokenizer.scaling}",
        f"text       {text.name} version {text.version}: {text.length} tokens of width {text.width}"
        + (f", {text.file}" if text.file else ""),
        *_condition_lines(info.condition),
    ]


def _condition_lines(condition: ConditionSpec) -> list[str]:
    if not condition.known:
        return []
    images = f"{condition.image_tokens} image tokens of width {condition.width} ({condition.image})"
    return [f"known      {condition.known}; {images if condition.image else 'no image features'}"]


def _bucket_lines(source: ShardSource) -> list[str]:
    spec = source.tokenizer
    lines = [f"{'samples':>8}  latents (C x F x H x W)   video"]
    for bucket in source.buckets:
        _, frames, height, width = bucket.shape
        video = f"{1 + (frames - 1) * spec.temporal} x {height * spec.spatial} x {width * spec.spatial}"
        lines.append(f"{len(bucket):>8}  {' x '.join(map(str, bucket.shape)):24}  {video}")
    return lines


def _latent_lines(samples: list[Sample]) -> list[str]:
    """Mean and deviation of the clips shown: about 0 and 1 if the scaling is the tokenizer's."""
    if not samples:
        return ["latents    no sound sample to show"]
    latents = [sample.latents_CFHW.float() for sample in samples]
    count = sum(tensor.numel() for tensor in latents)
    mean = sum(float(tensor.sum()) for tensor in latents) / count
    square = sum(float(tensor.square().sum()) for tensor in latents) / count
    largest = max(float(tensor.abs().max()) for tensor in latents)
    rates = ", ".join(f"{rate:g}" for rate in sorted({sample.frame_rate for sample in samples}))
    return [
        f"latents    mean {mean:.3f}, root mean square {square**0.5:.3f}, largest {largest:.1f} "
        f"(over {len(samples)} samples)",
        f"rates      {rates} latent frames per second",
    ]


def _caption_lines(source: ShardSource) -> list[str]:
    counts = Counter(source.captions())
    empty = counts.pop("", 0)
    words = [len(caption.split()) for caption in counts for _ in range(counts[caption])]
    lines = [
        f"captions   {sum(counts.values())} ({len(counts)} different), {empty} samples without one"
        + (f"; {min(words)} to {max(words)} words" if words else "")
    ]
    lines += [f"  {count:>6} x  {caption[:140]}" for caption, count in counts.most_common(_CAPTIONS)]
    if len(counts) > _CAPTIONS:
        lines.append(f"  and {len(counts) - _CAPTIONS} others")
    return lines


def _sheet(samples: list[Sample], source: ShardSource, tokenizer_folder: str) -> Frames | None:
    if not samples or (source.tokenizer.name != "dct" and not tokenizer_folder):
        return None
    tokenizer: VideoTokenizer = tokenizer_of_spec(source.tokenizer, tokenizer_folder)
    return contact_sheet([(sample.caption, [tokenizer.decode(sample.latents_CFHW)]) for sample in samples])
