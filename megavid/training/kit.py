"""What sampling needs beside weights: which tokenizer decodes, which text encoder reads prompts, and the usual size.

Owns ``sampling.json`` and the vocabulary that every checkpoint carries, so that sampling needs no shards. Encoders with
weights of their own (UMT5, Wan's VAE) are named, not copied.
"""

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavid.checkpoint import Checkpoint
from megavid.checkpoint.manifest import decode, read_checked
from megavid.config.load import from_table
from megavid.config.schema import RunConfig
from megavid.data.sample import BadSample, ClipSource, ConditionSpec, Sample, Shape, TextSpec, TokenizerSpec
from megavid.data.text import SentencePieceEncoder, TextEncoder, spec_of, text_encoder_of_spec
from megavid.data.tokenizer import VideoTokenizer, tokenizer_of_spec
from megavid.errors import CheckpointError

KIT = "sampling.json"
VOCABULARY = "vocabulary.model"


@dataclass(frozen=True, slots=True)
class ClipSize:
    """A usual clip of the data set, in pixels.

    Attributes:
        frames: frames of video.
        height: rows.
        width: columns.
        frame_rate: frames of video per second.
    """

    frames: int
    height: int
    width: int
    frame_rate: float


@dataclass(frozen=True)
class SamplingKit:
    """See the module's text.

    Attributes:
        tokenizer: who made the latents.
        text_encoder: reads prompts.
        text: its identity; a relative file lies in the checkpoint.
        size: what is sampled where nobody says otherwise.
        condition: what the model was given of its clips, and who made it.
    """

    tokenizer: TokenizerSpec
    text_encoder: TextEncoder
    text: TextSpec
    size: ClipSize
    condition: ConditionSpec = dataclasses.field(default_factory=ConditionSpec)

    @classmethod
    def of(cls, config: RunConfig, source: ClipSource, text_encoder: TextEncoder) -> "SamplingKit":
        """The kit of a run."""
        is_embedded = isinstance(text_encoder, SentencePieceEncoder)
        named = str((Path(config.data.path) / source.text.file).resolve())
        text = spec_of(text_encoder, VOCABULARY if is_embedded else named)
        condition = source.condition if config.model.task != "t2v" else ConditionSpec()
        size = usual_size(source, config.model.latent_frame_rate)
        return cls(source.tokenizer, text_encoder, text, size, condition)

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> "SamplingKit":
        """The kit that a checkpoint carries.

        Raises:
            CheckpointError: it carries none, or a damaged one.
            DataError: an encoder that is only named is not where it was.
        """
        if KIT not in checkpoint.manifest.files:
            raise CheckpointError(
                f"{checkpoint.folder} carries no {KIT}: its weights come from elsewhere and no run has trained them, "
                "so nothing says which video tokenizer and text encoder go with them; sample the pipeline they are of, "
                f"or make one: megavid convert {checkpoint.folder} DST --to diffusers --pipeline BASE"
            )
        table = decode(read_checked(checkpoint.folder, KIT, checkpoint.manifest), checkpoint.folder / KIT)
        text = from_table(TextSpec, table["text"])
        if text.file == VOCABULARY:
            read_checked(checkpoint.folder, VOCABULARY, checkpoint.manifest)
        text_encoder = text_encoder_of_spec(text, checkpoint.folder)
        tokenizer = from_table(TokenizerSpec, table["tokenizer"])
        condition = from_table(ConditionSpec, table.get("condition", {}))
        return cls(tokenizer, text_encoder, text, from_table(ClipSize, table["size"]), condition)

    def files(self) -> dict[str, bytes]:
        """Content of the files that a checkpoint carries, by name."""
        table: dict[str, Any] = {
            "tokenizer": dataclasses.asdict(self.tokenizer),
            "text": dataclasses.asdict(self.text),
            "size": dataclasses.asdict(self.size),
        }
        if self.condition.known:
            table["condition"] = dataclasses.asdict(self.condition)
        files = {KIT: (json.dumps(table, indent=1) + "\n").encode()}
        if isinstance(self.text_encoder, SentencePieceEncoder):
            files[VOCABULARY] = self.text_encoder.model
        return files

    def video_tokenizer(self, folder: str = "") -> VideoTokenizer:
        """The tokenizer, ready to decode; ``folder`` holds its weights where it has some."""
        return tokenizer_of_spec(self.tokenizer, folder)


def trained_tokenizer(checkpoint: Checkpoint) -> TokenizerSpec | None:
    """Whose latents a checkpoint's model was trained on; None for one without a kit, such as converted weights."""
    if KIT not in checkpoint.manifest.files:
        return None
    table = decode(read_checked(checkpoint.folder, KIT, checkpoint.manifest), checkpoint.folder / KIT)
    return from_table(TokenizerSpec, table["tokenizer"])


def usual_size(source: ClipSource, latent_frame_rate: float) -> ClipSize:
    """Size of the most frequent videos of a data set (of its images, where it has no video)."""
    spec = source.tokenizer
    bucket = max(source.buckets, key=lambda bucket: (bucket.shape[1] > 1, len(bucket), bucket.shape))
    with contextlib.suppress(BadSample):  # the reader will name it; the model's own rate is as good
        latent_frame_rate = source.read(int(bucket.starts[0])).frame_rate
    return _size(bucket.shape, spec, latent_frame_rate)


def size_of(sample: Sample, spec: TokenizerSpec) -> ClipSize:
    """Size of the clip that a sample holds the latents of."""
    return _size(sample.shape, spec, sample.frame_rate)


def _size(shape: Shape, spec: TokenizerSpec, latent_frame_rate: float) -> ClipSize:
    _, frames, height, width = shape
    return ClipSize(
        frames=1 + (frames - 1) * spec.temporal,
        height=height * spec.spatial,
        width=width * spec.spatial,
        frame_rate=latent_frame_rate * spec.temporal,
    )
