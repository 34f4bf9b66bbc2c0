"""What one pack holds and how many packs a step takes: the input of every closed form about work.

Owns the step from a clip in pixels to tokens. FLOPs, activation bytes and traffic take a ``Workload``, never pixels.
"""

import math
from dataclasses import dataclass

from megavid.config.schema import RunConfig, require

SPATIAL, TEMPORAL = 8, 4
"""Pixels and frames of one latent position of Wan 2.1's tokenizer (8 x 8 x 4, the first frame alone)."""
PACK_MULTIPLE = 96
"""Presets cut packs into multiples of this, so that 1, 2, 3, 4, 6, 8, ... ranks can share one."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The packs of a run, all alike.

    Attributes:
        clip_tokens: tokens of each clip of ONE pack; their sum is at most ``pack_tokens``.
        pack_tokens: tokens of a pack, padding included.
        packs_per_step: packs of one optimizer step, on all ranks together.
        name: for reports, such as ``81x480x832``.
    """

    clip_tokens: tuple[int, ...]
    pack_tokens: int
    packs_per_step: int
    name: str

    def __post_init__(self) -> None:
        require(
            bool(self.clip_tokens) and min(self.clip_tokens) >= 1,
            f"clips of workload '{self.name}' need at least one token each, got {self.clip_tokens}",
        )
        require(
            self.tokens <= self.pack_tokens,
            f"clips of workload '{self.name}' have {self.tokens} tokens, more than a pack of {self.pack_tokens}; "
            "raise data.pack_tokens",
        )

    @property
    def tokens(self) -> int:
        """Tokens of a pack that belong to clips."""
        return sum(self.clip_tokens)

    @property
    def padding(self) -> int:
        """Tokens of a pack that belong to no clip."""
        return self.pack_tokens - self.tokens

    @property
    def samples_per_step(self) -> int:
        """Clips of one optimizer step."""
        return self.packs_per_step * len(self.clip_tokens)


def tokens_of_clip(patch_size: tuple[int, int, int], frames: int, height: int, width: int) -> int:
    """Tokens of a video clip of ``frames`` x ``height`` x ``width`` pixels in Wan 2.1's latents.

    Raises:
        ConfigError: the size is not one that the tokenizer and the patches divide.
    """
    time, rows, columns = patch_size
    require(
        frames >= 1 and (frames - 1) % TEMPORAL == 0,
        f"--frames {frames} must be 1 more than a multiple of {TEMPORAL}, as the video tokenizer takes them; "
        f"set {max(frames - 1, 0) // TEMPORAL * TEMPORAL + 1}",
    )
    for flag, size, patch in (("--height", height, rows), ("--width", width, columns)):
        step = SPATIAL * patch
        require(size >= step and size % step == 0, f"{flag} {size} must be a multiple of {step} pixels")
    latent_frames = 1 + (frames - 1) // TEMPORAL
    require(
        latent_frames % time == 0,
        f"--frames {frames} gives {latent_frames} latent frames, of which model.patch_size takes {time} at a time",
    )
    return latent_frames // time * (height // (SPATIAL * rows)) * (width // (SPATIAL * columns))


def workload_of_clip(config: RunConfig, frames: int, height: int, width: int) -> Workload:
    """One clip of this size in each pack, as long as the ranks of ``config.parallel`` can share.

    Raises:
        ConfigError: no such clip, see ``tokens_of_clip``.
    """
    tokens = tokens_of_clip(config.model.patch_size, frames, height, width)
    unit = math.lcm(PACK_MULTIPLE, config.parallel.tensor * config.parallel.context)
    return Workload(
        clip_tokens=(tokens,),
        pack_tokens=-(-tokens // unit) * unit,
        packs_per_step=config.train.global_batch_size,
        name=f"{frames}x{height}x{width}",
    )


def workload_of_run(config: RunConfig) -> Workload:
    """What ``config`` trains on at most: one clip that fills each pack."""
    tokens = config.data.pack_tokens
    return Workload((tokens,), tokens, config.train.global_batch_size, f"packs of {tokens} tokens")
