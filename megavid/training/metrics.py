"""metrics.jsonl: one object per step, in order, flushed as it happens.

Owns the file and its rows. Rows of a resumed run follow the rows up to the loaded checkpoint, which stay byte for byte.
Knows no torch, so that tools can read it anywhere.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Self

from megavid.errors import DataError, StorageError

BEGINNINGS = ("started", "resumed", "rolled_back")
"""Events from whose step on a run takes steps, what it had taken after it being void."""


def cut_after(file: Path, step: int) -> int:
    """Cut every row after ``step``, and a last row that was cut off mid-write; return the number of rows that stay.

    The rows that stay go to a new file of the same name, so that a former start that is still alive, and has the old
    one open, writes where nobody looks.

    Raises:
        DataError: a row in the middle of the file is not one that a run wrote.
    """
    if not file.exists():
        return 0
    content, keep, rows = file.read_bytes(), 0, 0
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            row_step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file}: row {rows + 1} is not a row of a run ({error}); move the file away to go on"
            ) from error
        if row_step > step:
            break
        keep, rows = keep + len(line), rows + 1
    aside = file.with_name(f".{file.name}.new")
    with aside.open("wb") as handle:
        handle.write(content[:keep])
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(aside, file)
    return rows


def read_rows(file: Path) -> list[dict[str, object]]:
    """All complete rows.

    Raises:
        DataError: the file is missing or is not JSON, a row a line.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def row_text(row: Mapping[str, object]) -> str:
    """One line of JSON; numbers that are not finite, which JSON does not know, become null."""
    return json.dumps(_without_nan(row), allow_nan=False) + "\n"


def _without_nan(value: object) -> object:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {name: _without_nan(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_without_nan(inner) for inner in value]
    return value


class MetricsFile:
    """Appends rows; a context manager."""

    def __init__(self, file: Path) -> None:
        """Open ``file`` to append; rows after the loaded checkpoint must have been cut."""
        self.file = file
        self._handle: IO[str] = file.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, object]) -> None:
        """Append one row and flush it.

        Raises:
            StorageError: the disk is full or gone.
        """
        try:
            self._handle.write(row_text(row))
            self._handle.flush()
        except OSError as error:
            raise StorageError(f"cannot write {self.file}: {error.strerror}") from error

    def sync(self) -> None:
        """Return once the rows are on the disk: a checkpoint must not outlive the rows before it.

        Raises:
            StorageError: the disk is full or gone.
        """
        try:
            os.fsync(self._handle.fileno())
        except OSError as error:
            raise StorageError(f"cannot write {self.file}: {error.strerror}") from error

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._handle.close()
