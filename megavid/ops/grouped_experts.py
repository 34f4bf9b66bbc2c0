"""The experts' feed-forward on one rank: rows sorted by expert, one matrix product per expert, gates inside.

Owns the math and its gradients. ``grouped_experts`` runs all experts of a rank in one grouped product where torch has
one for the dtype; ``grouped_experts_reference`` is the slow twin that defines it; ``feed_forward`` is what is between
and after the products, whoever computes them. Knows no rank: what an expert-tensor rank does not hold (hidden units,
columns of the last bias) is missing from its weights and from its output alike.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megavid.ops.fp8 import Quantized
from megavid.ops.fp8_linear import Scaling, fp8_grouped_linear, fp8_grouped_product
from megavid.ops.moe_ops import Activate, ActivateFp8
from megavid.ops.weight_gradient import GradientSum, add_product_

Activation = Literal["gelu", "swiglu"]
Product = Callable[[Tensor], Tensor]
"""``x @ matrix[expert of the row].T`` of rows sorted by expert."""

# What torch.nn.functional.grouped_mm takes; fp64 goes expert by expert.
GROUPED_DTYPES = (torch.float32, torch.bfloat16)
# grouped_mm wants every row of every matrix to begin on this many bytes.
GROUPED_ALIGNMENT = 16


class ExpertWeights(NamedTuple):
    """Matrices and biases of the ``e`` experts of a rank, stacked; None for what the model does not have.

    Attributes:
        up_eMD: first matrix.
        down_eDM: second matrix.
        gate_eMD: the matrix whose output goes through SiLU (SwiGLU), or None (GELU).
        up_bias_eM: bias of the first matrix.
        gate_bias_eM: bias of the gate's matrix.
        down_bias_eD: bias of the second matrix, or a range of its columns.
    """

    up_eMD: Tensor
    down_eDM: Tensor
    gate_eMD: Tensor | None = None
    up_bias_eM: Tensor | None = None
    gate_bias_eM: Tensor | None = None
    down_bias_eD: Tensor | None = None


class ExpertProducts(NamedTuple):
    """Products with the three matrices of every expert of a rank, by whoever holds them; None: there is no gate."""

    up: Product
    down: Callable[[Any], Tensor]  # of what the activation gives: wide numbers, or eight bits with their scales
    gate: Product | None = None


class ExpertBiases(NamedTuple):
    """Biases of ``ExpertWeights``."""

    up_eM: Tensor | None = None
    gate_eM: Tensor | None = None
    down_eD: Tensor | None = None


class ExpertScalings(NamedTuple):
    """Scales of the products in FP8, one record for each of the three matrices, all experts together; None: wide."""

    up: Scaling | None = None
    down: Scaling | None = None
    gate: Scaling | None = None


class ExpertSums(NamedTuple):
    """Where the gradients of the three matrices are added, see ``megavid.ops.weight_gradient``; None: autograd's."""

    up: GradientSum | None = None
    down: GradientSum | None = None
    gate: GradientSum | None = None


