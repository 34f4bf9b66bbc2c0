"""Linears whose products are in eight bits, and what their scales are taken from on all ranks.

Owns the tensor-parallel linears, the record of a layer's magnitudes, and who shares a scale: tensor- and
context-parallel ranks those of a dense layer, so that a tensor of a microbatch is rounded alike however it is cut;
expert- and expert-tensor-parallel ranks those of experts, which under ``tensorwise`` may be a part of a microbatch
(fewer of them than tensor- and context-parallel ranks) or several (experts shared over data-parallel ranks). As scales
are powers of two, another one moves only numbers too small for the format. The products are
``megavid.ops.fp8_linear``'s.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megavid.config.schema import PrecisionConfig
from megavid.ops.block_attention_fp8 import OPERANDS
from megavid.ops.fp8 import LARGEST_BYTE, Quantized, dequantize, scale_of
from megavid.ops.fp8_linear import ROLES, Recipe, Role, fp8_linear, multiplies_in_eight_bits
from megavid.ops.fp8_ops import Fp8Ops
from megavid.parallel import mcore

FIGURES = ("numbers", "underflow", "overflow", "error", "size")
"""What is summed of every operand while it is watched: numbers that are not 0, those of them that became 0, those that
were cut to the largest number, squares of the errors, and squares of the numbers."""


class Watched(nn.Module):
    """Something that rounds operands, and adds up how well while ``seen`` asks for it.

    Args:
        name: of the layer in model space.
        operands: that it rounds, three as everywhere.
    """

    def __init__(self, name: str, operands: Sequence[str]) -> None:
        super().__init__()
        self.name, self.operands = name, tuple(operands)
        self.seen: Tensor | None = None
        self.kept: Tensor | None = None

    @property
    def is_watching(self) -> bool:
        """Whether ``seen`` asks for figures."""
        return self.seen is not None

    @torch.no_grad()
    def watch(self, operand: str, x: Tensor, rounded: Quantized) -> None:
        """Add up the figures of an operand, where ``seen`` asks for them."""
        if self.seen is None:
            return
        wide, became = x.float(), dequantize(rounded)
        is_nonzero = wide != 0
        is_cut = (rounded.data.view(torch.uint8) & 0x7F) == LARGEST_BYTE[rounded.data.dtype]
        sums = (
            is_nonzero.sum(),
            (is_nonzero & (became == 0)).sum(),
            (is_cut & (wide.abs() > became.abs())).sum(),
            (wide - became).square().sum(dtype=torch.float64),
            wide.square().sum(dtype=torch.float64),
        )
        self.seen[self.operands.index(operand)] += torch.stack([value.double() for value in sums])


class Fp8Scaling(Watched):
    """Scales of one layer's input, matrix and gradient, each for the whole tensor; tiles have their own.

    Args:
        recipe: how operands are scaled.
        name: the layer's name in model space, its first matrix's.
        group: ranks that share a scale.
        history_steps: steps that a delayed scale looks back.
        device: of the history.
    """

    def __init__(
        self, recipe: Recipe, name: str, group: dist.ProcessGroup, history_steps: int, device: torch.device
    ) -> None:
        super().__init__(name, ROLES)
        self.recipe, self.group = recipe, group
        steps = history_steps if recipe.name == "delayed" else 0
        self.history: Tensor
        self.latest: Tensor
        self.register_buffer("history", torch.zeros(len(ROLES), steps, device=device), persistent=False)
        self.register_buffer("latest", torch.zeros(len(ROLES), device=device), persistent=False)

    def scales(self, tensors: dict[Role, Tensor], *, is_training: bool) -> dict[Role, Tensor | None]:
        """One scale for each tensor, see ``megavid.ops.fp8_linear.Scaling``.

        Ranks: under ``tensorwise`` one maximum over those that share the scales; under ``delayed`` none, as histories
        are alike on all ranks once a step is over.
        """
        if self.recipe.has_tiles:
            return dict.fromkeys(tensors)
        amaxes = torch.stack([self.recipe.ops.amax(x) for x in tensors.values()])
        if self.recipe.name == "tensorwise":
            if self.group.size() > 1:
                dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=self.group)
            return {role: scale_of(amax, self.recipe.dtype(role)) for role, amax in zip(tensors, amaxes)}
        return {role: self._delayed(role, amax, is_training) for role, amax in zip(tensors, amaxes)}

    def _delayed(self, role: Role, amax: Tensor, is_training: bool) -> Tensor:
        place = ROLES.index(role)
        if is_training:
            self.latest[place] = torch.maximum(self.latest[place], amax)
        past = self.history[place].amax()
        scale = scale_of(torch.where(past > 0, past, amax), self.recipe.dtype(role))
        # A tensor that is not finite must not become a finite one by being cut to the largest number.
        return scale + amax * 0.0


class Fp8AttentionRounding(Watched):
    """Rounding of queries, keys and values of one layer's self-attention; scales are of the rectangle at hand."""

    def __init__(self, name: str, ops: Fp8Ops) -> None:
        super().__init__(name, OPERANDS)
        self.ops = ops


