"""Shards: what is written is read back, by us and by tarfile, and no damage goes unseen."""

import json
import os
import tarfile
from pathlib import Path

import pytest
import torch

from megavid.data.sample import BadSample, Sample, TokenizerSpec
from megavid.data.shard_format import write_aside
from megavid.data.shard_writer import ShardWriter, finished_shard, shard_name, write_dataset
from megavid.data.shards import ShardSource
from megavid.errors import DataError, StorageError
from tests.support.data_stubs import IMAGE, LONG, MIXED, SHORT, TEXT, TOKENIZER, make_sample, write_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards")


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def offset_of(file: Path, member: str) -> int:
    with tarfile.open(file) as tar:
        return tar.getmember(member).offset_data


def test_samples_come_back_bitwise(folder: Path) -> None:
    source = ShardSource(folder)
    assert len(source) == 41
    assert {bucket.shape: len(bucket) for bucket in source.buckets} == {IMAGE: 14, SHORT: 12, LONG: 15}
    keys = []
    for index in range(len(source)):
        sample = source.read(index)
        number = int(sample.key.removeprefix("clip_"))
        expected = make_sample(number, sample.shape)
        assert sample.shape == source.shape(index)
        assert torch.equal(sample.latents_CFHW, expected.latents_CFHW)
        assert (sample.caption, sample.frame_rate) == (expected.caption, 4.0)
        assert sample.meta["licence"] == "CC0"
        assert source.sample_name(index).endswith(f".tar:{sample.key}")
        keys.append(sample.key)
    assert sorted(keys) == [f"clip_{number:05d}" for number in range(41)]
    for bucket in source.buckets:
        members = torch.arange(len(bucket)).numpy()
        indices = bucket.samples(members).tolist()
        assert all(source.shape(index) == bucket.shape for index in indices)
        assert [bucket.member(index) for index in indices] == members.tolist()
    assert not list(source.verify())
    assert sorted(source.captions()) == sorted(make_sample(n, IMAGE).caption for n in range(41))
    source.close()


def test_tarfile_reads_a_shard_as_webdataset_would(folder: Path) -> None:
    with tarfile.open(folder / "shard_00000.tar", "r|") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert list(members)[:2] == ["clip_00000.latent", "clip_00000.json"]
    values = json.loads(members["clip_00003.json"])
    assert values["tokenizer"] == {"name": "stub", "version": "1"}
    latents = torch.frombuffer(bytearray(members["clip_00003.latent"]), dtype=torch.bfloat16)
    assert torch.equal(latents.reshape(values["shape"]), make_sample(3, IMAGE).latents_CFHW)


def test_text_encoded_ahead_comes_back(tmp_path: Path) -> None:
    features = torch.arange(12.0).reshape(3, 4).bfloat16()
    with ShardWriter(tmp_path, "shard_00000", TOKENIZER) as writer:
        writer.add(Sample("a", torch.zeros(IMAGE), "words", 4.0, features))
    write_dataset(tmp_path, TOKENIZER, TEXT, ["shard_00000"])
    text_LD = ShardSource(tmp_path).read(0).text_LD
    assert text_LD is not None
    assert torch.equal(text_LD, features)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_shards(tmp_path / name) for name in ("a", "b"))
    for file in sorted(first.iterdir()):
        assert file.read_bytes() == (second / file.name).read_bytes()


def test_shard_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fails() -> None:
        with ShardWriter(tmp_path, "shard_00000", TOKENIZER) as writer:
            writer.add(make_sample(0, IMAGE))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert not list(tmp_path.iterdir())
    assert finished_shard(tmp_path, "shard_00000") is None
    with ShardWriter(tmp_path, "shard_00000", TOKENIZER) as writer:
        writer.add(make_sample(0, IMAGE))
    assert finished_shard(tmp_path, "shard_00000") is not None
    (tmp_path / "shard_00000.idx").write_bytes(b"")
    assert finished_shard(tmp_path, "shard_00000") is None
    with pytest.raises(DataError, match=r"shard_00000.tar is not finished"):
        write_dataset(tmp_path, TOKENIZER, TEXT, [shard_name(0)])


