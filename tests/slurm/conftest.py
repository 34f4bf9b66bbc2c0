"""One cluster for all tests here, or the reason why there is none."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slurm import SlurmCluster, why_not

CLUSTER = pytest.StashKey[SlurmCluster]()


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[SlurmCluster]:
    """Four nodes, on this machine."""
    reason = why_not()
    if reason:
        pytest.skip(f"no local Slurm cluster: {reason}")
    # Not under pytest's own folder, which only its owner may enter: munged refuses a socket that not all can reach.
    folder = Path(tempfile.mkdtemp(prefix="megavid-slurm-"))
    folder.chmod(0o755)
    with SlurmCluster(folder) as running:  # removes it
        request.session.stash[CLUSTER] = running
        yield running


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End it behind the last test here: other tests may run for long, and another cluster would wait for this one."""
    is_last = nextitem is None or nextitem.path.parent != item.path.parent
    if is_last and CLUSTER in item.session.stash:
        item.session.stash[CLUSTER].close()