@dataclass(frozen=True)
class Fp8Build:
    """What a layer needs to be built in FP8.

    Attributes:
        recipe: how operands are scaled.
        experts: likewise, of routed experts.
        history_steps: steps that a delayed scale looks back.
        device: of histories.
        has_attention: self-attention is in FP8, too.
    """

    recipe: Recipe
    experts: Recipe
    history_steps: int
    device: torch.device
    has_attention: bool = False

    @classmethod
    def of(cls, precision: PrecisionConfig, device: torch.device, ops: Fp8Ops) -> "Fp8Build | None":
        """The record of a run whose numbers are rounded by ``ops``; None where it has no FP8."""
        if precision.fp8 == "off":
            return None
        recipe = Recipe.of(precision.fp8, precision.fp8_gradients, ops)
        if device.type == "cuda":
            multiplies_in_eight_bits(recipe, device)  # tried now, while there is memory
        experts = recipe if precision.fp8_experts == "same" else Recipe.of(precision.fp8_experts, "e4m3", ops)
        return cls(recipe, experts, precision.fp8_history, device, precision.fp8_attention)

    def scaling(self, name: str, group: dist.ProcessGroup, *, is_expert: bool = False) -> Fp8Scaling:
        """Scales of the layer ``name``, shared by the ranks of ``group``."""
        recipe = self.experts if is_expert else self.recipe
        return Fp8Scaling(recipe, name, group, self.history_steps, self.device)

    def attention(self, name: str) -> Fp8AttentionRounding | None:
        """Rounding of the self-attention ``name``; None where it stays wide."""
        return Fp8AttentionRounding(name, self.recipe.ops) if self.has_attention else None


class Fp8ColumnLinear(mcore.ColumnParallelLinear):  # type: ignore[misc]  # megatron-core has no type stubs
    """megatron-core's linear whose outputs are split over tensor-parallel ranks, in eight bits."""

    def with_scaling(self, scaling: Fp8Scaling) -> "Fp8ColumnLinear":
        """Give the layer its scales; returns itself."""
        self.scaling = scaling
        return self

    def forward(self, x_tBI: Tensor) -> tuple[Tensor, Tensor | None]:
        """This rank's outputs for all tokens, and the bias that is still to be added, if any.

        Under sequence parallelism the tokens are gathered first, and the gathered ones are kept, in eight bits.
        """
        if self.sequence_parallel:
            x_tBI = mcore.gather_from_sequence_parallel_region(x_tBI, group=self.tp_group)
        elif self.tp_group.size() > 1:
            x_tBI = mcore.copy_to_tensor_model_parallel_region(x_tBI, group=self.tp_group)
        out = fp8_linear(x_tBI, self.weight, self.scaling)
        if self.skip_bias_add or self.bias is None:
            return out, self.bias
        return out + self.bias, None


class Fp8RowLinear(mcore.RowParallelLinear):  # type: ignore[misc]  # megatron-core has no type stubs
    """megatron-core's linear whose inputs are split over tensor-parallel ranks, in eight bits; the sum is not."""

    def with_scaling(self, scaling: Fp8Scaling) -> "Fp8RowLinear":
        """Give the layer its scales; returns itself."""
        self.scaling = scaling
        return self

    def forward(self, x_TBi: Tensor) -> tuple[Tensor, None]:
        """The outputs, of this rank's tokens under sequence parallelism; nothing is left to be added."""
        out = fp8_linear(x_TBi, self.weight, self.scaling)
        if self.sequence_parallel:
            out = mcore.reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        elif self.tp_group.size() > 1:
            out = mcore.reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return (out if self.bias is None else out + self.bias), None


def column_class(fp8: Fp8Build | None, name: str, group: dist.ProcessGroup) -> Callable[..., Any]:
    """What builds a column-parallel linear, in eight bits where ``fp8`` is given."""
    if fp8 is None:
        column: Callable[..., Any] = mcore.ColumnParallelLinear
        return column
    scaling = fp8.scaling(name, group)
    return lambda *args, **kwargs: Fp8ColumnLinear(*args, **kwargs).with_scaling(scaling)


def row_class(fp8: Fp8Build | None, name: str, group: dist.ProcessGroup) -> Callable[..., Any]:
    """What builds a row-parallel linear, likewise."""
    if fp8 is None:
        row: Callable[..., Any] = mcore.RowParallelLinear
        return row
    scaling = fp8.scaling(name, group)
    return lambda *args, **kwargs: Fp8RowLinear(*args, **kwargs).with_scaling(scaling)


def watched_of(chunks: Sequence[nn.Module]) -> list[Watched]:
    """Everything in FP8 on this rank whose rounding can be watched, in the model's order, likewise."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Watched)]


def scalings_of(chunks: Sequence[nn.Module]) -> list[Fp8Scaling]:
    """Scales of every layer in FP8 on this rank, in the model's order, the same on all ranks of a pipeline stage."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Fp8Scaling)]


@torch.no_grad()
def update_histories(scalings: Sequence[Fp8Scaling], maximum: Callable[[Tensor], Tensor]) -> None:
    """End a step of delayed scaling: what was largest in it enters the histories, and the oldest step leaves.

    Magnitudes that are not finite are left out, so that a step that was skipped for them spoils no later one.

    Args:
        scalings: of all layers of the rank.
        maximum: over the ranks of the pipeline stage, of a tensor.

    Ranks: collective over those.
    """
    delayed = [scaling for scaling in scalings if scaling.recipe.name == "delayed"]
    if not delayed:
        return
    latest = torch.stack([scaling.latest for scaling in delayed])
    latest = maximum(torch.where(latest.isfinite(), latest, 0.0))
    for scaling, row in zip(delayed, latest, strict=True):
        scaling.history.copy_(torch.cat([row.unsqueeze(-1), scaling.history[:, :-1]], dim=-1))
        scaling.latest.zero_()