def grouped_experts(
    x_SD: Tensor,
    tokens_per_expert: Tensor,
    weights: ExpertWeights,
    probability_S: Tensor,
    *,
    first_column: int = 0,
    activate: Activate | None = None,
    activate_fp8: ActivateFp8 | None = None,
    scalings: ExpertScalings | None = None,
    sums: ExpertSums | None = None,
) -> Tensor:
    """``probability * (down(activation(up(x) + bias)) + bias)`` of each row's expert.

    The gate multiplies the hidden activation and the last bias, not the output: the same number, and no [S, D] tensor
    is kept for the backward pass.

    Args:
        x_SD: rows sorted by expert.
        tokens_per_expert: rows of each expert, int64 [e], best on the host; they sum to S.
        weights: the experts; GELU-tanh, or SwiGLU where they have a gate.
        probability_S: gate of each row, fp32 or wider.
        first_column: first output column that ``weights.down_bias_eD`` belongs to.
        activate: what is between the products, in one op (``megavid.ops.expert_activation``); None: in plain torch.
        activate_fp8: likewise in eight bits, for passes without gradient whose last product takes nothing else.
        scalings: of the products in FP8; None for wide ones.
        sums: of the gradients of matrices that are not in FP8; None: autograd gets them. ``tokens_per_expert`` is on
            the host.

    Returns:
        [S, D] in the dtype of ``x_SD``.

    Gradient:
        Every weight gets a gradient of its own shape, zero for an expert without rows.
    """
    rows = _Rows.of(tokens_per_expert, x_SD)
    scalings, sums = scalings or ExpertScalings(), sums or ExpertSums()

    def product(weight_eOI: Tensor, scaling: Scaling | None, total: GradientSum | None) -> Product:
        return partial(_linear, weight_eOI=weight_eOI, rows=rows, scaling=scaling, total=total)

    products = ExpertProducts(
        product(weights.up_eMD, scalings.up, sums.up),
        product(weights.down_eDM, scalings.down, sums.down),
        None if weights.gate_eMD is None else product(weights.gate_eMD, scalings.gate, sums.gate),
    )
    biases = ExpertBiases(weights.up_bias_eM, weights.gate_bias_eM, weights.down_bias_eD)
    run = partial(
        feed_forward, x_SD, rows.expert_S, biases=biases, probability_S=probability_S, first_column=first_column
    )
    down = scalings.down
    # A backward pass would want the activation along the tokens too, and who watches wants it wide.
    if activate_fp8 and down and down.recipe.input_tile and not (torch.is_grad_enabled() or down.is_watching):
        in_tiles = partial(activate_fp8, tile=down.recipe.input_tile, scale_dtype=down.recipe.scale_dtype)
        of_tiles = partial(
            fp8_grouped_product, weight_eOI=weights.down_eDM, sizes=rows.sizes.tolist(), scaling=down, dtype=x_SD.dtype
        )
        return run(products._replace(down=of_tiles), activate=in_tiles)
    return run(products, activate=activate or activate_plainly)


def feed_forward(
    x_SD: Tensor,
    expert_S: Tensor,
    products: ExpertProducts,
    biases: ExpertBiases,
    probability_S: Tensor,
    *,
    activate: Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor], Tensor | Quantized],
    first_column: int = 0,
) -> Tensor:
    """``grouped_experts`` but for the products with the matrices, which are the caller's.

    Args:
        x_SD: rows sorted by expert.
        expert_S: expert of each row, see ``expert_of_rows``.
        products: with the matrices.
        biases: of the experts.
        probability_S: gate of each row.
        activate: what is between the products.
        first_column: first output column that ``biases.down_eD`` belongs to.
    """
    out_SD = products.down(_hidden(x_SD, expert_S, products, biases, probability_S, activate))
    if biases.down_eD is None:
        return out_SD
    return _add_bias(out_SD, biases.down_eD, probability_S, expert_S, first_column)


def expert_of_rows(tokens_per_expert: Tensor, x_SD: Tensor) -> Tensor:
    """Expert of each of the rows ``x_SD``, sorted by expert, int64 [S] on their device; waits for nothing."""
    sizes = tokens_per_expert.to(x_SD.device, non_blocking=True)
    numbers = torch.arange(sizes.numel(), device=x_SD.device)
    return torch.repeat_interleave(numbers, sizes, output_size=x_SD.shape[0])


def _hidden(
    x_SD: Tensor,
    expert_S: Tensor,
    products: ExpertProducts,
    biases: ExpertBiases,
    probability_S: Tensor,
    activate: Callable[..., Tensor | Quantized],
) -> Tensor | Quantized:
    """Hidden activations times the gate; nothing that autograd does not keep outlives the call."""
    up_SM = products.up(x_SD)
    gate_SM = None if products.gate is None else products.gate(x_SD)
    return activate(up_SM, gate_SM, biases.up_eM, biases.gate_eM, expert_S, probability_S)


