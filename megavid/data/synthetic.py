"""Procedural clips of moving shapes with true captions: training data with no file behind it.

Owns what clip ``index`` of a seed shows. A shape of one colour crosses a background of another; images show
it at rest. Every clip is drawn and encoded when it is read (milliseconds), so the set has a length and no
size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megavid.data.conditioning import condition_spec, with_known
from megavid.data.images import ImageEncoder
from megavid.data.sample import Bucket, ConditionSpec, Sample, Shape, TextSpec, TokenizerSpec, buckets_of_runs
from megavid.data.tokenizer import Frames, VideoTokenizer, latent_shape
from megavid.ops.philox import key_of, uniform_at

COLOURS = {
    "red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (235, 215, 50),
    "purple": (150, 60, 190), "orange": (240, 140, 30), "white": (240, 240, 240), "black": (20, 20, 20),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"right": (0.0, 1.0), "left": (0.0, -1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}
SIZES = (
    (17, 64, 64), (1, 64, 64), (9, 64, 96), (17, 96, 96), (5, 64, 64), (1, 96, 96), (13, 64, 96), (9, 96, 96),
)  # fmt: skip
"""Frames, height, width of the clips that runs train on. One in four is an image."""
FRAMES_PER_SECOND = 16.0
NUM_CLIPS = 4096


def mixed_sizes(
    resolutions: Sequence[tuple[int, int]], short_frames: int, long_frames: int
) -> tuple[tuple[int, int, int], ...]:
    """Sizes for ``SyntheticSource``: of ten clips five images, four short and one long, in all resolutions alike.

    Args:
        resolutions: (height, width).
        short_frames: frames of a short clip.
        long_frames: frames of a long one.
    """
    frames = 5 * (1,) + 4 * (short_frames,) + (long_frames,)
    return tuple((count, height, width) for count in frames for height, width in resolutions)


def caption_of(colour: str, shape: str, direction: str, background: str) -> str:
    """The caption; an empty ``direction`` is for images."""
    motion = f" moving {direction}" if direction else ""
    article = "an" if colour[0] in "aeiou" else "a"
    ground = "an" if background[0] in "aeiou" else "a"
    return f"{article} {colour} {shape}{motion} on {ground} {background} background"


def synthetic_captions() -> list[str]:
    """Every caption there is, in a fixed order: what the text encoder's vocabulary is trained on."""
    return [
        caption_of(colour, shape, direction, background)
        for colour in COLOURS
        for shape in SHAPES
        for direction in ("", *DIRECTIONS)
        for background in COLOURS
        if background != colour
    ]


@dataclass(frozen=True, slots=True)
class Scene:
    """What one clip shows.

    Attributes:
        colour: of the shape.
        background: colour behind it.
        shape: one of ``SHAPES``.
        direction: one of ``DIRECTIONS``; empty for an image.
        radius: part of the picture's shorter side.
        place: (row, column) of the middle at half time, in shorter sides.
        travel: way of the middle, in shorter sides.
    """

    colour: str
    background: str
    shape: str
    direction: str
    radius: float
    place: tuple[float, float]
    travel: float

    @property
    def caption(self) -> str:
        """True words about it."""
        return caption_of(self.colour, self.shape, self.direction, self.background)


def scene_of(seed: int, index: int, size: tuple[int, int, int]) -> Scene:
    """The scene of clip ``index``, a pure function of its arguments."""
    key = key_of(seed, "synthetic", index)
    colours = list(COLOURS)
    colour = colours.pop(int(uniform_at(key, 0) * len(colours)))
    background = colours[int(uniform_at(key, 1) * len(colours))]
    frames, height, width = size
    direction = list(DIRECTIONS)[int(uniform_at(key, 3) * len(DIRECTIONS))] if frames > 1 else ""
    radius = 0.14 + 0.12 * uniform_at(key, 4)
    short = min(height, width)
    # Slower than the room allows, so that the shape stays in the picture; longer clips travel further.
    room = np.array([height, width]) / short - 2 * radius
    towards = np.abs(DIRECTIONS[direction]) if direction else np.zeros(2)
    travel = float(towards @ room) * (0.5 + 0.5 * uniform_at(key, 5)) * min(1.0, 0.4 + frames / 20)
    slack = room - towards * travel
    row, column = radius + towards * travel / 2 + slack * [uniform_at(key, 6), uniform_at(key, 7)]
    return Scene(
        colour, background, SHAPES[int(uniform_at(key, 2) * len(SHAPES))], direction, radius,
        (float(row), float(column)), travel,
    )  # fmt: skip


