"""One cluster for all tests here, or the reason why there is none."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slurm import SlurmCluster, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """Four nodes, on this machine."""
    reason = why_not()
    if reason:
        pytest.skip(f"no local Slurm cluster: {reason}")
    # Not under pytest's own folder, which only its owner may enter: munged refuses a socket that not all can reach.
    folder = Path(tempfile.mkdtemp(prefix="megavid-slurm-"))
    folder.chmod(0o755)
    with SlurmCluster(folder) as running:  # removes it
        yield running