def activate_plainly(
    up_SM: Tensor,
    gate_SM: Tensor | None,
    up_bias_eM: Tensor | None,
    gate_bias_eM: Tensor | None,
    expert_S: Tensor,
    probability_S: Tensor,
) -> Tensor:
    """``megavid.ops.expert_activation``, bias by bias in plain torch: what ``train.ops = "reference"`` runs."""
    dtype, up_SM = up_SM.dtype, _biased(up_SM, up_bias_eM, expert_S)
    if gate_SM is None:
        hidden_SM = torch.nn.functional.gelu(up_SM, approximate="tanh")
    else:
        hidden_SM = torch.nn.functional.silu(_biased(gate_SM, gate_bias_eM, expert_S)) * up_SM
    return (hidden_SM * probability_S.unsqueeze(-1)).to(dtype)


def grouped_experts_reference(
    x_SD: Tensor,
    tokens_per_expert: Tensor,
    weights: ExpertWeights,
    probability_S: Tensor,
    *,
    first_column: int = 0,
) -> Tensor:
    """The slow, obvious twin of ``grouped_experts``: one expert after another."""
    sizes = tokens_per_expert.tolist()
    parts = []
    for expert, (x, probability) in enumerate(zip(torch.split(x_SD, sizes), torch.split(probability_S, sizes))):
        up, down, gate, up_bias, gate_bias, down_bias = (w if w is None else w[expert] for w in weights)
        assert up is not None
        assert down is not None
        hidden = torch.nn.functional.linear(x, up, up_bias)
        if gate is None:
            hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
        else:
            hidden = torch.nn.functional.silu(torch.nn.functional.linear(x, gate, gate_bias)) * hidden
        out = torch.nn.functional.linear(hidden, down)
        if down_bias is not None:
            right = out.shape[1] - first_column - down_bias.shape[0]
            out = out + torch.nn.functional.pad(down_bias, (first_column, right))
        parts.append((probability.unsqueeze(-1) * out).to(x_SD.dtype))
    return torch.cat(parts)


class _Rows(NamedTuple):
    """Which expert each row belongs to, in the forms that the products need."""

    sizes: Tensor  # [e] int64, as given
    ends: Tensor  # [e] int32 on the device: one past the last row of each expert
    expert_S: Tensor  # [S] int64 on the device

    @classmethod
    def of(cls, tokens_per_expert: Tensor, x_SD: Tensor) -> "_Rows":
        ends = tokens_per_expert.to(x_SD.device, non_blocking=True).cumsum(0).to(torch.int32)
        return cls(tokens_per_expert, ends, expert_of_rows(tokens_per_expert, x_SD))


def _linear(
    x_SI: Tensor, weight_eOI: Tensor, rows: _Rows, scaling: Scaling | None, total: GradientSum | None
) -> Tensor:
    """``x @ weight[expert of the row].T``, in FP8 where there are scales."""
    if scaling is not None:
        return fp8_grouped_linear(x_SI, weight_eOI, rows.sizes.tolist(), scaling)
    if not _is_groupable(x_SI, weight_eOI):
        parts = torch.split(x_SI, rows.sizes.tolist())
        return torch.cat([part @ weight.t() for part, weight in zip(parts, weight_eOI.unbind())])
    out: Tensor = _GroupedProduct.apply(x_SI, weight_eOI, rows, total)  # type: ignore[no-untyped-call]
    return out


def _is_groupable(x_SI: Tensor, weight_eOI: Tensor) -> bool:
    widths = (weight_eOI.shape[1], weight_eOI.shape[2])
    is_aligned = all(width * x_SI.element_size() % GROUPED_ALIGNMENT == 0 for width in widths)
    return x_SI.dtype in GROUPED_DTYPES and is_aligned and x_SI.shape[0] > 0


