"""The compiled ops of expert layers: references against autograd, compiled against references, the choice with ties."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megavid.ops import expert_activation, moe_permute, router_topk
from megavid.ops.compiled import why_not_compiled
from tests.unit.test_ops_compiled import gradients, in_threads, outputs, same, widened

SIZES = [(1, 1, 8), (7, 3, 34), (200, 8, 96), (130, 12, 18), (600, 4, 300), (0, 2, 16)]
"""Tokens, experts, width."""
ALIGNMENT = 16
OPS = ["gelu", "gelu, bias", "swiglu", "swiglu, biases", "permute", "permute, aligned", "unpermute"]
OPS += ["unpermute, weighted", "router", "router, one", "router, groups"]

needs_compiled = pytest.mark.skipif(bool(why_not_compiled()), reason=f"compiled ops: {why_not_compiled()}")


def make(op: str, tokens: int, experts: int, width: int, dtype: torch.dtype) -> tuple[Callable[..., Any], Any, Any]:
    """Forward reference, operator, arguments; where there are several experts, the second one gets no token."""
    generator = torch.Generator().manual_seed(tokens + width)
    narrow = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, of: torch.dtype = narrow) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(of)

    kind, _, variant = op.partition(", ")
    if kind in ("gelu", "swiglu"):
        expert = torch.randint(experts, (tokens,), generator=generator).sort().values
        expert[expert == 1] = experts - 1
        gate = normal(tokens, width, of=dtype) * 3 if kind == "swiglu" else None
        up_bias = normal(experts, width, of=dtype) if variant else None
        gate_bias = normal(experts, width, of=dtype) if variant == "biases" else None
        given: Any = (normal(tokens, width, of=dtype) * 3, gate, up_bias, gate_bias, expert, normal(tokens).sigmoid())
        return expert_activation.expert_activation_reference, torch.ops.megavid.expert_activation, given
    if kind == "router":
        top_k = 1 if variant == "one" or experts == 1 else 2
        groups = 4 if variant == "groups" and experts % 4 == 0 and experts >= 8 else 1
        bucket = torch.randint(-1, 4, (tokens,), generator=generator)
        scores = normal(tokens, experts).sigmoid()
        given = (scores, normal(experts) / 8, bucket, 4, top_k, groups, 2 if groups > 1 else 1, 2.5)
        return router_topk.router_topk_reference, torch.ops.megavid.router_topk, given
    routing = torch.rand(tokens, experts, generator=generator) < 0.4
    routing[:, 1:2] = False
    num_rows = int(routing.sum()) + (experts * ALIGNMENT if variant == "aligned" else 0)
    alignment = ALIGNMENT if variant == "aligned" else 1
    given = (normal(tokens, width, of=dtype), normal(tokens, experts).sigmoid(), routing, num_rows, alignment)
    if kind == "permute":
        return moe_permute.moe_permute_reference, torch.ops.megavid.moe_permute, given
    indices = moe_permute.moe_permute_reference(*given)[2:5]
    weight = normal(num_rows).sigmoid() if variant else None
    given = (normal(num_rows, width, of=dtype), weight, *indices)
    return moe_permute.moe_unpermute_reference, torch.ops.megavid.moe_unpermute, given


def learnt(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The outputs of ``op`` that carry a gradient."""
    count = 2 if op.startswith("permute") else 1
    return lambda *args: outputs(function(*args))[:count]


def written_out(op: str, given: tuple[Any, ...], grads: list[Tensor]) -> list[Tensor | None]:
    """Gradients of the arguments of an op, of the reference that the op's own gradient is compared with."""
    if op.startswith(("gelu", "swiglu")):
        *found, of_probability = expert_activation.expert_activation_backward_reference(grads[0], *given)
        return [None if x is None else g for x, g in zip(given, found)] + [None, of_probability]
    if op.startswith("router"):
        _, routing, _ = router_topk.router_topk_reference(*given)
        return [router_topk.router_topk_backward_reference(grads[0], given[0], routing, given[4], given[7]), None]
    if op.startswith("permute"):
        rows = moe_permute.moe_permute_reference(*given)
        return [*moe_permute.moe_permute_backward_reference(*grads, *rows[2:])]
    x, weight, token, _, _ = given
    of_rows, of_weight = moe_permute.moe_unpermute_backward_reference(grads[0], x, weight, token)
    return [of_rows, None if weight is None else of_weight]


