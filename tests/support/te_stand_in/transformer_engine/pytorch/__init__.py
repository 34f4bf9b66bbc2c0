"""The part for torch: linears and regions of FP8; other names are there to be subclassed, and cannot be built."""

from types import SimpleNamespace
from typing import Any, NoReturn

from transformer_engine.pytorch.fp8 import fp8_autocast, fp8_model_init
from transformer_engine.pytorch.grouped_linear import GroupedLinear
from transformer_engine.pytorch.linear import Linear

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8_autocast",
    "fp8_model_init",
    "ops",
]


class Absent:
    """What the stand-in does not have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.refuse()

    def refuse(self) -> NoReturn:
        """Say so."""
        raise NotImplementedError(f"{type(self).__name__}: the stand-in for Transformer Engine has linears only")


class LayerNorm(Absent): ...


class RMSNorm(Absent): ...


class LayerNormLinear(Absent): ...


class DotProductAttention(Absent): ...


class CudaRNGStatesTracker(Absent): ...


class Sequential(Absent): ...


class FusibleOperation(Absent): ...


distributed = SimpleNamespace(CudaRNGStatesTracker=CudaRNGStatesTracker)
ops = SimpleNamespace(Sequential=Sequential, FusibleOperation=FusibleOperation)
