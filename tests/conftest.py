"""Fixtures of all tests: the pool of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.ranks import RankPool

POOL = pytest.StashKey[Any]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fork the pool's warm process now: test modules are imported, and no test has made torch start threads."""
    is_wanted = any("pool" in item.fixturenames for item in session.items if isinstance(item, pytest.Function))
    if is_wanted and not session.config.option.collectonly:
        from tests.support.ranks import RankPool  # imports megatron-core, which other tests need not wait for

        session.config.stash[POOL] = RankPool()


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    """Ranks to run jobs on: ``pool.run(world, function, *args)``."""
    ranks = request.config.stash[POOL]
    yield ranks
    ranks.close()