def _biased(x_SM: Tensor, bias_eM: Tensor | None, expert_S: Tensor) -> Tensor:
    return x_SM if bias_eM is None else _add_bias(x_SM, bias_eM, None, expert_S, 0)


def _add_bias(x_SM: Tensor, bias_em: Tensor, factor_S: Tensor | None, expert_S: Tensor, first: int) -> Tensor:
    out: Tensor = _AddBiasOfExpert.apply(  # type: ignore[no-untyped-call]
        x_SM, bias_em, factor_S, expert_S, first
    )
    return out


class _GroupedProduct(torch.autograd.Function):
    """``grouped_mm`` with the gradients that autograd would take, but where the matrices' sums are at hand.

    Its backward refuses gradients that are expanded or transposed. Experts' gradients are added to their sums one by
    one: a product over the rows of one expert is as large as its matrix, enough to fill a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, weight_eOI: Tensor, rows: _Rows, total: GradientSum | None) -> Tensor:
        ctx.save_for_backward(x_SI, weight_eOI)
        ctx.rows, ctx.total = rows, total
        return _grouped_mm(x_SI, weight_eOI.transpose(1, 2), rows.ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, ...]:
        x_SI, weight_eOI = ctx.saved_tensors
        rows, total = ctx.rows, ctx.total
        grad_SO = grad_SO.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _grouped_mm(grad_SO, weight_eOI, rows.ends)
        if ctx.needs_input_grad[1] and total is None:
            grad_weight = _grouped_mm(grad_SO.t(), x_SI, rows.ends)
        elif ctx.needs_input_grad[1]:
            sizes = rows.sizes.tolist()
            parts = zip(total.total, torch.split(grad_SO, sizes), torch.split(x_SI, sizes), strict=True)
            for sum_OI, grad, x in parts:
                add_product_(sum_OI, grad, x)
            total.tell()
            grad_weight = total.stand_in(weight_eOI.dtype)
        return grad_x, grad_weight, None, None


def _grouped_mm(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    out: Tensor = torch.nn.functional.grouped_mm(left, right, offs=ends)
    return out


class _AddBiasOfExpert(torch.autograd.Function):
    """``x[:, first:first + width] += factor * bias[expert]``.

    Autograd would keep the gathered bias, as large as ``x``, and sum the bias's gradient with atomics on GPUs, in no
    fixed order; here it is gathered again, and summed by a matrix product.
    """

    @staticmethod
    def forward(
        ctx: Any, x_SM: Tensor, bias_em: Tensor, factor_S: Tensor | None, expert_S: Tensor, first: int
    ) -> Tensor:
        ctx.save_for_backward(bias_em, factor_S, expert_S)
        ctx.first = first
        rows_Sm = bias_em.index_select(0, expert_S)
        if factor_S is not None:
            rows_Sm = (rows_Sm * factor_S.unsqueeze(-1)).to(x_SM.dtype)
        if bias_em.shape[1] == x_SM.shape[1]:
            return x_SM + rows_Sm
        out_SM = x_SM.clone()
        out_SM[:, first : first + bias_em.shape[1]] += rows_Sm
        return out_SM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SM: Tensor) -> tuple[Tensor | None, ...]:
        bias_em, factor_S, expert_S = ctx.saved_tensors
        own_Sm = grad_SM[:, ctx.first : ctx.first + bias_em.shape[1]]
        belongs_eS = torch.zeros(bias_em.shape[0], expert_S.shape[0], dtype=grad_SM.dtype, device=grad_SM.device)
        source_1S = (torch.ones_like(expert_S) if factor_S is None else factor_S).to(grad_SM.dtype)
        belongs_eS.scatter_(0, expert_S.unsqueeze(0), source_1S.unsqueeze(0))
        grad_factor_S = None
        if factor_S is not None:
            rows_Sm = bias_em.index_select(0, expert_S).to(factor_S.dtype)
            grad_factor_S = (own_Sm * rows_Sm).sum(-1)
        return grad_SM, belongs_eS @ own_Sm, grad_factor_S, None, None
