"""``megavid profile --probe FILE``: measure what this machine's CPU ranks reach, for the planner.

Owns the arguments and the lines for the terminal. What is measured is ``megavid.training.probe_run``'s.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megavid.cli.arguments import take_option
from megavid.cli.quiet import silence_known_warnings
from megavid.errors import ConfigError
from megavid.plan.calibration import PROBE_RANGES


def main(argv: Sequence[str]) -> int:
    """Probe and write the file; returns the exit status.

    Raises:
        ConfigError: other arguments than ``--probe FILE``, or a file that cannot be written.
    """
    rest = list(argv)
    path = Path(take_option(rest, "--probe"))
    if rest:
        raise ConfigError(f"--probe FILE takes no other argument, got {rest[0]!r}: it times models of its own")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--probe {path} must name a file in a folder that exists")
    silence_known_warnings()

    from megavid.profiling.probe import worst_misfit
    from megavid.training.probe_run import run_probe

    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > cores / 2:
        print(
            f"megavid: load average {load:.1f} on {cores} cores: other processes will be measured too", file=sys.stderr
        )
    probed = run_probe()
    probed.save(path)
    machine, numbers = probed.machine, probed.calibration.numbers()
    print(f"{machine.name}, one thread a rank, probed in {probed.wall_s:.0f} s")
    print(f"  matrix product  {machine.peak['fp32'] / 1e9:8.1f} GFLOP/s in fp32")
    print(f"  memory          {machine.memory_rate / 1e9:8.1f} GB/s")
    print(f"  between ranks   {machine.nvlink_rate / 1e9:8.2f} GB/s after {numbers['nvlink_latency_s'] * 1e6:.0f} us")
    for name, cost in probed.calibration.calls.items():
        print(f"    {name:22} {cost.rate / 1e9:6.2f} GB/s after {cost.latency_s * 1e6:.0f} us")
    for name in (*PROBE_RANGES, "crowding"):
        print(f"  {name:22} {numbers[name]:.4g}")
    misfit = worst_misfit(machine, probed.calibration, list(probed.steps.values()))
    print(f"  fits its {len(probed.steps)} steps within {misfit:.0%}")
    print(f"written: {path}; read by `megavid plan --calibration {path}` and `megavid profile --calibration {path}`")
    return 0
