"""Names for stretches of a step, which a profile reads and nothing else does.

Owns the one switch. A region that is off costs a function call and touches neither torch's dispatcher nor autograd, so
regions may stand on the hot path; what becomes of them is ``megavid.profiling``'s business.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch._C._profiler import _RecordFunctionFast

PREFIX = "megavid/"
"""What the name of every region begins with in a trace."""

P = ParamSpec("P")
R = TypeVar("R")

_OFF: AbstractContextManager[Any] = nullcontext()


class _Switch:
    is_on = False


def region(name: str) -> AbstractContextManager[Any]:
    """A context whose time, and that of its operators' backward pass, a trace shows under ``name``.

    Args:
        name: lower case, such as ``dispatch``; a number after a slash is a layer, such as ``experts/3``.

    What torch.compile traces is one region with its caller: compiled code has none inside.
    """
    # In this order: what is traced must not depend on the switch, or it is compiled again when a profile begins.
    return _OFF if torch.compiler.is_compiling() or not _Switch.is_on else mark(name)


def mark(name: str) -> AbstractContextManager[Any]:
    """``region`` whether or not regions are on, for callers that are only there while a trace is taken.

    Not torch's public ``record_function``: that is an operator, which a dispatch mode (selective checkpointing) keeps
    or runs again as it does others, so that regions end where they should not.
    """
    fast: AbstractContextManager[Any] = _RecordFunctionFast(PREFIX + name)
    return fast


def in_region(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """``region`` around every call of a function."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with region(name):
                return function(*args, **kwargs)

        return call

    return decorate


@contextmanager
def regions_on() -> Iterator[None]:
    """Mark regions in the profiler's trace while entered; process-wide."""
    before, _Switch.is_on = _Switch.is_on, True
    try:
        yield
    finally:
        _Switch.is_on = before
