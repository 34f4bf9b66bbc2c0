"""Fixtures of all tests: ranks, and the parent of commands. And how workers share the tests (``pytest -n``)."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from tests.support.ranks import RankPool
    from tests.support.warm_parent import WarmParent

POOL = pytest.StashKey[Any]()

# Imports and collected tests are no garbage: looking for some while they are made, or among them later, is only slow.
gc.disable()


class ByFile(LoadScopeScheduling):
    """A file's tests run on one worker, for their fixtures' sake; those on the Slurm cluster all do: there is one."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "tests/slurm" if path.startswith("tests/slurm/") else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """Called by pytest-xdist where there are workers."""
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slurm's tests first: they wait most of the time, so another worker computes beside them."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/slurm/"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fork the pool's warm process now: test modules are imported, and no test has made torch start threads."""
    items = [] if session.config.option.collectonly else getattr(session, "items", [])
    if any("pool" in item.fixturenames for item in items if isinstance(item, pytest.Function)):
        from tests.support.ranks import RankPool  # imports megatron-core, which other tests need not wait for

        session.config.stash[POOL] = RankPool()
    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries that count what Python leaves behind would complain of all of it
    gc.enable()


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    """Ranks to run jobs on: ``pool.run(world, function, *args)``."""
    ranks = request.config.stash[POOL]
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmParent]:
    """Where commands are forked from. Importing everything takes seconds, a fork of it none."""
    from tests.support.warm_parent import WarmParent

    with WarmParent(tmp_path_factory.mktemp("commands")) as parent:
        yield parent
