"""Handing a script to Slurm, and following what its job writes.

Owns the calls of sbatch, squeue and scontrol from the place where a person sits.
"""

import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megavid.errors import ConfigError, MegavidError

POLL_S = 1.0
ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"),
    *("PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
}


class SlurmError(MegavidError):
    """Slurm refused, or is not there."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Job:
    """What Slurm says of a job.

    Attributes:
        state: RUNNING, PENDING, ...
        reason: why it waits.
        exit_code: of its script, once it has ended.
    """

    state: str
    reason: str
    exit_code: int

    @property
    def words(self) -> str:
        """Its state, for a person."""
        return self.state + (f" ({self.reason})" if self.state == "PENDING" else "")


def ask(*command: str) -> str:
    """What a Slurm command prints.

    Raises:
        ConfigError: it is not installed here.
        SlurmError: it failed.
    """
    if shutil.which(command[0]) is None:
        raise ConfigError(f"{command[0]} is not on PATH: run this where Slurm's commands are, or add --dry-run")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SlurmError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def submit(script: Path, chain: int) -> list[str]:
    """Queue ``chain`` jobs, each behind the one before; their numbers, which job.sh finds in ``chain`` beside it.

    ``afterany``: a job that was stopped, or lost a node, ends with a status of its own, and ``afterok`` behind it would
    wait for ever.
    """
    jobs: list[str] = []
    for _ in range(chain):
        behind = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        jobs.append(ask("sbatch", "--parsable", *behind, str(script)).strip().partition(";")[0])
        with script.with_name("chain").open("a", encoding="utf-8") as file:
            file.write(f"{jobs[-1]}\n")
    return jobs


def look(job: str) -> Job | None:
    """What Slurm says of it now; None where it does not answer, as while its controller starts anew.

    Raises:
        SlurmError: Slurm has forgotten the job, so how it ended is not known.
    """
    try:
        text = ask("scontrol", "show", "job", "-o", job)
    except SlurmError as error:
        if "Invalid job id" in str(error):
            raise SlurmError(f"Slurm no longer knows job {job}: how it ended stands in its log") from error
        return None
    fields = dict(re.findall(r"(\w+)=(\S*)", text))
    return Job(fields["JobState"], fields.get("Reason", ""), int(fields.get("ExitCode", "0:0").partition(":")[0]))


def follow(job: str, log: Path) -> int:
    """Print what the job writes until it has ended, through requeues too; its exit status. Ctrl-C leaves it running.

    Raises:
        SlurmError: Slurm has forgotten the job.
    """
    position, said = 0, ""
    while True:
        now = look(job)
        if log.exists():
            with log.open("rb") as file:
                file.seek(position)
                text = file.read()
            position += len(text)
            sys.stdout.write(text.decode("utf-8", errors="replace"))
            sys.stdout.flush()
        if now is not None and now.state in ENDED:
            print(f"job {job}: {now.state}, exit status {now.exit_code}")
            return now.exit_code if now.state != "CANCELLED" else 128 + 15
        waits = f"job {job}: " + (now.words if now is not None else "Slurm does not answer; asking again")
        if waits != said:
            said = waits
            print(waits, flush=True)
        time.sleep(POLL_S)
