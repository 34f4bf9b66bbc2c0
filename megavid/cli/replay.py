"""``megavid replay DIR --step N``: take one recorded step of a run again, and compare.

Owns the arguments. Finding and taking the step is ``megavid.training.replay``'s.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavid.cli.arguments import take_option, whole_number
from megavid.cli.imports import importing
from megavid.cli.quiet import silence_known_warnings
from megavid.config.load import load_run, with_flags
from megavid.errors import ConfigError, NumericalStop
from megavid.plan.layout import layout_of

HELP = "take one recorded step of a run again, from the nearest checkpoint, and compare its loss"

USAGE = """\
usage: megavid replay DIR --step N [--ranks N] [--routing recorded] [--parallel.KEY VALUE ...] [--precision.dtype D]

  DIR          a run's folder: --out of megavid train; nothing is written to it
  --step N     a step that it has taken
  --ranks N    ranks of this machine (default: as many as took the step then)
  --routing recorded
               every token goes to the experts that it went to then, in the steps that the run recorded (train with
               --log.routing_interval_steps): no flipped top-k tells two layouts or precisions apart

Loads the last checkpoint before step N (none: the run begins anew), takes the steps up to N on the run's own samples
and noise, and compares loss and gradient norm with the recorded ones: bit for bit in the layout of then, which is the
default; to 1e-5 in another one (--ranks, --parallel.*). Exit status 0 if they agree, 4 if not.

In another precision (--precision.dtype) the gap is told, not judged.

A step that does not repeat was hit by something outside of the run: a bad GPU or host, other data, other code.

  megavid replay runs/7b --step 1200
  megavid replay runs/7b --step 1200 --ranks 1 --parallel.tensor 1 --parallel.expert 1
"""


def main(argv: Sequence[str]) -> int:
    """Replay; see ``USAGE``. Raises ``NumericalStop`` where the step comes out otherwise."""
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    rest = list(argv)
    step = whole_number(take_option(rest, "--step"), "--step", default=0)
    ranks = whole_number(take_option(rest, "--ranks"), "--ranks", default=0)
    routing = take_option(rest, "--routing")
    if routing not in ("", "recorded"):
        raise ConfigError(f"--routing {routing} must be recorded; without it routers choose for themselves")
    if not rest or rest[0].startswith("-") or not step:
        raise ConfigError("replay needs a run's folder and --step N; see `megavid replay --help`")
    folder, overrides = Path(rest[0]), rest[1:]
    allowed = ("--parallel.", "--precision.")
    keys = [item for item in overrides if item.startswith("--") and not item.startswith(allowed)]
    if keys:
        raise ConfigError(f"replay: {keys[0]}: only --parallel.* and --precision.* may be given, the rest is the run's")
    silence_known_warnings()
    load_run(str(folder / "run.toml"), overrides)  # refuses a bad key before torch is imported

    with importing():
        import torch

        from megavid.parallel.launch import run_local_ranks
        from megavid.training.replay import recorded, replay_rank, routing_of
        from megavid.training.run import local_device

    what = recorded(folder, step)
    record = routing_of(folder, step) if routing else None
    config = with_flags(what.config, overrides)
    num_ranks = ranks or what.ranks
    layout = layout_of(config, num_ranks)
    device = local_device(num_ranks)
    if num_ranks > 1:
        torch.set_num_threads(1)  # a pool of threads does not survive the fork of the ranks
    finish = functools.partial(_finish, what, layout.describe(), config)
    entry = functools.partial(replay_rank, config, layout, device, what, finish, routing=record)
    run_local_ranks(entry, num_ranks, device)
    return 0


def _finish(what: Any, layout: str, config: Any, reports: Sequence[Any], routing: str) -> None:
    from megavid.training.replay import compare

    is_good, lines = compare(what, reports[-1], layout, config, routing)
    print("\n".join(lines), flush=True)
    if not is_good:
        raise NumericalStop(f"step {what.step} comes out otherwise than it was recorded: {lines[-2]}")
