"""From who a rank is to its open mesh: what every command that runs on ranks does first, in the one order that works.

Owns the world of ``torch.distributed`` for as long as it is open, and what is set before CUDA starts.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megavid.config.schema import RunConfig
from megavid.parallel.mcore import COLLECTIVE_S
from megavid.parallel.mesh import Mesh
from megavid.parallel.rank_env import Device, RankEnv, init_distributed
from megavid.plan.layout import Layout


@contextmanager
def open_world(env: RankEnv, device: Device = "cpu", timeout_s: float = COLLECTIVE_S) -> Iterator[None]:
    """``init_distributed``, undone at the end.

    Ranks: collective over the world.
    """
    init_distributed(env, device, timeout_s)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def open_mesh(
    config: RunConfig, layout: Layout, device: Device, env: RankEnv, *, timeout_s: float = 0.0
) -> Iterator[Mesh]:
    """The mesh of a run on this rank, deterministic where the run is.

    Args:
        config: the run.
        layout: of the world that ``env`` names.
        device: where tensors live; CUDA has not started yet.
        env: who this rank is.
        timeout_s: limit of every collective; 0 for longer than the watchdog's limits, which say who is to blame while a
            collective's own does not.

    Ranks: collective over the world.
    """
    if config.train.deterministic and device == "cuda":
        set_deterministic()
    timeout_s = timeout_s or config.watchdog.longest_s + 60.0
    with open_world(env, device, timeout_s), Mesh.open(layout, device, config.train.seed, timeout_s) as mesh:
        yield mesh


def set_deterministic() -> None:
    """Have CUDA, cuBLAS and NCCL give the same bits every time; call it before CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
