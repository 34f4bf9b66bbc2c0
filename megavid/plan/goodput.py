"""Checkpoints and failures: bytes, minutes, the best interval, and the share of time that is work that counts.

Owns what a checkpoint holds, the cost of failures, and the published rates that stand in where nobody measured this
cluster. What a rank holds comes from the caller. The model::

    a save blocks the steps for the copy to host memory (C); the files are whole W seconds later, W <= the interval
    failures come at random, M seconds apart in the mean; each costs the restart R and the work since the last whole
    checkpoint: half an interval in the mean, and W, because the newest one is not whole yet when it is newest

    goodput = T / (T + C) * (1 - ((T + C) / 2 + W + R) / M)           T: seconds of steps between two saves

The best T balances C / T against T / 2M: T = sqrt(2 C M) (Young 1974; Daly 2006 refines it where C is not small
against M, and the two agree to C / M). With a blocking save C includes the write and W is 0.
"""

import math
from dataclasses import dataclass

from megavid.config.schema import OptimizerConfig, require

STATE_BYTES = 4
"""Bytes of each number of a checkpoint: master weights, two moments and the average, all fp32."""

LLAMA3_GPUS, LLAMA3_DAYS, LLAMA3_FAILURES = 16_384, 54, 419
"""Llama 3 405B: unexpected interruptions in 54 days on 16,384 H100. Source: arXiv 2407.21783, section 3.3.4."""
LLAMA3_STORAGE_RATE = 2e12
"""Sustained bytes/s of the file system of that job. Source: likewise, section 3.3.1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """How often a job fails and what its storage and restart take; the defaults are another cluster's, published.

    Attributes:
        mtbf_gpu_hours: hours between failures of one GPU; a job of N GPUs fails N times as often.
        restart_s: seconds from a failure to the next step, without the work that is lost; an assumption.
        storage_rate: bytes/s that all ranks together write; 0 for the published rate for each GPU.
        host_rate: bytes/s from one GPU to host memory.
    """

    mtbf_gpu_hours: float = LLAMA3_GPUS * LLAMA3_DAYS * 24 / LLAMA3_FAILURES
    restart_s: float = 300.0
    storage_rate: float = 0.0
    host_rate: float = 25e9

    def __post_init__(self) -> None:
        require(self.mtbf_gpu_hours > 0, f"--mtbf-gpu-hours {self.mtbf_gpu_hours} must be above 0")
        require(self.restart_s >= 0, f"--restart-minutes {self.restart_s / 60} must be at least 0")
        require(self.storage_rate >= 0, f"--storage-gb-s {self.storage_rate / 1e9} must be above 0")
        require(self.host_rate > 0, f"the rate to host memory, {self.host_rate} bytes/s, must be above 0")

    def mtbf_s(self, world_size: int) -> float:
        """Seconds between failures of a job."""
        return self.mtbf_gpu_hours * 3600 / world_size

    def write_rate(self, world_size: int) -> float:
        """Bytes/s that the ranks of a job write together."""
        return self.storage_rate or LLAMA3_STORAGE_RATE / LLAMA3_GPUS * world_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """Checkpoints of a run and what failures cost it.

    Attributes:
        checkpoint_bytes: of one checkpoint, all ranks.
        host_bytes: host memory for staging on the fullest rank.
        write_s: seconds until it is whole.
        blocked_s: seconds that the steps wait for it.
        mtbf_s: seconds between failures.
        restart_s: seconds of a restart.
        interval_s: the best interval.
        interval_steps: likewise, in steps.
        fraction: goodput at the best interval.
        configured_steps: ``checkpoint.interval_steps``; 0 for none.
        configured_fraction: goodput with it.
    """

    checkpoint_bytes: int
    host_bytes: int
    write_s: float
    blocked_s: float
    mtbf_s: float
    restart_s: float
    interval_s: float
    interval_steps: int
    fraction: float
    configured_steps: int
    configured_fraction: float


def checkpoint_bytes(parameters: int, optimizer: OptimizerConfig) -> int:
    """Bytes of the tensors of one checkpoint: fp32 masters, two moments and, if there is one, the average."""
    copies = 3 + (optimizer.ema_decay > 0)
    return parameters * copies * STATE_BYTES


def goodput_of(interval_s: float, *, blocked_s: float, write_s: float, restart_s: float, mtbf_s: float) -> float:
    """Share of the time that becomes training that is kept, 0 to 1; see the head of this file.

    Args:
        interval_s: seconds of steps between two saves.
        blocked_s: seconds that a save stops the steps for.
        write_s: seconds from there until its files are whole.
        restart_s: seconds from a failure to the next step.
        mtbf_s: mean seconds between failures.
    """
    lost_s = (interval_s + blocked_s) / 2 + write_s + restart_s
    return interval_s / (interval_s + blocked_s) * max(0.0, 1.0 - lost_s / mtbf_s)


def best_interval_s(*, blocked_s: float, write_s: float, mtbf_s: float) -> float:
    """Seconds of steps between two saves that lose least: Young's, but no shorter than writing one takes.

    Source: Young 1974 (CACM 17:9); Daly 2006 (FGCS 22:3).
    """
    return max(math.sqrt(2 * blocked_s * mtbf_s), write_s)


def plan_goodput(
    *,
    checkpoint_size: int,
    rank_bytes: int,
    host_bytes: int,
    world_size: int,
    step_time_s: float,
    interval_steps: int,
    is_async: bool,
    faults: Faults,
) -> Goodput:
    """Checkpoints and failures of a job.

    Args:
        checkpoint_size: bytes of a whole checkpoint.
        rank_bytes: bytes of it that the fullest rank copies to host memory.
        host_bytes: host memory that the fullest rank stages it in.
        world_size: GPUs.
        step_time_s: seconds of one optimizer step.
        interval_steps: ``checkpoint.interval_steps``; 0 for the last step only.
        is_async: whether files are written while steps go on.
        faults: rates.
    """
    mtbf_s = faults.mtbf_s(world_size)
    copy_s, files_s = rank_bytes / faults.host_rate, checkpoint_size / faults.write_rate(world_size)
    blocked_s, late_s = (copy_s, files_s) if is_async else (copy_s + files_s, 0.0)
    best_s = best_interval_s(blocked_s=blocked_s, write_s=late_s, mtbf_s=mtbf_s)
    steps = max(1, round(best_s / step_time_s))

    def fraction(num_steps: int) -> float:
        # A save waits for the one before it, so an interval shorter than the writing blocks for the rest of it.
        seconds = num_steps * step_time_s
        return goodput_of(
            seconds,
            blocked_s=blocked_s + max(0.0, late_s - seconds),
            write_s=late_s,
            restart_s=faults.restart_s,
            mtbf_s=mtbf_s,
        )

    return Goodput(
        checkpoint_bytes=checkpoint_size,
        host_bytes=host_bytes,
        write_s=files_s,
        blocked_s=blocked_s,
        mtbf_s=mtbf_s,
        restart_s=faults.restart_s,
        interval_s=best_s,
        interval_steps=steps,
        fraction=fraction(steps),
        configured_steps=interval_steps,
        configured_fraction=fraction(interval_steps) if interval_steps else 0.0,
    )
