"""The ranks that save or load together, and how they come to one decision.

Owns a small protocol, which ``megavid.parallel.mesh.Mesh`` satisfies, so that tools read checkpoints with
no process group.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from megavid.errors import MegavidError, StorageError, kind_of, named


class Ranks(Protocol):
    """What saving and loading need of the world."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""

    def all_gather_object(self, value: Any, /) -> list[Any]:
        """``value`` of every rank, in order of rank."""


class SingleRank:
    """A world of one, for tools and for the front end."""

    rank = 0
    world_size = 1

    def all_gather_object(self, value: Any, /) -> list[Any]:
        """A list of ``value``."""
        return [value]


def packed(error: BaseException | None) -> list[str] | None:
    """``error`` as plain data that travels between ranks and files: class and text; None for none."""
    if error is None:
        return None
    if isinstance(error, MegavidError):
        return [kind_of(error), str(error)]
    return ["StorageError", f"{type(error).__name__}: {error}"]


def unpacked(told: list[str]) -> MegavidError:
    """The error that ``packed`` gave."""
    kind, text = told
    return named(kind, text, StorageError)


def raise_first(told: list[list[str] | None]) -> None:
    """Raise what the lowest of the ranks that failed told, and nothing if none did."""
    for error in told:
        if error is not None:
            raise unpacked(error)


@contextmanager
def agreed(ranks: Ranks) -> Iterator[None]:
    """Run the body, which must not communicate, and raise on every rank alike if it raised on any.

    Ranks: collective, one small gather. An error that is no ``MegavidError`` keeps its traceback on the
    rank where it arose.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    told = ranks.all_gather_object(packed(failure))
    if failure is not None and not isinstance(failure, MegavidError):
        raise failure
    raise_first(told)
