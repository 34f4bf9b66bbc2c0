"""``train.capture``: compiled once for each kind of call, the same numbers, and no more shapes than the limit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megavid.errors import ConfigError
from megavid.models.capture import Capture, Captured, check_capture
from megavid.ops.block_ops import REFERENCE, BlockOps
from megavid.ops.regions import regions_on
from tests.support import tolerance

T, D, HEAD, EPS = 24, 32, 8, 1e-6


class Backend:
    """A backend of torch.compile that runs graphs as they are, and counts the graphs and their calls."""

    def __init__(self) -> None:
        self.graphs, self.calls = 0, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.calls += 1
            return graph(*args)

        return run


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def norm_inputs(tokens: int = T, rows: int = 8, dtype: torch.dtype = torch.float32) -> list[Any]:
    row = (torch.arange(tokens) % rows).unsqueeze(1)  # so that threads, which share the tokens, meet in every row
    return [numbers(tokens, 1, D, dtype=dtype), numbers(rows, D), numbers(rows, D), row, EPS]


def gradients(function: Callable[..., Any], inputs: list[Any]) -> list[Tensor]:
    """Outputs, and gradients of the inputs that have one."""
    found = function(*inputs)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    weights = [torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


def test_off_leaves_the_functions_as_they_are() -> None:
    capture = Capture("off", REFERENCE)
    table = torch.ones(3, 6, D)
    assert capture.ops is REFERENCE
    assert capture.filled_up(table) is table


def test_calls_of_one_kind_are_compiled_once_and_others_for_themselves() -> None:
    backend = Backend()
    capture = Capture("compile", REFERENCE, backend)
    for tokens in (T, T, 2 * T, T):  # as several blocks and steps call it
        inputs = norm_inputs(tokens)
        torch.testing.assert_close(
            gradients(capture.ops.modulated_norm, inputs), gradients(REFERENCE.modulated_norm, inputs), rtol=0, atol=0
        )
    assert (backend.graphs, backend.calls) == (2, 4)
    news = capture.take_news()
    assert news == [Captured("modulated_norm", (T, 1, D), 1), Captured("modulated_norm", (2 * T, 1, D), 2)]
    assert news[1].describe() == "train.capture: compiled modulated_norm for 48 x 1 x 32 (2 of at most 8)"
    assert capture.take_news() == []


def test_passes_without_gradient_run_as_they_stand() -> None:
    backend = Backend()
    with torch.no_grad():
        Capture("compile", REFERENCE, backend).ops.modulated_norm(*norm_inputs())
    assert backend.graphs == 0


def test_shapes_beyond_the_limit_run_as_they_stand_and_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megavid.models.capture.MAX_SHAPES", 2)
    backend = Backend()
    capture = Capture("compile", REFERENCE, backend)
    for tokens in range(1, 6):
        x = numbers(tokens, 1, D)
        assert torch.equal(capture.ops.sum_of_squares(x), REFERENCE.sum_of_squares(x))
    assert backend.graphs == 2
    *compiled, refused = capture.take_news()
    assert [event.is_refused for event in compiled] == [False, False]
    assert refused.describe() == (
        "train.capture: sum_of_squares has 2 shapes already; 3 x 1 x 32 and further ones run without the compiler"
    )


def test_a_table_is_filled_up_to_few_numbers_of_rows_which_changes_no_number() -> None:
    capture = Capture("compile", REFERENCE, Backend())
    table = numbers(3, 6, D)
    filled = capture.filled_up(table)
    assert [capture.filled_up(torch.ones(rows, 6, 1)).shape[0] for rows in (1, 16, 17, 32, 33)] == [16, 16, 32, 32, 64]
    assert torch.equal(filled[:3], table)
    assert not filled[3:].any()
    (grad,) = torch.autograd.grad(filled.square().sum(), table)
    assert torch.equal(grad, 2 * table)


def test_a_profile_that_begins_compiles_nothing_again() -> None:
    backend = Backend()
    ops, inputs = Capture("compile", REFERENCE, backend).ops, norm_inputs()
    ops.modulated_norm(*inputs)
    with regions_on():
        ops.modulated_norm(*inputs)
    assert (backend.graphs, backend.calls) == (1, 2)


def test_a_machine_that_cannot_compile_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    check_capture("compile", device)
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_capture("off", device)
    words = "^train.capture = 'compile' cannot run here: there is no C[+]{2} compiler no-such-compiler; .*set 'off'$"
    with pytest.raises(ConfigError, match=words):
        check_capture("compile", device)


CASES: dict[str, tuple[torch.dtype, Callable[[BlockOps], Any], Callable[[torch.dtype], list[Any]]]] = {
    "modulated_norm": (torch.float32, lambda ops: ops.modulated_norm, lambda _: norm_inputs(1 << 16, 2)),
    "norm_rope": (
        torch.bfloat16,
        lambda ops: lambda x, *rest: ops.norm_rope(x, ops.sum_of_squares(x), *rest, D, EPS),
        lambda dtype: [
            numbers(T, 1, D, dtype=dtype),
            numbers(D),
            torch.randn(T, 1, 1, HEAD // 2).cos(),
            torch.randn(T, 1, 1, HEAD // 2).sin(),
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_inductor_compiles_computes_the_same(name: str) -> None:
    """fp32: to rounding, relative to the largest number. bf16: no further from fp32 than twice plain torch's error.

    Sums over the tokens of a row are bitwise the same: they do not depend on threads.
    """
    dtype, function, make = CASES[name]
    torch.manual_seed(0)
    inputs = make(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = gradients(function(Capture("compile", REFERENCE).ops), inputs)
    finally:
        torch.set_num_threads(threads)
    plain = gradients(function(REFERENCE), inputs)
    if dtype == torch.float32:
        for value, wanted in zip(found, plain, strict=True):
            assert (value - wanted).abs().max() <= tolerance.LAYER_FP32 * wanted.abs().max()
        assert torch.equal(found[2], plain[2])  # of the shift: the sum of what came, by rows
        return
    wide = [x.detach().float().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
    for value, other, exact in zip(found, plain, gradients(function(REFERENCE), wide), strict=True):
        floor = torch.finfo(torch.bfloat16).eps * exact.abs().max() / 8
        assert (value.float() - exact).abs().max() <= 2 * (other.float() - exact).abs().max() + floor
