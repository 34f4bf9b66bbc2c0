"""What CUDA kernels check of the numbers they are given, run with the plugin tests.support.gpu_on_cpu alone."""

import pytest
import torch

from megavid.ops.block_ops import COMPILED
from megavid.ops.choose import block_ops
from tests.unit import test_ops_compiled, test_ops_moe
from tests.unit.test_ops_compiled import gradients, learnt, operator, same

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


@pytest.mark.parametrize("op", [*test_ops_compiled.OPS, *test_ops_moe.OPS])
def test_outputs_are_like_those_that_are_declared(op: str) -> None:
    if op in test_ops_compiled.OPS:
        function, (_, _, given) = operator(op), test_ops_compiled.make(op, 9, 2, 12, torch.float32)
    else:
        _, function, given = test_ops_moe.make(op, 9, 8, 12, torch.float32)
    torch.library.opcheck(function.default, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", test_ops_compiled.OPS)
def test_the_order_of_blocks_and_warps_changes_nothing(op: str) -> None:
    _, _, given = test_ops_compiled.make(op, 200, 4, 96, torch.float32)
    once, again = (gradients(learnt(op, operator(op)), given, torch.float32) for _ in range(2))
    assert same(once, again)


@pytest.mark.parametrize("op", test_ops_moe.OPS)
def test_nor_in_expert_layers(op: str) -> None:
    _, function, given = test_ops_moe.make(op, 600, 8, 24, torch.float32)
    once, again = (gradients(test_ops_moe.learnt(op, function), given, torch.float32) for _ in range(2))
    assert same(once, again)


def test_many_experts_get_the_memory_that_their_scores_take() -> None:
    scores, bucket = torch.rand(9, 2000), torch.zeros(9, dtype=torch.int64)
    probability, routing, _ = torch.ops.megavid.router_topk(scores, None, bucket, 1, 4, 1, 1, 1.0)
    assert torch.equal(routing.nonzero()[:, 1].view(9, 4), scores.topk(4).indices.sort().values)
    torch.testing.assert_close(probability.sum(1), torch.ones(9))