@pytest.mark.parametrize("op", OPS)
def test_written_out_gradient_is_that_of_autograd(op: str) -> None:
    reference, _, given = make(op, 6, 8, 5, torch.float64)
    fixed = {1} if op.startswith("router") else set()  # the bias only selects
    leaves = [
        v.clone().requires_grad_(number not in fixed) if isinstance(v, Tensor) and v.is_floating_point() else v
        for number, v in enumerate(given)
    ]
    found = learnt(op, reference)(*leaves)
    grads = [torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype) for out in found]
    inputs = [(n, leaf) for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    expected = torch.autograd.grad(found, [leaf for _, leaf in inputs], grads)
    mine = written_out(op, given, grads)
    for (number, _), want in zip(inputs, expected):
        torch.testing.assert_close(mine[number], want, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(learnt(op, reference), leaves)


@needs_compiled
@pytest.mark.parametrize(("tokens", "experts", "width"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_compiled_is_as_near_as_the_reference(
    op: str, dtype: torch.dtype, tokens: int, experts: int, width: int
) -> None:
    reference, operator, given = make(op, tokens, experts, width, dtype)
    exact = gradients(learnt(op, reference), widened(given), torch.float64)
    plain = gradients(learnt(op, reference), given, dtype)
    fast = gradients(learnt(op, operator), given, dtype)
    assert len(fast) == len(plain) == len(exact)
    for number, (want, near, got) in enumerate(zip(exact, plain, fast)):
        if want is None or not want.numel():
            continue  # the router's bias takes no gradient
        assert got.dtype == near.dtype
        limit = 2 * (near.double() - want).abs().max() + 4 * torch.finfo(torch.float32).eps * want.abs().max()
        error = (got.double() - want).abs().max()
        assert error <= limit, f"output {number}: error {error:.2e}, limit {limit:.2e}"
    for number, (near, got) in enumerate(zip(outputs(reference(*given)), outputs(operator(*given)))):
        if not near.is_floating_point():
            assert torch.equal(near, got), f"output {number}"


@needs_compiled
@pytest.mark.parametrize("op", OPS)
def test_operators_are_registered_as_torch_wants_them(op: str) -> None:
    _, operator, given = make(op, 9, 8, 12, torch.float32)
    leaves = (0, 1) if op.startswith(("permute", "unpermute")) else (0,) if op.startswith("router") else (0, 1, 2, 3, 5)
    args = tuple(
        value.requires_grad_() if number in leaves and isinstance(value, Tensor) else value
        for number, value in enumerate(given)
    )
    torch.library.opcheck(operator.default, args)


@needs_compiled
@pytest.mark.parametrize("levels", [1, 3, 1000])
@pytest.mark.parametrize(("groups", "top_groups", "top_k"), [(1, 1, 1), (1, 1, 8), (8, 3, 6), (4, 1, 12), (8, 2, 8)])
def test_the_choice_is_the_references_with_ties_too(levels: int, groups: int, top_groups: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    scores = (torch.rand(1100, 64, generator=generator) * levels).round() / levels * 0.7 + 0.1
    bias = (torch.rand(64, generator=generator) * levels).round() * 1e-2
    bucket = torch.randint(-1, 4, (1100,), generator=generator)
    given = (scores, bias, bucket, 4, top_k, groups, top_groups, 1.5)
    probs, routing, counts = router_topk.router_topk_reference(*given)
    fast_probs, fast_routing, fast_counts = torch.ops.megavid.router_topk(*given)
    assert torch.equal(routing, fast_routing)
    assert torch.equal(counts, fast_counts)
    assert counts.sum() == top_k * (bucket >= 0).sum()
    torch.testing.assert_close(fast_probs, probs)


@needs_compiled
@pytest.mark.parametrize("op", OPS)
def test_rows_and_sums_do_not_depend_on_threads(op: str) -> None:
    _, operator, given = make(op, 3000, 8, 24, torch.float32)
    alone, *others = (
        in_threads(count, lambda: [*gradients(learnt(op, operator), given, torch.float32), *outputs(operator(*given))])
        for count in (1, 2, 3)
    )
    assert all(same(alone, other) for other in others)


@needs_compiled
def test_permuted_rows_come_back_as_they_were() -> None:
    _, _, (x, probability, routing, num_rows, _) = make("permute, aligned", 40, 8, 24, torch.bfloat16)
    rows = moe_permute.moe_permute_op(x, probability, routing, num_rows, ALIGNMENT)
    assert (rows.rows_of_expert_E % ALIGNMENT == 0).all()
    assert rows.rows_of_expert_E[1] == 0
    assert (rows.x_SD[rows.token_S < 0] == 0).all()
    back = moe_permute.moe_unpermute_op(rows.x_SD, None, rows.token_S, rows.first_T1, rows.row_S)
    torch.testing.assert_close(back, (x.float() * routing.sum(1, keepdim=True)).bfloat16())


@needs_compiled
@pytest.mark.parametrize("op", OPS)
def test_strided_inputs_are_read_as_they_are(op: str) -> None:
    _, operator, given = make(op, 30, 8, 24, torch.float32)
    strided = tuple(torch.stack((v, v), dim=-1)[..., 0] if isinstance(v, Tensor) else v for v in given)
    assert not strided[0].is_contiguous()
    assert same(outputs(operator(*strided)), outputs(operator(*given)))
    one, other = (gradients(learnt(op, operator), args, torch.float32) for args in (strided, given))
    assert same(one, other)


@needs_compiled
@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [
        ("gelu", {0: torch.zeros(9)}, ValueError, r"up must be \[S, M\]"),
        ("gelu", {0: torch.zeros(9, 12, dtype=torch.float16)}, TypeError, "up must be float32 or bfloat16"),
        ("gelu", {3: torch.zeros(8, 12)}, ValueError, "gate_bias is given, and no gate"),
        ("gelu, bias", {2: torch.zeros(8, 11)}, ValueError, r"up_bias must be \[e, 12\]"),
        ("swiglu, biases", {3: torch.zeros(7, 12)}, ValueError, "gate_bias must be"),
        ("gelu, bias", {4: torch.full((9,), 8)}, ValueError, r"expert must be in \[0, 8\), got 8"),
        ("swiglu", {1: torch.zeros(9, 13)}, ValueError, "gate must be"),
        ("swiglu", {5: torch.zeros(8)}, ValueError, r"probability must be \[9\]"),
        ("swiglu", {5: torch.zeros(9, dtype=torch.bfloat16)}, TypeError, "probability must be Float"),
        ("permute", {2: torch.zeros(9, 8)}, TypeError, "map must be bool"),
        ("permute", {2: torch.zeros(8, 8, dtype=torch.bool)}, ValueError, r"map must be \[9, E\]"),
        ("permute", {3: 1}, ValueError, r"num_rows must be at least \d+, got 1"),
        ("permute", {4: 0}, ValueError, "alignment must be at least 1"),
        ("unpermute", {2: torch.zeros(3, dtype=torch.int64)}, ValueError, "token must be"),
        ("unpermute, weighted", {1: torch.zeros(3)}, ValueError, "weight must be"),
        ("router", {0: torch.zeros(9, 8, dtype=torch.bfloat16)}, TypeError, "scores must be Float"),
        ("router", {1: torch.zeros(7)}, ValueError, r"bias must be \[8\]"),
        ("router", {2: torch.full((9,), 4)}, ValueError, r"bucket must be in \[-1, 4\), got 4"),
        ("router", {4: 9}, ValueError, "top_k must be 1 to 8, got 9"),
        ("router", {5: 3}, ValueError, "1 of 3 groups do not fit 8 experts"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(op: str, change: dict[int, Any], error: type[Exception], message: str) -> None:
    _, operator, given = make(op, 9, 8, 12, torch.float32)
    args = [change.get(number, value) for number, value in enumerate(given)]
    with pytest.raises(error, match=message):
        operator(*args)
