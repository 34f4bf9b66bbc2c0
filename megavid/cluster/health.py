"""What a node says of itself before a job, and which nodes are slow or broken.

Owns the facts, the limits, and the verdict over all nodes. Measuring is ``cluster.preflight``'s. No torch.
"""

import platform
import shutil
import statistics
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

GPU_FIELDS = (
    "index", "ecc.errors.uncorrected.volatile.total", "retired_pages.pending", "clocks_throttle_reasons.hw_slowdown",
)  # fmt: skip
"""Asked of nvidia-smi, in this order."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Beyond which a node is left out.

    Attributes:
        slow_below: share of the median node's rate of matrix products.
        clock_skew_s: seconds between a node's clock and the median one: logs and fences compare times.
        disk_free_gib: that node-local scratch must have free, for caches of compiled kernels.
    """

    slow_below: float = 0.8
    clock_skew_s: float = 2.0
    disk_free_gib: float = 2.0


@dataclass(frozen=True, slots=True)
class Facts:
    """What one rank found.

    Attributes:
        rank: which.
        host: that it is on.
        clock_s: of its node, right after all ranks met.
        versions: of what has to be alike everywhere.
        disk_free_gib: free in node-local scratch.
        gpu_troubles: what its GPUs complain of, a line each.
        product_rate: FLOP/s of matrix products.
        axes: seconds of one large all-reduce, by axis of the layout.
    """

    rank: int
    host: str
    clock_s: float
    versions: Mapping[str, str]
    disk_free_gib: float
    gpu_troubles: tuple[str, ...]
    product_rate: float
    axes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """Why a host should not take part."""

    host: str
    kind: Literal["slow", "broken"]
    words: str


def judge(facts: Sequence[Facts], limits: Limits) -> list[Finding]:
    """Slow and broken hosts, the worst first of each kind."""
    hosts = sorted({fact.host for fact in facts})
    of = {host: [fact for fact in facts if fact.host == host] for host in hosts}
    usual = {name: Counter(fact.versions[name] for fact in facts).most_common(1)[0][0] for name in facts[0].versions}
    clock_s = statistics.median(fact.clock_s for fact in facts)
    found = []
    for host in hosts:
        for fact in of[host]:
            found += [Finding(host, "broken", words) for words in _troubles(fact, usual, clock_s, limits)]
    # A node is as fast as its slowest rank: the others wait for it in every step.
    rates = {host: min(fact.product_rate for fact in of[host]) for host in hosts}
    median = statistics.median(rates.values())
    slow = sorted((rate, host) for host, rate in rates.items() if rate < limits.slow_below * median)
    found += [
        Finding(host, "slow", f"matrix products at {rate / median:.0%} of the median node's rate")
        for rate, host in slow
    ]
    return list(dict.fromkeys(found))


def _troubles(fact: Facts, usual: Mapping[str, str], clock_s: float, limits: Limits) -> list[str]:
    words = [
        f"{name} {version}, the other nodes have {usual[name]}"
        for name, version in fact.versions.items()
        if version != usual[name]
    ]
    skew_s = fact.clock_s - clock_s
    if abs(skew_s) > limits.clock_skew_s:
        words.append(f"its clock is {skew_s:+.1f} s off the median node's; the limit is {limits.clock_skew_s} s")
    if fact.disk_free_gib < limits.disk_free_gib:
        words.append(f"{fact.disk_free_gib:.1f} GiB free in local scratch, {limits.disk_free_gib} are needed")
    return words + list(fact.gpu_troubles)


def versions_here(packages: Mapping[str, str]) -> dict[str, str]:
    """What has to be alike on every node: Python and ``packages``."""
    return {"python": platform.python_version(), **packages}


def disk_free_gib(folder: Path) -> float:
    """Free space where ``folder`` lies."""
    return shutil.disk_usage(folder).free / 2**30


def gpu_troubles() -> tuple[str, ...]:
    """What this node's GPUs complain of; nothing where there is no nvidia-smi."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    query = [command, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return (f"nvidia-smi failed: {type(error).__name__}",)
    return tuple(words for line in answer.stdout.splitlines() for words in _gpu_words(line))


def _gpu_words(line: str) -> list[str]:
    index, ecc, retired, slowdown = ([part.strip() for part in line.split(",")] + [""] * 4)[:4]
    words = []
    if ecc.isdecimal() and int(ecc) > 0:
        words.append(f"GPU {index}: {ecc} uncorrected memory errors")
    if retired.lower() in ("yes", "pending"):
        words.append(f"GPU {index}: memory pages wait to be retired")
    if slowdown.lower() == "active":
        words.append(f"GPU {index}: slowed down by its hardware (heat or power)")
    return words
