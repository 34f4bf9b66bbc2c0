"""``megavid train``: checks everything that can be checked, then starts the ranks, or is one of them.

Owns the arguments and the order of the checks. The loop is ``megavid.training.loop``'s. Nothing that imports torch is
imported before the arguments are understood.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megavid.cli.arguments import out_folder, take_flag, take_option, take_preset, whole_number
from megavid.cli.imports import importing
from megavid.cli.quiet import silence_known_warnings
from megavid.config.load import load_run, preset_names
from megavid.config.schema import RunConfig
from megavid.errors import ConfigError, RankLost, Superseded
from megavid.plan.layout import layout_of

HELP = "train a preset or a TOML file; the same command on the same folder goes on where it stopped"

USAGE = """\
usage: megavid train PRESET_OR_TOML --out DIR [--ranks N] [--resume-step N] [--take-over] [--section.key VALUE ...]

  PRESET_OR_TOML   a preset ({presets}), or a file ending in .toml, such as DIR/run.toml
  --out DIR        the run's folder: run.toml, metrics.jsonl, events.jsonl, tensorboard/, checkpoints/, ...
  --ranks N        start N ranks on this machine (default 1; under torchrun or srun they are there already)
  --resume-step N  go on from the checkpoint of step N instead of the latest
  --take-over      replace another start that still holds DIR, such as one on a lost node: it ends with status 5 and
                   writes nothing more (a requeued Slurm job does so by itself)

The same command on the same DIR goes on after the latest checkpoint, in any layout. A preset's [layouts] names the
layout for each number of ranks (docs/cluster.md); a --parallel degree on the command line replaces it.
"""


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for."""

    preset: str
    out: Path
    ranks: int
    resume_step: int
    takes_over: bool
    overrides: tuple[str, ...]


def main(argv: Sequence[str]) -> int:
    """Train; see ``USAGE``. Returns the exit status, raises ``MegavidError`` for every other one than 0."""
    if not argv or {"-h", "--help"} & set(argv):
        from megavid.cli.help import config_help

        print(USAGE.format(presets=", ".join(preset_names())))
        print(config_help(_default_of(argv)))
        return 0
    request = parse(argv)
    config = load_run(request.preset, request.overrides)
    silence_known_warnings()

    with importing():
        from megavid.cli.ranks import find_ranks
        from megavid.parallel.launch import run_local_ranks

    env, num_ranks = find_ranks(request.ranks)
    config = load_run(request.preset, request.overrides, world_size=num_ranks)
    layout = layout_of(config, num_ranks)

    with importing():
        import torch
        import torch._dynamo  # the first optimizer imports it, a second of CPU

        from megavid.training.run import local_device, run_rank
        from megavid.training.run_dir import RunDir, RunLock

    device = local_device(request.ranks or 1)
    if request.ranks > 1:
        torch.set_num_threads(1)  # a pool of threads does not survive the fork of the ranks
    notices = check(config, request.out, device)
    if env.is_main:
        print("".join(f"{line}\n" for line in notices), end="")
    run_dir = RunDir(request.out)
    if env.world_size > 1:
        run_rank(config, layout, device, run_dir, None, request.resume_step, env, takes_over=request.takes_over)
        return 0
    with RunLock(run_dir.path, takes_over=request.takes_over):
        start = run_dir.decide(config, resume_step=request.resume_step)
        if start.kind == "finished":
            print(start.finished_text(config, run_dir.path))
            return 0
        entry = functools.partial(run_rank, config, layout, device, run_dir, start, request.resume_step)
        run_dir.fence = start.fence
        try:
            run_local_ranks(entry, num_ranks, device, epitaph=last_words)
        except RankLost as error:
            if not isinstance(error, Superseded):
                run_dir.error(-1, error)  # a killed rank could not
            raise
    return 0


def last_words(pid: int) -> str:
    """What a rank of this machine that was killed had last entered, for the error's line; "" where it left nothing."""
    import time

    from megavid.parallel.host import host_name
    from megavid.training.flight import read_slot, remove_slot

    last = read_slot(pid)
    remove_slot(pid)
    return "" if last is None else f" on {host_name()}, having last entered {last.text(time.time())}"


def parse(argv: Sequence[str]) -> Request:
    """Take this command's own arguments; what is left are config keys.

    Raises:
        ConfigError: a missing or repeated argument, or one that is no number.
    """
    rest = list(argv)
    out = take_option(rest, "--out")
    ranks = take_option(rest, "--ranks")
    resume_step = take_option(rest, "--resume-step")
    takes_over = take_flag(rest, "--take-over")
    preset, overrides = take_preset(rest)
    return Request(
        preset=preset,
        out=out_folder(out, "run"),
        ranks=whole_number(ranks, "--ranks", default=0),
        resume_step=whole_number(resume_step, "--resume-step", default=0),
        takes_over=takes_over,
        overrides=overrides,
    )


def _default_of(argv: Sequence[str]) -> RunConfig | None:
    """The preset whose values ``--help`` shows, where one is named."""
    return load_run(argv[0], []) if argv and not argv[0].startswith("-") else None


def check(config: RunConfig, out: Path, device: str) -> list[str]:
    """Everything that can be known before ranks start: packages, reports, the data set, the weights to start from.

    Returns:
        What the user should know of it.

    Raises:
        MegavidError: of the kind that fits.
    """
    from megavid.data.build import build_source
    from megavid.models import te
    from megavid.parallel import zero
    from megavid.training.build import check_reports
    from megavid.training.resume import check_base, check_init_from, told_differences

    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")
    if config.train.backend == "deepspeed":
        zero.check_installed()
    te.check_installed(config.precision, device)
    check_reports(config)
    source = build_source(config)
    check_base(config, source, out)
    notices = []
    if config.train.init_from and not (out / "checkpoints").exists():
        notices = told_differences(config, check_init_from(config, source))
    if config.data.kind == "synthetic" and config.data.path:
        notices.append(
            f"data.path = '{config.data.path}' is not read: data.kind = 'synthetic' trains on procedural clips; "
            "--data.kind shards reads it"
        )
    source.close()
    return notices
