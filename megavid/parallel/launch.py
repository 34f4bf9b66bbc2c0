"""Local ranks, which ``--ranks N`` starts itself, with their whole life.

They live in the launcher's process group, look to everything else like torchrun's, die with the launcher, and the first
one that fails ends the others. Who a rank is and how it joins the others is ``megavid.parallel.rank_env``'s, whose
names pass through here; axes and groups are ``megavid.parallel.mesh``'s.
"""

import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from megavid.errors import ConfigError, MegavidError, RankLost, kind_of, named
from megavid.parallel import cpu
from megavid.parallel.parent import die_with_parent
from megavid.parallel.rank_env import Device, RankEnv, first_host, init_distributed

__all__ = ["Device", "Failure", "RankEnv", "die_with_parent", "first_host", "init_distributed", "run_local_ranks"]

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
GRACE_S = 5.0  # between asking the other ranks to end and killing them
LONGEST_TRACEBACK = 16_000  # characters; fits in a pipe that nobody reads until the rank has ended


@dataclass(frozen=True, slots=True)
class Failure:
    """How a rank ended that did not end well.

    Attributes:
        rank: which one.
        kind: class name of a MegavidError; "" for any other exception; "signal" for a rank that was killed.
        exit_code: of the rank; the signal's number for "signal".
        message: one line for a MegavidError, a traceback for any other.
        at_s: when, on the machine's monotonic clock: what follows from the first failure is not shown.
    """

    rank: int
    kind: str
    exit_code: int
    message: str
    at_s: float


def run_local_ranks(
    entry: Callable[[RankEnv], None],
    num_ranks: int,
    device: Device = "cpu",
    *,
    epitaph: Callable[[int], str] = lambda pid: "",
) -> None:
    """Run ``entry`` on ``num_ranks`` ranks of this machine and return when all have ended well.

    On CPUs the ranks are forked: import what ``entry`` needs first, and start no threads. On GPUs they are spawned, so
    ``entry`` must be picklable. One rank runs in this process. Ranks divide the cores among them unless OMP_NUM_THREADS
    says otherwise. SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 are passed on; a terminal's Ctrl-C reaches ranks by itself as
    well, so a rank may see a signal twice.

    Args:
        entry: called with the rank's ``RankEnv``, which it gives to ``init_distributed``.
        num_ranks: at least 1.
        device: decides between fork and spawn.
        epitaph: what is known of a killed rank by its pid, for the error's line.

    Raises:
        MegavidError: what the first failing rank raised, once.
        RankLost: a rank was killed by a signal.
        SystemExit: with the first failing rank's status after any other exception, whose traceback is then printed;
            with 128 + signal when the launcher was asked to stop and the ranks had no better answer.
    """
    if num_ranks < 1:
        raise ConfigError(f"--ranks {num_ranks} must be at least 1")
    if num_ranks == 1:
        entry(RankEnv())
        return
    if device == "cpu":
        # The first optimizer imports it, 1.3 s of CPU, in every rank for itself where the launcher has not.
        importlib.import_module("torch._dynamo")
    context = get_context("fork" if device == "cpu" else "spawn")
    ranks: list[_LocalRank] = []
    passed_on: list[int] = []
    store: Any = None
    with _signals_passed_on(ranks, passed_on):
        try:
            # A signal in a fresh child must not run the launcher's handler: it waits until the child has its own.
            signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
            for rank in range(num_ranks):
                ranks.append(_LocalRank.start(context, entry, rank, num_ranks, device))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
            # The ranks meet here. After the forks, because it runs a thread; on a port that nobody can take meanwhile.
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
            for local in ranks:
                local.tell(store.port)
            failures = _watch(ranks)
        finally:
            _end(ranks)
            # An error's traceback keeps this frame. Were the store in it, a rank forked later might collect it, and
            # wait for ever for its thread, which only this process has.
            store = None
    if failures:
        _raise_first(failures, passed_on, {local.rank: epitaph(local.process.pid or 0) for local in ranks})


@dataclass(frozen=True, slots=True)
class _LocalRank:
    rank: int
    process: BaseProcess
    pipe: "connection.Connection[Any, Any]"

    @classmethod
    def start(
        cls, context: Any, entry: Callable[[RankEnv], None], rank: int, num_ranks: int, device: Device
    ) -> "_LocalRank":
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_rank_main,
            args=(entry, rank, num_ranks, device, theirs, os.getpid()),
            name=f"megavid-rank-{rank}",
        )
        process.start()
        theirs.close()
        return cls(rank, process, ours)

    def tell(self, port: int) -> None:
        """Give the rank the port of the rendezvous; one that has died already is found by ``_watch``."""
        try:
            self.pipe.send(port)
        except OSError:
            return

    def send_signal(self, number: int) -> None:
        """Signal the rank if it is still there."""
        if self.process.pid is not None and self.process.exitcode is None:
            os.kill(self.process.pid, number)

    def failure(self) -> Failure | None:
        """What this ended rank said, or what its exit status says, or None if it ended well."""
        try:
            if self.pipe.poll():
                report: Failure = self.pipe.recv()
                return report
        except (EOFError, OSError):
            pass
        code = self.process.exitcode or 0
        if code < 0:
            return Failure(self.rank, "signal", -code, "", time.monotonic())
        return Failure(self.rank, "", code, f"exited with status {code}\n", time.monotonic()) if code else None


