"""One warm parent for the command-line tests that do not need one of their own."""

from collections.abc import Iterator

import pytest

from tests.support.warm_parent import WarmParent


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmParent]:
    """Where commands are forked from."""
    with WarmParent(tmp_path_factory.mktemp("commands")) as parent:
        yield parent
