"""Fit the free numbers of the planner's calibration to published runs: ``python tools/fit_calibration.py --write``.

Rewrites [fitted] and [errors] of ``megavid/plan/calibration.toml``; prints the hindcast. Deterministic, no torch.
"""

import argparse
from pathlib import Path

from megavid.plan.calibration import FREE
from megavid.plan.hindcast import Hindcast, hindcast, table_text

TARGET = Path(__file__).resolve().parents[1] / "megavid" / "plan" / "calibration.toml"
MARK = "# Below this line: written by `python tools/fit_calibration.py --write`; do not edit.\n"


def tables_of(found: Hindcast) -> str:
    """What the file holds below its mark."""
    numbers = found.calibration.numbers()
    source = f"fitted to {len(found.rows)} published runs of hindcast.toml by tools/fit_calibration.py"
    lines = [f'[fitted.{name}]\nvalue = {numbers[name]:.6g}\nsource = "{source}"\n' for name in FREE]
    errors = "\n".join(f"{name} = [{', '.join(f'{e:.4f}' for e in row)}]" for name, row in found.errors().items())
    lines.append(
        "# Predicted over published throughput less one, by accelerator, row by row in the order of hindcast.toml,\n"
        f"# with all rows of the row's publisher left out of the fit.\n[errors]\n{errors}\n"
    )
    return "\n".join(lines)


def main() -> None:
    """Fit, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace the numbers in {TARGET.name}")
    write = parser.parse_args().write
    found = hindcast()
    print(table_text(found))
    if write:
        kept = TARGET.read_text(encoding="utf-8").split(MARK)[0]
        TARGET.write_text(kept + MARK + "\n" + tables_of(found), encoding="utf-8")


if __name__ == "__main__":
    main()
