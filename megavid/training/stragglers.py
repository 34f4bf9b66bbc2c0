"""GPUs whose kernels run slower than other ranks', by nvidia-resiliency-ext, where it is installed.

Owns the adapter. On CUDA the host does not see what its GPU waits for, so ``megavid.training.slow`` compares only waits
for data there; this times kernels with CUPTI. Written against the package's Detector and Report (0.3 to 0.5) and tested
with a stand-in of them; not run on a GPU.
"""

import importlib
import importlib.util
from typing import Any

from megavid.errors import ConfigError
from megavid.parallel.host import host_name
from megavid.training.callbacks import Callback, Run
from megavid.training.step import StepReport

MODULES = ("nvidia_resiliency_ext.attribution.straggler", "nvidia_resiliency_ext.straggler")
"""Where the detector is, newest first."""
PROFILED = 4
"""Steps between two reports whose kernels are timed."""


def find_detector() -> str | None:
    """The module of the detector; None where the package is not installed."""
    if importlib.util.find_spec("nvidia_resiliency_ext") is None:
        return None
    for name in MODULES:
        try:
            if importlib.util.find_spec(name) is not None:
                return name
        except ModuleNotFoundError:  # its parent is of another version
            continue
    return None


def check_detector(is_cuda: bool) -> None:
    """Refuse ``watchdog.gpu_stragglers`` where it cannot be.

    Raises:
        ConfigError: no GPU, or no package.
    """
    if not is_cuda:
        raise ConfigError("watchdog.gpu_stragglers = true times CUDA kernels, and these are CPU ranks; set it to false")
    if find_detector() is None:
        raise ConfigError(
            "watchdog.gpu_stragglers = true needs the package nvidia-resiliency-ext, which is not installed; pip "
            "install it, or set it to false"
        )


class GpuStragglers(Callback):
    """Writes an event for each slow GPU every ``watchdog.slow_interval_steps`` steps; stands on every rank."""

    def before_training(self, run: Run) -> None:
        """Time the kernels of some steps' forward and backward passes."""
        name = find_detector()
        assert name is not None, "check_detector refuses this"
        straggler = importlib.import_module(name)
        config = run.config.watchdog
        self.detector: Any = straggler.Detector
        self.steps = 0
        self.detector.initialize(
            scores_to_compute=["relative_perf_scores"],
            gather_on_rank0=True,
            profiling_interval=max(1, config.slow_interval_steps // PROFILED),
            node_name=host_name(),
        )
        self.detector.wrap_callables(callable_ids=[straggler.CallableId(run.engine, "forward_backward")])

    def after_step(self, run: Run, report: StepReport) -> None:
        """Compare where the interval ends. Ranks: collective there."""
        self.steps += 1
        config = run.config.watchdog
        if self.steps % config.slow_interval_steps:
            return
        found = self.detector.generate_report()
        if not run.mesh.is_main:
            return
        scores = found.gpu_relative_perf_scores
        slow = found.identify_stragglers(gpu_rel_threshold=1.0 / config.slow_factor)["straggler_gpus_relative"]
        for one in sorted(slow, key=lambda one: float(scores[one.rank])):
            score = round(float(scores[one.rank]), 3)
            run.event("slow_rank", step=report.step, rank=one.rank, host=one.node, gpu_score=score)

    def after_training(self, run: Run) -> None:
        """Leave the engine as it was."""
        self.detector.shutdown()
