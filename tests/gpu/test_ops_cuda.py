"""Compiled ops on a GPU: against the references in fp64 on CPU, in a fixed order, on any stream."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.test_ops_compiled import OPS, SIZES, gradients, learnt, leaves_of, make, operator, widened

pytestmark = pytest.mark.usefixtures("cuda_kernels")


def on_gpu(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.cuda() if isinstance(value, Tensor) else value for value in given)


@pytest.mark.parametrize(("tokens", "rows", "width"), [*SIZES, (3000, 5, 1536), (500, 21, 5120)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_cuda_is_as_near_as_the_reference(op: str, dtype: torch.dtype, tokens: int, rows: int, width: int) -> None:
    reference, _, given = make(op, tokens, rows, width, dtype)
    exact = gradients(learnt(op, reference), widened(given), torch.float64)
    plain = gradients(learnt(op, reference), given, dtype)
    fast = gradients(learnt(op, operator(op)), on_gpu(given), dtype)
    for number, (want, near, got) in enumerate(zip(exact, plain, fast, strict=True)):
        if got is None or not want.numel():
            continue  # angles take no gradient
        limit = 2 * (near.double() - want).abs().max() + 4 * torch.finfo(torch.float32).eps * want.abs().max()
        error = (got.cpu().double() - want).abs().max()
        assert got.dtype == near.dtype
        assert error <= limit, f"output {number}: error {error:.2e}, limit {limit:.2e}"


@pytest.mark.parametrize("op", OPS)
def test_sums_are_the_same_every_time_and_on_any_stream(op: str) -> None:
    given = on_gpu(make(op, 3000, 7, 384, torch.bfloat16)[2])
    once = gradients(learnt(op, operator(op)), given, torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        again = gradients(learnt(op, operator(op)), given, torch.bfloat16)
        torch.cuda.current_stream().synchronize()
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_operators_are_registered_as_torch_wants_them(op: str) -> None:
    given = on_gpu(make(op, 9, 2, 12, torch.float32)[2])
    torch.library.opcheck(operator(op).default, tuple(leaves_of(op, given)))


def test_nothing_waits_for_the_device() -> None:
    given = on_gpu(make("gated_residual_norm", 64, 2, 96, torch.bfloat16)[2])
    gradients(learnt("gated_residual_norm", operator("gated_residual_norm")), given, torch.bfloat16)
    leaves = [v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for v in given]
    torch.cuda.set_sync_debug_mode("error")
    try:
        residual, y, *_ = operator("gated_residual_norm")(*leaves)
        torch.autograd.backward((residual, y), (torch.ones_like(residual), torch.ones_like(y)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_strided_inputs_are_read_as_they_are() -> None:
    given = on_gpu(make("norm_rope", 11, 1, 24, torch.float32)[2])
    wide = torch.cat((given[0] * 2, given[0], given[0] * 3), dim=-1).chunk(3, dim=-1)[1]
    assert torch.equal(operator("norm_rope")(wide, *given[1:]), operator("norm_rope")(*given))


@pytest.mark.parametrize(
    "call",
    [
        "modulated_norm(x, table, table, row, 1e-6, True)",
        "gated_residual(x, x, table, row)",
        "gated_residual_norm(x, x, table, row, table, table, row * 0, 1e-6, True)",
        "gated_residual_norm(x, x, None, row, table, table, row, 1e-6, True)",
        "expert_activation(x, None, table, None, row, x[:, 0])",
        "router_topk(x, None, row, 2, 1, 1, 1, 1.0)",
        "moe_permute(x, x, x > -9, 4 * 8 - 1, 1)",
    ],
)
def test_numbers_out_of_range_stop_the_program(call: str) -> None:
    given = "x, table = torch.zeros(4, 8).cuda(), torch.zeros(2, 8).cuda(); row = torch.full((4,), 2).cuda()"
    load = "import torch\nfrom megavid.ops.choose import block_ops\n"
    load += "block_ops('compiled', torch.device('cuda'), torch.float32)\n"
    code = f"{load}{given}\ntorch.ops.megavid.{call}\ntorch.cuda.synchronize()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


def test_a_table_elsewhere_is_refused() -> None:
    _, _, given = make("gated_residual", 9, 2, 12, torch.float32)
    with pytest.raises(ValueError, match="x is on cuda:0, another argument on cpu"):
        operator("gated_residual")(given[0].cuda(), given[1].cuda(), given[2], given[3].cuda())
