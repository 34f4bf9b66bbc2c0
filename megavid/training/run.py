"""One rank of a training run, from ``torch.distributed`` to the end of the loop.

Owns what has to be set up before a mesh, and who holds the lock of the run's folder.
"""

import contextlib
import errno
from collections.abc import Iterator

import torch

from megavid.checkpoint.ranks import agreed
from megavid.config.schema import RunConfig
from megavid.errors import ConfigError, StopRequested, StorageError, Superseded
from megavid.parallel.launch import Device, RankEnv
from megavid.parallel.world import open_mesh
from megavid.plan.layout import Layout
from megavid.profiling.collectives import names_of
from megavid.training.flight import FlightRecorder
from megavid.training.loop import train
from megavid.training.run_dir import RunDir, RunLock, Start
from megavid.training.watchdog import Watchdog

STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}
"""What an ``OSError`` of storage, not of a mistake, is called."""
WAY_OUT = "free space or check the storage, then start again; checkpoints are intact"


def run_rank(
    config: RunConfig,
    layout: Layout,
    device: Device,
    run_dir: RunDir,
    start: Start | None,
    resume_step: int,
    env: RankEnv,
    *,
    takes_over: bool = False,
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
        takes_over: replace another start that holds the folder; read where rank 0 takes the lock.
    """
    with contextlib.ExitStack() as stack:
        if start is None and env.is_main:
            stack.enter_context(RunLock(run_dir.path, takes_over=takes_over))
        mesh = stack.enter_context(open_mesh(config, layout, device, env))
        if start is None:
            with agreed(mesh):
                found = run_dir.decide(config, resume_step=resume_step) if mesh.is_main else None
            start = mesh.broadcast_object(found)
            assert start is not None
        if start.kind == "finished":
            if mesh.is_main:
                print(start.finished_text(config, run_dir.path))
            return
        recorder = stack.enter_context(FlightRecorder(names_of(mesh)))
        run_dir.fence = start.fence
        stack.enter_context(noting_errors(run_dir, env))
        with (
            Watchdog(config.watchdog, env, recorder, run_dir.hangs, start.fence.token, run_dir.error) as watchdog,
            storage_faults(),
        ):
            train(config, mesh, run_dir, start, on_step=watchdog.beat)


@contextlib.contextmanager
def noting_errors(run_dir: RunDir, env: RankEnv) -> Iterator[None]:
    """Note what ends this rank in errors.jsonl, by its time: the first row is of the rank that failed first."""
    try:
        yield
    except (StopRequested, Superseded):  # no error; and a start that was replaced changes nothing
        raise
    except BaseException as error:
        run_dir.error(env.rank, error)
        raise


@contextlib.contextmanager
def storage_faults() -> Iterator[None]:
    """Turn what a full or failing disk does to any file of a run into one line and status 3.

    Raises:
        StorageError: instead of the ``OSError``.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        raise StorageError(f"cannot write {error.filename or 'the run'}: {error.strerror}; {WAY_OUT}") from error


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
