"""Reading and writing video and images, and cutting clips.

Owns files of pixels (PyAV, Pillow) and the rules that turn a video into clips: frame rate by time, cover and centre
crop, stride. Knows nothing of latents. All frames are RGB uint8.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from megavid.data.tokenizer import Frames
from megavid.errors import DataError, StorageError

VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".gif"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})

_DEFAULT_RATE = 25.0


def timed_frames(file: Path, start_s: float = 0.0, end_s: float | None = None) -> Iterator[tuple[float, Frames]]:
    """Decode a video, or a part of it, frame by frame.

    Args:
        file: the video.
        start_s: seconds from the video's beginning to the part's.
        end_s: seconds from the video's beginning to the part's end; None for the video's.

    Yields:
        Seconds since ``start_s`` and the frame, [height, width, 3].

    Raises:
        DataError: it cannot be decoded, or has no picture there.
    """
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise DataError(f"{file} has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            origin = float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0
            if start_s > 0:
                container.seek(int((origin + start_s) * 1e6), backward=True)
            step = 1 / float(stream.average_rate or _DEFAULT_RATE)
            given = 0
            for number, frame in enumerate(container.decode(stream)):
                time = number * step if frame.time is None else float(frame.time) - origin
                # Half a frame forgives tables that were written with rounded seconds.
                if time < start_s - step / 2:
                    continue
                if end_s is not None and time >= end_s - step / 2:
                    break
                given += 1
                yield max(0.0, time - start_s), frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{file} cannot be decoded: {error}") from error
    if not given:
        raise DataError(f"{file} has no frame from {start_s} s to {end_s or 'the end'}")


def read_frames(file: Path) -> Iterator[Frames]:
    """Every frame of a video, [height, width, 3] each.

    Raises:
        DataError: it cannot be decoded, or has no picture.
    """
    return (frame for _, frame in timed_frames(file))


def frame_rate_of(file: Path) -> float:
    """Average frames per second of a video; 25 where the file does not say.

    Raises:
        DataError: it cannot be opened as a video.
    """
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise DataError(f"{file} has no video stream")
            return float(container.streams.video[0].average_rate or _DEFAULT_RATE)
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{file} cannot be opened: {error}") from error


def read_image(file: Path) -> Frames:
    """An image as a video of one frame, [1, height, width, 3]; the orientation its camera noted is applied.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Image.open(file) as image:
            orientation = image.getexif().get(0x0112, 1)
            turned = image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
            return np.asarray(turned.convert("RGB"))[None]
    # Pillow's readers raise the first three for damaged files, the last for pictures of too many pixels.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from error


# EXIF orientation 2 to 8.
_TURNS = dict(
    zip(
        range(2, 9),
        (
            Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        strict=True,
    )
)  # fmt: skip


def at_frame_rate(frames: Iterable[tuple[float, Frames]], frame_rate: float) -> Iterator[Frames]:
    """Resample by time: frame k is the one that the video shows k / ``frame_rate`` seconds after its start.

    Args:
        frames: ascending (seconds, frame).
        frame_rate: frames per second wanted.
    """
    shown: Frames | None = None
    number, time = 0, 0.0
    for time, frame in frames:
        # A hundredth of a step forgives timestamps that containers round to milliseconds.
        while shown is not None and (number + 1e-2) / frame_rate < time:
            yield shown
            number += 1
        shown = frame
    # The last frame is shown at its own time, and for how long is not known.
    if shown is not None and number / frame_rate < time + 1e-2 / frame_rate:
        yield shown


def fit_frames(frames: Iterable[Frames], height: int, width: int) -> Frames:
    """Scale each frame to cover ``height`` x ``width``, keeping its aspect, and cut out the middle.

    The filter is a triangle as wide as the scale asks for (no aliasing, no ringing).

    Returns:
        [frames, height, width, 3].
    """
    return np.stack([fit_frame(frame, height, width) for frame in frames])


def fit_frame(frame: Frames, height: int, width: int) -> Frames:
    """``fit_frames`` for one frame, [height, width, 3]."""
    source_height, source_width, _ = frame.shape
    scale = min(source_height / height, source_width / width)
    top = (source_height - height * scale) / 2
    left = (source_width - width * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    if (source_height, source_width) == (height, width):
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR, box=box))


def clips_of(frames: Iterable[Frames], length: int, stride: int, limit: int = 0) -> Iterator[list[Frames]]:
    """Cut a video into clips of ``length`` frames that begin ``stride`` frames apart.

    Args:
        frames: the video.
        length: frames of a clip.
        stride: frames between the beginnings of two clips, at least 1; ``length`` for clips side by side.
        limit: clips at most; 0 for as many as there are.

    Yields:
        Whole clips only. A video shorter than ``length`` gives none.
    """
    kept: list[Frames] = []
    first, given = 0, 0  # number of the first kept frame, clips given
    for number, frame in enumerate(frames):
        if number >= given * stride:
            kept.append(frame)
        else:
            first = number + 1
            continue
        if number + 1 - given * stride == length:
            yield kept[given * stride - first :]
            given += 1
            if given == limit:
                return
            drop = min(given * stride, number + 1) - first
            del kept[:drop]
            first += drop


def write_video(file: Path, video: Frames, frame_rate: float, *, crf: int = 16) -> None:
    """Write H.264 in MP4 that any player shows (yuv420p). Odd sizes lose their last row or column.

    Args:
        file: ends in .mp4.
        video: [frames, height, width, 3].
        frame_rate: frames per second.
        crf: x264's quality, 0 (nothing lost) to 51.

    Raises:
        StorageError: it cannot be written.
    """
    height, width = (size - size % 2 for size in video.shape[1:3])
    try:
        with av.open(str(file), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(1001))
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.options = {"crf": str(crf)}
            for frame in video[:, :height, :width]:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    except (av.FFmpegError, OSError) as error:
        raise StorageError(f"cannot write {file}: {error}") from error


def write_gif(file: Path, video: Frames, frame_rate: float) -> None:
    """Write a GIF that loops for ever.

    Raises:
        StorageError: it cannot be written.
    """
    palette = Image.fromarray(video.reshape(-1, *video.shape[2:])).quantize(256, dither=Image.Dither.NONE)
    images = [Image.fromarray(frame).quantize(palette=palette) for frame in video]
    # GIF counts hundredths of a second, and players slow down anything under two.
    duration = max(2, round(100 / frame_rate)) * 10
    try:
        images[0].save(
            file, format="GIF", save_all=True, append_images=images[1:], duration=duration, loop=0, disposal=1
        )
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error}") from error


def write_png(file: Path, picture: Frames) -> None:
    """Write one picture, [height, width, 3].

    Raises:
        StorageError: it cannot be written.
    """
    try:
        Image.fromarray(picture).save(file, format="PNG")
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error}") from error
