"""`megavid preflight` on the local cluster: the node that is slowed on purpose is the one that is named."""

import json
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from tests.support.slurm import SlurmCluster, halting

SLOWED = 2
SECONDS = 10
"""Of matrix products."""


def rank_pid(cluster: SlurmCluster, rank: int, timeout_s: float = 60.0) -> int:
    """The Python process of a rank, once it has started."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for pid in cluster.processes():
            with suppress(OSError):
                environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                is_python = b"preflight" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if is_python and f"SLURM_PROCID={rank}".encode() in environ and b"SLURM_STEP_ID=0" in environ:
                    return pid
        time.sleep(0.1)
    raise AssertionError("no such rank")


def test_slowed_node_is_named_and_excluded(cluster: SlurmCluster, tmp_path: Path) -> None:
    out = tmp_path / "run"
    srun = ("srun", "--nodes=4", "--ntasks-per-node=1", *cluster.env["MEGAVID_COMMAND"].split())
    limits = ("--seconds", str(SECONDS), "--slow-below", "0.2")
    asked = ("preflight", "tiny", "--out", str(out), *limits, "--parallel.expert", "2")
    began = time.monotonic()
    job = subprocess.Popen(
        [*srun, *asked], env=cluster.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert job.stdout is not None
        said = ""
        while "measuring 4 ranks" not in said:  # from here on: slow imports would only take long
            said += (line := job.stdout.readline())
            assert line, said
        # Nodes that share two cores with other tests come to a third of the median, this one to a tenth: one that wakes
        # is served before those that compute all the time, on however few cores.
        with halting(rank_pid(cluster, SLOWED), 0.03):
            time.sleep(SECONDS)
        said += job.communicate(timeout=120)[0]
    finally:
        job.kill()  # srun; the cluster's end takes its tasks with it
        job.wait()
    assert time.monotonic() - began < 90
    found = json.loads((out / "slurm" / "preflight.json").read_text())
    named = [(finding["host"], finding["kind"]) for finding in found["findings"]]
    # The slowest first. On two cores another node may truly come below the limit; those in the middle never do.
    assert named[0] == (f"n{SLOWED}", "slow"), said
    assert len(named) <= 2, said
    assert sorted((out / "slurm" / "exclude").read_text().split()) == sorted(host for host, _ in named)
    assert f"n{SLOWED} is slow: matrix products at" in said
    assert job.returncode == 3, said
    assert all(set(rank["axes"]) == {"dp", "ep", "edp"} for rank in found["ranks"])
