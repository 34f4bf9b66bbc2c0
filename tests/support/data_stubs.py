"""Stand-ins for the data tests: a source of any shapes in memory, a tokenizer and a text encoder that cost nothing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megavid.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from megavid.data.sample import (
    BadSample,
    Bucket,
    Sample,
    Shape,
    TextSpec,
    TokenizerSpec,
    buckets_of_runs,
)
from megavid.data.shard_writer import ShardWriter, shard_name, write_dataset

TOKENIZER = TokenizerSpec("stub", "1", 4, 8, 4, "none")
TEXT = TextSpec("stub", "1", 8, 6)
IMAGE: Shape = (4, 1, 8, 8)
SHORT: Shape = (4, 3, 8, 8)
LONG: Shape = (4, 5, 12, 12)
MIXED = [(IMAGE, 10), (LONG, 7), (SHORT, 12), (IMAGE, 4), (LONG, 8)]


class StubSource:
    """Samples that lie in runs of (shape, count); latents are the sample's index plus a ramp; some may be damaged."""

    name = "the stub"
    tokenizer = TOKENIZER
    text = TEXT

    def __init__(self, runs: Sequence[tuple[Shape, int]], bad: Sequence[int] = ()) -> None:
        self.buckets: tuple[Bucket, ...] = buckets_of_runs(runs)
        self.bad = set(bad)
        self.reads: list[int] = []
        self._runs, self._ends = list(runs), np.cumsum([count for _, count in runs])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def shape(self, index: int) -> Shape:
        return self._runs[int(np.searchsorted(self._ends, index, side="right"))][0]

    def sample_name(self, index: int) -> str:
        return f"stub:{index}"

    def read(self, index: int) -> Sample:
        self.reads.append(index)
        if index in self.bad:
            raise BadSample(self.sample_name(index), "damaged for the test")
        return make_sample(index, self.shape(index))

    def close(self) -> None:
        pass


class StubText:
    """Features that say which caption they are of."""

    name, version, width, length = "stub", "1", 8, 6

    def __init__(self) -> None:
        self.calls: list[str] = []

    def encode(self, captions: Sequence[str]) -> Tensor:
        self.calls += captions
        return torch.stack([torch.full((self.length, self.width), float(len(caption))) for caption in captions])


def make_sample(index: int, shape: Shape, caption: str | None = None) -> Sample:
    """A sample whose latents are multiples of 1/8, which bf16 holds."""
    ramp = torch.arange(int(np.prod(shape)), dtype=torch.float32).remainder(16).reshape(shape) / 8
    text = "caption " + "x" * (index % 5) if caption is None else caption
    return Sample(f"clip_{index:05d}", (ramp + index % 8).bfloat16(), text, 4.0, None, {"licence": "CC0"})


def stub_config(**data: object) -> RunConfig:
    """A run whose model takes the stub's latents."""
    values = {"pack_tokens": 192, "validation_samples": 3, "queue_size": 2} | data
    return RunConfig(
        model=ModelConfig(in_channels=4, out_channels=4, text_size=8, text_length=6),
        train=TrainConfig(global_batch_size=8, seed=11),
        data=DataConfig(**values),  # type: ignore[arg-type]
    )


def write_shards(folder: Path, runs: Sequence[tuple[Shape, int]] = tuple(MIXED), per_shard: int = 9) -> Path:
    """A data set of shards with the same samples as ``StubSource`` of ``runs`` (in another order)."""
    shapes = [shape for shape, count in runs for _ in range(count)]
    names = []
    for first in range(0, len(shapes), per_shard):
        names.append(shard_name(len(names)))
        with ShardWriter(folder, names[-1], TOKENIZER) as writer:
            for index in range(first, min(first + per_shard, len(shapes))):
                writer.add(make_sample(index, shapes[index]))
    write_dataset(folder, TOKENIZER, TEXT, names)
    return folder
