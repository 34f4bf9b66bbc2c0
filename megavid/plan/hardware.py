"""What the machines can do at best: peaks, memory and link rates, each with its source.

Owns the table in ``hardware.toml`` and the one object that carries a machine's numbers. What a kernel or a collective
reaches of them is ``calibration``'s. A machine that is not in the table (a CPU, an unusual cluster) is a ``Hardware``
that the caller makes.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from megavid.config.schema import require

NUMBERS = (
    "peak", "memory_bytes", "memory_rate", "nvlink_rate", "nvlink_domain", "network_rate", "exponential_rate",
)  # fmt: skip
"""Keys of a machine; each has a source."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One accelerator, its memory and its links.

    Attributes:
        name: as on the command line.
        generation: of its architecture ("hopper"); empty for a machine that is not in the table.
        peak: dense FLOP/s by number format ("bf16", "fp8", "fp32").
        memory_bytes: memory that the driver reports.
        memory_rate: bytes/s between memory and the chip.
        nvlink_rate: bytes/s that one accelerator sends inside its NVLink domain.
        nvlink_domain: accelerators of one such domain.
        network_rate: bytes/s that one accelerator sends across domains.
        exponential_rate: exponentials/s, which attention needs one of for every query, key and head; infinite where a
            measured attention rate has them in it.
        source: where each number comes from, by key.
    """

    name: str
    peak: Mapping[str, float]
    memory_bytes: int
    memory_rate: float
    nvlink_rate: float
    nvlink_domain: int
    network_rate: float
    exponential_rate: float = math.inf
    generation: str = ""
    source: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rates = (*self.peak.values(), self.memory_bytes, self.memory_rate, self.nvlink_rate, self.network_rate)
        rates = (*rates, self.exponential_rate)
        require(bool(self.peak) and min(rates) > 0, f"hardware '{self.name}' needs rates above 0, got {rates}")
        require(self.nvlink_domain >= 1, f"hardware '{self.name}': nvlink_domain = {self.nvlink_domain} must be >= 1")

    def peak_of(self, dtype: str) -> float:
        """Dense FLOP/s of matrix products in ``dtype``.

        Raises:
            ConfigError: the machine has no rate for it.
        """
        require(
            dtype in self.peak,
            f"'{self.name}' has no dense peak for {dtype}; it has {', '.join(self.peak)}; change precision.* or --gpu",
        )
        return self.peak[dtype]

    def ranks_per_domain(self, group_size: int, stride: int) -> int:
        """Ranks of one group that share an NVLink domain, when the group takes every ``stride``-th rank."""
        return max(1, min(group_size, self.nvlink_domain // stride))


@cache
def table() -> Mapping[str, Hardware]:
    """Every machine of ``hardware.toml`` by name."""
    text = resources.files("megavid.plan").joinpath("hardware.toml").read_text(encoding="utf-8")
    return {name: Hardware(name=name, **entry) for name, entry in tomllib.loads(text).items()}


def hardware(name: str) -> Hardware:
    """The machine called ``name``.

    Raises:
        ConfigError: no such machine; names those there are.
    """
    known = table()
    require(name in known, f"unknown hardware '{name}'; known: {', '.join(sorted(known))}; pass one as --gpu")
    return known[name]
