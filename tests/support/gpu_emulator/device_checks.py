"""What CUDA kernels check of the numbers they are given, run with the plugin tests.support.gpu_on_cpu alone."""

import pytest
import torch

from megavid.ops.block_ops import COMPILED
from megavid.ops.choose import block_ops

ROW = "row >= 0 && row < rows"


@pytest.mark.parametrize(
    ("call", "assertion"),
    [
        ("modulated_norm(x, table, table, row, 1e-6, True)", ROW),
        ("gated_residual(x, x, table, row)", ROW),
        ("gated_residual_norm(x, x, table, row, table, table, row * 0, 1e-6, True)", ROW),
        ("gated_residual_norm(x, x, None, row, table, table, row, 1e-6, True)", ROW),
        ("expert_activation(x, None, table, None, row, x[:, 0])", ROW),
        ("expert_activation_fp8(x, None, table, None, row, x[:, 0], 32, torch.float32)", ROW),
        ("router_topk(x, None, row, 2, 1, 1, 1, 1.0)", ROW),
        ("moe_permute(x, x, x > -9, 4 * 8 - 1, 1)", "begin <= job.num_rows"),
    ],
)
def test_numbers_out_of_range_stop_the_kernel(call: str, assertion: str) -> None:
    given = {"x": torch.zeros(4, 8), "table": torch.zeros(2, 8), "row": torch.full((4,), 2), "torch": torch}
    with pytest.raises(RuntimeError, match="device-side assert: ") as caught:
        eval(f"torch.ops.megavid.{call}", given)
    assert assertion in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_before_a_run_passes(dtype: torch.dtype) -> None:
    assert torch.ops.megavid.instruction_set() == "cuda on a CPU"
    assert block_ops("compiled", torch.device("cpu"), dtype) is COMPILED
