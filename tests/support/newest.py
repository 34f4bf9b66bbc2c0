"""Which cases run a second time, on the newest megatron-core (``make test-mcore-latest``).

What differs between versions is how megatron-core is called, not how many layouts there are: each way of calling it (an
axis, a schedule, a dispatcher, an optimizer's state) is there once, in the largest layout that has it.
"""

from collections.abc import Iterable
from typing import Any

import pytest


def newest_too(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """Parameters for ``pytest.mark.parametrize``, of which ``chosen`` run on the newest megatron-core too."""
    cases = list(cases)
    assert set(chosen) <= set(cases), f"no such case: {set(chosen) - set(cases)}"
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=[pytest.mark.mcore] if case in chosen else []))
    return found
