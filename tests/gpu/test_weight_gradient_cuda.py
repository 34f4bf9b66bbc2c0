"""On a GPU a product of bf16 numbers is added to a sum in fp32: no rounding, and no tensor of the matrix' size."""

import pytest
import torch

from megavid.ops.weight_gradient import add_product_, add_product_reference_, can_add_product

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_is_nearer_to_the_truth_than_that_of_its_slow_twin(dtype: torch.dtype) -> None:
    if not can_add_product(dtype, torch.device("cuda")):
        pytest.skip("this torch adds no product of bf16 to fp32")
    generator = torch.Generator(device="cuda").manual_seed(3)
    sizes = ((512, 768), (1040, 512), (1040, 768))
    total, grad, x = (torch.randn(size, generator=generator, device="cuda") for size in sizes)
    grad, x = grad.to(dtype), x.to(dtype)
    true = total.double() + grad.double().t() @ x.double()
    slow = total.clone()
    add_product_(torch.zeros_like(total), grad, x)  # cuBLAS takes its workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    add_product_(total, grad, x)
    assert torch.cuda.max_memory_allocated() == before
    add_product_reference_(slow, grad, x)
    error, slow_error = ((found - true).abs().max() / true.abs().max() for found in (total, slow))
    assert error <= 1e-5
    assert dtype == torch.float32 or error < 0.1 * slow_error
