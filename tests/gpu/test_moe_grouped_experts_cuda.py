"""Grouped experts on a GPU: the grouped product with awkward loads, and the bias's gradient in a fixed order."""

import pytest
import torch

from megavid.ops.grouped_experts import grouped_experts, grouped_experts_reference
from megavid.ops.weight_gradient import can_add_product
from tests.unit.test_moe_grouped_experts import LOADS, make_rows, make_weights, sums_and_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 6e-2)])
def test_grouped_experts_on_a_gpu_equal_their_slow_twin(
    kind: str, load: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    results = []
    for function in (grouped_experts, grouped_experts_reference):
        weights, (x, sizes, probability) = make_weights(kind, True, dtype), make_rows(load, dtype)
        leaves = [t.detach().cuda().requires_grad_() for t in (x, probability, *(w for w in weights if w is not None))]
        rest = iter(leaves[2:])
        on_gpu = type(weights)(*(None if w is None else next(rest) for w in weights))
        out = function(leaves[0], sizes, on_gpu, leaves[1])
        (out.double() * torch.linspace(-1, 1, 16, dtype=torch.float64, device="cuda")).sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for fast, slow in zip(*results):
        torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_gradients_are_added_to_the_sums_at_hand_on_a_gpu(dtype: torch.dtype, tolerance: float) -> None:
    if not can_add_product(dtype, torch.device("cuda")):
        pytest.skip("this torch adds no product of bf16 to fp32")
    totals, gradients, told = sums_and_gradients([5, 0, 7], dtype, "cuda")
    assert told == 3
    for total, gradient in zip(totals, gradients, strict=True):
        torch.testing.assert_close(total, 1 + gradient.float(), rtol=tolerance, atol=tolerance)
