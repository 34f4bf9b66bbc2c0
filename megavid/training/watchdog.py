"""Watching over a rank that trains: when nothing moves, or a peer is lost, every rank says where it stands, and ends.

Owns the limit, the alarm, the dump of stacks and the wait for the other ranks' words. Ranks meet in torch's store by a
connection of the watchdog's own, never through a collective: those are what hangs. Who is to blame is
``megavid.training.verdict``'s; what was last entered is ``megavid.training.flight``'s.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import torch.distributed as dist

from megavid.config.watchdog import WatchdogConfig
from megavid.errors import MegavidError, RankLost, tell_job
from megavid.parallel.host import host_name
from megavid.parallel.launch import RankEnv
from megavid.training.flight import FlightRecorder, read_slot
from megavid.training.verdict import Report, judge

TICK_S = 1.0
"""How often a watchdog looks, at most."""
GRACE_S = 3.0
"""How long a rank that has spoken waits for the others; beyond it, one that is silent is held to be stopped or dead."""


class Watchdog:
    """Watches this rank and listens for the alarm of others, in a thread; a context manager.

    Args:
        config: the limits.
        env: who this rank is.
        recorder: what it last entered; entered by the caller.
        folder: where dumps go, one folder for each alarm: ``DIR/hangs``.
        token: of this start of the run: a store may outlive it, with the words of a former one.
        note: writes the error with which this rank ends to the run's log.
    """

    def __init__(
        self,
        config: WatchdogConfig,
        env: RankEnv,
        recorder: FlightRecorder,
        folder: Path,
        token: str,
        note: Callable[[int, BaseException], None],
    ) -> None:
        self.config, self.env, self.recorder, self.folder, self.note = config, env, recorder, folder, note
        self._keys = f"megavid/{token}"
        self.step = 0
        self._is_first = True
        self._hosts: dict[int, tuple[str, int]] = {}
        self._store: Any = None
        self._closed, self._alarmed, self._speaking = threading.Event(), threading.Event(), threading.Lock()

    def __enter__(self) -> Self:
        """Begin to watch; every rank of the world does so at the same point.

        Ranks: collective.
        """
        if self.env.world_size > 1:
            self._store = dist.TCPStore(  # type: ignore[attr-defined]
                self.env.master_address, self.env.master_port, is_master=False, timeout=timedelta(seconds=60)
            )
        here: list[Any] = [None] * self.env.world_size
        dist.all_gather_object(here, (host_name(), os.getpid()))
        self._hosts = dict(enumerate(here))
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        if self._store is not None:
            threading.Thread(target=self._listen, name="watchdog-listener", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching. Where the body was ended by a lost connection, say whose, and end the process."""
        self._closed.set()
        if error is not None and is_lost_connection(error):
            self._end(f"rank {self.env.rank} lost its connection to another rank")

    def beat(self, step: int) -> None:
        """Say that ``step`` is done; 0 where the run goes back, for which it reads a checkpoint as at its start."""
        self.step, self._is_first = step, step == 0

    @property
    def limit_s(self) -> float:
        """Seconds without progress that are too many now; infinite where there is no limit."""
        return (self.config.first_step_s if self._is_first else self.config.step_s) or float("inf")

    def _watch(self) -> None:
        seen, moved = (-1, -1), time.monotonic()
        while not self._closed.wait(min(TICK_S, self.limit_s / 5)):
            now = (self.recorder.sequence, self.step)
            if now != seen:
                seen, moved = now, time.monotonic()
            name = "watchdog.first_step_s" if self._is_first else "watchdog.step_s"
            if time.monotonic() - moved > self.limit_s:
                self._end(f"no progress for {self.limit_s:g} s ({name})")
            elif self._alarmed.is_set():
                self._end(f"no progress within {self.limit_s:g} s ({name}), or a rank was lost")

    def _listen(self) -> None:
        """Ask for the alarm; in a thread of its own, as a store whose process is stopped never answers."""
        with suppress(RuntimeError):  # the store is gone with the process that kept it: the step's own calls fail too
            while not self._closed.wait(TICK_S):
                if self._store.check([f"{self._keys}/alarm"]):
                    self._alarmed.set()
                    return

    def _end(self, why: str) -> NoReturn:
        """Speak, and leave without waiting for the main thread: it may never come back."""
        told, is_first = self.speak(why, patience_s=GRACE_S)
        error = RankLost(told)
        self.note(self.env.rank, error)
        leave(self.env, error, is_first=is_first)

    def speak(self, why: str, *, patience_s: float) -> tuple[str, bool]:
        """Dump this rank's stacks, tell the others where it stands, and hear them.

        Returns:
            One line that names who is to blame, and whether this is the first of the ranks that know it.

        Called by two threads at once, the second never comes back: the first one ends the process.
        """
        if not self._speaking.acquire(blocking=False):
            threading.Event().wait()
        report, reports = self._report(), dict[int, Report]()
        folder, answered = self.folder / f"step_{self.step:08d}", threading.Event()
        names = [folder.name]
        # In threads of their own: the store's process or the storage may be what hangs.
        talk = threading.Thread(target=self._talk, args=(report, reports, names, answered), daemon=True)
        talk.start()
        if self._store is not None:
            answered.wait(patience_s)
        folder = self.folder / names[0]
        dump = threading.Thread(target=self._dump, args=(folder, why, report), daemon=True)
        dump.start()
        dump.join(patience_s)
        talk.join(patience_s + 2 * TICK_S)
        reports[report.rank] = report
        if self.env.is_main and self.env.world_size > 1:
            time.sleep(TICK_S)  # this process may keep the store that others still read
        hosts = {rank: host for rank, (host, _) in self._hosts.items()}
        is_deaf = self._store is not None and not answered.is_set()
        told = judge(dict(reports), hosts, time.time(), is_deaf=is_deaf)
        return f"{told}; {why}; stacks and last collectives of the others: {folder}", self.env.rank == min(reports)

    def _report(self) -> Report:
        host, _ = self._hosts[self.env.rank]
        near = {rank: pid for rank, (where, pid) in self._hosts.items() if where == host and rank != self.env.rank}
        slots = {rank: read_slot(pid) for rank, pid in near.items()}
        neighbours = {rank: slot for rank, slot in slots.items() if slot is not None}
        return Report(self.env.rank, self.step, self.recorder.last(), neighbours)

    def _talk(self, mine: Report, reports: dict[int, Report], names: list[str], answered: threading.Event) -> None:
        """Raise the alarm, say where this rank stands, and gather the words of all that speak in time."""
        reports[mine.rank] = mine
        if self._store is None:
            return
        with suppress(RuntimeError):
            names[0] = self._store.compare_set(f"{self._keys}/alarm", "", names[0]).decode()
            self._store.set(f"{self._keys}/{mine.rank}", json.dumps(mine.to_json()))
            answered.set()
            deadline = time.monotonic() + GRACE_S + TICK_S
            while len(reports) < self.env.world_size and time.monotonic() < deadline:
                for rank in range(self.env.world_size):
                    key = f"{self._keys}/{rank}"
                    if rank not in reports and self._store.check([key]):
                        reports[rank] = Report.from_json(json.loads(self._store.get(key)))
                time.sleep(0.05)

    def _dump(self, folder: Path, why: str, report: Report) -> None:
        host, pid = self._hosts[self.env.rank]
        with suppress(OSError):  # a full or failing disk: what the ranks tell each other remains
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"rank_{self.env.rank:05d}.txt").open("w", encoding="utf-8") as file:
                print(f"rank {self.env.rank} on {host}, pid {pid}, after step {self.step}: {why}", file=file)
                print(f"last entered: {report.last.text(time.time())}", file=file)
                for rank, slot in sorted(report.neighbours.items()):
                    print(f"  rank {rank} of this host: {slot.text(time.time())}", file=file)
                print("\nstacks, this rank's:", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
                print("\nlast collectives, oldest first (number in all, time, what):", file=file)
                print("\n".join(self.recorder.lines()), file=file)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error is torch's word for a peer that is gone."""
    words = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and not isinstance(error, MegavidError)
        and any(word in str(error) for word in words)
    )


def leave(env: RankEnv, error: MegavidError, *, is_first: bool) -> NoReturn:
    """End this process at once; threads that wait for a lost peer are left where they are.

    The launcher prints the first error that it is told. Where there is none (srun, torchrun), the first rank prints the
    line, and the others give it a moment: the first exit may end them all. Who read it may be gone, as on a lost node.
    """
    try:
        if env.tell is not None:
            env.tell(error)
        elif not is_first:
            time.sleep(TICK_S)
        else:
            sys.stderr.write(f"megavid: error: rank {env.rank}: {error}\n")
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        tell_job(error.exit_code)
        os._exit(error.exit_code)
