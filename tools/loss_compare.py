#!/usr/bin/env python
"""Compare the curves of two run folders: first step that differs, worst difference, a plot.

    python tools/loss_compare.py runs/a runs/b --tolerance 1e-5 --plot compare.png

Prints one line a figure. Exit status 0 where every common step agrees, 1 where a difference is over its tolerance,
2 where a folder has no curve or the two have no step in common.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megavid.errors import MegavidError
from megavid.training.metrics import read_rows
from megavid.training.plots import plot_runs

Row = dict[str, object]


@dataclass(frozen=True)
class Difference:
    """How one figure of two curves differs.

    Attributes:
        name: the figure.
        first_step: first common step where it is not the same number; 0 where it never is.
        worst: largest relative difference; infinite where only one run has a number.
        worst_step: its step.
    """

    name: str
    first_step: int
    worst: float
    worst_step: int


def relative(a: object, b: object) -> float:
    """|a - b| over the larger magnitude; 0 where both are missing, infinite where one is."""
    if not isinstance(a, (int, float)) or not isinstance(b, (int, float)):
        return 0.0 if a == b else math.inf
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0


def compare(a: Sequence[Row], b: Sequence[Row], name: str) -> Difference:
    """Compare figure ``name`` over the steps that both runs have."""
    other = {row["step"]: row.get(name) for row in b}
    gaps = [(int(str(row["step"])), relative(row.get(name), other[row["step"]])) for row in a if row["step"] in other]
    worst_step, worst = max(gaps, key=lambda gap: gap[1])
    return Difference(name, next((step for step, gap in gaps if gap > 0), 0), worst, worst_step if worst else 0)


def _layers(row: Row) -> dict[str, dict[str, list[list[float]]]]:
    layers = row["layers"]
    assert isinstance(layers, dict)
    return layers


def describe_routing(a: Sequence[Row], b: Sequence[Row], steps: set[object]) -> str:
    """One line on how many (token, expert) pairs two runs routed differently.

    From counts by layer, noise bucket and expert, so it is what must have differed at least: two tokens that swapped
    experts within one bucket do not show.
    """
    other = {row["step"]: row for row in b}
    moved, total, first = 0.0, 0.0, 0
    for row in a:
        if row["step"] not in steps or row["step"] not in other:
            continue
        here, there = (_layers(r) for r in (row, other[row["step"]]))
        before = moved
        for layer, stats in here.items():
            for mine, theirs in zip(stats["counts"], there[layer]["counts"]):
                moved += sum(abs(x - y) for x, y in zip(mine, theirs)) / 2
                total += sum(mine)
        first = first or (int(str(row["step"])) if moved > before else 0)
    if total == 0:
        return "routing: router.jsonl has none of these steps in both runs (it is written every log.interval_steps)"
    since = f", the first at step {first}" if first else ""
    return f"routing: at least {moved:.0f} of {total:.0f} (token, expert) pairs differ{since}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, help="run folder, or its metrics.jsonl")
    parser.add_argument("b", type=Path, help="run folder, or its metrics.jsonl")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="largest relative difference of loss (default: 0, bitwise)"
    )
    parser.add_argument(
        "--grad-tolerance", type=float, default=None, help="the same for grad_norm (default: 10 x --tolerance)"
    )
    parser.add_argument("--steps", type=int, default=0, help="compare only the first steps up to this one")
    parser.add_argument("--plot", type=Path, help="write both curves to this PNG")
    args = parser.parse_args(argv)
    try:
        runs = [read_rows(path / "metrics.jsonl" if path.is_dir() else path) for path in (args.a, args.b)]
    except MegavidError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    a, b = ([row for row in run if not args.steps or int(str(row["step"])) <= args.steps] for run in runs)
    common = {row["step"] for row in a} & {row["step"] for row in b}
    if not common:
        print(f"error: {args.a} and {args.b} have no step in common", file=sys.stderr)
        return 2
    print(f"{len(common)} common steps ({len(a)} in {args.a}, {len(b)} in {args.b})")
    tolerances = {
        "loss": args.tolerance,
        "grad_norm": 10 * args.tolerance if args.grad_tolerance is None else args.grad_tolerance,
    }
    is_over = False
    for name, tolerance in tolerances.items():
        gap = compare(a, b, name)
        if gap.first_step == 0:
            print(f"{name}: bitwise the same at every common step")
            continue
        is_over |= gap.worst > tolerance
        verdict = "over" if gap.worst > tolerance else "within"
        print(
            f"{name}: first differs at step {gap.first_step}; worst relative difference {gap.worst:.3g} at step "
            f"{gap.worst_step}, {verdict} {tolerance:g}"
        )
    routed = [path / "router.jsonl" for path in (args.a, args.b)]
    if all(path.is_file() for path in routed):
        print(describe_routing(*(read_rows(path) for path in routed), common))
    if args.plot:
        plot_runs([(str(args.a), a), (str(args.b), b)], args.plot, title="loss and gradient norm")
        print(f"wrote {args.plot}")
    return 1 if is_over else 0


if __name__ == "__main__":
    sys.exit(main())
