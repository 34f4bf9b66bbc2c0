"""The data set, tokenizer and text encoder that a run's config asks for, and whether they fit its model.

Owns the choice between the kinds of ``data.kind`` and the checks that join data set and model.
"""

from functools import cache
from pathlib import Path

from megavid.config.schema import ModelConfig, RunConfig, require
from megavid.data.images import ColourEncoder
from megavid.data.sample import ClipSource, ConditionSpec, TextSpec, TokenizerSpec
from megavid.data.shard_format import read_dataset
from megavid.data.shards import ShardSource
from megavid.data.synthetic import SyntheticSource, synthetic_captions
from megavid.data.text import (
    SentencePieceEncoder,
    TextEncoder,
    spec_of,
    text_encoder_of_spec,
    train_sentencepiece,
)
from megavid.data.tokenizer import DctTokenizer, VideoTokenizer, tokenizer_of_spec
from megavid.errors import DataError


def build_source(config: RunConfig) -> ClipSource:
    """Open the data set of a run and check that it fits the model.

    Raises:
        ConfigError: the model cannot take synthetic clips.
        DataError: a shard is missing or truncated, or was made for a model of other channels or text features.
    """
    if config.data.kind == "synthetic":
        source: ClipSource = SyntheticSource(
            config.train.seed, build_tokenizer(config), spec_of(build_text_encoder(config)),
            known=_synthetic_rule(config.model), images=_synthetic_images(config.model),
        )  # fmt: skip
    else:
        source = ShardSource(Path(config.data.path), reads_known=config.model.task != "t2v")
    require_fit(source.tokenizer, source.text, config.model, source.name)
    require_known(source.tokenizer, source.condition, config.model, source.name)
    return source


def _synthetic_rule(model: ModelConfig) -> str:
    """Known frames of procedural clips: what the model reads."""
    if model.task != "i2v":
        return ""
    return "first_last" if model.image_positions else "first"


def _synthetic_images(model: ModelConfig) -> ColourEncoder | None:
    """The image encoder of procedural clips."""
    pictures = 2 if model.image_positions else 1
    require(
        model.image_tokens % pictures == 0,
        f"model.image_length = {model.image_length} must be even with data.kind = 'synthetic' and "
        "model.image_positions > 0: its clips show the first frame and the last one",
    )
    return ColourEncoder(model.image_size, model.image_length // pictures) if model.image_size else None


def build_text_encoder(config: RunConfig) -> TextEncoder:
    """The text encoder of a run, without opening shards: for training, and for prompts later.

    Raises:
        ConfigError: the data set names an encoder that there is not.
        DataError: its files are missing, or are another encoder's.
    """
    if config.data.kind == "synthetic":
        return SentencePieceEncoder(_synthetic_vocabulary(), config.model.text_size, config.model.text_length)
    folder = Path(config.data.path)
    return text_encoder_of_spec(read_dataset(folder).text, folder)


def build_tokenizer(config: RunConfig, weights: str = "") -> VideoTokenizer:
    """The tokenizer of a run, without opening shards: for decoding what the model makes.

    Args:
        config: the run.
        weights: folder of a tokenizer that has weights.

    Raises:
        ConfigError: the tokenizer has not that many channels, or needs weights.
        DataError: the weights are another tokenizer's.
    """
    if config.data.kind == "synthetic":
        channels = config.model.out_channels
        require(
            1 <= channels <= 64,
            f"model.out_channels = {channels} must be 1 to 64 with data.kind = 'synthetic': its clips are encoded by "
            "tokenizer dct",
        )
        return DctTokenizer(channels)
    return tokenizer_of_spec(read_dataset(Path(config.data.path)).tokenizer, weights)


def require_fit(tokenizer: TokenizerSpec, text: TextSpec, model: ModelConfig, name: str) -> None:
    """Refuse a data set that was made for a model of another shape.

    Args:
        tokenizer: of the data set.
        text: of the data set.
        model: the model.
        name: what the data set is called.

    Raises:
        DataError: channels, text width or text length differ.
    """
    latent = f"latent channels (tokenizer {tokenizer.name})"
    given = model.in_channels if model.task != "i2v" else model.out_channels
    for key, wanted, found, what in (
        ("model.in_channels", given, tokenizer.channels, latent),
        ("model.out_channels", model.out_channels, tokenizer.channels, latent),
        ("model.text_size", model.text_size, text.width, f"numbers per text token (encoder {text.name})"),
        ("model.text_length", model.text_length, text.length, f"text tokens per caption (encoder {text.name})"),
    ):  # fmt: skip
        if wanted != found:
            raise DataError(
                f"{name} has {found} {what}, but {key} = {wanted}; set {key} to {found} or prepare the data again"
            )


def require_known(tokenizer: TokenizerSpec, condition: ConditionSpec, model: ModelConfig, name: str) -> None:
    """Refuse a data set that does not carry what the model is given of a clip.

    Args:
        tokenizer: of the data set.
        condition: of the data set.
        model: the model.
        name: what the data set is called.

    Raises:
        ConfigError: the mask has not as many channels as a latent frame has frames.
        DataError: known frames or image features are missing, or of another encoder's shape.
    """
    if model.task != "i2v":
        return
    require(
        model.mask_channels == tokenizer.temporal,
        f"model.in_channels = {model.in_channels} must be {2 * model.out_channels + tokenizer.temporal} with "
        f"model.task = 'i2v': twice model.out_channels, and a mask of the {tokenizer.temporal} frames that "
        f"tokenizer {tokenizer.name} makes one of",
    )
    if not condition.known:
        raise DataError(
            f"{name} carries no latents of known frames, which model.task = 'i2v' reads; prepare the data again with "
            "--known first"
        )
    found = (condition.image_tokens, condition.width)
    if model.image_size and found != (model.image_length, model.image_size):
        raise DataError(
            f"{name} carries {found[0]} image tokens of width {found[1]}, but model.image_length x model.image_size = "
            f"{model.image_length} x {model.image_size}; prepare the data again with --image-encoder (and --known "
            "first_last for models of two images)"
        )


@cache
def _synthetic_vocabulary() -> bytes:
    return train_sentencepiece(synthetic_captions())
