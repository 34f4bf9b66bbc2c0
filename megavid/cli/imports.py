"""Importing large libraries, which is most of a command's start.

Owns what is switched off meanwhile.
"""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """While open, nothing looks for garbage: modules are none, and a tenth of a start was spent on looking at them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
