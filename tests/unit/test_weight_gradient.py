"""A product that is added to a sum in place is the product that is added afterwards."""

import pytest
import torch

from megavid.ops.weight_gradient import FIRST_MIXED, PIECE, add_product_, add_product_reference_, can_add_product

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("rows", [0, 1, 57])
def test_sum_is_that_of_its_slow_twin(dtype: torch.dtype, tolerance: float, rows: int) -> None:
    generator = torch.Generator().manual_seed(3)
    total, grad, x = (
        torch.randn(size, generator=generator, dtype=dtype) for size in ((24, 40), (rows, 24), (rows, 40))
    )
    wanted = total.clone()
    place = total.data_ptr()
    for factor in (1.0, -0.5):
        add_product_(total, factor * grad, x)
        add_product_reference_(wanted, factor * grad, x)
    assert total.data_ptr() == place
    torch.testing.assert_close(total, wanted, rtol=0, atol=tolerance * max(float(wanted.abs().max()), 1.0))


@pytest.mark.parametrize("shape", [(3, 5), (400, 700)])
def test_bf16_on_a_cpu_is_added_piece_by_piece_as_at_once(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    total = torch.randn(shape, generator=generator)
    grad, x = (torch.randn(19, size, generator=generator).bfloat16() for size in shape)
    wanted = total.clone()
    add_product_(total, grad, x)
    add_product_reference_(wanted, grad, x)
    assert torch.equal(total, wanted)
    assert 3 * 5 < PIECE < 400 * 700


def test_bf16_waits_for_torch_to_add_it_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_add_product(torch.float32, CPU)
    assert can_add_product(torch.float32, CUDA)
    assert can_add_product(torch.bfloat16, CPU)
    assert not can_add_product(torch.float16, CUDA)
    for version, is_new in (("2.9.1", False), ("2.10.0a0+git", False), ("2.10.0", True), ("2.13.0+cu130", True)):
        monkeypatch.setattr(torch, "__version__", version)
        assert can_add_product(torch.bfloat16, CUDA) is is_new, (version, FIRST_MIXED)
