"""How long a save holds the training thread, and what the writer behind it costs.

    python tools/bench_checkpoint.py --gib 1 --out docs/benchmarks/checkpoint.md

One process saves a state of ``--gib`` through the run's own ``AsyncSaver``: synchronously (written, hashed with
SHA-256, fsynced, renamed), and in the background, where the thread waits only for the copy to host memory. First saves,
which allocate the staging buffers, are left out. The same bytes through ``dd conv=fsync`` say what the disk gives. Then
a loop of matrix products stands for the training thread: its speed while the writer works, against its speed alone.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megavid.checkpoint import AsyncSaver, SingleRank
from megavid.config.schema import CheckpointConfig
from megavid.parallel.fragment import Box, Fragment

PARTS = 8
CLOSING = (
    "The writer is a thread of the same process: hashing and writing leave Python's lock, so on a host with idle cores "
    "the step runs on; where the step itself keeps all cores busy, as CPU ranks do, it gives up what the writer takes. "
    "GPU hosts: not measured."
)
WIDTH = 512


@dataclass(frozen=True)
class Figures:
    """What was measured; seconds, and MB of 10^6 bytes."""

    size: int
    dd_s: float
    sync_s: list[float]
    held_s: list[float]
    behind_s: list[float]
    alone_hz: float
    beside_hz: float
    threads: int

    @property
    def share(self) -> float:
        """Median of what a background save holds the thread, of the median synchronous one."""
        return statistics.median(self.held_s) / statistics.median(self.sync_s)

    def lines(self) -> list[str]:
        """The table."""
        sync, held, behind = (statistics.median(values) for values in (self.sync_s, self.held_s, self.behind_s))
        rate = self.size / 1e6
        slower = 1 - self.beside_hz / self.alone_hz
        return [
            "| what | seconds | MB/s |",
            "| --- | --- | --- |",
            f"| `dd bs=8M conv=fsync`, the same bytes | {self.dd_s:.2f} | {rate / self.dd_s:,.0f} |",
            f"| synchronous save: written, hashed, fsynced | {sync:.2f} | {rate / sync:,.0f} |",
            f"| background save: until it is on the disk | {behind:.2f} | {rate / behind:,.0f} |",
            f"| background save: the training thread waits | {held:.3f} | {rate / held:,.0f} |",
            "",
            f"The training thread waits {self.share:.1%} of a synchronous save "
            f"(each: {', '.join(f'{value:.3f}' for value in self.held_s)} s; synchronous: "
            f"{', '.join(f'{value:.2f}' for value in self.sync_s)} s).",
            f"While the writer works, a loop of matrix products on {self.threads} of {os.cpu_count()} cores runs at "
            f"{self.beside_hz:.1f} a second, {self.alone_hz:.1f} without it: {slower:.1%} slower.",
        ]


def fragments_of(size: int) -> list[Fragment]:
    """A state of ``size`` bytes in a few tensors."""
    numbers = size // 4 // PARTS
    boxes = (Box((0,), (numbers,)),)
    return [Fragment(f"model/part_{n}", (numbers,), boxes, torch.rand(numbers)) for n in range(PARTS)]


def products_until(is_over: "Until") -> float:
    """Matrix products a second until ``is_over`` says so."""
    a_DD, count, began = torch.rand(WIDTH, WIDTH), 0, time.perf_counter()
    while not is_over():
        torch.mm(a_DD, a_DD)
        count += 1
    return count / (time.perf_counter() - began)


class Until:
    """True once some seconds have gone by, or the saver is done."""

    def __init__(self, seconds: float, saver: AsyncSaver | None = None) -> None:
        self.deadline, self.saver = time.perf_counter() + seconds, saver

    def __call__(self) -> bool:
        """Whether it is over."""
        is_saved = self.saver is not None and self.saver.poll()
        return is_saved or time.perf_counter() > self.deadline


def measure(folder: Path, size: int, repeats: int) -> Figures:
    """Everything, in ``folder``."""
    fragments = fragments_of(size)
    size = sum(fragment.data.nbytes for fragment in fragments)
    sync_s, held_s, behind_s, beside = [], [], [], []
    with AsyncSaver(
        folder / "sync", SingleRank(), CheckpointConfig(keep_last=1, async_save=False), run_toml=""
    ) as saver:
        for step in range(1, repeats + 2):
            saver.save(step, fragments, {})
            sync_s.append(saver.held_s)
    dd = folder / "dd"
    began = time.perf_counter()
    count = size // (8 << 20)
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={dd}", "bs=8M", f"count={count}", "conv=fsync", "status=none"], check=True
    )
    dd_s = (time.perf_counter() - began) * size / (count * (8 << 20))
    dd.unlink()
    alone = [products_until(Until(1.0)) for _ in range(3)]
    with AsyncSaver(folder / "async", SingleRank(), CheckpointConfig(keep_last=1), run_toml="") as saver:
        for step in range(1, repeats + 2):
            began = time.perf_counter()
            saver.save(step, fragments, {})
            held_s.append(saver.held_s)
            beside.append(products_until(Until(600.0, saver)))
            behind_s.append(time.perf_counter() - began)
    alone += [products_until(Until(1.0)) for _ in range(3)]
    threads = torch.get_num_threads()
    return Figures(
        size,
        dd_s,
        sync_s[1:],
        held_s[1:],
        behind_s[1:],
        statistics.median(alone),
        statistics.median(beside[1:]),
        threads,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state (default %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="saves measured, after a first one (default %(default)s)"
    )
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure (default: here)")
    parser.add_argument("--out", type=Path, help="write the page there too")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        figures = measure(Path(name), int(arguments.gib * (1 << 30)), arguments.repeats)
        kind = subprocess.run(
            ["stat", "-f", "-c", "%T", name], capture_output=True, text=True, check=False
        ).stdout.strip()
    command = f"OMP_NUM_THREADS={figures.threads} python tools/bench_checkpoint.py --gib {arguments.gib:g}"
    page = [
        "# What a checkpoint costs the training thread",
        "",
        f"State {figures.size / 1e6:,.0f} MB, one process, {arguments.repeats} saves each after a first one, medians; "
        f"{os.cpu_count()} cores ({platform.machine()}), file system {kind}, torch {torch.__version__}.",
        "",
        f"Command: `{command}`",
        "",
        *figures.lines(),
        "",
        CLOSING,
    ]
    print("\n".join(page))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(page) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
