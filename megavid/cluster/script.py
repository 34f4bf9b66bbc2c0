"""The sbatch script of a planned run.

Owns its text, and how long before the end of its time a job is told to save. Submitting is ``cluster.submit``'s; what
the script does with signals and exit codes is ``files/job.sh``'s, which the shipped examples use too.
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from megavid.cluster.environment import environment_of
from megavid.errors import ConfigError
from megavid.plan.answer import Answer
from megavid.plan.memory import GIB

SLACK_S = 90.0
"""Slurm looks at time limits some 30 s apart, and its signal passes through srun: never plan with less than 60."""
LEAST_LEAD_S = 120
FILES = ("env.sh", "job.sh")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the command line asks of Slurm; "" where Slurm's own default holds.

    Attributes:
        preset: or .toml file.
        flags: config keys, as `megavid train` takes them.
        out: folder of the run.
        nodes: how many.
        gpus_per_node: ranks on each.
        time: limit of one job, as Slurm writes times.
        chain: jobs queued one behind the other; 1: one job that requeues itself.
        name: of the job.
        partition: to run in.
        account: to charge.
        qos: quality of service.
        exclude: hosts to leave out, as Slurm writes lists.
        cpus_per_task: cores of one rank; 0 for Slurm's default.
        container: image for pyxis (``--container-image``); "" for none.
        mounts: of the container.
        ranks_by: srun or torchrun.
    """

    preset: str
    flags: tuple[str, ...]
    out: Path
    nodes: int
    gpus_per_node: int
    time: str
    chain: int
    name: str
    partition: str = ""
    account: str = ""
    qos: str = ""
    exclude: str = ""
    cpus_per_task: int = 0
    container: str = ""
    mounts: str = ""
    ranks_by: str = "srun"

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.gpus_per_node

    @property
    def folder(self) -> Path:
        """Where the job's files and logs lie."""
        return self.out / "slurm"


def signal_lead_s(answer: Answer) -> int:
    """Seconds before the end of its time at which a job is told to save: slack, the step under way, and the save.

    The step is the slowest of the predicted interval, and the save writes what is not staged yet: twice, for a former
    save may be under way when the signal comes.
    """
    save_s = answer.goodput.blocked_s + answer.goodput.write_s
    return max(LEAST_LEAD_S, math.ceil(SLACK_S + answer.step_interval[1] + 2 * save_s))


def require_fit(answer: Answer) -> None:
    """Refuse a layout that does not fit.

    Raises:
        ConfigError: the fullest rank leaves less memory free than the headroom.
    """
    if not answer.fits:
        total, limit = answer.memory.total / GIB, answer.hardware.memory_bytes / GIB
        gpu, layout = answer.hardware.name, answer.layout
        raise ConfigError(
            f"layout {layout.describe()} does not fit: {total:.1f} GiB on the fullest rank, a {gpu} has {limit:.1f}, "
            f"of which {answer.headroom:.0%} are to stay free; `megavid plan ... --world-size {layout.world_size} "
            f"--gpu {gpu} --search` finds one that fits"
        )


def require_time(time: str, lead_s: int) -> None:
    """Refuse a time limit that leaves no time to train.

    Raises:
        ConfigError: it is not a time of Slurm's, or is hardly longer than what the last save needs.
    """
    limit_s = seconds_of(time)
    if limit_s < 2 * lead_s:
        raise ConfigError(
            f"--time {time} is {limit_s} s, of which the last {lead_s} s are kept for the last step and its save; "
            f"ask for at least {math.ceil(2 * lead_s / 60)} minutes"
        )


def seconds_of(time: str) -> int:
    """Seconds of a time as Slurm writes it: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    Raises:
        ConfigError: it is none.
    """
    days, dash, rest = time.rpartition("-")
    parts = rest.split(":")
    words = [*parts, *([days] if dash else [])]
    if not all(word.isdecimal() for word in words) or len(parts) > 3:
        raise ConfigError(f"--time {time} must be written as Slurm does: MM, HH:MM:SS or D-HH:MM:SS")
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        return int(days) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(numbers) == 3:
        return numbers[0] * 3600 + numbers[1] * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)


