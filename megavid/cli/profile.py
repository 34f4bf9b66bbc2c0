"""``megavid profile``: a short run that says where the time of a step goes, as report.json and report.html.

Owns the arguments and the order of the checks. What is measured is ``megavid.training.profile_run``'s; nothing that
imports torch is imported before the arguments are understood.
"""

import contextlib
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megavid.cli.arguments import one_of, out_folder, take_flag, take_option, take_preset, whole_number
from megavid.cli.quiet import silence_known_warnings
from megavid.config.load import load_run, preset_names
from megavid.config.schema import RunConfig
from megavid.errors import ConfigError
from megavid.plan.calibration import load_probe
from megavid.plan.layout import layout_of
from megavid.plan.unplanned import refuse_unplanned

HELP = "measure a short run: MFU, HFU, where the time of a step goes, load of experts, memory; as a page"

USAGE = """\
usage: megavid profile PRESET_OR_TOML --out DIR [--steps N] [--ranks N] [--routing KIND] [--section.key VALUE ...]
       megavid profile --probe FILE

  PRESET_OR_TOML     a preset ({presets}), or a file ending in .toml
  --out DIR          where report.json, report.html, steps.jsonl, run.toml and traces go
  --steps N          measured steps, from which times, rates and MFU come (default 10)
  --warmup N         steps before them that do not count (default 3)
  --trace-steps N    steps after them under torch.profiler, from which the split of the time comes (default 2)
  --ranks N          start N ranks on this machine (default 1; under torchrun or srun they are there already)
  --routing KIND     real: the router decides; forced: every expert gets the same load, which is not training, to tell
                     what balance would give; both: one run of each (default real)
  --traces WHICH     ranks whose traces are kept, for chrome://tracing or ui.perfetto.dev: none, one, all (default one)
  --calibration FILE what a probe measured of this machine, to predict each part and show it beside the measurement;
                     GPUs of the hardware table are predicted without one
  --memory-snapshot  keep CUDA's memory snapshot of the traced steps too, for pytorch.org/memory_viz
  --probe FILE       no profile: measure this machine's CPU ranks for about 30 seconds (matrix products, memory,
                     attention, links, steps of small models); FILE is for --calibration here and in `megavid plan`

MFU counts the forward and backward pass of the clips, HFU also padding and recomputation. The peak is the GPU's from
the hardware table; on CPUs it is a matrix product measured in the same run. Weights are fresh unless
--train.init_from names a checkpoint: a trained router loads its experts otherwise than a fresh one.

  megavid profile tiny --out profiles/tiny --steps 10
  megavid profile tiny --out profiles/tp2 --ranks 2 --parallel.tensor 2 --routing both
  torchrun --nproc-per-node 8 -m megavid profile wan_moe_7b_a2b --out profiles/7b --data.path SHARDS
"""

