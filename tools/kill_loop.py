"""Kill a run at random points and resume it, N times: no checkpoint may be lost, no command hang, no bit differ.

    python tools/kill_loop.py --kills 200 --seed 7

Runs two CPU ranks forked from a warm parent, with faults of tests/support/faults.py: kill -9 of the launcher or a rank
by the clock or at a change of the file system, half-written files, ENOSPC, EIO, stale reads, SIGSTOP. ``--first`` and
``--kills`` cut the loop into slices that append to ``--results``; ``--table`` prints what a file of results holds.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.kill_loop import KillLoop, Outcome, file_system_of, table, to_line  # noqa: E402
from tests.support.warm_parent import WarmParent  # noqa: E402


def main() -> int:
    """Run the loop, or print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="faults with a resume behind each (default %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first fault (default %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of the faults (default %(default)s)")
    parser.add_argument("--folder", type=Path, help="where runs are written (default: a temporary folder)")
    parser.add_argument("--results", type=Path, help="append one line of JSON for each resume")
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="print the table of a file of results and end")
    arguments = parser.parse_args()
    if arguments.table:
        lines = arguments.table.read_text().splitlines()
        print(table([Outcome(**json.loads(line)) for line in lines]))
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name, tqdm(total=arguments.kills, unit="resume") as bar:
        folder = Path(name)
        print(f"seed {arguments.seed}, file system {file_system_of(folder)}, faults {arguments.first} to "
              f"{arguments.first + arguments.kills - 1}")  # fmt: skip

        def note(outcome: Outcome) -> None:
            bar.update()
            if arguments.results:
                with arguments.results.open("a") as file:
                    file.write(to_line(outcome) + "\n")

        (folder / "commands").mkdir()
        with WarmParent(folder / "commands") as warm:
            loop = KillLoop(warm, folder, arguments.seed)
            loop.run(arguments.first, arguments.kills, note)
    print(table(loop.outcomes))
    longest = max(outcome.seconds for outcome in loop.outcomes)
    print(f"{len(loop.outcomes)} resumes, no checkpoint lost, no hang, every finished run bitwise the undisturbed one; "
          f"longest command {longest:.1f} s; {time.monotonic() - began:.0f} s in all")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
