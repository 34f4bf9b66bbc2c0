"""Regions of FP8, and what rounds in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from transformer_engine.common.recipe import Format

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


class FP8GlobalStateManager:
    """The region at hand."""

    recipe: Any = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None

    @classmethod
    def get_fp8_recipe(cls) -> Any:
        return cls.recipe

    @classmethod
    def is_fp8_available(cls) -> tuple[bool, str]:
        return True, ""

    @classmethod
    def is_fp8_block_scaling_available(cls) -> tuple[bool, str]:
        return True, ""

    @classmethod
    def is_mxfp8_available(cls) -> tuple[bool, str]:
        return False, "the stand-in has no device of compute capability 10.0"


@contextmanager
def fp8_autocast(
    enabled: bool = True, calibrating: bool = False, fp8_recipe: Any = None, fp8_group: Any = None, _graph: bool = False
) -> Iterator[None]:
    """Inside, linears round."""
    before, FP8GlobalStateManager.recipe = FP8GlobalStateManager.recipe, fp8_recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = before


@contextmanager
def fp8_model_init(
    enabled: bool = True, recipe: Any = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    """Matrices kept in FP8, which megavid never asks for."""
    assert not enabled
    yield


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` after a round trip through eight bits, with one scale in fp32."""
    amax = x.abs().amax().float()
    scale = torch.where(amax > 0, LARGEST[dtype] / amax, 1.0)
    return ((x.float() * scale).to(dtype).float() / scale).to(x.dtype)


class RoundOperand(torch.autograd.Function):
    """Rounds on the way forward, and lets gradients pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return rounded(x, torch.float8_e4m3fn)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class RoundGradient(torch.autograd.Function):
    """Lets numbers pass, and rounds gradients on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fp8_format: Format) -> Tensor:
        ctx.dtype = torch.float8_e5m2 if fp8_format is Format.HYBRID else torch.float8_e4m3fn
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return rounded(gradient, ctx.dtype), None
