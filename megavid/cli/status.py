"""``megavid status DIR``: what a run is doing, during and after it, from its files alone.

Owns the options. What the files mean is ``megavid.training.status``'s; torch is not imported.
"""

import argparse
import json
from pathlib import Path
from typing import NoReturn

from megavid.errors import ConfigError

HELP = "what a run is doing, from its folder alone: step, ETA, MFU, checkpoint, restarts, running or crashed"

_DESCRIPTION = """\
Says what the run in DIR is doing: new, running, hung, stopped, finished or crashed, and by what that is known;
step, ETA, MFU, last checkpoint, restarts, skipped steps, damaged samples, slow hosts.

It reads files and tries the run's lock, so it works on a login node, without torch, while the run runs and after it
died. On another machine than the run's, where the lock may not show, a run counts as alive as long as it writes.

  megavid status runs/7b
  megavid status runs/7b --plot runs/7b/status.png      loss and MFU over all restarts
  megavid status runs/7b --json | jq .state"""


class _Parser(argparse.ArgumentParser):
    """Raises, so that a bad option is one line and exit status 2 like every other error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"status: {message}; see `megavid status --help`")


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status: 0 whatever the run's state, as long as it could be told."""
    parser = _Parser(
        prog="megavid status",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a run's folder: --out of megavid train")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw loss and MFU over restarts")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    arguments = parser.parse_args(argv)
    if arguments.plot is not None and arguments.plot.suffix != ".png":
        raise ConfigError(f"--plot {arguments.plot} must be a file that ends in .png")
    from megavid.training.status import read_tail, status_of

    status = status_of(arguments.folder)
    if arguments.json:
        print(json.dumps(status.to_json(), indent=1))
    else:
        print("\n".join(status.lines()))
    if arguments.plot is not None:
        from megavid.training.metrics import read_rows
        from megavid.training.plots import plot_restarts

        events = read_tail(arguments.folder / "events.jsonl", 1 << 30)
        plot_restarts(
            read_rows(arguments.folder / "metrics.jsonl"), events, arguments.plot, title=arguments.folder.name
        )
        if not arguments.json:
            print(f"{'plot':<11} {arguments.plot}")
    return 0
