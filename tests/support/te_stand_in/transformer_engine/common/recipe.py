"""Recipes of FP8, by the names and the fields that megatron-core gives them."""

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Format(Enum):
    """Formats of the forward pass and of gradients."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"


class DelayedScaling:
    """Takes and ignores any keyword, as pydantic's dataclasses do; megavid refuses this recipe."""

    def __init__(self, **fields: Any) -> None:
        self.fp8_format = fields["fp8_format"]


@dataclass
class Float8CurrentScaling:
    """One scale for a tensor."""

    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass
class Float8BlockScaling:
    """One scale for 128 numbers, or 128 x 128 of a matrix."""

    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass
class MXFP8BlockScaling:
    """One scale for 32 numbers."""

    margin: int = 0
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass
class NVFP4BlockScaling:
    """Named by megatron-core; not used."""
