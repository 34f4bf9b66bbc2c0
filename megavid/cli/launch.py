"""``megavid launch slurm``: plan a layout, write its sbatch script, queue it, follow its log.

Owns the arguments and the order of the checks. Nothing here imports torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megavid.cli.arguments import one_of, take_flag, take_option, whole_number
from megavid.cluster.script import Request, require_fit, require_time, signal_lead_s, write_files
from megavid.cluster.submit import follow, submit
from megavid.config.load import load_run, preset_names
from megavid.errors import ConfigError
from megavid.plan.answer import Answer, plan_run
from megavid.plan.calibration import gpu_calibration, load_calibration
from megavid.plan.hardware import hardware, table
from megavid.plan.job import Job
from megavid.plan.unplanned import refuse_unplanned
from megavid.plan.workload import workload_of_clip

HELP = "write the sbatch script of a planned layout, queue it (or a chain of jobs), follow its log"

USAGE = """\
usage: megavid launch slurm PRESET_OR_TOML --nodes N --out DIR [options] [--section.key VALUE ...]

  PRESET_OR_TOML        a preset, or a .toml file; presets: {presets}
  --nodes N             nodes
  --out DIR             the run's folder; script, settings and logs go to DIR/slurm
  --gpus-per-node N     ranks on each node (default 8)
  --gpu GPU             what they are (default h100-80gb): {gpus}
  --dry-run             write the script and print it; queue nothing
  --chain K             queue K jobs, each behind the one before, for a run longer than one time limit; the default is
                        one job that requeues itself
  --no-follow           return once it is queued; otherwise the log is followed, and Ctrl-C leaves the job running

  of the job
  --time LIMIT          of one job, as Slurm writes it (default 24:00:00)
  --partition, --account, --qos, --name, --exclude HOSTS
  --cpus-per-task N     cores of one rank
  --container IMAGE     for srun with pyxis; --mounts FROM:TO,...  (apptainer: edit DIR/slurm/env.sh)
  --ranks-by HOW        srun: one task a GPU (default); torchrun: one task a node, which starts its ranks

  of the plan (a layout that does not fit is refused)
  --frames N --height N --width N    the clip (default 81 x 480 x 832)
  --calibration FILE                 what `megavid preflight` or `megavid profile --probe` measured

The job is told to save before its time is over: --signal=B:USR1@S, S = slack of Slurm + a step + the save, as planned.
DIR/slurm/env.sh is written once and is yours to edit: Python environment, network interfaces, apptainer.
Example: megavid launch slurm wan_moe_30b_a3b --nodes 8 --out /shared/runs/30b --data.path /shared/shards --chain 4
"""

OPTIONS = (
    "nodes", "out", "gpus-per-node", "gpu", "chain", "time", "partition", "account", "qos", "name", "exclude",
    "cpus-per-task", "container", "mounts", "ranks-by", "frames", "height", "width", "calibration",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Launch; see ``USAGE``. Returns the exit status.

    Raises:
        ConfigError: a request that cannot be a job.
        MegavidError: Slurm refused.
    """
    if not argv or {"-h", "--help"} & set(argv):
        presets = "".join(f"\n{'':24}{name}" for name in preset_names())
        print(USAGE.format(presets=presets, gpus=", ".join(table())))
        return 0
    if argv[0] != "slurm":
        raise ConfigError(
            f"megavid launch {argv[0]}: slurm is the one scheduler it knows: megavid launch slurm PRESET ..."
        )
    return _slurm(list(argv[1:]))


def _slurm(argv: list[str]) -> int:
    asked = parse(argv)
    answer = plan(asked)
    request = asked.request
    require_fit(answer)
    require_time(request.time, signal_lead_s(answer))
    script = write_files(request, answer)
    if asked.is_dry_run:
        print(script.read_text(encoding="utf-8"), end="")
        print(f"# written to {script}; not queued (--dry-run)")
        return 0
    jobs = submit(script, request.chain)
    print(f"queued {', '.join(jobs)}: {script}")
    log = request.folder.absolute() / f"{request.name}-{jobs[0]}.log"
    print(f"log of {jobs[0]}: {log}", flush=True)
    if asked.is_followed:
        status = 0
        for job in jobs:
            status = follow(job, log.with_name(f"{request.name}-{job}.log"))
        return status
    return 0


@dataclass(frozen=True, slots=True)
class Asked:
    """The command line, understood."""

    request: Request
    gpu: str
    clip: tuple[int, int, int]
    calibration: str
    is_dry_run: bool
    is_followed: bool


def parse(argv: list[str]) -> Asked:
    """Take this command's own arguments; what is left are config keys.

    Raises:
        ConfigError: a missing or repeated argument, or one that is no number.
    """
    rest = list(argv)
    take = {name: take_option(rest, f"--{name}") for name in OPTIONS}
    is_dry_run, no_follow = take_flag(rest, "--dry-run"), take_flag(rest, "--no-follow")
    if not rest or rest[0].startswith("-"):
        raise ConfigError(f"the first argument must be a preset ({', '.join(preset_names())}) or a .toml file")
    for name, what in (("nodes", "N"), ("out", "DIR")):
        if not take[name]:
            raise ConfigError(f"--{name} {what} is missing")
    if take["mounts"] and not take["container"]:
        raise ConfigError(f"--mounts {take['mounts']} is read with --container IMAGE only")
    preset = str(Path(rest[0]).absolute()) if rest[0].endswith(".toml") else rest[0]
    request = Request(
        preset=preset,
        flags=tuple(rest[1:]),
        out=Path(take["out"]),
        nodes=whole_number(take["nodes"], "--nodes", default=1),
        gpus_per_node=whole_number(take["gpus-per-node"], "--gpus-per-node", default=8),
        time=take["time"] or "24:00:00",
        chain=whole_number(take["chain"], "--chain", default=1),
        name=take["name"] or f"megavid-{Path(take['out']).name}",
        partition=take["partition"],
        account=take["account"],
        qos=take["qos"],
        exclude=take["exclude"],
        cpus_per_task=whole_number(take["cpus-per-task"], "--cpus-per-task", default=0),
        container=take["container"],
        mounts=take["mounts"],
        ranks_by=one_of(take["ranks-by"] or "srun", "--ranks-by", ("srun", "torchrun")),
    )
    clip = tuple(
        whole_number(take[name], f"--{name}", default=usual)
        for name, usual in (("frames", 81), ("height", 480), ("width", 832))
    )
    return Asked(
        request=request,
        gpu=take["gpu"] or "h100-80gb",
        clip=(clip[0], clip[1], clip[2]),
        calibration=take["calibration"],
        is_dry_run=is_dry_run,
        is_followed=not no_follow,
    )


def plan(asked: Asked) -> Answer:
    """The plan of the run on the GPUs that are asked for.

    Raises:
        ConfigError: the layout is not legal.
    """
    request = asked.request
    config = load_run(request.preset, request.flags, world_size=request.world_size)
    refuse_unplanned(config, "megavid launch slurm")
    gpu = hardware(asked.gpu)
    calibration = load_calibration(Path(asked.calibration)) if asked.calibration else gpu_calibration()
    return plan_run(config, workload_of_clip(config, *asked.clip), Job(request.world_size, gpu, calibration))
