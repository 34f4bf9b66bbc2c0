"""The compiled ops of expert layers on a GPU: against the references in fp64, in a fixed order, the same choice."""

import pytest
import torch
from torch import Tensor

from megavid.ops import router_topk
from tests.gpu.test_ops_cuda import on_gpu
from tests.unit.test_ops_compiled import gradients, outputs, widened
from tests.unit.test_ops_moe import OPS, SIZES, learnt, make

pytestmark = pytest.mark.usefixtures("cuda_kernels")


@pytest.mark.parametrize(("tokens", "experts", "width"), [*SIZES, (3000, 64, 1536)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_cuda_is_as_near_as_the_reference(op: str, dtype: torch.dtype, tokens: int, experts: int, width: int) -> None:
    reference, operator, given = make(op, tokens, experts, width, dtype)
    exact = gradients(learnt(op, reference), widened(given), torch.float64)
    plain = gradients(learnt(op, reference), given, dtype)
    fast = gradients(learnt(op, operator), on_gpu(given), dtype)
    for number, (want, near, got) in enumerate(zip(exact, plain, fast, strict=True)):
        if want is None or not want.numel():
            continue  # the router's bias takes no gradient
        limit = 2 * (near.double() - want).abs().max() + 4 * torch.finfo(torch.float32).eps * want.abs().max()
        error = (got.cpu().double() - want).abs().max()
        assert error <= limit, f"output {number}: error {error:.2e}, limit {limit:.2e}"
    for number, (near, got) in enumerate(zip(outputs(reference(*given)), outputs(operator(*on_gpu(given))))):
        if not near.is_floating_point():
            assert torch.equal(near, got.cpu()), f"output {number}"


@pytest.mark.parametrize("op", OPS)
def test_sums_are_the_same_every_time(op: str) -> None:
    _, operator, given = make(op, 3000, 8, 384, torch.bfloat16)
    first, second = (gradients(learnt(op, operator), on_gpu(given), torch.bfloat16) for _ in range(2))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("groups", "top_groups", "top_k"), [(1, 1, 1), (1, 1, 8), (8, 3, 6), (4, 1, 12)])
def test_the_choice_is_the_references_with_ties_too(groups: int, top_groups: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(3000, 64, generator=generator) * 3).round() / 3
    bucket = torch.randint(-1, 4, (3000,), generator=generator)
    given = (scores, torch.zeros(64), bucket, 4, top_k, groups, top_groups, 1.5)
    _, routing, counts = router_topk.router_topk_reference(*given)
    _, fast_routing, fast_counts = torch.ops.megavid.router_topk(*on_gpu(given))
    assert torch.equal(routing, fast_routing.cpu())
    assert torch.equal(counts, fast_counts.cpu())


@pytest.mark.parametrize("op", OPS)
def test_nothing_waits_for_the_device(op: str) -> None:
    _, operator, given = make(op, 64, 8, 96, torch.bfloat16)
    leaves = [v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for v in on_gpu(given)]
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]

    def both_passes() -> None:
        found = learnt(op, operator)(*leaves)
        torch.autograd.grad(found, inputs, [torch.ones_like(out) for out in found], allow_unused=True)

    both_passes()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_passes()
    finally:
        torch.cuda.set_sync_debug_mode("default")
