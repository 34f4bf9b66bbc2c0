"""Ranks that work longer than the others, named with their host.

Owns the rule and the event. It compares what ranks do between their waits for each other, so that a slow one is told
from those that wait for it. On CUDA the host does not see its waits: there only the time that a rank waits for its data
is compared, and ``megavid profile`` tells the rest.
"""

import json
import statistics

import torch

from megavid.training.callbacks import Callback, Run
from megavid.training.step import StepReport

LEAST_S = 0.005
"""Differences below this a step are noise."""


def slow_ranks(own_s: list[float], step_s: float, factor: float) -> list[int]:
    """Ranks whose own time is out of line, slowest first.

    Args:
        own_s: seconds a step that each rank did not wait for others, by rank.
        step_s: what the median is compared with at least; 0 to compare own times alone.
        factor: ``watchdog.slow_factor``.
    """
    median = statistics.median_low(own_s)  # of two ranks, the faster one
    limit = median + max((factor - 1) * max(median, step_s), LEAST_S)
    return sorted((rank for rank, seconds in enumerate(own_s) if seconds > limit), key=lambda rank: -own_s[rank])


class SlowRanks(Callback):
    """Writes an event for each slow rank every ``watchdog.slow_interval_steps`` steps; stands on every rank."""

    def before_training(self, run: Run) -> None:
        """Begin to count."""
        self.own_s, self.data_s, self.step_s, self.steps = 0.0, 0.0, 0.0, 0

    def after_step(self, run: Run, report: StepReport) -> None:
        """Count, and compare where the interval ends. Ranks: collective there."""
        waits_s = report.comm_wait_s
        self.own_s += report.data_wait_s if waits_s is None else report.step_time_s - waits_s
        self.step_s += 0.0 if waits_s is not None else report.step_time_s
        self.data_s += report.data_wait_s
        self.steps += 1
        config = run.config.watchdog
        if self.steps < config.slow_interval_steps:
            return
        mine = torch.zeros(2, run.mesh.world_size, dtype=torch.float64, device=run.mesh.device)
        mine[:, run.mesh.rank] = torch.tensor([self.own_s, self.data_s]) / self.steps
        own_s, data_s = run.mesh.sum(mine, over="world").tolist()
        if run.mesh.is_main:
            slow = slow_ranks(own_s, self.step_s / self.steps, config.slow_factor)
            hosts = {row["rank"]: row["host"] for row in json.loads(run.run_dir.ranks_file.read_text())} if slow else {}
            for rank in slow:
                run.event(
                    "slow_rank", step=report.step, rank=rank, host=hosts[rank], own_s=round(own_s[rank], 4),
                    median_s=round(statistics.median_low(own_s), 4), data_wait_s=round(data_s[rank], 4),
                )  # fmt: skip
        self.before_training(run)
