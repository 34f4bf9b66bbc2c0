"""Matrix products of a linear layer, or of a rank's experts, in eight bits: forward, and both of the backward pass.

Owns the recipes, what each operand is scaled by, and the gradients. Every product sums over the last dim of both
operands, and each operand is rounded once for each product it is in: with scales by tile the input and the gradient are
rounded twice, along their width and along the tokens. The matrix is rounded again in the backward pass instead of being
kept; of the input only its eight bits are kept.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megavid.ops.device_products import Format, has_tiled_product
from megavid.ops.fp8 import E4M3, E5M2, E8M0, Quantized
from megavid.ops.fp8_ops import REFERENCE_FP8, Fp8Ops
from megavid.ops.nvfp4 import ROW, SQUARE, quantize_nvfp4
from megavid.ops.scaled_matmul import has_scaled_mm, scaled_grouped_matmul, scaled_matmul

RecipeName = Literal["tensorwise", "delayed", "blockwise", "mxfp8", "nvfp4"]
Role = Literal["input", "weight", "gradient"]
ROLES: tuple[Role, ...] = ("input", "weight", "gradient")
"""Operands of a layer's products, in the order of everything that is kept for each of them."""


@dataclass(frozen=True)
class Recipe:
    """How operands are scaled.

    Attributes:
        name: ``tensorwise``: one scale from the tensor at hand; ``delayed``: one from earlier steps; ``blockwise``: one
            for 128 numbers of an input or gradient, and 128 x 128 of a matrix; ``mxfp8``: one byte for 32 numbers;
            ``nvfp4``: four bits, one byte for 16 numbers, and 16 x 16 of a matrix.
        gradient_dtype: of gradients; inputs and matrices are e4m3, and numbers of four bits stand in it.
        ops: what rounds to eight bits; to four, it is plain torch always.
    """

    name: RecipeName
    gradient_dtype: torch.dtype
    ops: Fp8Ops = REFERENCE_FP8

    @classmethod
    def of(cls, name: RecipeName, gradients: Literal["auto", "e4m3", "e5m2"], ops: Fp8Ops = REFERENCE_FP8) -> "Recipe":
        """The recipe; "auto" takes e5m2's range where a scale serves a whole tensor, else e4m3's precision."""
        if gradients == "auto":
            gradients = "e5m2" if name in ("tensorwise", "delayed") else "e4m3"
        return cls(name, E5M2 if gradients == "e5m2" else E4M3, ops)

    @property
    def has_tiles(self) -> bool:
        """Whether scales belong to tiles, not to whole tensors."""
        return self.name in ("blockwise", "mxfp8", "nvfp4")

    def dtype(self, role: Role) -> torch.dtype:
        """Format of an operand."""
        return self.gradient_dtype if role == "gradient" else E4M3

    def tile(self, role: Role) -> tuple[int, int] | None:
        """Rows and columns of an operand that share a scale; None for one scale in all."""
        if not self.has_tiles:
            return None
        if self.name == "mxfp8":
            return (1, 32)
        if self.name == "nvfp4":
            return SQUARE if role == "weight" else ROW
        return (128, 128) if role == "weight" else (1, 128)

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of tiles' scales in eight bits."""
        return E8M0 if self.name == "mxfp8" else torch.float32

    @property
    def input_tile(self) -> int:
        """Numbers of an input's row that share a scale in eight bits; 0 where there are no such tiles."""
        tile = self.tile("input")
        return 0 if tile is None or self.name == "nvfp4" else tile[1]

    def quantize(self, x: Tensor, role: Role, scale: Tensor | None) -> Quantized:
        """``x`` [..., rows, columns] in eight bits, for a product that sums over its columns.

        Args:
            x: the operand.
            role: which one it is.
            scale: of the whole tensor; None where tiles have their own.
        """
        tile = self.tile(role)
        if tile is None:
            assert scale is not None, f"{self.name}: one scale serves the whole tensor"
            return self.ops.quantize(x, scale, self.dtype(role))
        assert scale is None, f"{self.name}: tiles have their own scales"
        if self.name == "nvfp4":
            return quantize_nvfp4(x, tile, is_random=role == "gradient")
        return self.ops.quantize_tiles(x, tile, self.dtype(role), scale_dtype=self.scale_dtype)


def multiplies_in_eight_bits(recipe: Recipe, device: torch.device) -> bool:
    """Whether ``device`` multiplies all operands of a recipe as they are in bf16 runs, not turned back to wide numbers.

    A GPU that is asked for the first time tries (``megavid.ops.device_products``).
    """
    if not recipe.has_tiles:
        return has_scaled_mm(device)
    inputs, weight, gradient = (Format(recipe.dtype(role), recipe.tile(role)) for role in ROLES)
    pairs = ((inputs, weight), (gradient, weight), (gradient, inputs))
    return all(has_tiled_product(device, a, b, torch.bfloat16) for a, b in pairs)


