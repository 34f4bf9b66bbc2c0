"""Whether Transformer Engine can be used here, decided once, before megatron-core is first imported.

Owns the probe only. Import this module before anything of ``megatron.core``: on a machine without a GPU an installed
Transformer Engine raises RuntimeError or OSError at import, megatron-core (0.16.1 and 0.19.2) catches ImportError only,
and would fail to import as well.
"""

import importlib
import sys


def probe() -> bool:
    """Whether ``transformer_engine.pytorch`` imports; if not, make every later import of it an ImportError.

    A probe, so it takes every kind of failure that a half-usable installation shows: a missing package (ImportError),
    a missing CUDA library (OSError, AssertionError), no device or a mismatched build (RuntimeError).
    """
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError):
        # None in sys.modules is Python's own way to say "importing this raises ModuleNotFoundError".
        for name in [name for name in sys.modules if name.split(".")[0].startswith("transformer_engine")]:
            del sys.modules[name]
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
        sys.modules["transformer_engine_torch"] = None  # type: ignore[assignment]
        return False
    return True


HAS_TE: bool = probe()
"""Transformer Engine is installed and imports; layers, FP8 and AdamW are megavid's own and torch's all the same."""
