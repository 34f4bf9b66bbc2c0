"""Tensors of a model in memory, read like those of a file, with a record of what was read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavid.checkpoint.convert import LazyTensor, ModelSource
from megavid.checkpoint.convert.ledger import Ledger
from megavid.config.schema import ModelConfig, RunConfig
from megavid.ops.philox import key_of, normal
from megavid.parallel.engine import Engine
from megavid.plan.parameters import tensors


def value_of(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor of a model as a function of its name; matrices keep the size of what they are given."""
    drawn = normal(key_of("lazy", name), 0, torch.Size(shape).numel()).double().view(shape)
    if "norm.weight" in name:
        return (1 + 0.1 * drawn).to(dtype)
    return (drawn * (shape[1] ** -0.5 if len(shape) == 2 else 0.3)).to(dtype)


class Memory:
    """A model in memory that notes how many elements of each tensor were read.

    Attributes:
        source: the model as a file would give it.
        values: its tensors by name.
        read: elements read of each.
    """

    def __init__(self, model: ModelConfig, values: Mapping[str, Tensor]) -> None:
        self.values, self.read = values, dict.fromkeys(values, 0)
        lazy = {name: self._lazy(name, value) for name, value in values.items()}
        self.source = ModelSource(RunConfig(model=model), lazy, Path("memory"), "megavid", Ledger())

    def _lazy(self, name: str, value: Tensor) -> LazyTensor:
        def fetch(start: int, stop: int) -> Tensor:
            assert 0 <= start <= stop <= value.numel()
            self.read[name] += stop - start
            return value.view(-1)[start:stop]

        return LazyTensor(tuple(value.shape), value.dtype, fetch, name, key=name)


def memory_model(model: ModelConfig, dtype: torch.dtype = torch.float64) -> Memory:
    """A model with the values of its tensors' names."""
    return Memory(model, {t.name: value_of(t.name, t.shape, dtype) for t in tensors(model)})


def meta_model(model: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Memory:
    """A model of any size, without a number in it."""
    return Memory(model, {t.name: torch.empty(t.shape, dtype=dtype, device="meta") for t in tensors(model)})


def fill_engine(engine: Engine[Any], values: Mapping[str, Tensor]) -> None:
    """Give an engine the weights, and the routers' bias, of a model in model space."""
    for fragment in [*engine.weight_fragments("model"), *engine.buffer_fragments()]:
        value, at = values[fragment.name.split("/", 1)[1]], 0
        for box in fragment.boxes:
            part = value[tuple(slice(o, o + s) for o, s in zip(box.offset, box.shape))]
            fragment.data[at : at + box.numel] = part.reshape(-1)
            at += box.numel
    engine.load_finished()
