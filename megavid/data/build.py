"""The data set, tokenizer and text encoder that a run's config asks for, and whether they fit its model.

Owns the choice between the kinds of ``data.kind`` and the checks that join data set and model.
"""

from functools import cache
from pathlib import Path

from megavid.config.schema import ModelConfig, RunConfig, require
from megavid.data.sample import ClipSource, TextSpec, TokenizerSpec
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
    require(
        config.model.task == "t2v",
        f"model.task = '{config.model.task}' cannot be trained yet: its conditioning is not in the batch; set 't2v'",
    )
    if config.data.kind == "synthetic":
        source: ClipSource = SyntheticSource(
            config.train.seed, build_tokenizer(config), spec_of(build_text_encoder(config))
        )
    else:
        source = ShardSource(Path(config.data.path))
    require_fit(source.tokenizer, source.text, config.model, source.name)
    return source


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
        channels = config.model.in_channels
        require(
            1 <= channels <= 64,
            f"model.in_channels = {channels} must be 1 to 64 with data.kind = 'synthetic': its clips are encoded by "
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
    for key, wanted, found, what in (
        ("model.in_channels", model.in_channels, tokenizer.channels, f"latent channels (tokenizer {tokenizer.name})"),
        ("model.out_channels", model.out_channels, tokenizer.channels, f"latent channels (tokenizer {tokenizer.name})"),
        ("model.text_size", model.text_size, text.width, f"numbers per text token (encoder {text.name})"),
        ("model.text_length", model.text_length, text.length, f"text tokens per caption (encoder {text.name})"),
    ):  # fmt: skip
        if wanted != found:
            raise DataError(
                f"{name} has {found} {what}, but {key} = {wanted}; set {key} to {found} or prepare the data again"
            )


@cache
def _synthetic_vocabulary() -> bytes:
    return train_sentencepiece(synthetic_captions())
