"""Whose time a step was: every moment of a traced step goes to one part of the model, or to none and is shown as such.

Owns the rule. The host's thread is a stack of slices; the moment belongs to the innermost one. Regions name forward
parts. A node of autograd belongs to the part whose operator made it, which they tell by autograd's sequence numbers; a
region inside a node is recomputation. A moment inside an operator is work, one between operators is the host's (Python,
autograd, the schedule), inside a region of a collective it is communication. What lies in no region but the step's own
and the schedule's belongs to no part, for neither names one.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from megavid.ops.regions import PREFIX
from megavid.profiling.trace import Slice
from megavid.profiling.waits import COMMUNICATION

Phase = Literal["forward", "backward", "recompute", "communication", "step"]
Kind = Literal["operators", "host"]

STEP = "step"
"""The region of a whole step."""
STEP_PARTS = frozenset(
    {
        "input_wait", "batch", "zero_gradients", "messages", "gradients", "optimizer", "average", "statistics",
        "reports",
    }
)  # fmt: skip
"""Regions of a step that are neither forward nor backward pass."""
BACKWARD_PARTS = frozenset({"autograd"})
"""Regions of the backward pass that are no node's: autograd's engine, between one node and the next."""
SCHEDULE = "schedule"
"""The region of all microbatches' passes. It only says when they were: what is in no region inside it belongs to no
part."""
NOBODY = "none"
"""The part of moments that belong to none."""

_NODE = "autograd::engine::evaluate_function: "
_ACCUMULATE = "AccumulateGrad"


class Owner(NamedTuple):
    """Whose a moment is.

    Attributes:
        phase: of the step.
        part: of the model or the step; the axis in communication.
        kind: inside an operator, or between operators.
    """

    phase: Phase
    part: str
    kind: Kind


@dataclass
class Split:
    """One traced step of one rank.

    Attributes:
        seconds: the whole step.
        owners: seconds of every owner; they sum to ``seconds``.
        calls: seconds that each call of an expert layer took, (layer, number of the call) to forward and backward.
    """

    seconds: float
    owners: dict[Owner, float] = field(default_factory=dict)
    calls: dict[tuple[int, int], float] = field(default_factory=dict)

    @property
    def unattributed_s(self) -> float:
        """Seconds that belong to no part."""
        return sum(seconds for owner, seconds in self.owners.items() if owner.part == NOBODY)

    def of(self, *, phase: str = "", part: str = "", kind: str = "") -> float:
        """Seconds of the owners that have all that is given."""
        return sum(
            seconds
            for owner, seconds in self.owners.items()
            if phase in ("", owner.phase) and part in ("", owner.part) and kind in ("", owner.kind)
        )


class Call(NamedTuple):
    """One call of a forward region: a number of its own, so that its nodes' backward pass can be added to it."""

    part: str
    layer: int
    number: int


class Frame(NamedTuple):
    """What a slice means where it stands.

    Attributes:
        stop_ns: where it ends.
        owner: whose its own moments are.
        call: the forward region that it is in, or whose node it runs.
        in_node: whether autograd is running a node.
    """

    stop_ns: int
    owner: Owner
    call: Call
    in_node: bool


NO_CALL = Call(NOBODY, -1, -1)


def split_steps(slices: Sequence[Slice]) -> list[Split]:
    """Split every traced step of a rank, in order."""
    steps = [piece for piece in slices if piece.name == PREFIX + STEP]
    return [_split(inside(slices, step)) for step in sorted(steps)]


def inside(slices: Sequence[Slice], step: Slice, thread: int | None = None) -> list[Slice]:
    """Slices of a thread (the step's own if None) within a step, outer ones first, the step at the front."""
    wanted = step.thread if thread is None else thread
    found = [
        piece
        for piece in slices
        if piece.thread == wanted and step.start_ns <= piece.start_ns and piece.stop_ns <= step.stop_ns
    ]
    if wanted != step.thread:
        found.append(step)
    return sorted(found, key=lambda piece: (piece.start_ns, -piece.stop_ns, piece.name != PREFIX + STEP))


