"""From a video or image to the clips that one data set takes of it.

Owns the rules of ``megavid prepare``: which bucket a video goes to, at which frame rate, and where it is cut.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from megavid.data.captions import SourceItem
from megavid.data.tokenizer import Frames
from megavid.data.video import at_frame_rate, clips_of, fit_frame, frame_rate_of, read_image, timed_frames
from megavid.errors import DataError

Size = tuple[int, int, int]
"""Frames, height and width of a clip in pixels."""


@dataclass(frozen=True, slots=True)
class ClipRules:
    """How videos become clips.

    Attributes:
        buckets: sizes that clips may have. A video goes to the (height, width) of nearest aspect, among those of one
            aspect to the largest that needs no enlarging, and is cut into clips of the longest of its lengths that it
            fills. An image goes to the same (height, width) as one frame.
        frame_rate: frames per second that videos are resampled to, by time; 0 for each video's own.
        stride: frames from the beginning of a clip to that of the next; 0 for clips side by side.
        clips_per_video: clips at most of one video; 0 for all.
    """

    buckets: tuple[Size, ...]
    frame_rate: float = 0.0
    stride: int = 0
    clips_per_video: int = 0


@dataclass(frozen=True, slots=True)
class PixelClip:
    """One clip: ``video`` [frames, height, width, 3], its frames per second, and where in the item it begins."""

    video: Frames
    frame_rate: float
    start_s: float


def clips_of_item(item: SourceItem, rules: ClipRules) -> Iterator[PixelClip]:
    """The clips of one video or image, in order; frames are scaled as they are decoded, so memory holds one clip.

    Raises:
        DataError: it cannot be read, or it is shorter than the shortest bucket.
    """
    if item.is_image:
        image = read_image(item.file)[0]
        height, width = nearest_size(rules.buckets, *image.shape[:2])
        yield PixelClip(fit_frame(image, height, width)[None], rules.frame_rate or 1.0, 0.0)
        return
    frame_rate = rules.frame_rate or frame_rate_of(item.file)
    first = next(iter(timed_frames(item.file, item.start_s, item.end_s)))[1]
    height, width = nearest_size(rules.buckets, *first.shape[:2])
    lengths = sorted({size[0] for size in rules.buckets if size[1:] == (height, width)}, reverse=True)
    for length in lengths:
        # A video that is too short for a length is short: reading it again for the next one costs little.
        fitted = (fit_frame(frame, height, width) for frame in _frames(item, rules.frame_rate))
        stride = rules.stride or length
        number = -1
        for number, clip in enumerate(clips_of(fitted, length, stride, rules.clips_per_video)):
            yield PixelClip(np.stack(clip), frame_rate, item.start_s + number * stride / frame_rate)
        if number >= 0:
            return
    raise DataError(f"{item.file} is shorter than {lengths[-1]} frames at {frame_rate:g} frames per second")


def nearest_size(buckets: Iterable[Size], height: int, width: int) -> tuple[int, int]:
    """Height and width of the bucket for a picture of ``height`` x ``width``; see ``ClipRules``."""

    def distance(size: tuple[int, int]) -> tuple[float, bool, int]:
        aspect = abs(math.log(size[1] / size[0]) - math.log(width / height))
        is_enlarged = size[0] > height or size[1] > width
        area = size[0] * size[1]
        return round(aspect, 6), is_enlarged, area if is_enlarged else -area

    return min(sorted({size[1:] for size in buckets}), key=distance)


def _frames(item: SourceItem, frame_rate: float) -> Iterator[Frames]:
    timed = timed_frames(item.file, item.start_s, item.end_s)
    return at_frame_rate(timed, frame_rate) if frame_rate else (frame for _, frame in timed)