Routing = Literal["real", "forced"]
Traces = Literal["none", "one", "all"]
ROUTINGS: dict[str, tuple[Routing, ...]] = {"real": ("real",), "forced": ("forced",), "both": ("real", "forced")}
TRACES: dict[str, Traces] = {"none": "none", "one": "one", "all": "all"}


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for."""

    preset: str
    out: Path
    steps: int
    warmup: int
    traced: int
    ranks: int
    routing: str
    traces: str
    has_snapshot: bool
    calibration: Path | None
    overrides: tuple[str, ...]


def main(argv: Sequence[str]) -> int:
    """Profile; see ``USAGE``. Returns the exit status, raises ``MegavidError`` for every other one than 0."""
    if not argv or {"-h", "--help"} & set(argv):
        from megavid.cli.help import config_help

        print(USAGE.format(presets=", ".join(preset_names())))
        print(config_help(load_run(argv[0], []) if argv and not argv[0].startswith("-") else None))
        return 0
    if any(item.partition("=")[0] == "--probe" for item in argv):
        from megavid.cli import profile_probe

        return profile_probe.main(argv)
    request = parse(argv)
    config = load_run(request.preset, request.overrides)
    refuse_unplanned(config, "megavid profile")
    check(config, request)
    silence_known_warnings()
    # The profiler's library announces every start and stop, and warns of tensors that are older than the trace.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    run(config, request, ("megavid", "profile", *argv))
    return 0


def run(config: RunConfig, request: Request, command: tuple[str, ...]) -> None:
    """Start the ranks that the request asks for, or be one of them, and write the report.

    Raises:
        MegavidError: of the kind that fits.
    """
    from megavid.cli.ranks import find_ranks

    env, num_ranks = find_ranks(request.ranks)
    config = load_run(request.preset, request.overrides, world_size=num_ranks)
    layout = layout_of(config, num_ranks)
    if config.train.backend != "megatron":
        raise ConfigError(
            f"train.backend = '{config.train.backend}' is not profiled: a step's parts are told by megatron-core's "
            "schedules; set 'megatron'"
        )
    machine = load_probe(request.calibration) if request.calibration else None

    import torch

    from megavid.data.build import build_source
    from megavid.parallel.launch import run_local_ranks
    from megavid.profiling.records import Settings
    from megavid.training.profile_report import Asked, write_report
    from megavid.training.profile_run import profile_rank
    from megavid.training.run import local_device
    from megavid.training.run_dir import RunLock

    device = local_device(request.ranks or 1)
    if request.has_snapshot and device != "cuda":
        raise ConfigError("--memory-snapshot needs CUDA, and these are CPU ranks; leave it out")
    if request.ranks > 1:
        torch.set_num_threads(1)  # a pool of threads does not survive the fork of the ranks
    build_source(config).close()
    settings = Settings(
        steps=request.steps,
        warmup=request.warmup,
        traced=request.traced,
        routings=ROUTINGS[request.routing],
        traces=TRACES[request.traces],
        has_snapshot=request.has_snapshot,
    )
    asked = Asked(command, request.preset, request.out, machine)
    finish = functools.partial(write_report, config, asked)
    entry = functools.partial(profile_rank, config, layout, device, settings, request.out, finish)
    with RunLock(request.out) if env.is_main else contextlib.nullcontext():
        if env.is_main:
            remove_old_files(request.out)
        if env.world_size > 1:
            entry(env)
        else:
            run_local_ranks(entry, num_ranks, device)


def parse(argv: Sequence[str]) -> Request:
    """Take this command's own arguments; what is left are config keys.

    Raises:
        ConfigError: a missing or repeated argument, one that is no number, or an unknown choice.
    """
    rest = list(argv)
    out = take_option(rest, "--out")
    numbers = {name: take_option(rest, name) for name in ("--steps", "--warmup", "--trace-steps", "--ranks")}
    routing = one_of(take_option(rest, "--routing") or "real", "--routing", tuple(ROUTINGS))
    traces = one_of(take_option(rest, "--traces") or "one", "--traces", tuple(TRACES))
    has_snapshot = take_flag(rest, "--memory-snapshot")
    calibration = take_option(rest, "--calibration")
    preset, overrides = take_preset(rest)
    return Request(
        preset=preset,
        out=out_folder(out, "report"),
        steps=whole_number(numbers["--steps"], "--steps", default=10),
        warmup=whole_number(numbers["--warmup"], "--warmup", default=3),
        traced=whole_number(numbers["--trace-steps"], "--trace-steps", default=2),
        ranks=whole_number(numbers["--ranks"], "--ranks", default=0),
        routing=routing,
        traces=traces,
        has_snapshot=has_snapshot,
        calibration=Path(calibration) if calibration else None,
        overrides=overrides,
    )


def check(config: RunConfig, request: Request) -> None:
    """What can be known before torch is imported.

    Raises:
        ConfigError: routing of a model without experts, or a folder that is not for a profile.
    """
    if request.routing != "real" and config.model.family != "wan_moe":
        raise ConfigError(
            f"--routing {request.routing} needs a model with experts, but model.family = '{config.model.family}'; "
            "leave it out"
        )
    if request.out.exists() and not request.out.is_dir():
        raise ConfigError(f"--out {request.out} is a file; name a folder")
    if (request.out / "checkpoints").exists() or (request.out / "metrics.jsonl").exists():
        raise ConfigError(f"--out {request.out} holds a training run; name another folder for the profile")


def remove_old_files(out: Path) -> None:
    """Remove what an earlier profile left, so that no trace stands beside a report that is not its own."""
    for pattern in ("report.*", "trace_*", "memory_*", "steps.jsonl"):
        for file in out.glob(pattern):
            file.unlink()
