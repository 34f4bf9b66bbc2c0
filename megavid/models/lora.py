"""Low-rank adapters beside frozen matrices, tensor-parallel like them: ``W x + scale * B (A x)``.

Owns the adapters' parameters and placements. Where tokens or outputs are split over ranks, what travels is ``A x``, as
narrow as the rank, never a tensor of the model's width. B begins at zero, so that a fresh adapter changes nothing.

Source: LoRA (arXiv:2106.09685).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megavid.parallel import mcore
from megavid.parallel.placement import Init, Piece, Placement, place, placement_of
from megavid.plan.adapters import A, B

if TYPE_CHECKING:
    from megavid.models.build import Build


def is_adapter(name: str) -> bool:
    """Whether a tensor in model space is an adapter's."""
    return name.endswith((A, B))


def freeze_base(chunk: nn.Module) -> None:
    """Let only the adapters of a chunk be trained; call it before DistributedDataParallel wraps the chunk."""
    for parameter in chunk.parameters():
        parameter.requires_grad_(is_adapter(placement_of(parameter).pieces[0].name))


def lora_reference(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The slow, obvious twin, of whole matrices on one rank: the product with ``W + scale * B A``."""
    return torch.nn.functional.linear(x, weight + scale * (b @ a))


class Adapted(nn.Module):
    """A linear layer of megatron-core and its adapter, called like the former."""

    def __init__(self, linear: Any, adapter: nn.Module) -> None:
        super().__init__()
        self.linear, self.adapter = linear, adapter

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output, and the bias that is still to be added, if any."""
        out, bias = self.linear(x)
        return out + self.adapter(x), bias


class ColumnAdapter(nn.Module):
    """Adapters of matrices of one input whose outputs are split over tensor-parallel ranks.

    Ranks: A whole on every rank, B of the rank's own outputs. Under sequence parallelism each rank takes its own tokens
    through A, and ``A x`` is gathered; else every rank does the same.

    Gradient: that of ``A x`` is summed over the ranks' outputs; A's covers a rank's own tokens, and is summed where the
    placement says so.
    """

    def __init__(
        self, build: "Build", names: Sequence[str], input_size: int, output_size: int, *, of_text: bool
    ) -> None:
        super().__init__()
        rank, local = build.lora.rank, output_size // build.tp
        self.scale, self.tp, self.group = build.lora.scale, build.tp, build.mesh.group("tp")
        self.gathers_tokens = build.mesh.is_sequence_parallel and not of_text
        self.count = len(names)
        self.a = build.empty(rank * len(names), input_size)
        self.b = build.empty(local * len(names), rank)
        first = build.tp_rank * local
        rows = [
            Piece(f"{name}.{A}", (rank, input_size), (0, 0), (rank, input_size), number * rank * input_size)
            for number, name in enumerate(names)
        ]
        columns = [
            Piece(f"{name}.{B}", (output_size, rank), (first, 0), (local, rank), number * local * rank)
            for number, name in enumerate(names)
        ]
        place(
            self.a,
            Placement(tuple(rows), is_partial_over_tp=self.gathers_tokens, init=_init_of_a(input_size)),
        )
        place(self.b, Placement(tuple(columns), frozenset({"tp"})))

    def forward(self, x_tBI: Tensor) -> Tensor:
        """What the adapters add to the matrices' local outputs, side by side."""
        narrow = torch.nn.functional.linear(x_tBI, self.a) * self.scale
        if self.gathers_tokens:
            narrow = mcore.gather_from_sequence_parallel_region(narrow, group=self.group)
        elif self.tp > 1:
            narrow = mcore.copy_to_tensor_model_parallel_region(narrow, group=self.group)
        pairs = zip(narrow.chunk(self.count, dim=-1), self.b.chunk(self.count), strict=True)
        parts = [torch.nn.functional.linear(part, b) for part, b in pairs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class RowAdapter(nn.Module):
    """Adapter of a matrix whose input is split over tensor-parallel ranks.

    Ranks: A of the rank's own inputs, B whole on every rank. ``A x`` is summed over the ranks, before B, to all of them
    or to each its tokens.

    Gradient: B's covers a rank's own tokens under sequence parallelism, and is summed where the placement says so.
    """

    def __init__(self, build: "Build", name: str, input_size: int, output_size: int) -> None:
        super().__init__()
        rank, local = build.lora.rank, input_size // build.tp
        self.scale, self.tp, self.group = build.lora.scale, build.tp, build.mesh.group("tp")
        self.scatters_tokens = build.mesh.is_sequence_parallel
        self.a, self.b = build.empty(rank, local), build.empty(output_size, rank)
        piece = Piece(f"{name}.{A}", (rank, input_size), (0, build.tp_rank * local), (rank, local))
        place(self.a, Placement((piece,), frozenset({"tp"}), init=_init_of_a(input_size)))
        build.place_whole(self.b, f"{name}.{B}", init=Init(), is_partial=True)

    def forward(self, x_TBI: Tensor) -> Tensor:
        """What the adapter adds to the matrix' output, after its sum over ranks."""
        narrow = torch.nn.functional.linear(x_TBI, self.a) * self.scale
        if self.scatters_tokens:
            narrow = mcore.reduce_scatter_to_sequence_parallel_region(narrow, group=self.group)
        elif self.tp > 1:
            narrow = mcore.reduce_from_tensor_model_parallel_region(narrow, group=self.group)
        return torch.nn.functional.linear(narrow, self.b)


def _init_of_a(input_size: int) -> Init:
    """Normal, of the variance that PEFT's uniform default has."""
    return Init(std=(3 * input_size) ** -0.5)
