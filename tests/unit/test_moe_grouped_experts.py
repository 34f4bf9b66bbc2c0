"""Grouped experts against their slow twin: outputs, every gradient, and the awkward loads."""

from functools import partial

import pytest
import torch
from torch import Tensor

from megavid.ops.compiled import why_not_compiled
from megavid.ops.expert_activation import expert_activation_op
from megavid.ops.grouped_experts import ExpertSums, ExpertWeights, grouped_experts, grouped_experts_reference
from megavid.ops.weight_gradient import GradientSum

LOADS = {
    "even": [4, 4, 4],
    "one expert without rows": [5, 0, 7],
    "all rows to one expert": [0, 12, 0],
    "no rows": [0, 0, 0],
}


def make_weights(kind: str, has_bias: bool, dtype: torch.dtype, width: int = 16, hidden: int = 8) -> ExpertWeights:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.4).to(dtype).requires_grad_()

    return ExpertWeights(
        up_eMD=draw(3, hidden, width),
        down_eDM=draw(3, width, hidden),
        gate_eMD=draw(3, hidden, width) if kind == "swiglu" else None,
        up_bias_eM=draw(3, hidden) if has_bias else None,
        gate_bias_eM=draw(3, hidden) if has_bias and kind == "swiglu" else None,
        down_bias_eD=draw(3, width) if has_bias else None,
    )


def make_rows(load: list[int], dtype: torch.dtype, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(sum(load), width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    gate_dtype = torch.promote_types(dtype, torch.float32)
    probability = torch.rand(sum(load), generator=generator, dtype=torch.float64).to(gate_dtype).requires_grad_()
    return x, torch.tensor(load), probability


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 6e-2)]
)
def test_grouped_experts_equal_their_slow_twin(
    kind: str, has_bias: bool, load: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    functions = [grouped_experts_reference, grouped_experts]
    if not why_not_compiled() and dtype != torch.float64:
        functions.append(partial(grouped_experts, activate=expert_activation_op))
    results = []
    for function in functions:
        weights, (x, sizes, probability) = make_weights(kind, has_bias, dtype), make_rows(load, dtype)
        out = function(x, sizes, weights, probability)
        assert out.dtype == dtype
        (out.double() * torch.linspace(-1, 1, 16, dtype=torch.float64)).sum().backward()
        leaves = [x, probability, *(w for w in weights if w is not None)]
        assert all(leaf.grad is not None for leaf in leaves)
        results.append([out, *(leaf.grad for leaf in leaves)])
    for fast, slow in ((fast, slow) for other in results[1:] for fast, slow in zip(other, results[0])):
        torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_expert_without_rows_gets_gradients_of_zero(dtype: torch.dtype) -> None:
    weights, (x, sizes, probability) = make_weights("swiglu", True, dtype), make_rows([5, 0, 7], dtype)
    grouped_experts(x, sizes, weights, probability).sum().backward()
    for weight in weights:
        assert weight is not None
        assert weight.grad is not None
        assert weight.grad.shape == weight.shape
        assert weight.grad[1].abs().max() == 0
        assert weight.grad[0].abs().max() > 0


def sums_and_gradients(load: list[int], dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor], int]:
    """Sums of the three matrices' gradients, begun at 1, those gradients from autograd, and how often a sum told."""
    weights, (x, sizes, probability) = make_weights("swiglu", True, dtype), make_rows(load, dtype)
    weights = ExpertWeights(*(None if w is None else w.detach().to(device).requires_grad_() for w in weights))
    x, probability = x.detach().to(device), probability.detach().to(device)
    matrices = [weights.up_eMD, weights.down_eDM, weights.gate_eMD]
    told: list[None] = []
    totals = [torch.ones_like(matrix, dtype=torch.float32) for matrix in matrices if matrix is not None]
    sums = ExpertSums(*(GradientSum(total, lambda: told.append(None)) for total in totals))
    found = []
    for where in (None, sums):
        out = grouped_experts(x, sizes, weights, probability, sums=where)
        loss = (out.double() * torch.linspace(-1, 1, 16, dtype=torch.float64, device=device)).sum()
        found.append(torch.autograd.grad(loss, [matrix for matrix in matrices if matrix is not None]))
    for matrix, stand_in in zip(matrices, found[1], strict=True):
        assert matrix is not None
        assert (stand_in.shape, stand_in.dtype) == (matrix.shape, dtype)
    return totals, list(found[0]), len(told)


@pytest.mark.parametrize("load", [[4, 4, 4], [5, 0, 7], [0, 12, 0]])
def test_gradients_are_added_to_the_sums_at_hand(load: list[int]) -> None:
    totals, gradients, told = sums_and_gradients(load, torch.float32, "cpu")
    assert told == 3
    for total, gradient in zip(totals, gradients, strict=True):
        torch.testing.assert_close(total, 1 + gradient, rtol=1e-6, atol=1e-6)


def test_gradients_of_grouped_experts_are_those_of_finite_differences() -> None:
    weights, (x, sizes, probability) = make_weights("swiglu", True, torch.float64), make_rows([2, 0, 3], torch.float64)

    def of_leaves(x: Tensor, probability: Tensor, *leaves: Tensor) -> Tensor:
        return grouped_experts(x, sizes, ExpertWeights(*leaves), probability)

    assert torch.autograd.gradcheck(of_leaves, (x, probability, *weights))


def test_hidden_units_and_bias_columns_of_two_ranks_add_up() -> None:
    whole, (x, sizes, probability) = make_weights("swiglu", True, torch.float64), make_rows([4, 1, 3], torch.float64)
    parts = []
    for rank in range(2):
        units, columns = slice(rank * 4, rank * 4 + 4), slice(rank * 8, rank * 8 + 8)
        own = ExpertWeights(
            up_eMD=whole.up_eMD[:, units],
            down_eDM=whole.down_eDM[:, :, units].contiguous(),
            gate_eMD=whole.gate_eMD[:, units],  # type: ignore[index]
            up_bias_eM=whole.up_bias_eM[:, units],  # type: ignore[index]
            gate_bias_eM=whole.gate_bias_eM[:, units],  # type: ignore[index]
            down_bias_eD=whole.down_bias_eD[:, columns],  # type: ignore[index]
        )
        parts.append(grouped_experts(x, sizes, own, probability, first_column=columns.start))
    torch.testing.assert_close(sum(parts), grouped_experts(x, sizes, whole, probability), rtol=1e-12, atol=1e-12)


def test_widths_that_grouped_mm_cannot_take_still_work() -> None:
    weights = make_weights("gelu", True, torch.float32, width=6, hidden=5)
    x, sizes, probability = make_rows([3, 2, 1], torch.float32, width=6)
    out = grouped_experts(x, sizes, weights, probability)
    torch.testing.assert_close(out, grouped_experts_reference(x, sizes, weights, probability))
