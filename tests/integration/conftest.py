"""Fixtures of the command line's tests: one process that has imported everything, for all of them."""

from collections.abc import Iterator

import pytest

from tests.support.warm_parent import WarmParent


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmParent]:
    """Where commands are forked from. Importing everything takes seconds, a fork of it none."""
    with WarmParent(tmp_path_factory.mktemp("commands")) as parent:
        yield parent