def _rank_main(
    entry: Callable[[RankEnv], None], rank: int, num_ranks: int, device: Device, pipe: Any, launcher: int
) -> None:
    die_with_parent(launcher)
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    if device == "cpu":
        # Local ranks talk over the loopback, whatever the machine's name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        torch.set_num_threads(_threads_of_rank(num_ranks))
        cpu.install()
    port, tell = pipe.recv(), lambda error: pipe.send(_failure_of(rank, error))
    env = RankEnv(rank, num_ranks, rank, "127.0.0.1", port, tell)
    env.export()
    # torch's word for: the store at MASTER_PORT is the launcher's, rank 0 must not open another.
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    failure = _attempt(entry, env)
    if failure is not None:
        pipe.send(failure)
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's end: threads that wait for a lost peer would keep the rank from leaving.
    os._exit(failure.exit_code if failure else 0)


def _threads_of_rank(num_ranks: int) -> int:
    """Threads of one CPU rank: what OMP_NUM_THREADS says, else its share of the cores that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // num_ranks)


def _attempt(entry: Callable[[RankEnv], None], env: RankEnv) -> Failure | None:
    """Run the rank; an error of any kind becomes a record for the launcher."""
    try:
        entry(env)
    except MegavidError as error:
        return _failure_of(env.rank, error)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return Failure(env.rank, "", code, f"exited: {stop.code}\n", time.monotonic()) if code else None
    except BaseException:
        return Failure(env.rank, "", 1, traceback.format_exc()[-LONGEST_TRACEBACK:], time.monotonic())
    return None


def _failure_of(rank: int, error: MegavidError) -> Failure:
    return Failure(rank, kind_of(error), error.exit_code, str(error), time.monotonic())


def _watch(ranks: list[_LocalRank]) -> list[Failure]:
    """Wait until all ranks have ended, or one has failed; then what failed, with a moment for the others' own words."""
    running = list(ranks)
    failures: list[Failure] = []
    deadline = float("inf")
    while running and time.monotonic() < deadline:
        wait_s = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        connection.wait([local.process.sentinel for local in running], wait_s)
        for local in [local for local in running if local.process.exitcode is not None]:
            running.remove(local)
            failure = local.failure()
            if failure is not None:
                failures.append(failure)
                # A rank that was killed makes the others fail in the same instant: wait for its status too.
                deadline = min(deadline, time.monotonic() + 0.5)
    return failures


def _end(ranks: list[_LocalRank]) -> None:
    """End every rank that is left: asked first, killed after ``GRACE_S``."""
    for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        running = [local for local in ranks if local.process.exitcode is None]
        for local in running:
            local.send_signal(number)
        deadline = time.monotonic() + patience_s
        for local in running:
            local.process.join(max(0.0, deadline - time.monotonic()))


def _raise_first(failures: list[Failure], passed_on: list[int], epitaphs: Mapping[int, str]) -> None:
    killed = [failure for failure in failures if failure.kind == "signal"]
    if passed_on and all(failure.exit_code in passed_on for failure in killed) and len(killed) == len(failures):
        raise SystemExit(128 + passed_on[0])
    unasked = [failure for failure in killed if failure.exit_code not in passed_on]
    first = min(unasked or failures, key=lambda failure: failure.at_s)
    if first.kind == "signal":
        name = signal.Signals(first.exit_code).name
        raise RankLost(f"rank {first.rank} was killed by {name}{epitaphs[first.rank]}; the other ranks were ended")
    if first.kind:
        error = named(first.kind, first.message, MegavidError)
        error.exit_code = first.exit_code
        raise error
    sys.stderr.write(f"rank {first.rank} failed:\n{first.message}")
    raise SystemExit(first.exit_code)


@contextmanager
def _signals_passed_on(ranks: list[_LocalRank], passed_on: list[int]) -> Iterator[None]:
    """While open, signals to this process go to the ranks, and are noted in ``passed_on``."""

    def pass_on(number: int, frame: Any) -> None:
        passed_on.append(number)
        for local in ranks:
            local.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # Python gives signal handlers to the main thread only
        return
    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