def test_writer_refuses_what_could_not_be_read(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "shard_00000", TOKENIZER)
    writer.add(make_sample(0, IMAGE))
    with pytest.raises(DataError, match="must be new"):
        writer.add(make_sample(0, IMAGE))
    with pytest.raises(DataError, match="must be new"):
        writer.add(Sample("a.b", torch.zeros(IMAGE), "", 4.0))
    with pytest.raises(DataError, match="has 5 channels"):
        writer.add(make_sample(1, (5, 1, 8, 8)))
    with pytest.raises(DataError, match="not finite"):
        writer.add(Sample("nan", torch.full(IMAGE, torch.nan), "", 4.0))
    with pytest.raises(DataError, match="not finite"):
        writer.add(Sample("nan", torch.zeros(IMAGE), "", 4.0, torch.full((3, 4), torch.inf)))
    with pytest.raises(StorageError, match="cannot write"):
        ShardWriter(tmp_path / "shard_00000.tar.partial", "shard_00000", TOKENIZER)


@pytest.mark.parametrize("name", ["shard_00002.tar", "shard_00002.idx", "dataset.json"])
def test_missing_file_is_named_when_opened(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{folder / name} is missing") as caught:
        ShardSource(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["shard_00001.tar", "shard_00001.idx"])
def test_truncated_file_is_named_when_opened(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-512])
    with pytest.raises(DataError, match=f"{folder / name} has {len(content) - 512} bytes"):
        ShardSource(folder)


def test_damaged_dataset_file_and_index_are_named(folder: Path) -> None:
    flip(folder / "shard_00000.idx", 300)
    with pytest.raises(DataError, match=r"shard_00000.idx is damaged"):
        ShardSource(folder).read(0)
    (folder / "dataset.json").write_text('{"format": "megavid-shards"')
    with pytest.raises(DataError, match=r"dataset.json is not JSON"):
        ShardSource(folder)
    (folder / "dataset.json").write_text('{"format": "megavid-shards", "version": 9}')
    with pytest.raises(DataError, match="this megavid reads"):
        ShardSource(folder)
    (folder / "dataset.json").write_text('{"format": "megavid-shards", "version": 1}')
    with pytest.raises(DataError, match=r"dataset.json is damaged"):
        ShardSource(folder)


@pytest.mark.parametrize("member", ["latent", "json"])
def test_flipped_byte_is_one_bad_sample(folder: Path, member: str) -> None:
    tar = folder / "shard_00001.tar"
    flip(tar, offset_of(tar, f"clip_00012.{member}") + 5)
    source = ShardSource(folder)
    assert [error.name for error in source.verify()] == ["shard_00001.tar:clip_00012"]
    index = next(n for n in range(len(source)) if source.sample_name(n).endswith("clip_00012"))
    with pytest.raises(BadSample, match=f"shard_00001.tar:clip_00012: {member} at byte"):
        source.read(index)


def test_file_cut_while_open_is_a_bad_sample(folder: Path) -> None:
    source = ShardSource(folder)
    source.read(0)
    (folder / "shard_00000.tar").open("r+b").truncate(600)
    with pytest.raises(BadSample, match="is cut off"):
        source.read(8)


def test_latents_of_another_tokenizer_are_refused() -> None:
    other = TokenizerSpec("wan", "2.1", 4, 8, 4, "none")
    with pytest.raises(DataError, match=r"DIR: latents were made with tokenizer name = 'wan', this needs 'stub'"):
        TOKENIZER.require_same(other, "DIR")
    TOKENIZER.require_same(TOKENIZER, "DIR")


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    source = ShardSource(write_shards(tmp_path, [*MIXED, (IMAGE, 60)], per_shard=1))
    for index in (*range(len(source)), 0, 50):
        assert source.read(index).shape == source.shape(index)
    source.close()


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def other_first(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)
            write_aside(tmp_path / "new" / "dataset.json", b"other")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", other_first)  # the second writer comes while the first one has its file open
    write_aside(tmp_path / "new" / "dataset.json", b"longer content")
    assert (tmp_path / "new" / "dataset.json").read_bytes() == b"longer content"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["dataset.json"]
