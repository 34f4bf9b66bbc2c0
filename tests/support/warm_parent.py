"""A process that has imported megavid and forks a ``megavid`` command, or runs a module, when asked: in milliseconds.

Owns the little protocol between the tests and that process. Each command runs in a fork of its own, with its own
output files, signals and limits, as if it had been started by a shell. Run as a script, this file is that process: a
line of JSON in for each request, a line of JSON out for each start and each end.
"""

import importlib
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

if __name__ == "__main__":  # run as a script, beside the package
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.faults import Fault, install

MODULES = (
    "megavid.cli.main", "megavid.cli.train", "megavid.cli.profile", "megavid.training.run",
    "megavid.training.sample_run", "megavid.training.profile_report", "megavid.training.replay",
    "megavid.training.diff", "megavid.training.plots", "torch.utils.tensorboard", "torch._dynamo",
    "matplotlib.backends.backend_agg",
)  # fmt: skip
"""What commands import, also late: torch's compiler alone, which the first optimizer imports, takes a second or two."""


@dataclass
class Command:
    """A running or ended command."""

    pid: int
    folder: Path
    parent: "WarmParent"
    returncode: int | None = None

    @property
    def stdout(self) -> str:
        """What it has written."""
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        """What it has complained of."""
        return (self.folder / "stderr").read_text()

    def poll(self) -> int | None:
        """Its exit status, minus the signal's number where it was killed, or None while it runs."""
        self.parent.look(0.0)
        return self.returncode

    def wait(self, timeout_s: float = 120.0) -> int:
        """Its exit status."""
        deadline = time.monotonic() + timeout_s
        while self.returncode is None:
            assert time.monotonic() < deadline, f"still running after {timeout_s} s:\n{self.stdout}\n{self.stderr}"
            self.parent.look(0.1)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Signal it."""
        os.kill(self.pid, number)


class WarmParent:
    """Starts the process; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands = folder, list[Command]()
        self._started: list[int] = []
        self._unread, self._ended = b"", dict[int, int]()

    def __enter__(self) -> Self:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def start(
        self, *argv: str, file_bytes: int = 0, fault: Fault | None = None, environ: dict[str, str] | None = None
    ) -> Command:
        """Start ``megavid ARGV``; ``file_bytes`` limits the size of its files (a full disk), 0 for no limit."""
        limits = {"file_bytes": file_bytes, "fault": fault and fault.to_json()}
        return self._start({"argv": argv, "environ": environ or {}, **limits})

    def _start(self, request: dict[str, Any]) -> Command:
        folder = self.folder / str(len(self.commands))
        folder.mkdir()
        assert self._process.stdin is not None
        (folder / "stdin").write_text(request.pop("stdin", ""))
        self._process.stdin.write(json.dumps({**request, "folder": str(folder)}) + "\n")
        self._process.stdin.flush()
        while not self._started:
            self.look(60.0)
        command = Command(self._started.pop(), folder, self)
        command.returncode = self._ended.pop(command.pid, None)  # it may have ended at once
        self.commands.append(command)
        return command

    def run(self, *argv: str, file_bytes: int = 0, fault: Fault | None = None) -> Command:
        """Start it and wait for its end."""
        command = self.start(*argv, file_bytes=file_bytes, fault=fault)
        command.wait()
        return command

    def run_module(self, name: str, *argv: str, stdin: str = "", timeout_s: float = 300.0) -> Command:
        """Run ``python -m NAME ARGV`` and wait for its end."""
        command = self._start({"module": name, "argv": argv, "stdin": stdin})
        command.wait(timeout_s)
        return command

    def look(self, timeout_s: float) -> None:
        """Take in what the process says, waiting up to ``timeout_s`` for it."""
        assert self._process.stdout is not None
        source = self._process.stdout.fileno()  # read without a buffer, in which a second line would wait unseen
        while select.select([source], [], [], timeout_s)[0]:
            content = os.read(source, 1 << 16)
            assert content, f"the warm parent ended with status {self._process.wait()}"
            *lines, self._unread = (self._unread + content).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
            timeout_s = 0.0

    def _take(self, said: dict[str, int]) -> None:
        if "started" in said:
            self._started.append(said["started"])
        if "ended" in said:
            self._ended[said["ended"]] = said["status"]
        for command in self.commands:
            if command.returncode is None and command.pid in self._ended:
                command.returncode = self._ended.pop(command.pid)

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        for command in self.commands:
            if command.returncode is None:
                os.kill(command.pid, signal.SIGKILL)
        self._process.stdin.close()
        self._process.wait(timeout=30)


def serve() -> None:
    """The process itself: ends when its input does."""
    from megavid.cli.quiet import silence_known_warnings

    silence_known_warnings()
    for module in MODULES:
        importlib.import_module(module)
    _draw_once()
    running: set[int] = set()
    while True:
        if select.select([sys.stdin], [], [], 0.02)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            running.add(pid := _fork(json.loads(line)))
            print(json.dumps({"started": pid}), flush=True)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                print(json.dumps({"ended": pid, "status": os.waitstatus_to_exitcode(status)}), flush=True)


def _draw_once() -> None:
    """So that the commands find matplotlib's fonts and formats of pictures already read."""
    from megavid.training.plots import plot_run

    with tempfile.TemporaryDirectory() as folder:
        plot_run([{"step": step, "loss": 1.0 / step, "grad_norm": 1.0} for step in (1, 2)], [], Path(folder) / "a.png")


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        folder = Path(request["folder"])
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(folder / "stdin", os.O_RDONLY), 0)
        status = _module(request) if "module" in request else _command(request)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
    raise AssertionError("unreachable")


def _command(request: dict[str, Any]) -> int:
    if request["file_bytes"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], request["file_bytes"]))
    os.environ.update(request["environ"])
    if request["fault"]:
        install(request["fault"])
    from megavid.cli.main import main

    try:
        return main(request["argv"])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1


def _module(request: dict[str, Any]) -> int:
    sys.argv = [request["module"], *request["argv"]]
    sys.stdin = os.fdopen(0)
    try:
        runpy.run_module(request["module"], run_name="__main__")
    except Exception:  # what Python does with one that nobody catches
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve()
