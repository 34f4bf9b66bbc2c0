"""The rate that MFU is a fraction of: the hardware table's on a known GPU, a measured one where a profile asks for it.

Owns how a peak is found and what it is called. A peak that nobody knows is None, and then no MFU is printed.
"""

import re
import time
from dataclasses import dataclass
from typing import Any

import torch

from megavid.config.schema import RunConfig
from megavid.parallel.mesh import Mesh
from megavid.plan.hardware import Hardware, table

SIZE = 1024
"""Rows and columns of the matrices whose product is measured on a CPU: 2.1 GFLOP."""
SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Peak:
    """Dense FLOP/s of one rank at best.

    Attributes:
        flops_per_s: of one rank.
        dtype: of the product.
        source: where the number comes from, for people.
        is_measured: in this run, not taken from a table.
    """

    flops_per_s: float
    dtype: str
    source: str
    is_measured: bool

    def to_json(self) -> dict[str, Any]:
        """As report.json has it."""
        return {
            "flops_per_s_per_rank": self.flops_per_s,
            "dtype": self.dtype,
            "source": self.source,
            "is_measured": self.is_measured,
        }


def known_peak(device: torch.device) -> Peak | None:
    """The table's dense bf16 peak for this rank's GPU, whatever the run's dtype, so that figures compare.

    None on a CPU, and on a GPU that is not in the table.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    machine = machine_of(name)
    if machine is None:
        return None
    return Peak(machine.peak["bf16"], "bf16", f"dense bf16 peak of {machine.name} ({name})", False)


def machine_of(device_name: str) -> Hardware | None:
    """The machine of the hardware table that the driver calls ``device_name``; None if it is not in the table.

    The PCIe and NVL cards of a chip have lower clocks than the table's modules, so they are not taken for them.
    """
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    if words & {"pcie", "nvl"}:
        return None
    return next((machine for name, machine in table().items() if set(name.split("-")) <= words), None)


def measured_peak(config: RunConfig, mesh: Mesh) -> Peak:
    """The fastest of many matrix products, on all ranks at once so that they share the machine as in a step.

    Ranks: collective over the world; the mean over ranks, the same on each of them.
    """
    name = config.precision.dtype
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    left, right = (torch.randn(SIZE, SIZE, device=mesh.device, dtype=dtype) for _ in range(2))
    mesh.barrier()
    deadline, best = time.perf_counter() + SECONDS, float("inf")
    while time.perf_counter() < deadline:
        began = time.perf_counter()
        left @ right
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    rate = torch.tensor(2.0 * SIZE**3 / best, dtype=torch.float64, device=mesh.device)
    mean = float(mesh.sum(rate, over="world")) / mesh.world_size
    what = f"{mesh.device.type}, threads of a rank: {torch.get_num_threads()}"
    source = f"measured in this run: {SIZE} x {SIZE} x {SIZE} matrix product in {name}, all ranks at once, {what}"
    return Peak(mean, name, source, True)


def peak_of(config: RunConfig, mesh: Mesh) -> Peak:
    """The table's peak where there is one, else a measured one.

    Ranks: collective over the world.
    """
    known = known_peak(mesh.device)
    return known if known is not None else measured_peak(config, mesh)
