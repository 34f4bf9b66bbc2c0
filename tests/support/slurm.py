"""A real Slurm cluster of several nodes on this machine, in one folder: munged, slurmctld, one slurmd a node.

Owns the daemons' configuration, start and end, and the few questions that tests ask of Slurm. Nothing outside the
folder is written; no systemd, no /etc, no slurm user. Run as a script, this file is the keeper: it waits until the
tests have ended in any way, kill -9 included, ends every process of the cluster, jobs too, and removes the folder.

One at a time on a machine, or tests of both run into their limits: the keeper holds a lock for which the next one
waits.
"""

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
NODES = 4
GPUS = 8
"""Of each node; they are device files that behave like /dev/null, so that the shipped scripts ask for what they ask."""
WAIT_S = 900.0
"""For the end of another cluster of this machine."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/msock/s
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=4
KillWait={kill_wait_s}
OverTimeLimit=0
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
"""


def why_not() -> str:
    """Why no cluster can be started here, in words for a skipped test; "" where one can."""
    if sys.platform != "linux":
        return f"Slurm runs on Linux, this is {sys.platform}"
    missing = [name for name in NEEDED if shutil.which(name, path=_path()) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "the cluster is started as root (device files for its GPUs)"
    return ""


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class SlurmCluster:
    """``NODES`` nodes n0, n1, ...; a context manager.

    Attributes:
        folder: everything of the cluster.
        env: environment of clients and jobs.
        logs: what jobs wrote, ``JOB.log``.
    """

    def __init__(self, folder: Path, *, kill_wait_s: int = 20) -> None:
        """Name the folder; ``kill_wait_s`` is Slurm's KillWait: from SIGTERM to SIGKILL of a cancelled job."""
        self.folder, self.logs = folder, folder / "jobs"
        self.conf = folder / "slurm.conf"
        self._kill_wait_s = kill_wait_s
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "PATH": f"{Path(sys.executable).parent}:{_path()}",  # torchrun is there
            "SLURM_CONF": str(self.conf),
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "MEGAVID_COMMAND": f"{sys.executable} -m megavid",
            "MASTER_ADDR": "127.0.0.1",  # n0 is no name that resolves
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._keeper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        lock = _only_one()
        for name in ("state", "run", "log", "munge", "msock", "dev", "jobs", *(f"spool/n{i}" for i in range(NODES))):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o700)
        (self.folder / "msock").chmod(0o755)
        self._keeper = subprocess.Popen(
            [sys.executable, __file__, str(self.folder)], stdin=subprocess.PIPE, start_new_session=True, pass_fds=[lock]
        )
        os.close(lock)  # the keeper has it, for as long as anything of the cluster runs
        try:
            self._write_conf()
            self._start_munged()
            self._daemon("slurmctld", "-f", str(self.conf))
            for i in range(NODES):
                self.start_node(f"n{i}")
            self._wait_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all of it; once more does nothing."""
        if self._keeper is None:
            return
        assert self._keeper.stdin is not None
        with suppress(AssertionError, subprocess.SubprocessError, OSError):
            for job in self.ask("squeue", "-h", "-o", "%i").split():
                self.ask("scancel", "--signal=KILL", "--full", job)
        self._keeper.stdin.close()  # its word to end all that is left
        self._keeper.wait(30)
        self._keeper = None

    # Daemons

    def _write_conf(self) -> None:
        host, user = socket.gethostname().split(".")[0], subprocess.check_output(["id", "-un"], text=True).strip()
        port = _free_ports(NODES + 1)
        text = SLURM_CONF.format(host=host, port=port, user=user, folder=self.folder, kill_wait_s=self._kill_wait_s)
        for i in range(NODES):
            text += (
                f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 1 + i} CPUs=64 RealMemory=64000 "
                f"Gres=gpu:{GPUS} State=UNKNOWN\n"
            )
        text += f"PartitionName=p Nodes=n[0-{NODES - 1}] Default=YES MaxTime=INFINITE OverSubscribe=NO State=UP\n"
        self.conf.write_text(text)
        for i in range(GPUS):
            os.mknod(self.folder / "dev" / f"nvidia{i}", 0o666 | 0o020000, os.makedev(1, 3))
        gpus = f"AutoDetect=off\nName=gpu File={self.folder}/dev/nvidia[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(gpus)

    def _start_munged(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        self._daemon(
            "munged", "-S", f"{self.folder}/msock/s", f"--key-file={munge}/key", f"--pid-file={munge}/pid",
            f"--log-file={munge}/log", f"--seed-file={munge}/seed", "--num-threads=2",
        )  # fmt: skip

    def _daemon(self, *command: str) -> None:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"

    def start_node(self, name: str) -> None:
        """Start a node's slurmd."""
        self._daemon("slurmd", "-N", name, "-f", str(self.conf))

    def kill_node(self, name: str) -> None:
        """Kill a node's slurmd; what its jobs run lives on, as it does where the network to a node is lost."""
        os.kill(int((self.folder / "run" / f"slurmd.{name}.pid").read_text()), signal.SIGKILL)

    def _wait_idle(self) -> None:
        deadline = time.monotonic() + 25
        while (text := self.ask("sinfo", "-h", "-N", "-o", "%N %T")).count("idle") < NODES:
            assert time.monotonic() < deadline, f"nodes are not idle: {text}\n{self.controller_log()}"
            time.sleep(0.1)

    def controller_log(self) -> str:
        """The end of what slurmctld wrote."""
        file = self.folder / "log" / "slurmctld.log"
        return file.read_text()[-2000:] if file.exists() else "no slurmctld.log"

    # Jobs

    def ask(self, *command: str, env: dict[str, str] | None = None) -> str:
        """Run a client; what it prints."""
        done = subprocess.run(
            command, env={**self.env, **(env or {})}, cwd=self.folder, capture_output=True, text=True, check=False,
            timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: Path, *args: str, options: tuple[str, ...] = (), env: dict[str, str] | None = None) -> str:
        """``sbatch OPTIONS SCRIPT ARGS``; the job's number."""
        log = f"--output={self.logs}/%j.log"
        return self.ask("sbatch", "--parsable", log, *options, str(script), *args, env=env).strip()

    def log(self, job: str) -> str:
        """What the job has written so far."""
        file = self.logs / f"{job}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says of it, by field."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", "-o", job)))

    def hosts(self, job: str) -> list[str]:
        """Nodes that it ran on last."""
        return self.ask("scontrol", "show", "hostnames", self.job(job)["NodeList"]).split()

    def end(self, job: str) -> None:
        """Have it gone, whatever it is doing."""
        if self.job(job)["JobState"] in ENDED:
            return
        with suppress(AssertionError):
            self.ask("scontrol", "update", f"JobId={job}", "Requeue=0")
            self.ask("scancel", "--signal=KILL", "--full", job)
        for pid in self.processes(job):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with suppress(AssertionError):
            self.ask("scancel", job)
        self.wait_end(job, 30.0)

    def wait_end(self, job: str, timeout_s: float = 300.0) -> str:
        """Wait until it has ended for good; its state."""
        return self.wait_state(job, *ENDED, timeout_s=timeout_s)

    def wait_state(self, job: str, *states: str, timeout_s: float = 300.0) -> str:
        """Wait until it is in one of ``states``; which."""
        deadline = time.monotonic() + timeout_s
        while (state := self.job(job)["JobState"]) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state} after {timeout_s} s:\n{self.log(job)}"
            time.sleep(0.2)
        return state

    def wait_log(self, job: str, text: str, timeout_s: float = 300.0, start: int = 0) -> None:
        """Wait until ``text`` stands in the job's log, at character ``start`` or later."""
        deadline = time.monotonic() + timeout_s
        while text not in self.log(job)[start:]:
            state = self.job(job)["JobState"]
            is_over = state in ENDED or time.monotonic() > deadline
            assert not is_over, f"job {job}, {state}, did not write {text!r}:\n{self.log(job)}"
            time.sleep(0.1)

    def start_now(self, job: str, timeout_s: float = 40.0) -> None:
        """Start a requeued job: by itself it waits two minutes.

        A moment later than its end: nodes refuse a start whose credential is of the second in which they ended the job.
        """
        self.wait_state(job, "PENDING", timeout_s=timeout_s)
        time.sleep(1.5)
        deadline = time.monotonic() + timeout_s
        while self.job(job)["JobState"] == "PENDING":
            assert time.monotonic() < deadline, f"job {job} does not start: {self.job(job)}"
            with suppress(AssertionError):
                self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(0.5)

    def processes(self, job: str = "") -> list[int]:
        """Processes that jobs of this cluster run (of one job, where named); Slurm's own are left out."""
        found = []
        for pid, environ in _environments():
            jobs = [item.partition(b"=")[2] for item in environ if item.startswith(b"SLURM_JOB_ID=")]
            if f"SLURM_CONF={self.conf}".encode() in environ and jobs and (not job or jobs[0] == job.encode()):
                found.append(pid)
        return found

    def command(self, pid: int) -> str:
        """What a process runs, and its state; for a test that did not expect it."""
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            return f"{pid} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2][:2]} {words}"
        return f"{pid} is gone"


