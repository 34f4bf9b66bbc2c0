"""Importing large libraries, which is most of a command's start.

Owns what is switched off meanwhile.
"""

import atexit
import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """While open, nothing looks for garbage: modules are none, and a tenth of a start was spent on looking at them.

    Nor afterwards: what is there at the end is left out of every later search, of those of ranks forked from here too.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # libraries that count what Python leaves behind would complain of all of it
        if was_enabled:
            gc.enable()
