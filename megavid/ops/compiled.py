"""The compiled ops of csrc/: whether they are built, for which devices, and the library their schemas are declared in.

Owns loading ``_C.so`` and the namespace ``megavid`` of torch's dispatcher. Each op's schema, reference, shapes and
gradient are in its own file beside this one; the compiled library only adds implementations for CPU and CUDA tensors,
so every op exists, slowly, without it.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megavid.ops.sources import hash_of_sources

BINARY = Path(__file__).with_name("_C.so")
BUILD = "python setup.py build_ext --inplace"
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
"""Of the devices that there may be kernels for."""

LIBRARY = torch.library.Library("megavid", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define("instruction_set() -> str")  # type: ignore[no-untyped-call]
LIBRARY.define("built_with() -> str")  # type: ignore[no-untyped-call]
LIBRARY.define("built_from() -> str")  # type: ignore[no-untyped-call]

DECLARED: list[str] = []
"""The ops of the modules imported so far; ``megavid.ops.block_ops`` imports all of them."""

DTYPES = (torch.float32, torch.bfloat16)
"""What the compiled ops take; models of other dtypes use the references."""


def declare(schema: str, reference: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Declare an op of the namespace ``megavid``.

    Args:
        schema: its name and arguments, as torch writes them.
        reference: what it computes where no compiled implementation is there.
        shapes: empty outputs for its inputs.
    """
    name = schema.partition("(")[0]
    DECLARED.append(name)
    LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"megavid::{name}", shapes, lib=LIBRARY)


def differentiate(name: str, gradient: Callable[..., Any], keep: Callable[..., None]) -> None:
    """Give an op its gradient: ``keep`` what ``gradient`` needs of a call."""
    torch.library.register_autograd(f"megavid::{name}", gradient, setup_context=keep, lib=LIBRARY)


@lru_cache
def why_not_compiled() -> str:
    """Load the compiled library; "" where its implementations are registered, else the reason in one line."""
    if not BINARY.exists():
        return f"not built: no C++ compiler, or no torch, when megavid was installed; {BUILD}"
    try:
        torch.ops.load_library(str(BINARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{BINARY.name} does not load with torch {torch.__version__}: {' '.join(str(error).split())[:160]}"
    if (built_with := _told("built_with")) != torch.__version__:
        return f"built with torch {built_with}, this is {torch.__version__}; {BUILD}"
    if (sources := hash_of_sources()) and _told("built_from") != sources:
        return f"built from other sources than csrc/ has now; {BUILD}"
    return ""


def _told(question: str) -> str:
    """What the library says of itself; "another" where it is too old to be asked."""
    known = _has_kernel(question, "CompositeExplicitAutograd")
    return str(getattr(torch.ops.megavid, question)()) if known else "another"


def instruction_set() -> str:
    """The widest of this machine's instruction sets that the compiled ops have, for example "avx2"; "" without them."""
    return "" if why_not_compiled() else str(torch.ops.megavid.instruction_set())


def compiled_devices() -> tuple[str, ...]:
    """Device types that every op declared so far is built for, among "cpu" and "cuda"; none before there is an op."""
    if why_not_compiled() or not DECLARED:
        return ()
    return tuple(device for device, key in DISPATCH_KEYS.items() if all(_has_kernel(name, key) for name in DECLARED))


def _has_kernel(name: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"megavid::{name}", key))


def why_not_compiled_for(device: torch.device, dtype: torch.dtype) -> str:
    """Why compiled ops do not run on tensors of this device and dtype, in one line; "" where they do."""
    if dtype not in DTYPES:
        return f"the compiled ops take {', '.join(str(known) for known in DTYPES)}, not {dtype}"
    if device.type == "meta":  # only shapes are asked, which the ops tell by themselves
        return ""
    if reason := why_not_compiled():
        return reason
    if device.type in compiled_devices():
        return ""
    return f"{BINARY.name} was built without all kernels for {device.type}; {BUILD}"
