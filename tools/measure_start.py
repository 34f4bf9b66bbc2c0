"""What the start of a rank asks of the file system: files, bytes, calls and seconds of its imports.

    python tools/measure_start.py

Imports what a rank of `megavid train` imports, in a process of its own: under strace, which counts the calls that name
a file; alone with the files in memory; and alone after they were dropped from it (a file that another process has
mapped stays, so the seconds are worth something on a quiet machine only).
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMPORTS = "import megavid.cli.main, megavid.cli.train, megavid.training.run"
CALL = re.compile(r'\b(\w+)\((?:AT_FDCWD(?:<[^>]*>)?, )?"([^"]*)".*?\) += (-?\d+)')
TRIES = 3


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        files, calls, failed = count(Path(name) / "calls")
        size = sum(file.stat().st_size for file in files)
        print(f"one rank's imports: {calls} calls that name a file, {failed} of them for a file that is not there; "
              f"{len(files)} files of {size / 1e6:.0f} MB opened")  # fmt: skip
        print(f"warm: {statistics.median(seconds() for _ in range(TRIES)):.1f} s")
        cold = [(drop(files), seconds())[1] for _ in range(TRIES)]
        print(f"cold, this disk: {statistics.median(cold):.1f} s")
    return 0


def command() -> list[str]:
    """Import, and nothing else."""
    return [sys.executable, "-B", "-c", IMPORTS]


def count(log: Path) -> tuple[list[Path], int, int]:
    """Files that were opened, calls that name a file, and how many of them failed."""
    subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-e", "trace=%file", "-o", str(log), *command()],
        check=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    opened, calls, failed = set[Path](), 0, 0
    for line in log.read_text(errors="replace").splitlines():
        match = CALL.search(line)
        if match is None:
            continue
        calls += 1
        failed += int(match[3]) < 0
        path = Path(match[2])
        if match[1] in ("open", "openat") and int(match[3]) >= 0 and path.is_file() and path.stat().st_size:
            opened.add(path.resolve())
    return sorted(opened), calls, failed


def seconds() -> float:
    """Wall time of the imports."""
    began = time.perf_counter()
    subprocess.run(command(), check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def drop(files: list[Path]) -> None:
    """Have the system forget what it holds of ``files``."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
