"""What a plan is asked about, whatever the layout: the machines, what they reach, how often they fail, the budget.

Owns the one object that the command line makes and that ``answer`` and ``search`` pass on; nothing is computed here.
"""

from dataclasses import dataclass, field

from megavid.plan.calibration import Calibration
from megavid.plan.goodput import Faults
from megavid.plan.hardware import Hardware

HEADROOM = 0.05
"""Share of the accelerator's memory that a layout has to leave free to count as one that fits."""


@dataclass(frozen=True, slots=True)
class Job:
    """Accelerators and what is assumed about them.

    Attributes:
        world_size: GPUs.
        hardware: what they are.
        calibration: efficiencies and latencies.
        faults: rates of failures and storage; the published ones by default.
        headroom: share of memory that has to stay free.
        budget_tokens: video tokens to train on; 0 for ``train.steps`` steps.
    """

    world_size: int
    hardware: Hardware
    calibration: Calibration
    faults: Faults = field(default_factory=Faults)
    headroom: float = HEADROOM
    budget_tokens: float = 0.0

    @property
    def limit(self) -> float:
        """Bytes that a rank may use."""
        return self.hardware.memory_bytes * (1.0 - self.headroom)
