"""The compiled ops: references against slow twins, compiled against references, gradients, registration, refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megavid.errors import ConfigError
from megavid.ops import gated_residual, gated_residual_norm, modulated_norm, norm_rope, sum_of_squares
from megavid.ops.block_ops import COMPILED, REFERENCE, BlockOps
from megavid.ops.choose import block_ops
from megavid.ops.compiled import why_not_compiled

CPU = torch.device("cpu")
SIZES = [(1, 1, 8), (7, 3, 34), (200, 4, 96), (130, 130, 18), (70, 3, 300), (0, 2, 16)]
"""Tokens, rows of the tables, width."""
HEAD = 2  # numbers of a head that every width of SIZES is a multiple of

needs_compiled = pytest.mark.skipif(bool(why_not_compiled()), reason=f"compiled ops: {why_not_compiled()}")

Case = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]
"""Forward reference, backward reference, arguments of the forward pass."""


def make(op: str, tokens: int, rows: int, width: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(tokens + width)
    narrow = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, of: torch.dtype = narrow) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(of)

    row = torch.randint(rows, (tokens,), generator=generator)
    x, shift, scale = normal(tokens, width, of=dtype) + 1, normal(rows, width), normal(rows, width)
    match op:
        case "modulated_norm":
            given: tuple[Any, ...] = (x, shift, scale, row.sort().values, 1e-6, True)
            return modulated_norm.modulated_norm_reference, modulated_norm.modulated_norm_backward_reference, given
        case "rms":
            given = (x, shift, scale, row, 1e-6, False)
            return modulated_norm.modulated_norm_reference, modulated_norm.modulated_norm_backward_reference, given
        case "gated_residual_norm" | "residual_norm":
            gate = normal(rows, width) if op == "gated_residual_norm" else None
            given = (x, normal(tokens, width, of=dtype), gate, row, shift[:1], scale[:1], row * 0, 1e-6, True)
            module = gated_residual_norm
            return module.gated_residual_norm_reference, module.gated_residual_norm_backward_reference, given
        case "gated_residual":
            given = (x, normal(tokens, width, of=dtype), scale, row)
            return gated_residual.gated_residual_reference, gated_residual.gated_residual_backward_reference, given
        case "sum_of_squares":
            return sum_of_squares.sum_of_squares_reference, sum_of_squares.sum_of_squares_backward_reference, (x,)
        case "norm_rope":
            angle = normal(tokens, HEAD // 2)
            sums = x.to(narrow).square().sum(-1)
            given = (x, sums, normal(width), angle.cos(), angle.sin(), width, 1e-6)
            return norm_rope.norm_rope_reference, norm_rope.norm_rope_backward_reference, given
    raise AssertionError(op)


OPS = ["modulated_norm", "rms", "gated_residual_norm", "residual_norm", "norm_rope", "gated_residual", "sum_of_squares"]


def operator(op: str) -> Any:
    names = {"rms": "modulated_norm", "residual_norm": "gated_residual_norm"}
    return getattr(torch.ops.megavid, names.get(op, op))


def outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def gradients(function: Callable[..., Any], given: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    """Outputs that carry a gradient, then gradients of the arguments that take one, of a fixed scalar of them."""
    leaves = [
        value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in given
    ]
    found = [out for out in outputs(function(*leaves)) if out.requires_grad]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in found]
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    return [*found, *torch.autograd.grad(found, inputs, weights, allow_unused=True)]


def widened(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in given)


def leaves_of(op: str, given: tuple[Any, ...]) -> list[Any]:
    """The arguments, those that take a gradient as leaves."""
    fixed = (3, 4) if op == "norm_rope" else ()  # its angles
    return [
        value.detach().requires_grad_(number not in fixed)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for number, value in enumerate(given)
    ]


def learnt(op: str, function: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """The outputs of ``op`` that carry a gradient."""
    count = 2 if op in ("gated_residual_norm", "residual_norm") else 1
    return lambda *args: outputs(function(*args))[:count]


def written_out(op: str, given: tuple[Any, ...], grads: list[Tensor]) -> list[Tensor | None]:
    """Gradients of the arguments of an op, of the reference that the op's own gradient is compared with."""
    reference, backward, _ = make(op, 1, 1, HEAD, torch.float64)
    kept = outputs(reference(*given))
    if op in ("modulated_norm", "rms"):
        x, _, scale, row, _, is_centered = given
        return [*backward(grads[0], x, scale, row, *kept[1:], is_centered)]
    if op == "gated_residual":
        return [grads[0], *backward(grads[0], *given[1:])]
    if op in ("sum_of_squares", "norm_rope"):
        return outputs(backward(grads[0], *given))
    _, update, gate, gate_row, _, scale, row, _, is_centered = given
    found = backward(*grads, kept[0], update, gate, gate_row, scale, row, *kept[2:], is_centered)
    grad_x, grad_update, grad_gate, grad_shift, grad_scale = found
    first = [grad_x, grad_x, None] if gate is None else [grad_x, grad_update, grad_gate]
    return [*first, None, grad_shift, grad_scale]


