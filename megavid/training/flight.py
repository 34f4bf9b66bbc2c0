"""The last collective that this process entered, where others can read it even after it was killed.

Owns the record, its slot in shared memory (``/dev/shm``, one small file a process, by its pid) and the hooks that fill
it: two to three microseconds a collective. Reading a slot needs no torch. Says nothing of what a record means.
"""

import mmap
import os
import re
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

SHARED = Path("/dev/shm")
"""Memory that survives a killed process; where a system has none, only the process itself knows its last collective."""
KEPT = 64
"""Collectives that a process remembers for its dump."""

_SLOT = struct.Struct("<QQdB7x24s24s")  # calls so far, of this group, since, inside, operation, group
_INSIDE = 24
_NAME = re.compile(r"megavid-(\d+)\.flight")


@dataclass(frozen=True, slots=True)
class LastCall:
    """What a rank last entered.

    Attributes:
        sequence: collectives, sends and receives that it has entered in all; 0 for none yet.
        number: of these, on this group.
        operation: "all_reduce", ...
        group: axis of its group.
        since: when it entered, in seconds of the epoch.
        is_inside: whether it is still in the call, or waits for what the call started.
    """

    sequence: int
    number: int
    operation: str
    group: str
    since: float
    is_inside: bool

    def text(self, now: float) -> str:
        """For people, as seen at ``now``."""
        if not self.sequence:
            return "no collective yet"
        where = "and is in it" if self.is_inside else "and has left it"
        return f"{self.operation} {self.number} of {self.group}, {max(0.0, now - self.since):.1f} s ago, {where}"

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def slot_of(pid: int) -> Path:
    """The slot of a process of this machine."""
    return SHARED / f"megavid-{pid}.flight"


def read_slot(pid: int) -> LastCall | None:
    """What a process of this machine last entered, dead or alive; None where it left no slot."""
    try:
        content = slot_of(pid).read_bytes()
        sequence, number, since, inside, operation, group = _SLOT.unpack_from(content)
    except (OSError, struct.error):
        return None
    words = [word.rstrip(b"\0").decode(errors="replace") for word in (operation, group)]
    return LastCall(sequence, number, words[0], words[1], since, bool(inside))


def remove_slot(pid: int) -> None:
    """Remove the slot of a process of this machine, if it left one."""
    with suppress(OSError):
        slot_of(pid).unlink()


def remove_slots_of_the_dead(age_s: float = 60.0) -> None:
    """Remove what processes left that have been gone for ``age_s``: until then somebody may want to read it."""
    for path in SHARED.glob("megavid-*.flight"):
        match = _NAME.fullmatch(path.name)
        with suppress(OSError):
            if match and not Path(f"/proc/{match[1]}").exists() and time.time() - path.stat().st_mtime > age_s:
                path.unlink()


class FlightRecorder:
    """Keeps the last collective of this process while it is entered.

    It stands where torch hands over to a process group, as ``megavid.profiling.waits`` does; the two stack.

    Args:
        names: axis of a group by torch's ``group_name``; other groups are "other".
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self._axes = {group: axis.encode()[:24] for group, axis in names.items()}
        self._numbers: dict[str, int] = {}
        self._slot: mmap.mmap | bytearray = bytearray(_SLOT.size)
        self._originals: dict[tuple[Any, str], Any] = {}
        self.sequence = 0
        """Collectives entered so far; whoever sees it grow knows that the process gets on."""
        self.recent: deque[tuple[int, int, str, bytes, float]] = deque(maxlen=KEPT)

    def last(self) -> LastCall:
        """What this process last entered."""
        sequence, number, since, inside, operation, group = _SLOT.unpack_from(self._slot)
        words = [word.rstrip(b"\0").decode() for word in (operation, group)]
        return LastCall(sequence, number, words[0], words[1], since, bool(inside))

    def lines(self) -> list[str]:
        """The last collectives, oldest first, for a dump."""
        return [
            f"{sequence:>8}  {time.strftime('%H:%M:%S', time.localtime(at))}.{int(at % 1 * 1000):03d}  "
            f"{operation} {number} of {axis.decode()}"
            for sequence, number, operation, axis, at in list(self.recent)
        ]

    def __enter__(self) -> Self:
        """Open the slot and put the hooks in."""
        import torch.distributed as dist

        from megavid.profiling.collectives import OPERATIONS

        remove_slots_of_the_dead()
        with suppress(OSError):  # a system without /dev/shm, or a full one: the slot is then this process's own
            path = slot_of(os.getpid())
            path.write_bytes(bytes(_SLOT.size))  # real memory: a slot that is not there must not kill the process later
            with path.open("r+b") as file:
                self._slot = mmap.mmap(file.fileno(), _SLOT.size)
        for name, operation in OPERATIONS.items():
            if name in vars(dist.ProcessGroup):  # versions of torch name the same thing differently
                self._replace(dist.ProcessGroup, name, self._call(name, operation))
        self._replace(dist.Work, "wait", self._wait(vars(dist.Work)["wait"]))
        return self

    def __exit__(self, *_: object) -> None:
        """Take them out; the slot goes with a process that ends well."""
        for (owner, name), original in self._originals.items():
            setattr(owner, name, original)
        self._originals = {}
        remove_slot(os.getpid())

    def _replace(self, owner: Any, name: str, hook: Callable[..., Any]) -> None:
        self._originals[owner, name] = vars(owner)[name]
        setattr(owner, name, hook)

    def _call(self, name: str, operation: str) -> Callable[..., Any]:
        import torch.distributed as dist

        original, word = vars(dist.ProcessGroup)[name], operation.encode()

        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            if group.size() == 1:
                return original(group, *args, **kwargs)
            key = group.group_name
            number = self._numbers[key] = self._numbers.get(key, 0) + 1
            axis, now = self._axes.get(key, b"other"), time.time()
            self.sequence += 1
            _SLOT.pack_into(self._slot, 0, self.sequence, number, now, 1, word, axis)
            self.recent.append((self.sequence, number, operation, axis, now))
            try:
                return original(group, *args, **kwargs)
            finally:
                self._slot[_INSIDE] = 0

        return call

    def _wait(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            self._slot[_INSIDE] = 1
            try:
                return original(work, *args, **kwargs)
            finally:
                self._slot[_INSIDE] = 0

        return wait