def draw(scene: Scene, size: tuple[int, int, int]) -> Frames:
    """The clip, [frames, height, width, 3]; edges are smooth over one pixel."""
    frames, height, width = size
    short = min(height, width)
    time = np.linspace(-0.5, 0.5, frames) if frames > 1 else np.zeros(1)
    move_row, move_column = DIRECTIONS.get(scene.direction, (0.0, 0.0))
    row = (scene.place[0] + time * scene.travel * move_row) * short
    column = (scene.place[1] + time * scene.travel * move_column) * short
    y = (np.arange(height, dtype=np.float32) + 0.5)[None, :, None] - row[:, None, None].astype(np.float32)
    x = (np.arange(width, dtype=np.float32) + 0.5)[None, None, :] - column[:, None, None].astype(np.float32)
    radius = np.float32(scene.radius * short)
    # Distance to the edge in pixels, below 0 inside.
    match scene.shape:
        case "circle":
            distance = np.sqrt(x * x + y * y) - radius
        case "square":
            distance = np.maximum(np.abs(x), np.abs(y)) - radius * np.float32(0.85)
        case _:
            slope = np.abs(x) * np.float32(0.866) - y * np.float32(0.5)
            distance = np.maximum(slope, y) - radius * np.float32(0.55)
    # Coverage in 255ths looks its colour up in a table: a third of the time of mixing every pixel's colours.
    cover = np.clip(np.float32(128.0) - np.float32(255.0) * distance, 0.0, 255.0).astype(np.uint8)
    colour, background = (np.array(COLOURS[name]) for name in (scene.colour, scene.background))
    mixed = np.rint(background + np.linspace(0, 1, 256)[:, None] * (colour - background)).astype(np.uint8)
    video: Frames = mixed[cover]
    return video


class SyntheticSource:
    """Moving shapes as a data set.

    Args:
        seed: ``train.seed``.
        tokenizer: turns them into latents.
        text: the text encoder that goes with the captions.
        num_clips: length.
        sizes: frames, height and width; clip ``index`` has those of number ``index % len(sizes)``.
        known: rule of the frames that models are given; "" for none.
        images: encoder of known pictures; None for no features.
    """

    def __init__(
        self,
        seed: int,
        tokenizer: VideoTokenizer,
        text: TextSpec,
        num_clips: int = NUM_CLIPS,
        sizes: Sequence[tuple[int, int, int]] = SIZES,
        known: str = "",
        images: ImageEncoder | None = None,
    ) -> None:
        self._seed, self._tokenizer, self._num_clips = seed, tokenizer, num_clips
        self._known, self._images = known, images
        self._text = text
        self._sizes = tuple(sizes)
        self._shapes = [latent_shape(tokenizer.spec, *size) for size in self._sizes]

    @property
    def name(self) -> str:
        """For messages."""
        return "the synthetic data set"

    @property
    def tokenizer(self) -> TokenizerSpec:
        """Who makes the latents."""
        return self._tokenizer.spec

    @property
    def text(self) -> TextSpec:
        """The text encoder that goes with the captions."""
        return self._text

    @property
    def condition(self) -> ConditionSpec:
        """What clips carry of known frames."""
        return condition_spec(self._known, self._images)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Every clip once, by shape."""
        return buckets_of_runs([(self.shape(index), 1) for index in range(self._num_clips)])

    def __len__(self) -> int:
        return self._num_clips

    def shape(self, index: int) -> Shape:
        """Latent shape of a clip."""
        return self._shapes[index % len(self._sizes)]

    def sample_name(self, index: int) -> str:
        """Name for logs."""
        return f"synthetic:{index}"

    def read(self, index: int) -> Sample:
        """Draw and encode one clip."""
        size = self._sizes[index % len(self._sizes)]
        scene = scene_of(self._seed, index, size)
        video = draw(scene, size)
        latents_CFHW = self._tokenizer.encode(video)
        rate = FRAMES_PER_SECOND / self._tokenizer.spec.temporal
        meta = {"source": "synthetic", "licence": "none needed", "size": list(size)}
        sample = Sample(self.sample_name(index).replace(":", "_"), latents_CFHW, scene.caption, rate, None, meta)
        return with_known(sample, video, self._known, self._tokenizer, self._images) if self._known else sample

    def close(self) -> None:
        """Nothing is open."""
