"""``train.capture``: what stands between a block's products and its attention, compiled once for each shape.

Owns which calls are alike, how many shapes are compiled, and the record of what was. A run's packs are all of one
length, so its blocks call each of these functions with the same shapes in every step; a table of modulation, which has
a row for each clip, is filled up to a power of two rows. Products stay outside, and with them every collective,
adapters and FP8: layouts do not matter here. So do attention, the text's keys and values (their number is that of the
clips), experts, and all passes without gradient.
"""

import importlib.util
import os
import shutil
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from megavid.errors import ConfigError
from megavid.ops.block_ops import REFERENCE, BlockOps
from megavid.ops.regions import region
from megavid.parallel import cpu

Choice = Literal["off", "compile"]

MAX_SHAPES = 8
"""Shapes of one function that are compiled; calls of further ones run as they stand."""
LEAST_ROWS = 16
"""Rows of a modulation table at least."""


@dataclass(frozen=True)
class Captured:
    """A function met a kind of call that it had not met before, and was compiled for it unless it is one too many.

    Attributes:
        part: name of the function.
        shape: of its first argument.
        number: which one of the function's kinds of call this is, from 1: shapes and dtypes of all arguments, and how
            they lie in memory.
    """

    part: str
    shape: tuple[int, ...]
    number: int

    @property
    def is_refused(self) -> bool:
        """Whether this kind of call is one too many: it runs as it stands, and so do all further ones."""
        return self.number > MAX_SHAPES

    def describe(self) -> str:
        """The line of the log."""
        shape = " x ".join(map(str, self.shape))
        if self.is_refused:
            return (
                f"train.capture: {self.part} has {MAX_SHAPES} shapes already; {shape} and further ones run without the "
                "compiler"
            )
        return f"train.capture: compiled {self.part} for {shape} ({self.number} of at most {MAX_SHAPES})"


class Capture:
    """The functions of a run's blocks, one compiled function for all blocks that call it.

    Attributes:
        ops: what a block calls; compiled but for experts, where the run asks for it.

    Args:
        choice: ``train.capture``.
        ops: what is to be compiled.
        backend: of torch.compile, a name or a function.
    """

    def __init__(
        self, choice: Choice = "off", ops: BlockOps = REFERENCE, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        self.is_on, self.ops = choice != "off", ops
        self._news: list[Captured] = []

        def part(name: str, region_name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            return _Part(name, region_name, function, backend, self._news)

        if self.is_on:
            self.ops = replace(
                ops,
                modulated_norm=part("modulated_norm", "norms", ops.modulated_norm),
                residual_affine_norm=part("residual_affine_norm", "norms", ops.residual_affine_norm),
                residual_modulated_norm=part("residual_modulated_norm", "norms", ops.residual_modulated_norm),
                gated_residual=part("gated_residual", "residuals", ops.gated_residual),
                sum_of_squares=part("sum_of_squares", "norms", ops.sum_of_squares),
                rms_norm=part("rms_norm", "norms", ops.rms_norm),
                norm_rope=part("norm_rope", "rotary", ops.norm_rope),
            )

    def filled_up(self, table_R6D: Tensor) -> Tensor:
        """A table with rows of zeros behind it, which no token has, so that few numbers of rows occur."""
        if not self.is_on:
            return table_R6D
        rows = table_R6D.shape[0]
        wanted = max(LEAST_ROWS, 1 << (rows - 1).bit_length())
        return torch.nn.functional.pad(table_R6D, (0, 0, 0, 0, 0, wanted - rows))

    def take_news(self) -> list[Captured]:
        """What was compiled since the last call."""
        news, self._news[:] = list(self._news), []
        return news


def why_not_captured(device: torch.device) -> str:
    """What torch.compile lacks for tensors of this device, in one line; "" where nothing."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "the package triton is not installed; pip install triton"
    compiler = os.environ.get("CXX", "g++")
    return "" if shutil.which(compiler) else f"there is no C++ compiler {compiler}; install it, or set CXX"


def check_capture(choice: Choice, device: torch.device) -> None:
    """Refuse what cannot be compiled here, before anything is.

    Raises:
        ConfigError: the run asks for it, and torch.compile lacks something.
    """
    if choice == "off" or device.type == "meta":
        return
    if reason := why_not_captured(device):
        raise ConfigError(f"train.capture = '{choice}' cannot run here: {reason}, or set 'off'")


class _Part:
    """One function and what it was compiled to."""

    def __init__(
        self,
        name: str,
        region_name: str,
        function: Callable[..., Any],
        backend: str | Callable[..., Any],
        news: list[Captured],
    ) -> None:
        self.name, self.region_name, self.function, self.backend = name, region_name, function, backend
        self.news = news
        self.compiled: dict[tuple[object, ...], Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.function(*args)
        key = tuple([_kind(arg) for arg in args])
        compiled = self.compiled.get(key)
        if compiled is None:
            compiled = self._compile(key, args[0])
        with region(self.region_name), _allowed():
            return compiled(*args)

    def _compile(self, key: tuple[object, ...], first: Tensor) -> Callable[..., Any]:
        event = Captured(self.name, tuple(first.shape), len(self.compiled) + 1)
        if event.number <= MAX_SHAPES + 1:  # of those that are too many, the first is news
            self.news.append(event)
        if event.is_refused:
            found = self.function
        else:
            own = _renamed(self.function, f"{self.name}_{event.number}")
            found = torch.compile(own, dynamic=False, fullgraph=True, backend=self.backend)
        self.compiled[key] = found
        return found


def _kind(arg: object) -> object:
    """What the compiler takes for granted of an argument."""
    if isinstance(arg, Tensor):
        return (type(arg), arg.shape, arg.stride(), arg.dtype, arg.device, arg.requires_grad)
    return arg


def _renamed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function that calls ``function``, with code of its own: the compiler counts and searches by code."""

    def call(*args: Any) -> Any:
        return function(*args)

    return types.FunctionType(call.__code__.replace(co_name=name), call.__globals__, name, None, call.__closure__)


def _allowed() -> AbstractContextManager[Any]:
    """Where CPU ranks have switched torch.compile off for megatron-core's sake: on again, for one call."""
    if not cpu.is_installed():
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("default")
    return stance