@pytest.mark.parametrize("op", OPS)
def test_written_out_gradient_is_that_of_autograd(op: str) -> None:
    reference, _, given = make(op, 5, 2, 6, torch.float64)
    leaves = leaves_of(op, given)
    found = learnt(op, reference)(*leaves)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator, dtype=out.dtype) for out in found]
    inputs = {n: leaf for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad}
    expected = torch.autograd.grad(found, list(inputs.values()), grads)
    mine = written_out(op, given, grads)
    for number, want in zip(inputs, expected, strict=True):
        torch.testing.assert_close(mine[number], want, rtol=1e-12, atol=1e-12)


def test_gradients_are_asked_for_where_the_outputs_are() -> None:
    found = gradients(lambda x: x * 2, (torch.zeros(3, device="meta"),), torch.float32)
    assert {tensor.device.type for tensor in found} == {"meta"}


@needs_compiled
@pytest.mark.parametrize(("tokens", "rows", "width"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_compiled_is_as_near_as_the_reference(op: str, dtype: torch.dtype, tokens: int, rows: int, width: int) -> None:
    reference, _, given = make(op, tokens, rows, width, dtype)
    exact = gradients(learnt(op, reference), widened(given), torch.float64)
    plain = gradients(learnt(op, reference), given, dtype)
    fast = gradients(learnt(op, operator(op)), given, dtype)
    assert len(fast) == len(plain) == len(exact)
    for number, (want, near, got) in enumerate(zip(exact, plain, fast)):
        if want is None or (got is None and op == "norm_rope"):
            continue  # angles take no gradient
        assert got.dtype == near.dtype
        limit = 2 * (near.double() - want).abs().max() if want.numel() else 0.0
        floor = 4 * torch.finfo(torch.float32).eps * (want.abs().max() if want.numel() else 0.0)
        error = (got.double() - want).abs().max() if want.numel() else 0.0
        assert error <= limit + floor, f"output {number}: error {error:.2e}, the reference's {limit / 2:.2e}"


@needs_compiled
@pytest.mark.parametrize("op", OPS)
def test_operators_are_registered_as_torch_wants_them(op: str) -> None:
    _, _, given = make(op, 9, 2, 12, torch.float32)
    torch.library.opcheck(operator(op).default, tuple(leaves_of(op, given)))


def same(these: list[Tensor], those: list[Tensor]) -> bool:
    """Whether all of them are equal bit for bit, or absent in both."""
    return all(a is b is None or torch.equal(a, b) for a, b in zip(these, those, strict=True))


def in_threads(count: int, call: Callable[[], list[Tensor]]) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def apart(value: Any) -> Any:
    """The same numbers with others between them; those of a row stay neighbours, as the ops for q and k ask."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 1:
        return torch.stack((value, value), dim=-1)[:, 0]
    return torch.cat((value, value), dim=-1)[:, : value.shape[1]]


@needs_compiled
@pytest.mark.parametrize("op", OPS)
def test_sums_do_not_depend_on_threads(op: str) -> None:
    _, _, given = make(op, 1000, 3, 64, torch.float32)
    alone, *others = (
        in_threads(count, lambda: gradients(learnt(op, operator(op)), given, torch.float32)) for count in (1, 2, 3)
    )
    assert all(same(alone, other) for other in others)


@needs_compiled
@pytest.mark.parametrize("op", OPS)
def test_strided_inputs_are_read_as_they_are(op: str) -> None:
    _, _, given = make(op, 11, 3, 24, torch.float32)
    strided = tuple(apart(value) for value in given)
    assert not strided[0].is_contiguous()
    assert same(outputs(operator(op)(*strided)), outputs(operator(op)(*given)))
    one, other = (gradients(learnt(op, operator(op)), args, torch.float32) for args in (strided, given))
    assert same(one, other)


@needs_compiled
@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [
        ("modulated_norm", {0: torch.zeros(3)}, ValueError, r"x must be \[T, D\]"),
        ("modulated_norm", {0: torch.zeros(9, 12, dtype=torch.float16)}, TypeError, "x must be float32 or bfloat16"),
        ("modulated_norm", {2: torch.zeros(2, 11)}, ValueError, r"scale must be \[2, 12\]"),
        ("modulated_norm", {1: torch.zeros(2, 11)}, ValueError, r"shift must be \[R, 12\]"),
        ("modulated_norm", {3: torch.zeros(9, dtype=torch.int32)}, TypeError, "row must be int64"),
        ("modulated_norm", {3: torch.full((9,), 2)}, ValueError, r"row must be in \[0, 2\), got 2"),
        ("gated_residual_norm", {1: torch.zeros(9, 13)}, ValueError, "update must be"),
        ("gated_residual_norm", {2: torch.zeros(2, 11)}, ValueError, r": gate must be \[R, 12\]"),
        ("gated_residual_norm", {3: torch.zeros(8).long()}, ValueError, r": gate_row must be \[9\]"),
        ("gated_residual_norm", {3: torch.full((9,), -1)}, ValueError, r": gate_row must be in \[0, 2\), got -1"),
        ("gated_residual_norm", {6: torch.full((9,), 1)}, ValueError, r": row must be in \[0, 1\), got 1"),
        ("gated_residual", {2: torch.zeros(2, 12).double()}, TypeError, ": gate must be float32"),
        ("gated_residual", {1: torch.zeros(9, 12, dtype=torch.bfloat16)}, TypeError, "update must be Float"),
        ("sum_of_squares", {0: torch.zeros(4, 6).t()}, ValueError, "neighbouring numbers"),
        ("norm_rope", {1: torch.zeros(8)}, ValueError, r"sums must be \[9\]"),
        ("norm_rope", {3: torch.zeros(9, 5), 4: torch.zeros(9, 5)}, ValueError, "heads of 10 numbers must divide"),
        ("norm_rope", {2: torch.zeros(12, dtype=torch.bfloat16)}, TypeError, "must be float32"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(op: str, change: dict[int, Tensor], error: type[Exception], message: str) -> None:
    _, _, given = make(op, 9, 2, 12, torch.float32)
    args = [change.get(number, value) for number, value in enumerate(given)]
    with pytest.raises(error, match=message):
        operator(op)(*args)


@needs_compiled
def test_backward_checks_the_gate_too() -> None:
    x, row, statistic = torch.zeros(9, 12), torch.zeros(9, dtype=torch.int64), torch.zeros(9)
    given = (x, x, x, x, torch.zeros(2, 11), row, torch.zeros(2, 12), row, statistic, statistic, True)
    with pytest.raises(ValueError, match=r"gated_residual_norm_backward: gate must be \[R, 12\]"):
        torch.ops.megavid.gated_residual_norm_backward(*given)


def test_the_choice_is_refused_where_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    assert block_ops("reference", CPU, torch.float32) is REFERENCE
    assert block_ops("auto", CPU, torch.float64) is REFERENCE
    with pytest.raises(ConfigError, match=r"train\.ops = 'compiled' cannot run here: .* not torch\.float64"):
        block_ops("compiled", CPU, torch.float64)
    if not why_not_compiled():
        assert block_ops("auto", CPU, torch.bfloat16) is COMPILED


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_bias_and_gelu_are_as_near_as_the_reference(has_bias: bool, dtype: torch.dtype) -> None:
    """The dense feed-forward's activation, against fp64; gradients of x and of the bias too."""
    generator = torch.Generator().manual_seed(7)
    x, grad = (2 * torch.randn(35, 2, 52, generator=generator, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(52, generator=generator, dtype=torch.float64)

    def errors(ops: BlockOps) -> list[float]:
        given = [x.to(dtype), bias.to(dtype)] if has_bias else [x.to(dtype)]
        exact, rounded = ([each.to(kind).requires_grad_() for each in given] for kind in (torch.float64, dtype))
        want = REFERENCE.bias_gelu(exact[0], exact[1] if has_bias else None)
        found = ops.bias_gelu(rounded[0], rounded[1] if has_bias else None)
        assert found.shape == x.shape
        assert found.dtype == dtype
        want.backward(grad.to(dtype).double())
        found.backward(grad.to(dtype))
        pairs = [(found, want), *((mine.grad, true.grad) for mine, true in zip(rounded, exact, strict=True))]
        return [float((mine.detach().double() - true.detach()).norm() / true.detach().norm()) for mine, true in pairs]

    for fast, slow in zip(errors(COMPILED), errors(REFERENCE), strict=True):
        assert fast <= 2 * slow
