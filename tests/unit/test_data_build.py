"""What a config asks for is what is built, and a data set for another model is refused in one line."""

import dataclasses
from pathlib import Path

import pytest

from megavid.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from megavid.data.build import build_source, build_text_encoder, build_tokenizer
from megavid.data.sample import Sample
from megavid.data.shard_writer import ShardWriter, write_dataset
from megavid.data.synthetic import SIZES, draw, scene_of, synthetic_captions
from megavid.data.text import SentencePieceEncoder, spec_of, train_sentencepiece
from megavid.data.tokenizer import DctTokenizer
from megavid.errors import ConfigError, DataError
from tests.support.loading import loader_of

SMALL = ModelConfig(in_channels=16, out_channels=16, text_size=24, text_length=20)


def synthetic() -> RunConfig:
    return RunConfig(model=SMALL, train=TrainConfig(global_batch_size=8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of 20 synthetic clips, as `megavid prepare` leaves it."""
    path = tmp_path_factory.mktemp("shards")
    tokenizer = DctTokenizer(16)
    text = SentencePieceEncoder(train_sentencepiece(synthetic_captions()[:50]), 24, 20)
    (path / "text.model").write_bytes(text.model)
    with ShardWriter(path, "shard_00000", tokenizer.spec) as writer:
        for index in range(20):
            size = SIZES[index % len(SIZES)]
            scene = scene_of(1, index, size)
            writer.add(Sample(f"clip{index}", tokenizer.encode(draw(scene, size)), scene.caption, 4.0))
    write_dataset(path, tokenizer.spec, spec_of(text, "text.model"), ["shard_00000"])
    return path


def of_shards(folder: Path, **model: int) -> RunConfig:
    return dataclasses.replace(
        synthetic(),
        model=dataclasses.replace(SMALL, **model),
        data=DataConfig(kind="shards", path=str(folder), validation_samples=2),
    )


def test_synthetic_run_needs_nothing_on_disk() -> None:
    with loader_of(synthetic(), dp_rank=1, dp_size=2) as loader:
        batches = next(loader)
        captions = loader.source.read(batches[0].clips[0].sample).caption
    assert len(batches) == 4
    for batch in batches:
        assert batch.clean_BTP.shape == (1, 384, 64)
        assert batch.text_GLD.shape == (len(batch.clips), 20, 24)
        assert 0.1 < float(batch.clean_BTP.square().mean()) < 10
    assert (batches[0].text_GLD[0] == build_text_encoder(synthetic()).encode([captions])[0]).all()
    assert build_tokenizer(synthetic()).spec == loader.source.tokenizer


def test_tiny_packs_are_well_filled() -> None:
    with loader_of(synthetic(), dp_rank=0, dp_size=1) as loader:
        batches = [batch for _ in range(6) for batch in next(loader)]
    assert sum(batch.num_tokens for batch in batches) > 0.9 * 384 * len(batches)


def test_prepared_shards_train(folder: Path) -> None:
    with loader_of(of_shards(folder), dp_rank=0, dp_size=1) as loader:
        for _ in range(3):
            assert all(batch.clips for batch in next(loader))
        assert loader.num_bad_samples == 0
        assert [clip.draw for batch in loader.validation_batches() for clip in batch.clips] == [0, 1]
        assert loader.sample_name(3).startswith("shard_00000.tar:clip")
    assert build_tokenizer(of_shards(folder)).spec == DctTokenizer(16).spec


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [("in_channels", 8, 16), ("out_channels", 8, 16), ("text_size", 32, 24), ("text_length", 8, 20)],
)
def test_data_set_for_another_model_is_refused(folder: Path, key: str, value: int, found: int) -> None:
    with pytest.raises(DataError, match=f"{folder} has {found} .* but model.{key} = {value}; set model.{key}"):
        build_source(of_shards(folder, **{key: value}))


def test_missing_folder_and_vocabulary_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset.json is missing: .* is not a folder of shards"):
        build_source(of_shards(tmp_path / "none"))
    (tmp_path / "dataset.json").write_bytes((folder / "dataset.json").read_bytes())
    with pytest.raises(DataError, match=r"vocabulary .*text.model cannot be read"):
        build_text_encoder(of_shards(tmp_path))


def test_synthetic_clips_need_a_model_of_at_most_64_channels() -> None:
    model = dataclasses.replace(SMALL, in_channels=80, out_channels=80)
    with pytest.raises(ConfigError, match=r"model.out_channels = 80 must be 1 to 64"):
        build_source(dataclasses.replace(synthetic(), model=model))
