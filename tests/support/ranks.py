"""Real ranks for tests, in milliseconds: one pool of forked processes for the whole test run.

Owns the processes and the little protocol between them and the test run. A warm process, forked before any test has
run (so before torch has threads), forks the ranks; each job opens a fresh gloo world on the first ``world`` of them and
closes it again, megatron-core's state included. After a failure or a time-out all ranks are killed and forked anew.
"""

import contextlib
import faulthandler
import gc
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch._dynamo  # the first optimizer imports it, in every rank for itself where the warm process has not
import torch.distributed as dist

from megavid.parallel import cpu, mcore
from megavid.parallel.parent import die_with_parent

SIZE = 8
TIMEOUT_S = 120.0


class RankFailure(AssertionError):
    """A job failed on some rank; the message begins with the first one that did."""


@dataclass
class RankPool:
    """Eight ranks that wait for jobs. Make it before torch has computed anything in this process; see conftest.py."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="megavid-ranks-")))
    jobs: int = 0
    ranks: "list[_Rank]" = field(default_factory=list)

    def __post_init__(self) -> None:
        self.listener = connection.Listener(str(self.folder / "socket"), "AF_UNIX", backlog=SIZE)
        reader, self.asks = os.pipe()
        parent = os.getpid()
        self.warm_pid = os.fork()
        if self.warm_pid == 0:
            os.close(self.asks)
            _serve_forks(reader, self.folder, parent)
        os.close(reader)
        # Where the ranks of every job meet. It runs a thread, hence after the fork.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Call ``function(*args)`` on ranks 0 .. world - 1 of a gloo world of that size.

        Args:
            world: at most 8.
            function: of a module (it travels by name); asks ``torch.distributed`` who it is.
            args: picklable, the same for every rank.
            timeout_s: of the whole job and of each collective in it.

        Returns:
            What each rank returned, by rank.

        Raises:
            RankFailure: a rank raised, died, or is still running at the time limit.
        """
        assert 1 <= world <= SIZE
        if not self.ranks:
            self._fork_ranks()
        self.jobs += 1
        job = pickle.dumps(_Job(self.jobs, world, self.store.port, timeout_s, function, args))
        for rank in self.ranks[:world]:
            rank.pipe.send_bytes(job)
        results = self._collect(world, timeout_s)
        return [results[rank] for rank in range(world)]

    def renew(self) -> None:
        """Kill the ranks: the next job has fresh ones. For after a library that changes torch itself."""
        self._kill()

    def close(self) -> None:
        """End every process."""
        self._kill()
        os.close(self.asks)
        os.waitpid(self.warm_pid, 0)
        self.listener.close()
        shutil.rmtree(self.folder)

    def _fork_ranks(self) -> None:
        os.write(self.asks, b"f")
        connected = [self.listener.accept() for _ in range(SIZE)]
        self.ranks = sorted((_Rank(*pipe.recv(), pipe) for pipe in connected), key=lambda rank: rank.rank)

    def _kill(self) -> None:
        for rank in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
            rank.pipe.close()
        self.ranks = []

    def _collect(self, world: int, timeout_s: float) -> dict[int, Any]:
        waiting = {rank.pipe: rank for rank in self.ranks[:world]}
        results: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + timeout_s
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            for pipe in connection.wait(list(waiting), left_s):
                rank = waiting.pop(pipe)
                try:
                    is_good, value = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    is_good, value = False, "died without a word\n"
                if is_good:
                    results[rank.rank] = value
                    continue
                failures.append(f"rank {rank.rank} of {world}: {value}{self._said(rank.rank)}")
                deadline = min(deadline, time.monotonic() + 0.3)  # the others fail because this one did
        if not failures and waiting:
            failures = ["\n".join(self._stacks(list(waiting.values()), timeout_s))]
        if failures:
            self._kill()
            others = [f"then {text.partition(':')[0]}: {text.strip().splitlines()[-1]}" for text in failures[1:]]
            raise RankFailure("\n".join([failures[0], *others]))
        return results

    def _stacks(self, hung: "list[_Rank]", timeout_s: float) -> list[str]:
        for rank in hung:
            os.kill(rank.pid, signal.SIGUSR1)
        time.sleep(0.5)
        return [f"rank {rank.rank} still runs after {timeout_s} s\n{self._said(rank.rank)}" for rank in hung]

    def _said(self, rank: int) -> str:
        text = _log(self.folder, rank).read_text(errors="replace")
        return f"it wrote:\n{text[-4000:]}" if text else ""


@dataclass
class _Rank:
    rank: int
    pid: int
    pipe: Any


@dataclass
class _Job:
    number: int
    world: int
    port: int
    timeout_s: float
    function: Callable[..., Any]
    args: tuple[Any, ...]


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.log"


def _serve_forks(asks: int, folder: Path, parent: int) -> NoReturn:
    """The warm process: forks all ranks each time it is asked; ends with its parent."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a rank ended
    gc.freeze()
    gc.enable()  # off while tests are collected, which is when this process begins
    while os.read(asks, 1):
        for rank in range(SIZE):
            if os.fork() == 0:
                os.close(asks)
                _serve_jobs(rank, folder, os.getppid())
    os._exit(0)


def _serve_jobs(rank: int, folder: Path, parent: int) -> NoReturn:
    """A rank: does one job after another until one fails."""
    die_with_parent(parent)
    log = os.open(_log(folder, rank), os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    torch.set_num_threads(1)
    cpu.install()
    pipe = connection.Client(str(folder / "socket"), "AF_UNIX")
    pipe.send((rank, os.getpid()))
    is_good = True
    while is_good:
        try:
            job = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        os.ftruncate(log, 0)
        is_good, value = _do(rank, job)
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send_bytes(pickle.dumps((is_good, value)))
    os._exit(0)


def _do(rank: int, job: _Job) -> tuple[bool, Any]:
    try:
        torch.manual_seed(0)
        store = dist.PrefixStore(str(job.number), dist.TCPStore("127.0.0.1", job.port, is_master=False))
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=job.world, timeout=timedelta(seconds=job.timeout_s)
        )
        value = job.function(*job.args)
        pickle.dumps(value)
        dist.barrier()  # nobody leaves while another still reads from it
        mcore.close_groups()
        dist.destroy_process_group()
    except BaseException:  # a rank must report whatever ends its job
        return False, traceback.format_exc()
    gc.collect()
    return True, value
