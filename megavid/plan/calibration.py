"""What kernels, links and hosts reach of their peaks: named efficiencies and latencies, each with its source.

Owns the numbers, their files and nothing that uses them. The numbers of GPUs are in ``calibration.toml``: most are
published measurements of single kernels and collectives, the few in ``FREE`` are fitted to published runs by
``python tools/fit_calibration.py`` and shared by all of them. A machine at hand is measured instead
(``Calibration.from_probe``).
"""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from megavid.config.schema import require
from megavid.errors import ConfigError
from megavid.plan.hardware import Hardware

FREE: Mapping[str, tuple[float, float]] = {
    "matrix_efficiency": (0.55, 0.95),
    "estimated_glue_factor": (0.8, 4.0),
    "routing_imbalance": (1.0, 2.0),
    "expert_overlap": (0.0, 1.0),
}
"""Numbers that the hindcast fits, each with the range that is physically plausible."""
PROBE_RANGES: Mapping[str, tuple[float, float]] = {
    "matrix_efficiency": (0.2, 1.3),
    "attention_efficiency": (0.1, 1.3),
    "glue_factor": (0.05, 5.0),
    "operator_s": (1e-6, 1e-4),
    "step_s": (0.0, 0.1),
}
"""Numbers that a probe fits to a few timed steps of small models (``fitting.fit_numbers``), after it has measured the
peak and the memory rate by themselves: a kernel alone in a loop finds warm caches that a step does not. Nothing of the
links is fitted to steps: few collectives are in those that a probe has time for, and a rate that they alone tell would
take up whatever else is slow in them."""
BESIDE = " beside"
"""Ends the name of a collective's cost where it runs beside computation."""


