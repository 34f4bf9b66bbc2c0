"""Local ranks that end well and badly; run as a script: imports once, forks a launcher for each case, prints JSON.

Each launcher behaves as the command line does: one line for a MegavidError, then its exit status.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megavid.errors import CheckpointError, MegavidError, StopRequested
from megavid.parallel.launch import RankEnv, init_distributed, run_local_ranks

RANKS = 4
Case = Callable[[RankEnv], None]


def ends_well(env: RankEnv) -> None:
    init_distributed(env, "cpu", 60)
    total = torch.tensor(env.rank)
    dist.all_reduce(total)
    if env.is_main:
        print(json.dumps([int(total), dist.get_world_size(), env == RankEnv.detect(), torch.get_num_threads()]))
    dist.destroy_process_group()


def raises(env: RankEnv) -> None:
    init_distributed(env, "cpu", 60)
    if env.rank == 1:
        raise ValueError("broken")
    dist.barrier()


def refuses(env: RankEnv) -> None:
    raise CheckpointError("index.json: the same on every rank")


def is_killed(env: RankEnv) -> None:
    init_distributed(env, "cpu", 60)
    if env.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def exits(env: RankEnv) -> None:
    if env.rank == 3:
        sys.exit(7)
    time.sleep(30)


def saves_and_stops(env: RankEnv) -> None:
    """Like the training loop: the signal sets a flag."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    _ready(env)
    while not asked:
        time.sleep(0.02)
    raise StopRequested("stopped on request")


def waits(env: RankEnv) -> None:
    _ready(env)
    time.sleep(60)


def ignores_sigterm(env: RankEnv) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if env.rank == 0:
        raise ValueError("the others do not listen")
    time.sleep(60)


CASES: dict[str, tuple[Case, int]] = {
    "ends_well": (ends_well, 0),
    "raises": (raises, 0),
    "refuses": (refuses, 0),
    "is_killed": (is_killed, 0),
    "exits": (exits, 0),
    "ignores_sigterm": (ignores_sigterm, 0),
    "saves_and_stops": (saves_and_stops, signal.SIGTERM),
    "is_interrupted": (waits, signal.SIGINT),
    "launcher_is_killed": (waits, signal.SIGKILL),
}


def _ready(env: RankEnv) -> None:
    Path(f"ready_{env.rank}").write_text(str(os.getpid()))


def _launch(entry: Case, folder: Path) -> None:
    """The launcher of one case, in its own process and folder."""
    folder.mkdir()
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    status = 0
    try:
        run_local_ranks(entry, RANKS)
    except MegavidError as error:
        print(f"megavid: {error}", file=sys.stderr)
        status = error.exit_code
    except SystemExit as stop:
        status = int(stop.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _finish(pid: int, folder: Path, number: int) -> dict[str, Any]:
    """Send the case's signal when all ranks are ready; what became of the launcher and of its ranks."""
    started = time.monotonic()
    ready = [folder / f"ready_{rank}" for rank in range(RANKS)]
    if number:
        while not all(path.exists() and path.read_text() for path in ready):
            assert time.monotonic() - started < 60
            time.sleep(0.02)
        os.kill(pid, number)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    deadline = time.monotonic() + 10
    alive = [int(path.read_text()) for path in ready if path.exists()]
    while (alive := [rank for rank in alive if _is_alive(rank)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return {
        "status": status,
        "alive": alive,
        "stdout": (folder / "stdout").read_text(),
        "stderr": (folder / "stderr").read_text(),
        "seconds": time.monotonic() - started,
    }


def _is_alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def main() -> None:
    """All cases at once."""
    root = Path(sys.argv[1])
    pids = {}
    for name, (entry, _) in CASES.items():
        pids[name] = os.fork()
        if pids[name] == 0:
            _launch(entry, root / name)
    print(json.dumps({name: _finish(pid, root / name, CASES[name][1]) for name, pid in pids.items()}))


if __name__ == "__main__":
    main()
