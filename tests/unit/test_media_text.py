"""Text encoders: determinism, shapes, and what a caption's features depend on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megavid.data.text import SentencePieceEncoder, Umt5Encoder, spec_of, text_encoder_of_spec, train_sentencepiece
from megavid.errors import ConfigError, DataError

CAPTIONS = [
    "a grey rabbit crawls out of a dark burrow",
    "a man with a red bow tie talks in a car",
    "a red circle moves left of a blue square",
    "a blue circle moves left of a red square",
]


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_sentencepiece(CAPTIONS)


def test_training_is_deterministic(model: bytes) -> None:
    assert train_sentencepiece(iter(CAPTIONS)) == model


def test_features_are_padded_and_of_about_unit_mean_square(model: bytes) -> None:
    encoder = SentencePieceEncoder(model, width=64, length=16)
    features = encoder.encode(CAPTIONS)
    assert features.shape == (4, 16, 64)
    assert features.dtype == torch.float32
    used = len(encoder.ids(CAPTIONS[0])) + 1
    assert bool((features[0, used:] == 0).all())
    assert float(features[0, :used].square().mean()) == pytest.approx(1, abs=0.2)


def test_known_words_are_whole_pieces(model: bytes) -> None:
    assert len(SentencePieceEncoder(model, 8, 32).ids(CAPTIONS[0])) == len(CAPTIONS[0].split())


def test_the_empty_caption_is_not_zero_and_differs_from_all_others(model: bytes) -> None:
    features = SentencePieceEncoder(model, 16, 24).encode(["", *CAPTIONS])
    assert float(features[0, 0].abs().sum()) > 0
    assert bool((features[0, 1:] == 0).all())
    assert all(not torch.equal(features[0], other) for other in features[1:])


def test_word_order_matters(model: bytes) -> None:
    features = SentencePieceEncoder(model, 32, 24).encode(CAPTIONS[2:])
    assert not torch.equal(features[0], features[1])
    # The same words: only their places tell the two apart.
    assert float((features[0].sum(0) - features[1].sum(0)).abs().max()) < 1e-4


def test_unknown_words_and_scripts_fall_back_to_bytes(model: bytes) -> None:
    encoder = SentencePieceEncoder(model, 16, 64)
    one, other = encoder.encode(["zyzzyva \u6f22", "zyzzyva \u5b57"])
    assert not torch.equal(one, other)


def test_features_do_not_depend_on_what_else_is_encoded(model: bytes) -> None:
    together = SentencePieceEncoder(model, 16, 24).encode(CAPTIONS)
    alone = [SentencePieceEncoder(model, 16, 24).encode([caption])[0] for caption in reversed(CAPTIONS)]
    assert torch.equal(together, torch.stack(alone[::-1]))


def test_a_piece_has_the_same_vector_in_every_vocabulary(model: bytes) -> None:
    other = train_sentencepiece([*CAPTIONS, "a green triangle spins"] * 2)
    one, two = (SentencePieceEncoder(bytes_of, 16, 24) for bytes_of in (model, other))
    assert one.version != two.version
    assert torch.equal(one.encode(CAPTIONS), two.encode(CAPTIONS))


def test_long_captions_are_cut_and_end(model: bytes) -> None:
    encoder = SentencePieceEncoder(model, 16, 4)
    cut, same = encoder.encode(["a red circle moves left", "a red circle talks in a car"])
    assert torch.equal(cut, same)


def test_the_seed_changes_the_vectors(model: bytes) -> None:
    one, two = (SentencePieceEncoder(model, 16, 8, seed).encode(["a"]) for seed in (0, 1))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("captions", [[], [""], ["x"], ["a b", "a b"], ["\u6f22\u5b57"]])
def test_any_captions_give_a_vocabulary(captions: list[str]) -> None:
    encoder = SentencePieceEncoder(train_sentencepiece(captions), 8, 8)
    assert encoder.encode(["anything at all"]).shape == (1, 8, 8)


def test_spec_round_trip(tmp_path: Path, model: bytes) -> None:
    encoder = SentencePieceEncoder(model, 16, 12, seed=7)
    (tmp_path / "text.model").write_bytes(model)
    spec = spec_of(encoder, "text.model")
    again = text_encoder_of_spec(spec, tmp_path)
    assert torch.equal(again.encode(CAPTIONS), encoder.encode(CAPTIONS))
    (tmp_path / "text.model").write_bytes(train_sentencepiece(CAPTIONS[:2]))
    with pytest.raises(DataError, match="was prepared with version"):
        text_encoder_of_spec(spec, tmp_path)
    (tmp_path / "text.model").write_bytes(b"damaged")
    with pytest.raises(DataError, match="no SentencePiece model"):
        text_encoder_of_spec(spec, tmp_path)
    with pytest.raises(DataError, match=r"other\.model cannot be read"):
        text_encoder_of_spec(replace(spec, file="other.model"), tmp_path)
    with pytest.raises(ConfigError, match="'clip' of"):
        text_encoder_of_spec(replace(spec, name="clip"), tmp_path)


def test_umt5_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"transformers|config\.json"):
        Umt5Encoder(tmp_path)