@dataclass(frozen=True, slots=True)
class CallCost:
    """What one kind of collective adds to the computation around it.

    Attributes:
        latency_s: seconds of a tiny one of two ranks.
        rate: bytes/s that a rank sends, beyond that.
    """

    latency_s: float
    rate: float

    def __post_init__(self) -> None:
        require(self.latency_s >= 0, f"calibration: latency_s = {self.latency_s} of a collective must be at least 0")
        require(self.rate > 0, f"calibration: rate = {self.rate} of a collective must be above 0")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Efficiencies and latencies of one machine.

    Each field says what it is and, after "Probe:", what a probe on a machine at hand measures for it; what is fitted
    there (``PROBE_RANGES``) is fitted to a few timed steps of small models.

    Attributes:
        name: machine that it was measured on, or "gpu".
        matrix_efficiency: share of the dense peak that a large matrix product reaches. Probe: fitted; the peak of
            ``Hardware`` is the best product by itself.
        fp8_matrix_ratio: share of the FP8 peak that a large product in eight bits reaches, over ``matrix_efficiency``.
            Probe: 1.0, a probe times no product in eight bits.
        attention_efficiency: share of the peak that the products in attention's forward kernel reach on long sequences,
            its exponentials apart. Probe: fitted, from the forward of scaled-dot-product attention on 4,096 keys over
            the probe's peak, divided by 4096 / (4096 + attention_half_keys); exponentials are in it
            (``exponential_rate`` infinite).
        attention_backward_ratio: FLOP/s of attention's backward kernel (2.5 times the forward's products) over the
            forward's. Probe: backward of the same call.
        attention_half_keys: keys per query at which attention reaches half of that. Probe: the same call on 256 keys.
        ring_efficiency: FLOP/s of attention that crosses ranks by a ring, piece by piece, over that of one kernel, all
            communication hidden. Probe: 1.0, the pieces of a tiny run are timed as they are.
        memory_efficiency: share of the memory rate that memory-bound kernels reach. Probe: the rate of ``Hardware`` is
            the probe's copy of a tensor larger than the caches, so 1.0.
        glue_factor: seconds of memory-bound operators over those that their counted inputs and outputs take at the
            memory rate. Probe: fitted, from 1.0.
        estimated_glue_factor: the same for published models, whose bytes are estimated as if fused; in the hindcast
            only. Probe: 1.0.
        nvlink_efficiency: share of the NVLink rate that collectives in one domain reach. Probe: 1.0, and ``calls``.
        network_efficiency: share of the network rate that rings across domains reach. Probe: as above.
        alltoall_efficiency: share of the network rate that all-to-alls across domains reach. Probe: rate of a large
            all-to-all over that of all kinds of large collectives, their harmonic mean; 1.0 at most.
        nvlink_latency_s: seconds of one tiny collective of two ranks in one domain. Probe: an all-reduce of 2 KiB.
        network_latency_s: likewise across domains. Probe: the same number where there is one machine.
        operator_s: seconds of host time to issue one operator. Probe: fitted, from operators on one number each.
        stall_s: seconds that one pass of a layer with dropless experts leaves the device idle: its host reads how many
            rows go where, and issues many small operators. Probe: 0 on a CPU, where nothing runs ahead of the host.
        step_s: seconds of host work once a step (gradient norm, data, logging). Probe: fitted, from 0.
        expert_overlap: share of expert all-to-alls hidden when one microbatch's run beside another's computation.
        routing_imbalance: rows of the busiest expert-parallel rank over the mean under real, trained routing. Probe:
            1.0; short runs measure it in their own metrics.
        crowding: seconds of computation where every core has a rank over those where one rank runs alone. Probe: the
            same computation by one rank and by two at once. It counts for runs of more than one rank.
        is_asynchronous: whether operators run behind the host's back (GPUs), so that issuing them is hidden while the
            device is busy. Probe: false on a CPU.
        calls: cost of a collective in one domain by c10d's name, with ``BESIDE`` behind it where it runs beside
            computation; one that is not there takes what the link's rate and latency say. Probe: each kind between
            computations.
        source: where each number comes from, by field.
    """

    name: str
    matrix_efficiency: float
    fp8_matrix_ratio: float
    attention_efficiency: float
    attention_backward_ratio: float
    attention_half_keys: float
    ring_efficiency: float
    memory_efficiency: float
    glue_factor: float
    estimated_glue_factor: float
    nvlink_efficiency: float
    network_efficiency: float
    alltoall_efficiency: float
    nvlink_latency_s: float
    network_latency_s: float
    operator_s: float
    stall_s: float
    step_s: float
    expert_overlap: float
    routing_imbalance: float
    crowding: float
    is_asynchronous: bool = True
    calls: Mapping[str, CallCost] = field(default_factory=dict)
    source: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value = self.numbers()[name]
            low = 1.0 if name in ("routing_imbalance", "crowding") else 0.0
            require(value >= low, f"calibration '{self.name}': {name} = {value} must be at least {low}")
        for name in POSITIVE:
            value = self.numbers()[name]
            require(value > 0, f"calibration '{self.name}': {name} = {value} must be above 0")

    def numbers(self) -> dict[str, float]:
        """Every efficiency and latency by name."""
        return {key: value for key, value in vars(self).items() if key in NUMBERS}

    def with_numbers(self, **numbers: float) -> "Calibration":
        """The same with some numbers replaced."""
        return replace(self, **numbers)  # type: ignore[arg-type]

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_probe(cls, measured: Mapping[str, object]) -> "Calibration":
        """What a probe measured: a JSON table with every field of this class.

        Raises:
            ConfigError: a field is missing, unknown, or no number.
        """
        known = {entry.name for entry in fields(cls)}
        missing, unknown = known - measured.keys() - OPTIONAL, measured.keys() - known
        require(not missing, f"calibration lacks {', '.join(sorted(missing))}; run the probe of this version again")
        require(not unknown, f"calibration has unknown keys {', '.join(sorted(unknown))}")
        for name in NUMBERS:
            value = measured[name]
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(is_number, f"calibration: {name} = {value!r} must be a number")
        try:
            calls = {name: CallCost(**cost) for name, cost in dict(measured.get("calls", {})).items()}  # type: ignore[call-overload]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"calibration: calls do not fit this version: {error}; run the probe again") from error
        return cls(**{**measured, "calls": calls})  # type: ignore[arg-type]


OPTIONAL = {"source", "is_asynchronous", "calls"}
"""Fields that a file may lack."""
NUMBERS = tuple(entry.name for entry in fields(Calibration) if entry.type is float or entry.type == "float")
"""Fields that are efficiencies or latencies."""


POSITIVE = tuple(name for name in NUMBERS if "efficiency" in name or name.endswith("_ratio"))
"""Fields that others are divided by."""


def load_calibration(path: Path) -> Calibration:
    """Read what ``Calibration.save`` or ``save_probe`` wrote.

    Raises:
        ConfigError: no such file, no JSON, or not a calibration.
    """
    table = _read(path)
    return Calibration.from_probe(table.get("calibration", table))


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read calibration {path}: {error}") from error
    require(isinstance(table, dict), f"calibration {path} must be a JSON table, got {type(table).__name__}")
    found: dict[str, Any] = table
    return found


def save_probe(path: Path, machine: Hardware, calibration: Calibration) -> None:
    """Write what a probe measured of a machine: its rates and what steps reach of them."""
    rates = {key: value for key, value in asdict(machine).items() if value != math.inf}
    table = {"hardware": rates, "calibration": asdict(calibration)}
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def load_probe(path: Path) -> tuple[Hardware, Calibration]:
    """Read what ``save_probe`` wrote.

    Raises:
        ConfigError: no such file, no JSON, or not a probe's.
    """
    table = _read(path)
    require(
        isinstance(table.get("hardware"), dict) and isinstance(table.get("calibration"), dict),
        f"probe {path} must hold the tables 'hardware' and 'calibration', got {', '.join(table) or 'none'}",
    )
    try:
        machine = Hardware(**table["hardware"])
    except TypeError as error:
        raise ConfigError(f"probe {path}: hardware does not fit this version: {error}; run the probe again") from error
    return machine, Calibration.from_probe(table["calibration"])


@cache
def gpu_calibration() -> Calibration:
    """The one calibration of all GPUs in ``hardware.toml``."""
    text = resources.files("megavid.plan").joinpath("calibration.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    entries = {**table["measured"], **table["fitted"]}
    return Calibration(
        name="gpu",
        source={key: entry["source"] for key, entry in entries.items()},
        **{key: entry["value"] for key, entry in entries.items()},
    )
