#!/usr/bin/env python3
"""Run the distributed tests on the newest megatron-core, whatever version is installed.

python tools/mcore_latest.py                                    # tests/distributed, those marked mcore
python tools/mcore_latest.py tests/distributed/test_cpu.py -k uneven   # pytest arguments instead

pip installs 0.16.1 on Python 3.11 and 0.19.x on 3.12 and up, and clusters have the newest; both are supported. Its
wheel is pure Python but for optional helpers, so its unpacked sources, put before the installed ones, run on any
Python. They are kept in .cache/mcore-latest. Without a network and without a copy, says so and ends with status 0.
"""

import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "mcore-latest"
REQUIREMENT = "megatron-core>=0.19.2,<0.20"
TESTS = ["tests/distributed"]


def main() -> int:
    """Fetch, unpack, check which version is imported, run the tests."""
    if find_spec("triton") is None:
        return _skip("triton is not installed, and the newest megatron-core imports it; `pip install triton`")
    wheel = _fetch()
    if wheel is None:
        return _skip(f"no network and no wheel of {REQUIREMENT} in {CACHE.relative_to(ROOT)}")
    sources = _unpack(wheel)
    # NO_VCS_VERSION: it would otherwise run git at every import and add this repository's revision to its version.
    environ = {**os.environ, "PYTHONPATH": str(sources), "NO_VCS_VERSION": "1"}
    version = wheel.name.split("-")[1]
    question = "from megavid.parallel import mcore; print('.'.join(map(str, mcore.version())))"
    asked = [sys.executable, "-W", "ignore", "-c", question]
    answer = subprocess.run(asked, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    if answer != version:
        sys.stderr.write(f"mcore-latest: megatron-core {answer} was imported instead of {version} in {sources}\n")
        return 1
    print(f"mcore-latest: distributed tests on megatron-core {answer} from {sources.relative_to(ROOT)}", flush=True)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "mcore", *(sys.argv[1:] or TESTS)]
    return subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode


def _skip(reason: str) -> int:
    print(f"mcore-latest: skipped: {reason}")
    return 0


def _fetch() -> Path | None:
    """The newest wheel, from the package index or, when that fails, from the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--python-version", "3.12", "--only-binary=:all:", "--retries", "1", "--timeout", "15",
        "--dest", str(CACHE), REQUIREMENT,
    ]  # fmt: skip
    fetched = subprocess.run(command, capture_output=True, text=True, check=False)
    if fetched.returncode:
        print(f"mcore-latest: not fetched: {(fetched.stderr.strip().splitlines() or ['pip failed'])[-1]}")
    wheels = sorted(CACHE.glob("megatron_core-*.whl"), key=lambda path: _numbers(path.name.split("-")[1]))
    return wheels[-1] if wheels else None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def _unpack(wheel: Path) -> Path:
    """Folder of the wheel's files; made aside and renamed, so that an interrupted run leaves nothing half done."""
    folder = CACHE / wheel.name.removesuffix(".whl")
    if not folder.exists():
        aside = CACHE / f"{folder.name}.{os.getpid()}.partial"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(aside)
        aside.rename(folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
