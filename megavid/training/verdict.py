"""Who is to blame when ranks stand still, from what those that still speak say.

Owns the rule and its words; pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from megavid.training.flight import LastCall

SHOWN = 4
"""Ranks that a line names; more are counted."""


@dataclass(frozen=True)
class Report:
    """What one rank says of itself, and of the processes of its host.

    Attributes:
        rank: who speaks.
        step: the last step that it has done.
        last: the last collective that it entered.
        neighbours: last collectives of the other ranks of its host, read from shared memory: also of those that do not
            speak.
    """

    rank: int
    step: int
    last: LastCall
    neighbours: Mapping[int, LastCall]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        near = {str(rank): call.to_json() for rank, call in self.neighbours.items()}
        return {"rank": self.rank, "step": self.step, "last": self.last.to_json(), "neighbours": near}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """What ``to_json`` gave."""
        near = {int(rank): LastCall(**call) for rank, call in fields["neighbours"].items()}
        return cls(fields["rank"], fields["step"], LastCall(**fields["last"]), near)


def judge(reports: Mapping[int, Report], hosts: Mapping[int, str], now: float, *, is_deaf: bool = False) -> str:
    """The ranks that hold up the others, with host and last collective, as one line.

    In this order: ranks that do not speak (stopped, dead, or their machine is); ranks that stand outside of any
    collective while others wait in one; the rank that has entered the fewest.

    Args:
        reports: of the ranks that spoke.
        hosts: of every rank.
        now: seconds of the epoch.
        is_deaf: the store through which ranks speak does not answer: rank 0 keeps it, where no launcher does.
    """
    known: dict[int, LastCall] = {}
    for report in reports.values():
        known.update(report.neighbours)
    known.update({rank: report.last for rank, report in reports.items()})
    silent = [0] if is_deaf else sorted(hosts.keys() - reports.keys())
    if silent:
        return _line(silent, "does not answer", known, hosts, now)
    outside = sorted(rank for rank, report in reports.items() if not report.last.is_inside)
    if outside and (len(outside) < len(reports) or len(reports) == 1):
        return _line(outside, "stands still outside of any collective", known, hosts, now)
    fewest = min(report.last.sequence for report in reports.values())
    behind = sorted(rank for rank, report in reports.items() if report.last.sequence == fewest)
    what = "is behind the others" if len(behind) < len(reports) else "stands still like all others"
    return _line(behind, what, known, hosts, now)


def _line(ranks: list[int], what: str, known: Mapping[int, LastCall], hosts: Mapping[int, str], now: float) -> str:
    parts = []
    for rank in ranks[:SHOWN]:
        last = known[rank].text(now) if rank in known else "unknown, as no rank of that host answers"
        parts.append(f"rank {rank} on {hosts[rank]} {what}; it last entered: {last}")
    more = f"; and {len(ranks) - SHOWN} more ranks" if len(ranks) > SHOWN else ""
    return "; ".join(parts) + more
