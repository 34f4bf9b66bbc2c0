"""Every error that megavid raises on purpose, each with the exit status of the command line.

Owns the classes, the exit codes, how an error travels as plain data and how a job's script hears one, nothing else. A
message says what, what was got, the limit, and where to change it, in one line.
"""

import os
from contextlib import suppress


class MegavidError(Exception):
    """An error for the person who started the run: the command line prints its one line, no traceback."""

    exit_code = 2


class ConfigError(MegavidError, ValueError):
    """A preset, a flag or a layout that cannot be a valid run."""


class DataError(MegavidError):
    """A shard, a clip or a caption that cannot be read, or is not what its index says."""


class CheckpointError(MegavidError):
    """A checkpoint that is missing, damaged, or not of this model."""


class StorageError(MegavidError):
    """Storage or the machine failed: a full disk, an unreadable device, a writer that died."""

    exit_code = 3


class NumericalStop(MegavidError):
    """Too many steps in a row with a loss or a gradient that is not finite."""

    exit_code = 4


class RankLost(MegavidError):
    """A rank died or hung, so the run cannot go on."""

    exit_code = 5


class Superseded(RankLost):
    """A later start of the same run has taken over; this one must not write."""


class StopRequested(MegavidError):
    """The run was asked to stop (a signal, the end of its time) after saving; it may be queued again."""

    exit_code = 75


def tell_job(status: int) -> None:
    """Write an exit status other than 0 to the file that the job's script reads, if there is one.

    ``MEGAVID_STATUS_FILE`` names it. Launchers do not hand a status on: torchrun says 1 whatever its ranks said, and
    srun has one from each. The first rank's word stays: the others end because of it.
    """
    file = os.environ.get("MEGAVID_STATUS_FILE")
    if file is None or status == 0:
        return
    with suppress(OSError):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(descriptor, f"{status}\n".encode())
        os.close(descriptor)


def kind_of(error: MegavidError) -> str:
    """The name of an error's class, of the nearest one here for a class of another module; see ``named``."""
    return next(base.__name__ for base in type(error).__mro__ if base.__module__ == __name__)


def named(kind: str, text: str, default: type[MegavidError]) -> MegavidError:
    """The error that was told as its ``kind_of`` and its text; a ``default`` where there is no such class."""
    known = globals().get(kind)
    return (known if isinstance(known, type) and issubclass(known, MegavidError) else default)(text)