@contextmanager
def halting(pid: int, share: float) -> Iterator[None]:
    """While open, the process runs for ``share`` of the time only, 5 ms at once."""
    is_over = threading.Event()

    def halt() -> None:
        with suppress(ProcessLookupError):
            while not is_over.is_set():
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.005 / share - 0.005)
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.005)

    thread = threading.Thread(target=halt)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _only_one() -> int:
    """Wait until no other cluster of these tests runs on this machine; the lock that says so."""
    path = Path(tempfile.gettempdir()) / "megavid-slurm.lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            assert time.monotonic() < deadline, f"another cluster of these tests has held {path} for {WAIT_S:.0f} s"
            time.sleep(0.5)


def _free_ports(count: int) -> int:
    """First of ``count`` neighbouring ports that nobody listens on, below those that jobs take.

    Jobs are numbered from it, so that those of clusters which run side by side take other ports for their ranks.
    """
    for port in range(12_000 + os.getpid() % 4000, 19_000, count + 3):
        with suppress(OSError):
            for i in range(count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port + i))
            return port
    raise AssertionError("no free ports for a cluster")


def _environments() -> list[tuple[int, list[bytes]]]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                found.append((int(entry.name), (entry / "environ").read_bytes().split(b"\0")))
    return found


def _keep(folder: Path) -> None:
    """Wait for the end of the tests, then end every process of the cluster: daemons first, so that nothing restarts."""
    sys.stdin.buffer.read()
    conf, word = f"SLURM_CONF={folder}/slurm.conf".encode(), str(folder).encode()

    def left() -> list[int]:
        pids = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with suppress(OSError):
                line, environ = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
                is_daemon = line.split(b"\0")[0].rpartition(b"/")[2] in (b"munged", b"slurmctld", b"slurmd")
                if conf in environ.split(b"\0") or (is_daemon and word in line):
                    pids.append(int(entry.name))
        return pids

    for number, patience_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0)):
        for pid in left():
            with suppress(OSError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, number)
        deadline = time.monotonic() + patience_s
        while left() and time.monotonic() < deadline:
            time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
