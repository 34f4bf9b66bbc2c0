"""Whether what the ranks of a job say fits together, from recordings alone: nothing unmatched, no order twice, no wait
without end.

Owns the three checks and the folding of a job onto one rank for each pipeline stage. Every call blocks here until its
other sides have come to it (only calls of one batch are issued together): what runs to the end under this rule also
does where calls run aside, on streams of their own, or into buffers.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from megavid.plan.layout import DENSE_AXES, Layout
from megavid.profiling.collectives import ALONE, Call

Recordings = Mapping[int, Sequence[Call]]
Where = tuple[str, tuple[int, ...]]


@dataclass
class Match:
    """What was found.

    Attributes:
        problems: one sentence each; none if the schedule is right.
        sends: sends that met their receive.
        collectives: calls of collectives that were held against those of another recorded rank.
        unseen: sends and receives whose other side nobody recorded.
    """

    problems: list[str] = field(default_factory=list)
    sends: int = 0
    collectives: int = 0
    unseen: int = 0


@dataclass(frozen=True)
class Folding:
    """A job in which all ranks of a pipeline stage say the same, folded onto the first rank of each stage.

    Attributes:
        layout: of the job, or None where every rank has a recording of its own.
    """

    layout: Layout | None = None

    def representative(self, rank: int) -> int:
        """Whose recording stands for that of ``rank``."""
        if self.layout is None:
            return rank
        stage = self.layout.world_size // self.layout.pp
        return rank // stage * stage

    def where(self, call: Call) -> Where:
        """The group of a call: its name and the ranks with recordings that it may have."""
        return call.group, tuple(sorted({self.representative(rank) for rank in call.ranks}))

    def way(self, call: Call, rank: int) -> tuple[object, ...]:
        """Of a send or receive: from whom to whom; where ranks share a recording, how far along each axis."""
        assert call.peer is not None
        source, target = (rank, call.peer) if call.operation == "send" else (call.peer, rank)
        far = _displacement(self.layout, source, target) if self.layout else ()
        return self.where(call), self.representative(source), self.representative(target), far


def check(recordings: Recordings, layout: Layout | None = None) -> Match:
    """Hold recordings of one step against each other.

    Args:
        recordings: calls of each rank, all ranks of the job; or with ``layout`` those of the first rank of each stage.
        layout: of a job whose ranks of one stage say the same (see ``differences``).
    """
    folding, match = Folding(layout), Match()
    _check_orders(recordings, folding, match)
    _check_messages(recordings, folding, match)
    _check_progress(recordings, folding, match)
    return match


def differences(layout: Layout, first: tuple[int, Sequence[Call]], other: tuple[int, Sequence[Call]]) -> Iterator[str]:
    """Where two ranks of one stage do not say the same, each in its own groups and to its own neighbours."""
    (rank, calls), (other_rank, other_calls) = first, other
    for number, (mine, others) in enumerate(zip(calls, other_calls)):
        if _impersonal(mine, rank, layout) != _impersonal(others, other_rank, layout):
            yield f"call {number}: rank {rank} {describe(mine)}, rank {other_rank} {describe(others)}"
            return
    if len(calls) != len(other_calls):
        yield f"rank {rank} makes {len(calls)} calls, rank {other_rank} {len(other_calls)}"


def describe(call: Call) -> str:
    """A call in a few words."""
    peer = "" if call.peer is None else f" with {call.peer}"
    return f"{call.operation} {list(call.shape)} {call.dtype} in {call.group}{peer}"


# Orders -------------------------------------------------------------------------------------------------------------


def _check_orders(recordings: Recordings, folding: Folding, match: Match) -> None:
    """Every group sees one order of collectives, with shapes that fit."""
    said: dict[Where, dict[int, list[Call]]] = defaultdict(lambda: defaultdict(list))
    for rank, calls in recordings.items():
        for call in calls:
            if call.group != ALONE and not _is_message(call):
                said[folding.where(call)][rank].append(call)
    for where, by_rank in said.items():
        for rank in where[1]:
            if rank in recordings and rank not in by_rank:
                by_rank[rank] = []  # it never came
        first, *others = sorted(by_rank)
        match.collectives += len(by_rank[first])
        match.problems += _uneven(first, by_rank[first], folding)
        for other in others:
            match.collectives += len(by_rank[other])
            match.problems += _two_orders(where, (first, by_rank[first]), (other, by_rank[other]))


def _two_orders(where: Where, first: tuple[int, list[Call]], other: tuple[int, list[Call]]) -> Iterator[str]:
    (rank, calls), (other_rank, other_calls) = first, other
    for number, (mine, others) in enumerate(zip(calls, other_calls)):
        if not _fit(mine, rank, others, other_rank):
            mine_said, others_said = describe(mine), describe(others)
            yield f"{where[0]}, call {number}: rank {rank} says {mine_said}, rank {other_rank} {others_said}"
            return
    if len(calls) != len(other_calls):
        yield f"{where[0]}: rank {rank} makes {len(calls)} calls, rank {other_rank} {len(other_calls)}"


def _fit(mine: Call, rank: int, others: Call, other_rank: int) -> bool:
    """Whether two members of a group make the same call."""

    def common(call: Call) -> tuple[object, ...]:
        shape = call.shape[1:] if call.splits else call.shape
        return call.operation, shape, call.dtype, call.reduction, call.peer, len(call.ranks), call.splits is None

    if common(mine) != common(others):
        return False
    if mine.splits is None or others.splits is None or rank not in others.ranks:
        return True
    here, there = mine.ranks.index(rank), mine.ranks.index(other_rank)
    return mine.splits[0][there] == others.splits[1][here] and others.splits[0][here] == mine.splits[1][there]


def _uneven(rank: int, calls: Sequence[Call], folding: Folding) -> Iterator[str]:
    """All-to-alls whose sides cannot fit if all ranks of a stage say the same."""
    for call in calls:
        if folding.layout and call.splits and len({*call.splits[0], *call.splits[1]}) > 1:
            yield f"{call.group}: rank {rank}'s all-to-all is uneven, {call.splits}: record all of its ranks"
            return


# Sends --------------------------------------------------------------------------------------------------------------


def _check_messages(recordings: Recordings, folding: Folding, match: Match) -> None:
    """Every send has its receive, of the same shape and in the same order, and every receive its send."""
    ways: dict[tuple[object, ...], tuple[list[Call], list[Call]]] = defaultdict(lambda: ([], []))
    for rank, calls in recordings.items():
        for call in filter(_is_message, calls):
            if folding.representative(call.peer or 0) in recordings:
                ways[folding.way(call, rank)][call.operation == "recv"].append(call)
            else:
                match.unseen += 1
    for (where, source, target, *_), (sent, received) in ways.items():
        name = f"{where[0]} from {source} to {target}"  # type: ignore[index]
        for number, (send, receive) in enumerate(zip(sent, received)):
            if (send.shape, send.dtype) != (receive.shape, receive.dtype):
                match.problems.append(f"{name}, number {number}: {describe(send)} meets {describe(receive)}")
                break
        match.sends += min(len(sent), len(received))
        if len(sent) != len(received):
            match.problems.append(f"{name}: {len(sent)} sends, {len(received)} receives")


# Progress -----------------------------------------------------------------------------------------------------------


class _Progress:
    """Ranks that go from batch to batch as soon as all calls of one are through."""

    def __init__(self, recordings: Recordings, folding: Folding) -> None:
        self.recordings, self.folding = recordings, folding
        self.ahead = {
            rank: deque(list(batch) for _, batch in groupby(calls, key=lambda call: call.batch))
            for rank, calls in recordings.items()
        }
        self.open = dict.fromkeys(recordings, 0)  # calls of each rank's batch that are not through
        self.collectives: dict[Where, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        self.messages: dict[tuple[object, ...], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        self.ready = deque(recordings)

    def run(self) -> dict[int, list[Call]]:
        """Let all ranks run; returns the batch that each rank which cannot go on waits in."""
        waits: dict[int, list[Call]] = {}
        while self.ready:
            rank = self.ready.popleft()
            if self.open[rank]:
                continue
            waits.pop(rank, None)
            if self.ahead[rank]:
                batch = waits[rank] = self.ahead[rank].popleft()
                self.open[rank] = len(batch)
                for call in batch:
                    self._issue(rank, call)
        return waits

    def _issue(self, rank: int, call: Call) -> None:
        if call.group == ALONE:
            self._through(rank)
        elif _is_message(call):
            if self.folding.representative(call.peer or 0) not in self.recordings:
                self._through(rank)
                return
            waiting = self.messages[self.folding.way(call, rank)]
            waiting[call.operation == "recv"].append(rank)
            if all(waiting):
                for side in waiting:
                    self._through(side.pop(0))
        else:
            where = self.folding.where(call)
            came = self.collectives[where]
            came[rank] += 1
            members = [member for member in where[1] if member in self.recordings]
            if all(came[member] for member in members):
                for member in members:
                    came[member] -= 1
                    self._through(member)

    def _through(self, rank: int) -> None:
        self.open[rank] -= 1
        if not self.open[rank]:
            self.ready.append(rank)


def _check_progress(recordings: Recordings, folding: Folding, match: Match) -> None:
    """No rank waits for ever."""
    waits = _Progress(recordings, folding).run()
    if waits:
        said = "; ".join(f"rank {rank} in {describe(batch[0])}" for rank, batch in sorted(waits.items())[:8])
        match.problems.append(f"{len(waits)} ranks wait for ever: {said}")


# ---------------------------------------------------------------------------------------------------------------------


def _is_message(call: Call) -> bool:
    return call.operation in ("send", "recv")


def _displacement(layout: Layout, source: int, target: int) -> tuple[int, ...]:
    here, there = layout.coordinates(source), layout.coordinates(target)
    return tuple((there[axis] - here[axis]) % layout.size(axis) for axis in DENSE_AXES)


def _impersonal(call: Call, rank: int, layout: Layout) -> tuple[object, ...]:
    """A call without the names of ranks."""
    if call.peer is None:
        peer: object = None
    elif _is_message(call):
        peer = _displacement(layout, rank, call.peer)
    else:
        peer = call.ranks.index(call.peer)
    return (
        call.operation, call.group, len(call.ranks), call.shape, call.dtype, peer, call.splits, call.reduction,
        call.is_async, call.batch,
    )  # fmt: skip
