"""Where a parameter stands in the model as a whole: one frozen record per parameter.

Read by initialisation, gradient reduction, the norm, the checkpoint and conversion; nothing else says how a
parameter is sharded. Model space is the model as one device would hold it: q, k and v apart, one name per
expert, global shapes.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch.nn import Parameter


@dataclass(frozen=True, slots=True)
class Init:
    """Distribution of a fresh parameter: normal, deviation ``std`` around ``mean``; std 0 for a constant."""

    std: float = 0.0
    mean: float = 0.0


@dataclass(frozen=True, slots=True)
class Piece:
    """One box of a tensor in model space, held as a contiguous, row-major range of a local parameter.

    Attributes:
        name: global name, such as ``blocks.3.moe.experts.17.up.weight``.
        global_shape: shape in model space.
        offset: where the box begins in model space.
        shape: extents of the box; as many as global_shape has.
        start: where the box begins in the local parameter, as a flat index.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """What a rank must know of one of its parameters.

    Attributes:
        pieces: boxes in model space; together they cover the local parameter.
        sharded_over: axes of the mesh along which ranks hold different boxes, of "tp", "ep", "etp" ("pp" is
            implied unless ``is_on_every_stage``).
        is_expert: reduced over the expert-data ranks, not over all data-parallel ones.
        is_partial_over_tp: each tensor-parallel rank's gradient covers only its own tokens (sequence
            parallelism): they are summed.
        is_on_every_stage: replicated on all pipeline stages and chunks; their gradients are summed and
            counted once.
        has_decay: takes weight decay.
        init: distribution of fresh values.
    """

    pieces: tuple[Piece, ...]
    sharded_over: frozenset[Literal["tp", "ep", "etp"]] = field(default_factory=frozenset)
    is_expert: bool = False
    is_partial_over_tp: bool = False
    is_on_every_stage: bool = False
    has_decay: bool = True
    init: Init = Init()


def placement_of(parameter: Parameter) -> Placement:
    """The record that ``place`` gave this parameter."""
    placement = parameter.placement  # type: ignore[attr-defined]
    assert isinstance(placement, Placement)
    return placement


def place(parameter: Parameter, placement: Placement, *, is_first_copy: bool = True) -> None:
    """Attach ``placement`` and say the same to megatron-core in the attributes that it reads.

    Args:
        parameter: the local parameter; place it before DistributedDataParallel wraps the model.
        placement: its record.
        is_first_copy: False on the ranks (or chunks) whose equal copy must not count in the gradient norm:
            all but the first stage's first chunk for ``is_on_every_stage``, all but the first expert-tensor
            rank for a parameter of an expert that is not sharded over "etp".
    """
    parameter.placement = placement  # type: ignore[attr-defined]
    # megatron-core 0.16.1 reduces expert gradients over the wrong group at EP = 1 with TP > ETP unless this
    # is set before DDP wraps the model (0.19 sets it itself).
    parameter.allreduce = not placement.is_expert  # type: ignore[attr-defined]
    parameter.sequence_parallel = placement.is_partial_over_tp  # type: ignore[attr-defined]
    # What is not marked is counted on tensor-parallel rank 0 only; experts are never copies along that axis.
    parameter.tensor_model_parallel = placement.is_expert or "tp" in placement.sharded_over  # type: ignore[attr-defined]
    parameter.shared = not is_first_copy  # type: ignore[attr-defined]  # left out of the gradient norm
    parameter.has_no_decay = not placement.has_decay  # type: ignore[attr-defined]
    if placement.is_on_every_stage:
        parameter.shared_embedding = True  # type: ignore[attr-defined]  # a gradient bucket of its own on every stage


def is_owner(parameter: Parameter, coordinates: dict[str, int]) -> bool:
    """Whether this rank is the one that writes its copy, data-parallel sharding aside."""
    placement = placement_of(parameter)
    axis = "etp" if placement.is_expert else "tp"
    is_first = axis in placement.sharded_over or coordinates[axis] == 0
    return is_first and not (placement.is_on_every_stage and parameter.shared)  # type: ignore[attr-defined]
