"""Whose time a step was on a GPU: what its kernels did, and where none ran, what the host was doing.

Owns the rule for GPUs; ``megavid.profiling.attribution`` says what each operator is part of. A moment belongs to the
part whose kernel runs; else to communication, if a collective's kernel runs (that is exposed communication); else to
what the host's thread was in, as a gap.
"""

from collections.abc import Iterator, Mapping, Sequence

from megavid.ops.regions import PREFIX
from megavid.profiling.attribution import STEP, Call, Frame, Split, frames, inside, makers, moments
from megavid.profiling.trace import Slice, Trace


def split_steps_of_gpu(trace: Trace) -> list[Split]:
    """Split every traced step of a rank, in order."""
    return [_split(trace, step) for step in sorted(piece for piece in trace.slices if piece.name == PREFIX + STEP)]


def _split(trace: Trace, step: Slice) -> Split:
    host = inside(trace.slices, step)
    made_by = makers(host)
    split = Split((step.stop_ns - step.start_ns) / 1e9)
    for frame, is_kernel, nanoseconds in _moments(trace, step, host, made_by):
        is_work = is_kernel and frame.owner.phase != "communication"
        owner = frame.owner._replace(kind="operators" if is_work else "host")
        split.owners[owner] = split.owners.get(owner, 0.0) + nanoseconds / 1e9
        if is_work and frame.call.part == "experts" and owner.phase in ("forward", "backward"):
            call = (frame.call.layer, frame.call.number)
            split.calls[call] = split.calls.get(call, 0.0) + nanoseconds / 1e9
    return split


def _moments(
    trace: Trace, step: Slice, host: Sequence[Slice], made_by: Mapping[int, Call]
) -> Iterator[tuple[Frame, bool, int]]:
    """(whose, whether a kernel runs, nanoseconds) of every stretch of the step."""
    launched = _frame_of_launch(trace.slices, step, made_by)
    kernels = [
        (kernel, launched[kernel.external])
        for kernel in trace.kernels
        if kernel.external in launched and kernel.stop_ns > step.start_ns and kernel.start_ns < step.stop_ns
    ]
    # What happens at each boundary: a kernel begins (1) or ends (-1), or the host turns to something else (0).
    events: list[tuple[int, int, int]] = []
    for number, (kernel, _) in enumerate(kernels):
        events += [(max(kernel.start_ns, step.start_ns), 1, number), (min(kernel.stop_ns, step.stop_ns), -1, number)]
    turns: list[Frame] = []
    at = step.start_ns
    for frame, nanoseconds in moments(host, made_by):
        events.append((at, 0, len(turns)))
        turns.append(frame)
        at += nanoseconds
    events.append((step.stop_ns, 0, len(turns)))
    turns.append(turns[-1])

    running: dict[int, Frame] = {}
    doing, at = turns[0], step.start_ns
    for now, change, number in sorted(events):
        if now > at:
            yield *_whose(running, doing), now - at
            at = now
        if change == 0:
            doing = turns[number]
        elif change > 0:
            running[number] = kernels[number][1]
        else:
            running.pop(number, None)


def _whose(running: Mapping[int, Frame], doing: Frame) -> tuple[Frame, bool]:
    work = next((frame for frame in running.values() if frame.owner.phase != "communication"), None)
    kernel = work or next(iter(running.values()), None)
    return (doing, False) if kernel is None else (kernel, True)


def _frame_of_launch(slices: Sequence[Slice], step: Slice, made_by: Mapping[int, Call]) -> dict[int, Frame]:
    """What every operator of the step means, by the number that its kernels carry; autograd has a thread of its own."""
    found: dict[int, Frame] = {}
    for thread in {piece.thread for piece in slices}:
        pieces = inside(slices, step, thread)
        for piece, frame in zip(pieces, frames(pieces, made_by), strict=True):
            if piece.external >= 0:
                found[piece.external] = frame
    return found