def _split(slices: Sequence[Slice]) -> Split:
    """Split one step; ``slices`` are nested and sorted, outer ones first, the step itself at the front."""
    step = slices[0]
    made_by = makers(slices)
    owners: dict[Owner, int] = defaultdict(int)
    calls: dict[tuple[int, int], int] = defaultdict(int)
    for frame, nanoseconds in moments(slices, made_by):
        owners[frame.owner] += nanoseconds
        if frame.call.part == "experts" and frame.owner.phase in ("forward", "backward"):
            calls[frame.call.layer, frame.call.number] += nanoseconds
    return Split(
        seconds=(step.stop_ns - step.start_ns) / 1e9,
        owners={owner: value / 1e9 for owner, value in owners.items()},
        calls={call: value / 1e9 for call, value in calls.items()},
    )


def makers(slices: Sequence[Slice]) -> dict[int, Call]:
    """The forward call that made each node of autograd.

    Operators carry the number that the next node will have, whether or not they make it: the last one made it.
    """
    made_by: dict[int, Call] = {}
    for piece, frame in zip(slices, frames(slices, {}), strict=True):
        if piece.sequence >= 0 and not frame.in_node:
            made_by[piece.sequence] = frame.call
    return made_by


def moments(slices: Sequence[Slice], made_by: Mapping[int, Call]) -> Iterator[tuple[Frame, int]]:
    """(innermost frame, nanoseconds) of every stretch of the step between two boundaries of slices."""
    stack: list[Frame] = []
    at = slices[0].start_ns
    for piece, frame in zip(slices, frames(slices, made_by), strict=True):
        while stack and stack[-1].stop_ns <= piece.start_ns:
            top = stack.pop()
            yield top, top.stop_ns - at
            at = top.stop_ns
        if stack:
            yield stack[-1], piece.start_ns - at
        at = piece.start_ns
        stack.append(frame)
    while stack:
        top = stack.pop()
        yield top, top.stop_ns - at
        at = top.stop_ns


def frames(slices: Iterable[Slice], made_by: Mapping[int, Call]) -> Iterator[Frame]:
    """What each slice means where it stands. A slice that outlives its parent by rounding is cut."""
    stack: list[Frame] = []
    numbers: dict[str, int] = defaultdict(int)
    for piece in slices:
        while stack and stack[-1].stop_ns <= piece.start_ns:
            stack.pop()
        if not stack:
            frame = Frame(piece.stop_ns, Owner("step", NOBODY, "host"), NO_CALL, False)
        else:
            parent = stack[-1]
            stop_ns = min(piece.stop_ns, parent.stop_ns)
            if parent.owner.phase == "communication":
                frame = parent._replace(stop_ns=stop_ns)
            elif piece.name.startswith(PREFIX):
                frame = _of_region(piece.name.removeprefix(PREFIX), stop_ns, parent, numbers)
            elif piece.name.startswith(_NODE):
                frame = _of_node(piece, stop_ns, made_by)
            else:
                is_work = parent.owner.kind == "operators" or _is_operator(piece.name)
                owner = parent.owner._replace(kind="operators" if is_work else "host")
                frame = parent._replace(stop_ns=stop_ns, owner=owner)
        stack.append(frame)
        yield frame


def _of_region(name: str, stop_ns: int, parent: Frame, numbers: dict[str, int]) -> Frame:
    if name.startswith(COMMUNICATION):
        axis = name.removeprefix(COMMUNICATION)
        return parent._replace(stop_ns=stop_ns, owner=Owner("communication", axis, "host"))
    part, _, layer = name.partition("/")
    if part == SCHEDULE:
        return parent._replace(stop_ns=stop_ns)
    if part in BACKWARD_PARTS:
        return Frame(stop_ns, Owner("backward", part, "host"), NO_CALL, False)
    if parent.in_node:
        return parent._replace(stop_ns=stop_ns, owner=Owner("recompute", part, "host"))
    phase: Phase = "step" if part in STEP_PARTS else "forward"
    call = Call(part, int(layer) if layer else -1, numbers[name])
    numbers[name] += 1
    return Frame(stop_ns, Owner(phase, part, "host"), call, False)


def _of_node(piece: Slice, stop_ns: int, made_by: Mapping[int, Call]) -> Frame:
    if piece.name.endswith(_ACCUMULATE):
        return Frame(stop_ns, Owner("backward", "accumulate", "host"), NO_CALL, True)
    call = made_by.get(piece.sequence, NO_CALL)
    return Frame(stop_ns, Owner("backward", call.part, "host"), call, True)


def _is_operator(name: str) -> bool:
    return "::" in name and not name.startswith(("autograd::", "torch::autograd::"))
