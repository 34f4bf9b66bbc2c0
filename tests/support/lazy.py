"""Tensors of a model in memory, read like those of a file, with a record of what was read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megavid.config.schema import ModelConfig
from megavid.ops.philox import key_of, normal
from megavid.parallel.engine import Engine
from megavid.plan.parameters import tensors


@dataclass
class MemoryTensor:
    """A tensor that counts how many of its rows were read."""

    value: Tensor
    rows_read: int = 0
    shape: tuple[int, ...] = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.shape, self.dtype = tuple(self.value.shape), self.value.dtype

    def read(self) -> Tensor:
        return self.read_rows(0, self.shape[0])

    def read_rows(self, start: int, stop: int) -> Tensor:
        assert 0 <= start <= stop <= self.shape[0]
        self.rows_read += stop - start
        return self.value[start:stop]


def value_of(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor of a model as a function of its name; matrices keep the size of what they are given."""
    drawn = normal(key_of("lazy", name), 0, torch.Size(shape).numel()).double().view(shape)
    if "norm.weight" in name:
        return (1 + 0.1 * drawn).to(dtype)
    return (drawn * (shape[1] ** -0.5 if len(shape) == 2 else 0.3)).to(dtype)


def memory_model(model: ModelConfig, dtype: torch.dtype = torch.float64) -> dict[str, MemoryTensor]:
    """Every tensor of a model, with the values of their names."""
    return {t.name: MemoryTensor(value_of(t.name, t.shape, dtype)) for t in tensors(model)}


def meta_model(model: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, MemoryTensor]:
    """Every tensor of a model, of any size, without a number in it."""
    return {t.name: MemoryTensor(torch.empty(t.shape, dtype=dtype, device="meta")) for t in tensors(model)}


def fill_engine(engine: Engine[Any], values: Mapping[str, Tensor]) -> None:
    """Give an engine the weights, and the routers' bias, of a model in model space."""
    for fragment in [*engine.weight_fragments("model"), *engine.buffer_fragments()]:
        value, at = values[fragment.name.split("/", 1)[1]], 0
        for box in fragment.boxes:
            part = value[tuple(slice(o, o + s) for o, s in zip(box.offset, box.shape))]
            fragment.data[at : at + box.numel] = part.reshape(-1)
            at += box.numel
    engine.load_finished()
