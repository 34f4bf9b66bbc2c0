"""``megavid diff RUN_A RUN_B``: where two runs part.

Owns the arguments and the exit status. The search is ``megavid.training.diff``'s.
"""

import argparse
from pathlib import Path
from typing import NoReturn

from megavid.errors import ConfigError

HELP = "the first step, layer and sample where two runs part, and whether by weights, data, routing or gradient"

_DESCRIPTION = """\
Finds where two runs of one model part, from what they wrote, and names the first cause in this order:

  weights    the first common checkpoint (before the step) whose tensors differ: layer, tensor, how many numbers
  data       the sample whose latents or caption differ, or that another one stands in for
  routing    the expert layer whose top-k fell otherwise (router.jsonl; logged every log.interval_steps)
  forward    the loss differs with the same samples and routing
  gradient   the loss is the same, the gradient norm is not

Exit status 0 if the runs agree, 1 if they part. Nothing is written.

  megavid diff runs/a runs/b
  megavid diff runs/tp2 runs/tp1 --tolerance 1e-5        layouts differ in the last bits by right"""


class _Parser(argparse.ArgumentParser):
    """Raises, so that a bad option is one line and exit status 2 like every other error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"diff: {message}; see `megavid diff --help`")


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    parser = _Parser(
        prog="megavid diff",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("one", type=Path, metavar="RUN_A", help="a run's folder")
    parser.add_argument("other", type=Path, metavar="RUN_B", help="another's")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="relative difference that counts as none (default: bitwise)"
    )
    arguments = parser.parse_args(argv)
    from megavid.training.diff import parting_of

    found = parting_of(arguments.one, arguments.other, tolerance=arguments.tolerance)
    if not found.cause:
        print("the runs agree: every common step and checkpoint is the same")
        return 0
    print(f"first step  {'none differs' if found.step is None else found.step}")
    print(f"cause       {found.cause}")
    print("\n".join(found.details))
    return 1
