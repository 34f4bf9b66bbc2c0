"""Stopping on request: signals become one decision that every rank takes at the same step.

Owns SIGTERM and SIGUSR1 while a run trains (Slurm sends them before the end of a job's time). The handler only sets a
flag; ``agree`` joins the flags of all ranks once a step.
"""

import signal
from types import FrameType, TracebackType
from typing import Literal, Protocol, Self

import torch
from torch import Tensor


class ReducesMax(Protocol):
    """The part of a mesh that this needs."""

    @property
    def device(self) -> torch.device:
        """Where tensors of a reduction must lie."""

    def max(self, tensor: Tensor, over: Literal["world"]) -> Tensor:
        """Largest over all ranks of the group."""


class StopSignal:
    """Catches SIGTERM and SIGUSR1; a context manager.

    Attributes:
        agreed: name of the signal that some rank got, as of the last ``agree``; empty for none. Equal on all ranks.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, mesh: ReducesMax) -> None:
        """Watch on behalf of all ranks of ``mesh``."""
        self.mesh, self.agreed = mesh, ""
        self._received = 0
        self._before: dict[int, object] = {}

    def agree(self) -> str:
        """Join the flags of all ranks; call it once per step on every rank."""
        flag = self.mesh.max(torch.tensor([self._received], device=self.mesh.device), over="world")
        number = int(flag.item())
        self.agreed = signal.Signals(number).name if number else ""
        return self.agreed

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._received = number

    def __enter__(self) -> Self:
        """Install the handlers."""
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Put the former handlers back."""
        for number in self.SIGNALS:
            signal.signal(number, self._before[number])  # type: ignore[arg-type]
