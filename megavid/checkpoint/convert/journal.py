"""What of an interrupted conversion is done: a line for every tensor and file that is on the disk.

Owns the journal's form, its lock, and the rule that a line is written only after what it speaks of was synced: after a
power cut, a line that is there is true.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megavid.checkpoint.files import FileRecord
from megavid.errors import CheckpointError

JOURNAL = "journal.jsonl"
SYNC_BYTES = 256 << 20
"""Bytes written after which a file is synced and the journal told: what a kill costs at most."""


@dataclass
class Journal:
    """The journal of one folder that is being written.

    Attributes:
        tensors: digest of every tensor that is done, by name.
        sources: digest of every source tensor that was read whole, by key.
        files: every file that is whole, by name.
    """

    file: IO[bytes]
    tensors: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    _pending: list[dict[str, Any]] = field(default_factory=list)

    def note(self, line: dict[str, Any]) -> None:
        """Take down a line; it is kept in memory until ``commit``."""
        self._pending.append(line)

    def commit(self) -> None:
        """Write the lines taken down; call it once what they speak of is on the disk."""
        for line in self._pending:
            self.file.write(json.dumps(line).encode() + b"\n")
        if self._pending:
            self.file.flush()
            os.fsync(self.file.fileno())
        self._pending.clear()

    def read(self, fingerprint: str) -> bool:
        """Take over what an earlier run has done; False if it did something else, or nothing.

        A last line that was cut off is dropped.
        """
        self.file.seek(0)
        *lines, _ = self.file.read().split(b"\n")
        try:
            rows = [json.loads(line) for line in lines]
            if not rows or rows[0] != {"fingerprint": fingerprint}:
                return False
            for row in rows[1:]:
                if "tensor" in row:
                    self.tensors[row["tensor"]] = row["sha256"]
                    self.sources |= row["sources"]
                else:
                    self.files[row["file"]] = FileRecord(row["size"], row["sha256"])
        except (ValueError, KeyError, TypeError):
            return False
        self.file.truncate(sum(len(line) + 1 for line in lines))
        self.file.seek(0, os.SEEK_END)
        return True

    def begin(self, fingerprint: str) -> None:
        """Start anew."""
        self.tensors.clear()
        self.sources.clear()
        self.files.clear()
        self.file.seek(0)
        self.file.truncate()
        self.note({"fingerprint": fingerprint})
        self.commit()


@contextmanager
def open_lock(path: Path) -> Iterator[IO[bytes]]:
    """The file ``path``, locked, to be read and appended to: who has it writes to its folder, and nobody else.

    Raises:
        CheckpointError: another process has it.
    """
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUseError(f"{path.parent} is being written by another process; wait for it, or end it") from None
        yield file


class InUseError(CheckpointError):
    """Another process writes to the same place; what it has written must stay."""
