"""``megavid preflight``: check and measure every node of an allocation before the first step.

Owns the arguments, the report, and the files of bad hosts. What is measured is ``megavid.cluster.preflight``'s.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megavid.cli.arguments import decimal_number, take_option, whole_number
from megavid.cli.imports import importing
from megavid.cli.quiet import silence_known_warnings
from megavid.cluster.health import Facts, Finding, Limits, judge
from megavid.config.load import load_run, preset_names
from megavid.config.schema import RunConfig
from megavid.errors import ConfigError, MegavidError
from megavid.plan.layout import Layout, layout_of

if TYPE_CHECKING:
    from megavid.parallel.launch import Device, RankEnv

HELP = "check and measure every node of an allocation; name slow and broken hosts before step 1"

USAGE = """\
usage: srun ... megavid preflight PRESET_OR_TOML --out DIR [options] [--section.key VALUE ...]

  PRESET_OR_TOML     as `megavid train`: its layout decides which axes are measured; presets: {presets}
  --out DIR          the run's folder; written to DIR/slurm:
                     preflight.json    every figure of every rank
                     exclude           hosts to leave out, one a line (kept and added to); examples/slurm and
                                       `megavid launch slurm` keep requeued and chained jobs away from them
                     calibration.json  for `megavid plan --calibration` and `megavid profile --calibration` (CPU ranks)
  --ranks N          start N ranks on this machine (default 1; under srun or torchrun they are there already)
  --seconds S        for the measurements (default {seconds:g}; with start-up it ends within 90 s)
  --slow-below X     a host is slow below this share of the median rate of matrix products (default {slow:g})

Checked on every node: clock, versions of Python and packages, local disk space, GPU memory errors and throttling
(nvidia-smi). Measured: matrix products; an all-reduce on each parallel axis of this layout.
Exit status: 0 all hosts are good; 3 some are bad, and named.
"""

SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for."""

    preset: str
    out: Path
    ranks: int
    seconds: float
    limits: Limits
    overrides: tuple[str, ...]


class BadHosts(MegavidError):
    """Hosts that should not take part; named in the message and in DIR/slurm/exclude."""

    exit_code = 3


def main(argv: Sequence[str]) -> int:
    """Examine the allocation; see ``USAGE``.

    Raises:
        BadHosts: some host is slow or broken.
        MegavidError: bad input.
    """
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE.format(presets=", ".join(preset_names()), seconds=SECONDS, slow=Limits().slow_below))
        return 0
    request = parse(argv)
    silence_known_warnings()

    with importing():
        from megavid.cli.ranks import find_ranks
        from megavid.parallel.launch import run_local_ranks
        from megavid.training.run import local_device

    env, num_ranks = find_ranks(request.ranks)
    config = load_run(request.preset, request.overrides, world_size=num_ranks)
    layout, device = layout_of(config, num_ranks), local_device(request.ranks or 1)
    entry = functools.partial(preflight_rank, request, config, layout, device)
    if env.world_size > 1:
        entry(env)
    else:
        run_local_ranks(entry, num_ranks, device)
    return 0


def parse(argv: Sequence[str]) -> Request:
    """Take this command's own arguments; what is left are config keys.

    Raises:
        ConfigError: a missing or repeated argument, or one that is no number.
    """
    rest = list(argv)
    out, ranks = take_option(rest, "--out"), take_option(rest, "--ranks")
    seconds = decimal_number(take_option(rest, "--seconds"), "--seconds", default=SECONDS, minimum=1.0)
    slow = decimal_number(take_option(rest, "--slow-below"), "--slow-below", default=Limits().slow_below, minimum=0.0)
    if not rest or rest[0].startswith("-"):
        raise ConfigError(f"the first argument must be a preset ({', '.join(preset_names())}) or a .toml file")
    if not out:
        raise ConfigError("--out DIR is missing: the run's folder")
    if slow >= 1:
        raise ConfigError(f"--slow-below {slow:g} must be below 1: it is a share of the median host's rate")
    number = whole_number(ranks, "--ranks", default=0)
    return Request(rest[0], Path(out), number, seconds, Limits(slow_below=slow), tuple(rest[1:]))


def preflight_rank(request: Request, config: RunConfig, layout: Layout, device: "Device", env: "RankEnv") -> None:
    """Examine as one rank; rank 0 writes and prints.

    Raises:
        BadHosts: on every rank, some host is slow or broken.
    """
    from megavid.cluster.preflight import examine, write_calibration
    from megavid.parallel.world import open_mesh

    began = time.perf_counter()
    with open_mesh(config, layout, device, env, timeout_s=90.0) as mesh:
        mesh.barrier()  # all begin together, or the first ones would have the machine's network to themselves
        if mesh.is_main:
            print(f"measuring {mesh.world_size} ranks for about {request.seconds:g} s", flush=True)
        facts = examine(mesh, request.seconds / 2)
        findings = judge(facts, request.limits)
        folder = request.out / "slurm"
        if mesh.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            write(folder, facts, findings)
            print(report(facts, layout), flush=True)
        file = folder / "calibration.json"
        is_written = not findings and write_calibration(mesh, file, request.seconds / 2)
        if is_written and mesh.is_main:
            print(f"written: {file} (kernels and links, for `megavid plan --calibration`)")
        if mesh.is_main:
            print(f"preflight of {mesh.world_size} ranks took {time.perf_counter() - began:.0f} s", flush=True)
        mesh.barrier()
    if findings:
        words = "; ".join(f"{found.host} is {found.kind}: {found.words}" for found in findings)
        raise BadHosts(f"{words}; they stand in {request.out / 'slurm' / 'exclude'}")


def write(folder: Path, facts: Sequence[Facts], findings: Sequence[Finding]) -> None:
    """Write preflight.json, and add the bad hosts to exclude."""
    table = {
        "ranks": [dataclasses.asdict(fact) for fact in facts],
        "findings": [dataclasses.asdict(found) for found in findings],
    }
    (folder / "preflight.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    file = folder / "exclude"
    known = file.read_text(encoding="utf-8").split() if file.exists() else []
    hosts = sorted({*known, *(found.host for found in findings)})
    if hosts:
        file.write_text("".join(f"{host}\n" for host in hosts), encoding="utf-8")


def report(facts: Sequence[Facts], layout: Layout) -> str:
    """One line a host: the slowest of its ranks, and its seconds on each axis."""
    hosts = sorted({fact.host for fact in facts})
    axes = list(facts[0].axes)
    width = max(len("host"), *map(len, hosts))
    lines = [f"layout {layout.describe()}; all-reduce of 4 MiB by axis, slowest rank of each host"]
    lines += [f"{'host':{width}}  ranks  GFLOP/s  {'  '.join(f'{axis:>8}' for axis in axes)}"]
    for host in hosts:
        mine = [fact for fact in facts if fact.host == host]
        rate = min(fact.product_rate for fact in mine) / 1e9
        times = "  ".join(f"{max(fact.axes[axis] for fact in mine) * 1e3:5.1f} ms" for axis in axes)
        lines += [f"{host:{width}}  {len(mine):5}  {rate:7.1f}  {times}"]
    return "\n".join(lines)
