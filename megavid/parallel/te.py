"""Whether Transformer Engine can be used here, decided once, before megatron-core is first imported.

Owns the probe, and what it says of a recipe; its layers are ``megavid.models.te``'s. Import this module before anything
of ``megatron.core``: on a machine without a GPU an installed Transformer Engine raises RuntimeError or OSError at
import, megatron-core (0.16.1 and 0.19.2) catches ImportError only, and would fail to import as well.
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
"""Transformer Engine is installed and imports; what is built from it is said by ``precision.linears``."""

DEVICES = frozenset({"cuda"})
"""Where its layers run."""


def why_no_fp8(recipe: str) -> str:
    """Why Transformer Engine cannot take a recipe of ``precision.fp8`` on this machine; "" where it can.

    Only where ``HAS_TE``. Source: ``FP8GlobalStateManager`` of Transformer Engine 2.3 to 2.20.
    """
    if recipe == "off":
        return ""
    state = importlib.import_module("transformer_engine.pytorch.fp8").FP8GlobalStateManager
    ask = {"mxfp8": state.is_mxfp8_available, "blockwise": state.is_fp8_block_scaling_available}
    is_available, reason = ask.get(recipe, state.is_fp8_available)()
    return "" if is_available else str(reason)
