"""Measuring every node of an allocation before step 1: what it is, how fast it computes, and each axis of the layout.

Owns what runs on the ranks. Who is slow or broken is ``cluster.health``'s.
"""

import dataclasses
import importlib.metadata
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megavid.cluster.dcgm import dcgm_troubles
from megavid.cluster.health import Facts, disk_free_gib, gpu_troubles, versions_here
from megavid.parallel.host import host_name
from megavid.parallel.mesh import Axis, Mesh
from megavid.plan.calibration import save_probe
from megavid.profiling.links import time_links
from megavid.profiling.probe import hardware_of, start_of, time_kernels

AXES: tuple[Axis, ...] = ("tp", "cp", "dp", "pp", "ep", "etp", "edp")
PACKAGES = ("torch", "megatron-core", "numpy", "transformer-engine")
WINDOW_S = 0.3
"""Of which the median rate is taken: longer than a system's pauses, so that a node that halts often shows."""
MESSAGE_BYTES = 4 << 20
CALLS = 5
"""All-reduces of each axis; the median counts."""
ROWS = {"cpu": 256, "cuda": 8192}


def examine(mesh: Mesh, seconds: float) -> list[Facts]:
    """Facts of every rank, on every rank.

    Args:
        mesh: open, in the layout of the run.
        seconds: for the matrix products; the axes take a few more.

    Ranks: collective over the world.
    """
    rate = _product_rate(mesh.device, seconds)
    dist.barrier()
    clock_s = time.time()
    mine = Facts(
        rank=mesh.rank,
        host=host_name(),
        clock_s=clock_s,
        versions=versions_here({name: _version(name) for name in PACKAGES}),
        disk_free_gib=disk_free_gib(Path(tempfile.gettempdir())),
        gpu_troubles=gpu_troubles() + dcgm_troubles() if mesh.device.type == "cuda" else (),
        product_rate=rate,
        axes={axis: _axis_seconds(mesh, axis) for axis in AXES if mesh.size(axis) > 1},
    )
    return [Facts(**told) for told in mesh.all_gather_object(dataclasses.asdict(mine))]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _product_rate(device: torch.device, seconds: float) -> float:
    """Median FLOP/s over windows of ``WINDOW_S``; each is measured whole, pauses included."""
    rows = ROWS[device.type]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    left, right = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
    rates: list[float] = []
    deadline = time.perf_counter() + seconds
    left @ right  # warms up
    while time.perf_counter() < deadline or len(rates) < 3:
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < WINDOW_S:
            left @ right
            count += 1
            if device.type == "cuda":
                torch.cuda.synchronize()
        rates.append(2.0 * rows**3 * count / (time.perf_counter() - began))
    return statistics.median(rates)


def _axis_seconds(mesh: Mesh, axis: Axis) -> float:
    tensor = torch.ones(MESSAGE_BYTES // 4, device=mesh.device)
    found = []
    for _ in range(CALLS):
        began = time.perf_counter()
        dist.all_reduce(tensor, group=mesh.group(axis))
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def write_calibration(mesh: Mesh, path: Path, seconds: float) -> bool:
    """Measure what the planner reads, on CPU ranks, and write it; whether there was something to write.

    Kernels and links alone, not fitted to whole steps as `megavid profile --probe` does. The probe's kernels are CPU's.

    Ranks: collective over the world.
    """
    if mesh.device.type != "cpu" or mesh.world_size < 2:
        return False
    kernels: Any = time_kernels(seconds / 6) if mesh.is_main else None
    dist.barrier()
    links = time_links(seconds / 3)
    if mesh.is_main:
        name = f"{host_name()} and {mesh.world_size - 1} ranks more"
        save_probe(path, hardware_of(kernels, links, name), start_of(kernels, links, name))
    return True
