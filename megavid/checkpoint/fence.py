"""Which start of a run may write: the last one that began, and no other.

Owns ``incarnation.json`` in the run's folder and the check against it. A job that was started again while ranks of its
former start live on, on a node that the scheduler lost, has two writers; a lock does not reach them all (a lost node
keeps its locks, and some file systems have none). Every start writes a fresh token; whoever finds another one ends.

A check and the change behind it are two calls, and a process may be frozen between them for hours. So what is published
is first written under a name that has the token in it, then the token is checked, then the name is changed; and a start
writes its token first and then removes every such name. A frozen writer that wakes up finds nothing to rename.
"""

import json
import os
import platform
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megavid.checkpoint.files import replace_text, storage_errors
from megavid.errors import Superseded

FILE = "incarnation.json"


@dataclass(frozen=True)
class Fence:
    """The right of one start to write to a run's folder.

    Attributes:
        folder: the run's; None for writers that nothing can replace, such as tools.
        token: of this start.
    """

    folder: Path | None = None
    token: str = ""

    @classmethod
    def put_up(cls, folder: Path, environ: Mapping[str, str] | None = None) -> Self:
        """Replace whoever wrote to ``folder`` before; call it under the run's lock, before anything else is changed.

        Raises:
            StorageError: the folder cannot be written.
        """
        environ = os.environ if environ is None else environ
        former = read_incarnation(folder)
        token = uuid.uuid4().hex[:12]
        row = {
            "token": token,
            "number": int(former.get("number", 0)) + 1,
            "host": platform.node(),
            "pid": os.getpid(),
            "job": environ.get("SLURM_JOB_ID", ""),
            "job_start": int(environ.get("SLURM_RESTART_COUNT", "0")),
            "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        with storage_errors("create", folder):
            folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / FILE, json.dumps(row) + "\n")
        return cls(folder, token)

    def check(self) -> None:
        """Return if this start is still the one that may write.

        Raises:
            Superseded: another one began.
            StorageError: the folder cannot be read.
        """
        if self.folder is None:
            return
        now = read_incarnation(self.folder)
        if now.get("token") != self.token:
            who = f"start {now['number']} (pid {now['pid']} on {now['host']})" if now else "nobody, the file is gone"
            raise Superseded(
                f"{self.folder} is now written by {who}: this start, pid {os.getpid()} on {platform.node()}, ends and "
                "changes nothing"
            )


def read_incarnation(folder: Path) -> dict[str, Any]:
    """What ``incarnation.json`` says; empty where there is none, or where it is not JSON.

    Raises:
        StorageError: it cannot be read.
    """
    path = folder / FILE
    with storage_errors("read", path):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return {}
    try:
        row = json.loads(content)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
