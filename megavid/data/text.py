"""Text encoders: captions to features.

Owns the ``TextEncoder`` protocol, the embedded ``SentencePieceEncoder`` (a vocabulary trained on the captions at
hand and seeded, frozen vectors: nothing to download) and the adapter for UMT5/T5. Which caption is dropped is
``diffusion``'s.
"""

import hashlib
import io
import itertools
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import torch
from torch import Tensor

from megavid.data.sample import TextSpec
from megavid.errors import ConfigError, DataError
from megavid.ops.philox import key_of, normal

VOCABULARY_SIZE = 8000
TRAINING_CAPTIONS = 1_000_000
"""Captions that a vocabulary is trained on at most; the first ones."""

WHOLE_WORDS = 4000
"""Words that are pieces of their own at most; the most frequent ones."""

_END = "</s>"
_WORD = re.compile(r"\w+")
_WORD_START = "\u2581"  # what SentencePiece writes for a space
# Shares of the unit mean square: words tell captions apart, places only tell "a over b" from "b over a".
_WORD_SHARE, _PLACE_SHARE = 0.8, 0.2


class TextEncoder(Protocol):
    """Encodes captions into features of one shape; the empty caption has features of its own."""

    @property
    def name(self) -> str:
        """Its kind, such as "sentencepiece"."""
        ...

    @property
    def version(self) -> str:
        """What else its features depend on, as short text."""
        ...

    @property
    def width(self) -> int:
        """Width of the features."""
        ...

    @property
    def length(self) -> int:
        """Text tokens of a caption (L)."""
        ...

    def ids(self, caption: str) -> list[int]:
        """Token ids of a caption in the encoder's vocabulary, without padding."""
        ...

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Features of G captions, [G, L, width] fp32 of about unit mean square, zero after the caption's last token."""
        ...


class SentencePieceEncoder:
    """Pieces of words as seeded random vectors: a frozen table that a model can tell captions apart by.

    The vector of a piece is a pure function of (seed, its text), that of a place of (seed, its number); their
    weighted sum has unit mean square. An end token is appended, so the empty caption is not all zero. Longer
    captions are cut.

    Args:
        model: bytes of a SentencePiece model.
        width: width of the features.
        length: text tokens of a caption.
        seed: of the vectors.

    Raises:
        DataError: the bytes are no SentencePiece model.
    """

    name = "sentencepiece"

    def __init__(self, model: bytes, width: int, length: int, seed: int = 0) -> None:
        self.model, self._width, self._length, self._seed = model, width, length, seed
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise DataError(f"the text encoder's {len(model)} bytes are no SentencePiece model: {error}") from error
        place = normal(key_of(seed, "text place"), 0, length * width).view(length, width)
        self._place_LD = place * _PLACE_SHARE**0.5
        self._words: dict[str, Tensor] = {}

    @property
    def version(self) -> str:
        """Hash of the vocabulary, and the seed."""
        return f"{hashlib.blake2b(self.model, digest_size=8).hexdigest()}-{self._seed}"

    @property
    def width(self) -> int:
        """Width of the features."""
        return self._width

    @property
    def length(self) -> int:
        """Text tokens of a caption (L)."""
        return self._length

    @property
    def vocabulary_size(self) -> int:
        """Pieces of the vocabulary."""
        return int(self._pieces.get_piece_size())

    def ids(self, caption: str) -> list[int]:
        """Token ids of a caption, without the end token, not cut."""
        return [int(number) for number in self._pieces.encode(caption)]

    def encode(self, captions: Sequence[str]) -> Tensor:
        """See ``TextEncoder.encode``."""
        features_GLD = torch.zeros(len(captions), self._length, self._width)
        for row, caption in enumerate(captions):
            pieces = [*self._pieces.encode(caption, out_type=str)[: self._length - 1], _END]
            words = torch.stack([self._word(piece) for piece in pieces])
            features_GLD[row, : len(pieces)] = words + self._place_LD[: len(pieces)]
        return features_GLD

    def _word(self, piece: str) -> Tensor:
        if piece not in self._words:
            self._words[piece] = normal(key_of(self._seed, "text piece", piece), 0, self._width) * _WORD_SHARE**0.5
        return self._words[piece]


def train_sentencepiece(captions: Iterable[str]) -> bytes:
    """Train a vocabulary; the same captions in the same order give the same bytes.

    The words that occur most often are whole pieces. The trainer by itself proposes only what occurs in two
    different words, so with few captions it would cut every other word into letters.

    Args:
        captions: any number; empty ones are left out, and with none at all the vocabulary holds bytes only.

    Returns:
        The SentencePiece model: at most ``VOCABULARY_SIZE`` pieces, and a byte fallback, so that nothing is unknown.
    """
    used = [caption for caption in itertools.islice(captions, TRAINING_CAPTIONS) if caption.strip()]
    counts = Counter(word for caption in used for word in _WORD.findall(unicodedata.normalize("NFKC", caption)))
    words = sorted(counts, key=lambda word: (-counts[word], word))[:WHOLE_WORDS]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # Letters by themselves: the trainer fails on a corpus that whole words cover to the last letter.
        sentence_iterator=itertools.chain([" ".join(string.printable.strip())], used),
        model_writer=model,
        vocab_size=VOCABULARY_SIZE,
        user_defined_symbols=[_WORD_START + word for word in words],
        byte_fallback=True,
        hard_vocab_limit=False,  # few captions give fewer pieces
        max_sentence_length=1 << 16,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


