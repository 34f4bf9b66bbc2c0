"""The check before compiled ops are used: they are tried against plain torch, and one that is wrong is named."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megavid.errors import ConfigError
from megavid.ops import choose
from megavid.ops.block_ops import COMPILED, REFERENCE
from megavid.ops.compiled import why_not_compiled

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(bool(why_not_compiled()), reason=f"compiled ops: {why_not_compiled()}")


@pytest.fixture(autouse=True)
def ask_anew() -> Iterator[None]:
    """The answer is kept for the process."""
    choose.disagreement.cache_clear()
    yield
    choose.disagreement.cache_clear()


class RightForwardOnly(torch.autograd.Function):
    """x + update * gate whose gradient of x is 1% too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, gate: Tensor, row: Tensor) -> Tensor:
        """What the compiled op gives."""
        return COMPILED.gated_residual(x, update, gate, row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Wrong."""
        return 1.01 * grad, None, None, None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ops_of_this_machine_agree(dtype: torch.dtype) -> None:
    assert choose.disagreement(CPU, dtype) == ""
    assert choose.block_ops("auto", CPU, dtype) is COMPILED


def test_an_op_that_is_wrong_is_named_and_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choose, "COMPILED", replace(COMPILED, gated_residual=RightForwardOnly.apply))
    with caplog.at_level(logging.WARNING):
        assert choose.block_ops("auto", CPU, torch.float32) is REFERENCE
    assert "gated_residual is off by" in caplog.text
    with pytest.raises(ConfigError, match=r"gated_residual is off by .* on cpu in torch.float32; set 'auto'"):
        choose.block_ops("compiled", CPU, torch.float32)


@pytest.mark.parametrize("part", ["numbers", "nan"])
def test_no_number_passes_as_agreement(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Sums of another token, and NaN, which is below no limit and above none."""

    def wrong(x_TBn: Tensor) -> Tensor:
        found = COMPILED.sum_of_squares(x_TBn)
        return found.flip(0) if part == "numbers" else found * float("nan")

    monkeypatch.setattr(choose, "COMPILED", replace(COMPILED, sum_of_squares=wrong))
    assert choose.disagreement(CPU, torch.float32).startswith("sum_of_squares is off by")


def test_plain_torch_is_taken_unasked() -> None:
    assert choose.block_ops("reference", CPU, torch.float32) is REFERENCE
    assert choose.disagreement.cache_info().currsize == 0


def test_an_op_that_does_not_run_is_named_and_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(x_TBn: Tensor) -> Tensor:
        raise RuntimeError("sum_of_squares: no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(choose, "COMPILED", replace(COMPILED, sum_of_squares=refuses))
    assert choose.block_ops("auto", CPU, torch.float32) is REFERENCE
    with pytest.raises(ConfigError, match=r"sum_of_squares does not run on cpu: .* available for execution .*; set"):
        choose.block_ops("compiled", CPU, torch.float32)
