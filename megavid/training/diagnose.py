"""Where numbers stopped being finite: run once more, looking at what every part of the model gives.

Owns the search; it runs only when a run is about to stop, so it may be slow.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megavid.models.runner import velocity_of
from megavid.ops.packs import LatentBatch
from megavid.parallel.engine import Engine
from megavid.parallel.placement import placement_of
from megavid.training.model_step import Objective

Place = tuple[int, str]
"""Order in the model, and what is to be said of it."""

NOWHERE: Place = (1 << 30, "no weight and no output of the model: look at the loss and its gradient")


def first_bad_part(engine: Engine[Any], objective: Objective, microbatches: Sequence[LatentBatch]) -> str:
    """The first part of the model whose weights or output are not finite on these microbatches, over all ranks.

    Ranks: collective; every rank has as many microbatches.
    """
    found: list[Place] = [*_bad_weights(engine), NOWHERE]
    handles = []
    for chunk in engine.chunks:
        for order, name, part in _parts(chunk):
            handles.append(part.register_forward_hook(_watch(found, order, name)))
    try:
        for batch in microbatches:
            span = engine.mesh.token_span(batch.packs[0].tokens)
            velocity_of(engine, objective.noise(batch.part(span).to(engine.mesh.device)).input)
    finally:
        for handle in handles:
            handle.remove()
    everywhere: list[Place] = engine.mesh.all_gather_object(min(found))
    first = min(everywhere)
    seen_by = [rank for rank, place in enumerate(everywhere) if place == first]
    # Ranks of one stage or replica see the same numbers: what a single one sees may be its machine's fault.
    return first[1] + (f" on rank {seen_by[0]} alone" if len(seen_by) == 1 < engine.mesh.world_size else "")


def _parts(chunk: Any) -> Iterator[tuple[int, str, nn.Module]]:
    """Embedders, blocks and head of one chunk, with their order in the whole model."""
    for name, part in chunk.named_children():
        if name == "blocks":
            yield from ((1 + block.layer, f"blocks.{block.layer}", block) for block in part)
        else:
            yield (1 << 20 if name == "head" else 0), name, part


def _bad_weights(engine: Engine[Any]) -> Iterator[Place]:
    for chunk in engine.chunks:
        for order, _, part in _parts(chunk):
            for parameter in part.parameters():
                if not torch.isfinite(parameter).all():
                    yield order, f"weights of {placement_of(parameter).pieces[0].name}"


def _watch(found: list[Place], order: int, name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        values = output if isinstance(output, tuple) else (output,)
        tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
        if any(not torch.isfinite(value).all() for value in tensors):
            found.append((order, f"output of {name}"))

    return hook
