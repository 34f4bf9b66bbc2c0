"""Who a rank is, as torchrun, srun or ``--ranks N`` say, and how it joins the others.

Owns reading the launcher's variables, and the start of ``torch.distributed``. Local ranks and their life are
``megavid.parallel.launch``'s, which gives these names on.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from megavid.errors import ConfigError, MegavidError
from megavid.parallel import cpu
from megavid.parallel.mcore import COLLECTIVE_S

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class RankEnv:
    """Who this process is among the ranks of the run.

    Attributes:
        rank: from 0, over all nodes.
        world_size: ranks in all.
        local_rank: from 0, on this node; the index of its GPU.
        master_address: host where rank 0 meets the others.
        master_port: its port; 0 in a world of one.
        tell: gives the launcher this rank's error before the rank ends itself; None where no launcher listens.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_address: str = "127.0.0.1"
    master_port: int = 0
    tell: Callable[[MegavidError], None] | None = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @classmethod
    def detect(cls, environ: Mapping[str, str] | None = None) -> "RankEnv":
        """Read what the launcher says: torchrun's variables, else srun's, else a world of one.

        Args:
            environ: the environment; ``os.environ`` if None.

        Raises:
            ConfigError: a variable is missing or is not a number, or a Slurm job script was not started through srun.
        """
        environ = os.environ if environ is None else environ
        if "RANK" in environ and "WORLD_SIZE" in environ:
            return cls(
                rank=_number(environ, "RANK"),
                world_size=_number(environ, "WORLD_SIZE"),
                local_rank=_number(environ, "LOCAL_RANK", "0"),
                master_address=environ.get("MASTER_ADDR", "127.0.0.1"),
                master_port=_number(environ, "MASTER_PORT"),
            )
        if "SLURM_PROCID" in environ and "SLURM_NTASKS" in environ:
            return cls._of_slurm(environ)
        return cls()

    @classmethod
    def _of_slurm(cls, environ: Mapping[str, str]) -> "RankEnv":
        world_size = _number(environ, "SLURM_NTASKS")
        if world_size == 1:
            return cls()
        if "SLURM_JOB_ID" in environ and not any(name in environ for name in STEP_VARIABLES):
            # A job script itself carries SLURM_PROCID = 0: alone, it would wait for the others until the time limit.
            raise ConfigError(
                f"SLURM_NTASKS = {world_size}, but this process was not started by srun; "
                "use `srun megavid ...`, or --ranks N for ranks on this node"
            )
        nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
        job = re.sub(r"\D", "", environ.get("SLURM_JOB_ID", "0")) or "0"
        return cls(
            rank=_number(environ, "SLURM_PROCID"),
            world_size=world_size,
            local_rank=_number(environ, "SLURM_LOCALID", "0"),
            master_address=environ.get("MASTER_ADDR") or first_host(nodes),
            # The same on every node, below the ports that systems give out, other for jobs that share a node.
            master_port=_number(environ, "MASTER_PORT", str(20_000 + int(job) % 10_000)),
        )

    def export(self) -> None:
        """Write torchrun's variables to ``os.environ``: torch's rendezvous and other libraries read them."""
        os.environ.update(
            RANK=str(self.rank), WORLD_SIZE=str(self.world_size), LOCAL_RANK=str(self.local_rank),
            MASTER_ADDR=self.master_address, MASTER_PORT=str(self.master_port),
        )  # fmt: skip


STEP_VARIABLES = (
    "SLURM_STEP_ID",
    "SLURM_STEPID",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_SRUN_COMM_HOST",
)


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    value = environ.get(name, default)
    if value is None or not value.isdigit():
        raise ConfigError(f"environment variable {name} = {value!r} must be a number; it is set by torchrun or srun")
    return int(value)


def first_host(nodes: str) -> str:
    """First host of a Slurm node list such as ``gpu[003-006,9],login``.

    ``scontrol show hostnames`` knows the whole grammar; containers often lack it, so the common form is read here.
    """
    scontrol = shutil.which("scontrol")
    if scontrol is not None:
        answer = subprocess.run([scontrol, "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.split():
            return answer.stdout.split()[0]
    match = re.match(r"([^\[\],]+)(?:\[(\w+)[^\]]*\])?([^\[\],]*)", nodes)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST = {nodes!r} is not a list of hosts; set MASTER_ADDR")
    prefix, number, suffix = match.groups()
    return f"{prefix}{number or ''}{suffix}"


def init_distributed(env: RankEnv, device: Device, timeout_s: float = COLLECTIVE_S) -> None:
    """Start ``torch.distributed`` on this rank: gloo on CPUs, NCCL on GPUs.

    Args:
        env: who this rank is.
        device: where tensors live.
        timeout_s: limit of the rendezvous and of every collective.

    Ranks:
        Collective over the world; returns when all have come. A world of one needs no network.
    """
    timeout = timedelta(seconds=timeout_s)
    if device == "cuda":
        # megatron-core overlaps communication with the kernels of one stream by this order; read when CUDA starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(env.local_rank)
    else:
        cpu.install()
    backend = "nccl" if device == "cuda" else "gloo"
    if env.world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    env.export()
    dist.init_process_group(backend, init_method="env://", timeout=timeout)