class Scaling(Protocol):
    """What a layer's products ask for: the scales of whole tensors, and who watches the rounding."""

    recipe: Recipe

    def scales(self, tensors: dict[Role, Tensor], *, is_training: bool) -> dict[Role, Tensor | None]:
        """One scale for each tensor, alike on all ranks that share it; None where tiles have their own.

        Args:
            tensors: the operands.
            is_training: their magnitudes count for the scales of later steps.
        """

    def watch(self, role: Role, x: Tensor, rounded: Quantized) -> None:
        """See ``x`` and what became of it."""

    @property
    def is_watching(self) -> bool:
        """Whether ``watch`` wants to see the operands."""


def fp8_linear(x: Tensor, weight_OI: Tensor, scaling: Scaling) -> Tensor:
    """``x @ weight.T`` in eight bits; [..., I] to [..., O] in the dtype of ``x``.

    Ranks: collective over those that share a scale, in the forward and in the backward pass.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = fp8_grouped_linear(rows, weight_OI.unsqueeze(0), [rows.shape[0]], scaling)
    return out.view(*x.shape[:-1], weight_OI.shape[0])


def fp8_grouped_linear(x_SI: Tensor, weight_eOI: Tensor, sizes: list[int], scaling: Scaling) -> Tensor:
    """``x @ weight[expert of the row].T`` in eight bits, expert by expert.

    Args:
        x_SI: rows sorted by expert.
        weight_eOI: matrices.
        sizes: rows of each expert.
        scaling: of the layer; one scale serves the matrices of all experts.

    Gradient:
        Every matrix gets one, zero for an expert without rows.
    """
    out: Tensor = _Fp8Linear.apply(  # type: ignore[no-untyped-call]
        x_SI, weight_eOI, sizes, scaling, torch.is_grad_enabled()
    )
    return out


def fp8_grouped_product(
    x_SI: Quantized, weight_eOI: Tensor, sizes: list[int], scaling: Scaling, dtype: torch.dtype
) -> Tensor:
    """The forward pass of ``fp8_grouped_linear`` alone, of rows that were rounded as they were made; in ``dtype``.

    It has no gradient, and its scales belong to tiles.
    """
    weight8 = scaling.recipe.quantize(weight_eOI, "weight", None)
    return scaled_grouped_matmul(x_SI, weight8, sizes, dtype)


class _Kept(NamedTuple):
    """What the backward pass needs beside tensors."""

    sizes: list[int]
    scaling: Scaling


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_SI: Tensor, weight_eOI: Tensor, sizes: list[int], scaling: Scaling, is_training: bool
    ) -> Tensor:
        recipe = scaling.recipe
        scales = scaling.scales({"input": x_SI, "weight": weight_eOI}, is_training=is_training)
        x8 = recipe.quantize(x_SI, "input", scales["input"])
        weight8 = recipe.quantize(weight_eOI, "weight", scales["weight"])
        scaling.watch("input", x_SI, x8)
        scaling.watch("weight", weight_eOI, weight8)
        ctx.kept = _Kept(sizes, scaling)
        if ctx.needs_input_grad[1]:
            x8_along_tokens = _along_tokens(recipe, x_SI, sizes, "input") if recipe.has_tiles else [x8.t]
            parts = [tensor for part in x8_along_tokens for tensor in (part.data, part.scale)]
        else:
            parts = []
        ctx.save_for_backward(weight_eOI, scales["weight"], *parts)
        return scaled_grouped_matmul(x8, weight8, sizes, x_SI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, ...]:
        weight_eOI, weight_scale, *parts = ctx.saved_tensors
        sizes, scaling = ctx.kept
        recipe = scaling.recipe
        (scale,) = scaling.scales({"gradient": grad_SO}, is_training=True).values()
        grad8 = recipe.quantize(grad_SO, "gradient", scale)
        scaling.watch("gradient", grad_SO, grad8)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            weight8 = recipe.quantize(weight_eOI.transpose(-1, -2), "weight", weight_scale)
            grad_x = scaled_grouped_matmul(grad8, weight8, sizes, grad_SO.dtype)
        if ctx.needs_input_grad[1]:
            if recipe.has_tiles:
                x8 = [Quantized(data, scale, recipe.tile("input")) for data, scale in zip(parts[::2], parts[1::2])]
                gradients = _along_tokens(recipe, grad_SO, sizes, "gradient")
            else:
                x8 = _columns(Quantized(*parts), sizes)
                gradients = _columns(grad8.t, sizes)
            pairs = zip(gradients, x8, strict=True)
            grad_weight = torch.stack([scaled_matmul(gradient, x, weight_eOI.dtype) for gradient, x in pairs])
        return grad_x, grad_weight, None, None, None


def _along_tokens(recipe: Recipe, x_SI: Tensor, sizes: list[int], role: Role) -> list[Quantized]:
    """Each expert's rows, transposed, with tiles along them."""
    return [recipe.quantize(part.t(), role, None) for part in torch.split(x_SI, sizes)]


def _columns(x_IS: Quantized, sizes: list[int]) -> list[Quantized]:
    """Each expert's columns of a tensor with one scale."""
    return [Quantized(part, x_IS.scale) for part in torch.split(x_IS.data, sizes, dim=1)]
