"""Table ``watchdog``: how long ranks may stand still, and which ones count as slow.

Owns names, defaults and checks. Waiting, dumping and naming are ``megavid.training.watchdog``'s.
"""

from dataclasses import dataclass

from megavid.config.checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchdogConfig:
    """How a hung, dead or slow rank is found."""

    first_step_s: float = 1800.0
    """Seconds without progress (a collective entered, or a step done) until the first step is done, in which libraries
    start, kernels compile and the checkpoint is read; then every rank's stacks are written and the job ends (status 5).
    0 for no limit."""
    step_s: float = 600.0
    """The same from the second step on; above the longest time that one rank alone may work, as for pictures."""
    slow_factor: float = 1.5
    """A rank that works longer than this many times the median rank, waiting for others not counted, is named in
    events.jsonl with its host; 0 for none."""
    slow_interval_steps: int = 20
    """Steps over which that is measured."""
    gpu_stragglers: bool = False
    """On GPUs, time kernels of some steps and name ranks whose GPU is slow_factor times slower than the fastest; needs
    the package nvidia-resiliency-ext."""

    def __post_init__(self) -> None:
        for name, value in (("first_step_s", self.first_step_s), ("step_s", self.step_s)):
            require(
                0 <= value < float("inf"),
                f"watchdog.{name} = {value} must be a number of seconds, or 0 for no limit",
            )
        require(
            self.slow_factor == 0 or self.slow_factor > 1,
            f"watchdog.slow_factor = {self.slow_factor} must be above 1, or 0 for none",
        )
        require(
            not self.gpu_stragglers or self.slow_factor > 1,
            "watchdog.gpu_stragglers = true needs watchdog.slow_factor, which says what is slow; set it above 1",
        )
        require(
            self.slow_interval_steps >= 1,
            f"watchdog.slow_interval_steps = {self.slow_interval_steps} must be at least 1",
        )

    @property
    def longest_s(self) -> float:
        """The longer of the two limits; a day where there is none."""
        limits = (self.first_step_s, self.step_s)
        return max(limits) if all(limits) else 86_400.0
