"""Print commands' output into the pages that show it: ``python tools/print_pages.py [--check]``.

A page marks such a block with the command before it, and the fenced block after it is replaced::

    <!-- output of: megavid plan wan_14b --world-size 64 --gpu h100-80gb -->

Only commands that need neither torch nor files are allowed, so that a figure on a page is what the command prints.
"""

import argparse
import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

from megavid.cli.main import main as megavid

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/plan.md")
BLOCK = re.compile(r"(<!-- output of: megavid (plan [^>]*?) -->\n```(?:text)?\n)(.*?)(```\n)", re.S)


def output_of(arguments: str) -> str:
    """What ``megavid ARGUMENTS`` prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        status = megavid(shlex.split(arguments))
    if status:
        raise SystemExit(f"megavid {arguments} ended with status {status}")
    return text.getvalue()


def printed(page: str) -> str:
    """The text of a page with all its blocks printed anew."""
    return BLOCK.sub(lambda found: found[1] + output_of(found[2]) + found[4], page)


def main() -> None:
    """Rewrite the pages, or with --check say which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a page is out of date")
    is_check, old = parser.parse_args().check, []
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = printed(before)
        old += [name] if after != before else []
        if not is_check:
            path.write_text(after, encoding="utf-8")
    if old:
        print(("out of date: " if is_check else "rewritten: ") + ", ".join(old))
    sys.exit(1 if is_check and old else 0)


if __name__ == "__main__":
    main()