def write_files(request: Request, answer: Answer) -> Path:
    """Write the script, env.sh and job.sh to the run's folder; the script's path.

    An env.sh that is there already is a person's and stays.
    """
    folder = request.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if name != "env.sh" or not (folder / name).exists():
            (folder / name).write_text(file_text(name), encoding="utf-8")
    script = folder / "train.sbatch"
    script.write_text(script_text(request, answer), encoding="utf-8")
    return script


def file_text(name: str) -> str:
    """``env.sh`` or ``job.sh``, as shipped."""
    return resources.files("megavid.cluster").joinpath("files").joinpath(name).read_text(encoding="utf-8")


def script_text(request: Request, answer: Answer) -> str:
    """The whole sbatch script."""
    lead_s = signal_lead_s(answer)
    folder = request.folder.absolute()
    train = [request.preset, "--out", str(request.out.absolute()), *request.flags]
    lines = ["#!/bin/bash", *_plan_comments(answer), "#"]
    lines += [f"# {line}" for line in _restart_words(request)]
    lines += ["", *(f"#SBATCH {option}" for option in _options(request, lead_s)), ""]
    lines += ["set -uo pipefail"]
    for setting in environment_of(answer.config, answer.layout):
        lines += [f"# {setting.reason}", f"export {setting.name}=${{{setting.name}:-{setting.value}}}"]
    lines += [
        f"export MEGAVID_RESTART_BY={'chain' if request.chain > 1 else 'requeue'}",
        f"export MEGAVID_RANKS_BY=${{MEGAVID_RANKS_BY:-{request.ranks_by}}}",
        f"source {shlex.quote(str(folder / 'env.sh'))} || exit 2",
        f"source {shlex.quote(str(folder / 'job.sh'))} || exit 2",
    ]
    if request.container:
        image = [f"--container-image={request.container}", "--no-container-mount-home"]
        image += [f"--container-mounts={request.mounts}"] if request.mounts else []
        lines += [f"SRUN_OPTIONS+=({_words(image)})"]
    lines += ["", f"preflight {_words(train)}", f"run_ranks train {_words(train)}", "finish", ""]
    return "\n".join(lines)


def _words(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)


def _plan_comments(answer: Answer) -> list[str]:
    fast, slow = answer.step_interval
    room = f"{answer.memory.total / GIB:.1f} of {answer.hardware.memory_bytes / GIB:.1f} GiB on the fullest rank"
    return [
        f"# Written by `megavid launch slurm`. Layout {answer.layout.describe()} on {answer.layout.world_size} x "
        f"{answer.hardware.name}:",
        f"# {room}, a step of {fast:.2f} to {slow:.2f} s, a save of {answer.goodput.write_s:.0f} s (predicted).",
    ]


def _restart_words(request: Request) -> list[str]:
    if request.chain == 1:
        return ["Requeues itself after a stop (75) and after faults (3, 5); any other status stops it."]
    return [
        f"One of a chain of {request.chain}: the next job begins when this one ends (afterany: afterok would wait for",
        "ever behind a failure); a status that needs a person cancels the rest.",
    ]


def _options(request: Request, lead_s: int) -> list[str]:
    pairs = {
        "job-name": request.name,
        "account": request.account,
        "partition": request.partition,
        "qos": request.qos,
        "nodes": str(request.nodes),
        "ntasks-per-node": str(request.gpus_per_node),
        "gpus-per-node": str(request.gpus_per_node),
        "cpus-per-task": str(request.cpus_per_task or ""),
        "exclude": request.exclude,
        "time": request.time,
        "signal": f"B:USR1@{lead_s}",
        "open-mode": "append",
        "output": str(request.folder.absolute() / "%x-%j.log"),
    }
    return [*(f"--{name}={value}" for name, value in pairs.items() if value), "--requeue"]