class Umt5Encoder:
    """UMT5 or T5 (transformers) from a local folder, as Wan uses it: features after the caption's end are zero.

    Args:
        folder: holds ``config.json``, weights and the tokenizer (or, as in a diffusers pipeline, it lies in
            ``../tokenizer``). length: text tokens of a caption; Wan: 512. device: where to encode. dtype: of the
            weights.

    Raises:
        DataError: transformers is missing, or the folder cannot be used.
    """

    name = "umt5"

    def __init__(
        self, folder: Path, length: int = 512, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> None:
        try:
            import transformers
        except ImportError as error:
            raise DataError(
                f"text encoder {folder} needs transformers, which is not installed; pip install 'megavid[inference]'"
            ) from error
        try:
            config: dict[str, Any] = json.loads((folder / "config.json").read_text())
            kind = str(config["model_type"])
            width, layers = int(config["d_model"]), int(config["num_layers"])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder} holds no UMT5 or T5 config.json ({error}); change --text-encoder") from error
        if kind not in ("umt5", "t5"):
            raise DataError(f"{folder} holds a {kind}; a text encoder is umt5 or t5; change --text-encoder")
        model_class = transformers.UMT5EncoderModel if kind == "umt5" else transformers.T5EncoderModel
        sibling = folder.parent / "tokenizer"
        try:
            # local_files_only: a misspelt folder must not turn into a download.
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                str(sibling if sibling.is_dir() else folder), local_files_only=True
            )
            self._model: Any = model_class.from_pretrained(
                str(folder), dtype=dtype, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder} cannot be read as a {kind}: {error}".splitlines()[0]) from error
        self._model.to(device).eval()
        self._width, self._length, self._device = width, length, device
        self._version = f"{kind}-{layers}x{width}"

    @property
    def version(self) -> str:
        """Kind and size."""
        return self._version

    @property
    def width(self) -> int:
        """Width of the features."""
        return self._width

    @property
    def length(self) -> int:
        """Text tokens of a caption (L)."""
        return self._length

    def ids(self, caption: str) -> list[int]:
        """See ``TextEncoder.ids``; the end token is one of them."""
        ids: list[int] = self._tokenizer(_clean(caption), max_length=self._length, truncation=True).input_ids
        return ids

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """See ``TextEncoder.encode``."""
        tokens = self._tokenizer(
            [_clean(caption) for caption in captions], padding="max_length", max_length=self._length, truncation=True,
            add_special_tokens=True, return_attention_mask=True, return_tensors="pt",
        ).to(self._device)  # fmt: skip
        hidden = self._model(tokens.input_ids, tokens.attention_mask).last_hidden_state.float()
        features_GLD: Tensor = (hidden * tokens.attention_mask[..., None]).cpu()
        return features_GLD


def _clean(caption: str) -> str:
    """As Wan's pipeline cleans prompts, short of repairing broken Unicode."""
    return " ".join(caption.split())


def spec_of(encoder: TextEncoder, file: str = "") -> TextSpec:
    """What a data set says of its text encoder; ``file`` is its model file or folder."""
    return TextSpec(encoder.name, encoder.version, encoder.width, encoder.length, file)


def text_encoder_of_spec(spec: TextSpec, folder: Path, device: str = "cpu") -> TextEncoder:
    """The text encoder of a data set.

    Args:
        spec: what the data set says of it.
        folder: the data set's; a relative ``spec.file`` lies in it.
        device: where an encoder with weights computes.

    Raises:
        DataError: its files are missing, or are another encoder's.
        ConfigError: no such encoder.
    """
    file = folder / spec.file
    if spec.name == "sentencepiece":
        seed = spec.version.rpartition("-")[2]
        try:
            model = file.read_bytes()
        except OSError as error:
            raise DataError(f"the text encoder's vocabulary {file} cannot be read: {error.strerror}") from error
        encoder: TextEncoder = SentencePieceEncoder(
            model, spec.width, spec.length, int(seed) if seed.isdecimal() else 0
        )
    elif spec.name == "umt5":
        encoder = Umt5Encoder(file, spec.length, device)
    else:
        raise ConfigError(f"text encoder {spec.name!r} of {folder} is unknown; it is sentencepiece or umt5")
    if (encoder.version, encoder.width) != (spec.version, spec.width):
        raise DataError(
            f"{file} is text encoder version {encoder.version} of width {encoder.width}, "
            f"but {folder} was prepared with version {spec.version} of width {spec.width}"
        )
    return encoder
