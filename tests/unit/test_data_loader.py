"""The loader: a step does not depend on who reads it, nor on where the run began; damage is replaced by rule."""

import dataclasses
import itertools
import json
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megavid.config.schema import RunConfig
from megavid.data.loader import Loader
from megavid.data.sample import Sample
from megavid.data.shards import ShardSource
from megavid.errors import ConfigError, DataError, StorageError
from megavid.ops.packs import LatentBatch, Pack
from megavid.ops.patches import patchify, unpatchify
from tests.support.data_stubs import IMAGE, LONG, MIXED, StubSource, StubText, stub_config, write_shards

PATCH = (1, 2, 2)


def with_micro(config: RunConfig, size: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=size))


def steps_of(
    config: RunConfig, count: int, *, dp_rank: int = 0, dp_size: int = 1, start_step: int = 1,
    state: dict[str, object] | None = None, bad: Sequence[int] = (),
) -> list[list[LatentBatch]]:  # fmt: skip
    source = StubSource(MIXED, bad)
    with Loader(
        config, source, StubText(), dp_rank=dp_rank, dp_size=dp_size, start_step=start_step, state=state
    ) as loader:
        return [next(loader) for _ in range(count)]


def packs_of(batches: Sequence[LatentBatch]) -> list[Pack]:
    return [pack for batch in batches for pack in batch.packs]


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 2), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2), (8, 1)])
def test_step_sees_the_same_packs_in_every_layout(dp_size: int, micro: int) -> None:
    expected = steps_of(stub_config(), 3)
    config = with_micro(stub_config(), micro)
    ranks = [steps_of(config, 3, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for step in range(3):
        assert all(len(batch.packs) == micro for rank in ranks for batch in rank[step])
        assert [p for rank in ranks for p in packs_of(rank[step])] == packs_of(expected[step])
        clean = torch.cat([batch.clean_BTP for rank in ranks for batch in rank[step]])
        text = torch.cat([batch.text_GLD for rank in ranks for batch in rank[step]])
        assert torch.equal(clean, torch.cat([batch.clean_BTP for batch in expected[step]]))
        assert torch.equal(text, torch.cat([batch.text_GLD for batch in expected[step]]))


def test_no_two_ranks_read_the_same_sample_and_an_epoch_is_every_sample() -> None:
    ranks = [steps_of(stub_config(), 12, dp_rank=rank, dp_size=4) for rank in range(4)]
    draws = [{clip.draw for step in rank for batch in step for clip in batch.clips} for rank in ranks]
    assert sum(map(len, draws)) == len(set().union(*draws))
    clips = {clip.draw: clip.sample for rank in ranks for step in rank for b in step for clip in b.clips}
    epoch = [clips[draw] for draw in range(38)]
    assert Counter(epoch).most_common(1)[0][1] == 1
    assert len(clips) > 76


@pytest.mark.parametrize("from_state", [True, False])
def test_resumed_loader_goes_on_as_if_never_stopped(from_state: bool) -> None:
    straight = steps_of(stub_config(), 6)
    with Loader(stub_config(), StubSource(MIXED), StubText(), dp_rank=0, dp_size=2) as loader:
        for _ in range(3):
            next(loader)
        state = json.loads(json.dumps(loader.state_dict()))
    assert state["step"] == 3
    ranks = [
        steps_of(stub_config(), 3, dp_rank=r, dp_size=4, start_step=4, state=state if from_state else None)
        for r in range(4)
    ]
    for step in range(3):
        assert [p for rank in ranks for p in packs_of(rank[step])] == packs_of(straight[3 + step])


def test_state_before_the_first_step_and_of_another_data_set() -> None:
    with Loader(stub_config(), StubSource(MIXED), StubText(), dp_rank=0, dp_size=1) as loader:
        state = loader.state_dict()
    assert packs_of(steps_of(stub_config(), 1, state=state)[0]) == packs_of(steps_of(stub_config(), 1)[0])
    with pytest.raises(DataError, match="the stub is not the data set that the checkpoint was trained on"):
        Loader(stub_config(), StubSource(MIXED[:-1]), StubText(), dp_rank=0, dp_size=1, state=state)


def test_batch_holds_the_latents_and_captions_of_its_clips() -> None:
    source = StubSource(MIXED)
    for batch in steps_of(with_micro(stub_config(), 4), 1)[0]:
        clips = iter(zip(batch.clips, batch.text_GLD, strict=True))
        for pack, clean_TP in zip(batch.packs, batch.clean_BTP, strict=True):
            is_padding = torch.ones(pack.tokens, dtype=torch.bool)
            for _ in pack.clips:
                clip, text_LD = next(clips)
                sample = source.read(clip.sample)
                own = slice(clip.start, clip.start + clip.tokens)
                assert is_padding[own].all()
                is_padding[own] = False
                assert torch.equal(clean_TP[own], patchify(sample.latents_CFHW.float(), PATCH))
                assert torch.equal(unpatchify(clean_TP[own], clip.grid, PATCH), sample.latents_CFHW.float())
                assert (text_LD == len(sample.caption)).all()
            assert not clean_TP[is_padding].any()


def test_dropped_captions_follow_the_draw() -> None:
    def drops(draw: int) -> bool:
        return draw % 3 == 0

    text = StubText()
    with Loader(stub_config(), StubSource(MIXED), text, dp_rank=0, dp_size=1, drops_caption=drops) as loader:
        for batch in next(loader):
            for clip, text_LD in zip(batch.clips, batch.text_GLD, strict=True):
                assert bool((text_LD == 0).all()) == (clip.draw % 3 == 0)
    assert len(text.calls) == len(set(text.calls)), "each caption is encoded once"


class AheadSource(StubSource):
    """Captions of one sort come with features, two tokens long; the others have no caption."""

    def read(self, index: int) -> Sample:
        sample = super().read(index)
        if index % 2:
            return dataclasses.replace(sample, text_LD=torch.full((2, 8), 7.0))
        return dataclasses.replace(sample, caption="")


def test_text_encoded_ahead_is_padded_and_missing_captions_are_empty() -> None:
    text = StubText()
    with Loader(stub_config(), AheadSource(MIXED), text, dp_rank=0, dp_size=1) as loader:
        for batch in next(loader):
            for clip, text_LD in zip(batch.clips, batch.text_GLD, strict=True):
                expected = torch.zeros(6, 8)
                expected[:2] = 7.0 * (clip.sample % 2)
                assert torch.equal(text_LD, expected)
    assert text.calls == [""]


@pytest.mark.parametrize("dp_size", [1, 4])
def test_damaged_sample_is_replaced_alike_in_every_layout(dp_size: int) -> None:
    bad, steps = (3, 12, 30), 8
    sound = packs_of([batch for step in steps_of(stub_config(), steps) for batch in step])
    ranks = [steps_of(stub_config(), steps, dp_rank=r, dp_size=dp_size, bad=bad) for r in range(dp_size)]
    packs = packs_of([batch for step in range(steps) for rank in ranks for batch in rank[step]])
    replaced, source = 0, StubSource(MIXED)
    for clip, expected in zip((c for p in packs for c in p.clips), (c for p in sound for c in p.clips), strict=True):
        assert (clip.draw, clip.start, clip.grid) == (expected.draw, expected.start, expected.grid)
        assert clip.sample not in bad
        assert source.shape(clip.sample) == source.shape(expected.sample)
        assert (clip.sample != expected.sample) == (expected.sample in bad)
        replaced += clip.sample != expected.sample
    assert replaced >= 4
    single = packs_of([b for step in steps_of(stub_config(), steps, bad=bad) for b in step])
    assert packs == single


def test_damaged_samples_are_counted_named_and_read_once() -> None:
    source = StubSource(MIXED, bad=(3, 12, 30))
    with Loader(stub_config(), source, StubText(), dp_rank=0, dp_size=1) as loader:
        for _ in range(8):
            next(loader)
        assert loader.num_bad_samples == 3
        assert sorted(loader.new_bad_samples()) == [f"stub:{n}: damaged for the test" for n in (12, 30, 3)]
        assert loader.new_bad_samples() == []
    assert [source.reads.count(index) for index in (3, 12, 30)] == [1, 1, 1]


def test_too_many_damaged_samples_stop_the_run() -> None:
    source = StubSource(MIXED, bad=(3, 12, 30))
    config = stub_config(max_bad_samples=2)
    with (
        Loader(config, source, StubText(), dp_rank=0, dp_size=1) as loader,
        pytest.raises(DataError, match=r"3 samples are damaged, more than data.max_bad_samples = 2"),
    ):
        deque(itertools.islice(loader, 8))


def test_bucket_with_no_sound_sample_takes_a_smaller_clip() -> None:
    runs = [(IMAGE, 12), (LONG, 2)]
    config = stub_config(validation_samples=0)
    with Loader(config, StubSource(runs, bad=(12, 13)), StubText(), dp_rank=0, dp_size=1) as loader:
        clips = [clip for batch in next(loader) for clip in batch.clips]
    assert {clip.grid for clip in clips} == {(1, 4, 4)}
    with (
        Loader(config, StubSource([(LONG, 2)], bad=(0, 1)), StubText(), dp_rank=0, dp_size=1) as loader,
        pytest.raises(DataError, match="no sound sample that fits"),
    ):
        next(loader)


def test_storage_failure_is_never_taken_for_damage() -> None:
    class Broken(StubSource):
        def read(self, index: int) -> Sample:
            raise StorageError("the disk is gone")

    with (
        Loader(stub_config(), Broken(MIXED), StubText(), dp_rank=0, dp_size=1) as loader,
        pytest.raises(StorageError, match="the disk is gone"),
    ):
        next(loader)


def test_validation_batches_are_the_held_out_clips_on_every_rank() -> None:
    config = with_micro(stub_config(validation_samples=5), 2)
    with Loader(config, StubSource(MIXED), StubText(), dp_rank=1, dp_size=2) as loader:
        batches, again = list(loader.validation_batches()), list(loader.validation_batches())
        trained = {clip.sample for _ in range(6) for batch in next(loader) for clip in batch.clips}
    assert all(len(batch.packs) == 2 for batch in batches)
    clips = [clip for batch in batches for clip in batch.clips]
    assert [clip.draw for clip in clips] == list(range(5)) == list(range(loader.num_validation_clips))
    assert not trained & {clip.sample for clip in clips}
    assert [batch.packs for batch in batches] == [batch.packs for batch in again]
    with Loader(stub_config(validation_samples=0), StubSource(MIXED), StubText(), dp_rank=0, dp_size=1) as loader:
        assert list(loader.validation_batches()) == []


def test_holding_everything_out_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"data.validation_samples = 8 must be below the 6 clips"):
        Loader(stub_config(validation_samples=8), StubSource([(IMAGE, 6)]), StubText(), dp_rank=0, dp_size=1)


def test_loader_reads_shards_and_goes_around_a_flipped_byte(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    clean = [batch.clean_BTP for batch in _first_step(folder)]
    tar = folder / "shard_00001.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 4
    tar.write_bytes(content)
    damaged = [batch.clean_BTP for batch in _first_step(folder)]
    assert [batch.shape for batch in damaged] == [batch.shape for batch in clean]


def _first_step(folder: Path) -> list[LatentBatch]:
    with Loader(stub_config(), ShardSource(folder), StubText(), dp_rank=0, dp_size=1) as loader:
        return next(loader)
