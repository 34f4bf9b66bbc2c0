"""One rank of a training run, from ``torch.distributed`` to the end of the loop.

Owns what has to be set up before a mesh, and who holds the lock of the run's folder.
"""

import contextlib
import os

import torch
import torch.distributed as dist

from megavid.checkpoint.ranks import agreed
from megavid.config.schema import RunConfig
from megavid.errors import ConfigError
from megavid.parallel.launch import Device, RankEnv, init_distributed
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import Layout
from megavid.training.loop import train
from megavid.training.run_dir import RunDir, RunLock, Start


def run_rank(
    config: RunConfig,
    layout: Layout,
    device: Device,
    run_dir: RunDir,
    start: Start | None,
    resume_step: int,
    env: RankEnv,
) -> None:
    """Train as one rank.

    Args:
        config: the run.
        layout: of the world that ``env`` names.
        device: where tensors live.
        run_dir: the run's folder.
        start: what the launcher, which holds the lock, found in the folder; None where torchrun or srun started the
            ranks: then rank 0 takes the lock and looks.
        resume_step: checkpoint asked for by number; 0 for the latest.
        env: who this rank is.
    """
    if config.train.deterministic and device == "cuda":
        set_deterministic()
    with contextlib.ExitStack() as stack:
        if start is None and env.is_main:
            stack.enter_context(RunLock(run_dir.path))
        init_distributed(env, device)
        stack.callback(dist.destroy_process_group)
        mesh = stack.enter_context(Mesh.open(layout, device, config.train.seed))
        if start is None:
            with agreed(mesh):
                found = run_dir.decide(config, resume_step=resume_step) if mesh.is_main else None
            start = mesh.broadcast_object(found)
            assert start is not None
        if start.kind == "finished":
            if mesh.is_main:
                print(start.finished_text(config, run_dir.path))
            return
        train(config, mesh, run_dir, start)


def local_device(num_ranks: int) -> Device:
    """What ``num_ranks`` ranks of this machine run on: GPUs where there are some, else CPU cores.

    Raises:
        ConfigError: more ranks than GPUs.
    """
    if not torch.cuda.is_available():
        return "cpu"
    if num_ranks > torch.cuda.device_count():
        raise ConfigError(
            f"--ranks {num_ranks} needs as many GPUs, this machine shows {torch.cuda.device_count()}; lower it, or set "
            "CUDA_VISIBLE_DEVICES to nothing for CPU ranks"
        )
    return "cuda"


def set_deterministic() -> None:
    """Have CUDA, cuBLAS and NCCL give the same bits every time; call it before CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
