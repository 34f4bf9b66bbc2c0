"""Tables and numbers as people read them in a terminal of 80 to 120 columns: plain ASCII, aligned, no colours.

Owns the forms; what is in a table is the caller's.
"""

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 100
"""Columns that reports keep to."""
BAR = 24
"""Characters of a bar that stands for the whole."""

_STEPS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def table(rows: Sequence[Sequence[str]], *, heading: Sequence[str] = (), left: int = 1, indent: int = 2) -> list[str]:
    """Lines of a table: the first ``left`` columns to the left, the others to the right; the last is not padded."""
    cells = [list(heading), *map(list, rows)] if heading else [list(row) for row in rows]
    if not cells:
        return []
    columns = max(len(row) for row in cells)
    cells = [row + [""] * (columns - len(row)) for row in cells]
    widths = [max(len(row[column]) for row in cells) for column in range(columns)]
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append((" " * indent + "  ".join(padded)).rstrip())
    return lines


def bar(share: float) -> str:
    """A bar for a share from 0 to 1; anything above nothing shows."""
    return "#" * max(round(share * BAR), 1 if share > 0.002 else 0)


def wrapped(name: str, text: str, *, label: int = 12, indent: int = 2) -> list[str]:
    """``name`` and beside it ``text``, wrapped under itself."""
    first = " " * indent + name.ljust(label)
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=" " * (indent + label), break_on_hyphens=False
    ) or [first.rstrip()]


def section(title: str, lines: Iterable[str]) -> list[str]:
    """A titled block with an empty line before it; nothing where there are no lines."""
    body = list(lines)
    return ["", title, *body] if body else []


def scaled(value: float, unit: str = "", *, digits: int = 3) -> str:
    """A number with three digits and a decimal prefix: ``6.18 P``, ``512 k``, ``0``."""
    size = abs(value)
    for step, prefix in _STEPS:
        # Compared after rounding, so that 999.96 does not read 1000.
        if size >= step * (1 - 0.5 * 10**-digits):
            return f"{significant(value / step, digits)} {prefix}{unit}"
    return f"{significant(value, digits)} {unit}".rstrip()


def significant(value: float, digits: int = 3) -> str:
    """A number with so many digits that count, never in powers of ten."""
    if value == 0:
        return "0"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if whole == 0:
        leading = 0
        rest = abs(value)
        while rest < 0.1 and leading < 6:
            rest, leading = rest * 10, leading + 1
        return f"{value:.{digits + leading}f}"
    return f"{value:,.{max(digits - whole, 0)}f}"


def percent(share: float) -> str:
    """``34%``, and ``0.4%`` or ``0.02%`` where a whole number would hide it."""
    if 0 < abs(share) < 0.000995:
        return f"{share * 100:.2g}%" if abs(share) > 5e-6 else "0%"
    return f"{share * 100:.1f}%" if abs(share) < 0.0995 else f"{share * 100:.0f}%"


def words(part: str) -> str:
    """A key of a report as words: ``self_attention`` reads ``self attention``."""
    return part.replace("_", " ")


def billions(number: int) -> str:
    """Parameters: ``99.26 B``; small models in millions."""
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    for limit, size, unit in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{significant(seconds / size)} {unit}"
    return f"{significant(seconds / 86400)} days"


def dollars(amount: float) -> str:
    """``$1,234``, with cents below ten dollars."""
    return f"${amount:,.0f}" if amount >= 10 else f"${amount:,.2f}"
