"""The search for the best layout: every legal one, cheap bounds first, the best by step time among those that fit.

Owns the order in which layouts are judged and why each runner-up loses. What is tried is ``enumerate``'s, what is legal
``megavid.plan.layout``'s to say, what fits ``memory``'s, what it takes ``time``'s. The bounds are never above what they
bound, so nothing better is skipped; a test searches small worlds without them.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from megavid.config.schema import RunConfig
from megavid.errors import ConfigError
from megavid.plan.answer import Answer, plan_run
from megavid.plan.bounds import RECOMPUTE
from megavid.plan.enumerate import Point, Space, Trial
from megavid.plan.job import Job
from megavid.plan.memory import GIB, worst_memory
from megavid.plan.time import step_time

LARGE_TRIED = 24
"""Layouts that do not fit and might be faster than the best: so many are timed, those with the lowest bounds."""
LARGE_SHOWN = 2
SMALLEST_TRIED = 2000
"""Points that are looked at to name the smallest layout where none fits."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layout of the ranking, and why it stands where it stands."""

    answer: Answer
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        candidates: layouts that fit, the best first.
        too_large: layouts that would be faster than the best but do not fit, the fastest first.
        counts: points tried, those that may fit by their bounds (light), and layouts judged in full and found to fit.
        notes: what bounds the search itself, in words.
    """

    candidates: tuple[Candidate, ...]
    too_large: tuple[Candidate, ...]
    counts: dict[str, int]
    notes: tuple[str, ...]


def search(
    config: RunConfig,
    clip: tuple[int, int, int],
    job: Job,
    *,
    runners_up: int = 5,
    pinned: Collection[str] = (),
) -> Found:
    """The best layouts for clips of this size, one in each pack.

    Args:
        config: the run; its layout counts for nothing but the keys that are not enumerated.
        clip: frames, height and width in pixels.
        job: what it runs on.
        runners_up: how many layouts are wanted after the best.
        pinned: keys of the config that keep their values, such as ``parallel.tensor``.

    Raises:
        ConfigError: no layout is legal, or none fits; says by how much the smallest does not.
    """
    space = Space(config, job, clip, pinned)
    judge = _Judge(space, wanted=runners_up + 1)
    points = space.points()
    for point in points:
        if not judge.take(point):
            break
    if not judge.best:
        raise ConfigError(_nothing_fits(space, points))

    def answer(trial: Trial) -> Answer:
        return plan_run(trial.config, trial.workload, job)

    candidates = [Candidate(first := answer(judge.best[0][1]), "the best")]
    for _, trial in judge.best[1:]:
        candidates.append(Candidate(loser := answer(trial), why_slower(first, loser)))
    large = [Candidate(loser := answer(trial), why_too_large(first, loser)) for trial in judge.faster_but_large()]
    counts = {"tried": space.tried, "light": len(points), "judged": judge.judged, "fit": judge.fit}
    return Found(tuple(candidates), tuple(large), counts, _notes(first))


class _Judge:
    """Takes points in the order of their bounds, keeps the best that fit, and says when no later one can be better."""

    def __init__(self, space: Space, *, wanted: int) -> None:
        self.space, self.wanted = space, wanted
        self.best: list[tuple[float, Trial]] = []
        self.large: list[Trial] = []
        self.judged = self.fit = 0
        self._settled: set[object] = set()

    def take(self, point: Point) -> bool:
        """Judge one; False where it and all after it are slower than what is wanted."""
        if len(self.best) == self.wanted and point.floor_s > self.best[-1][0]:
            return False
        within_s = self.best[-1][0] if len(self.best) == self.wanted else math.inf
        for trial in self.space.trials(point, within_s):
            key = (point.base, trial.layout.context)
            if key not in self._settled:  # else it already fits with less recomputation, and is faster
                self._settled |= {key} if self._judge(trial) else set()
        return True

    def faster_but_large(self) -> list[Trial]:
        """Layouts that would beat the best if they fitted, the fastest first."""
        found = sorted(((self._time(trial), trial) for trial in self.large), key=lambda pair: pair[0])
        return [trial for seconds, trial in found if seconds < self.best[0][0]][:LARGE_SHOWN]

    def _judge(self, trial: Trial) -> bool:
        """Whether it fits; if it does, it is timed and put where it belongs."""
        self.judged += 1
        memory = worst_memory(trial.config, trial.layout, trial.workload, hardware=self.space.job.hardware)[1]
        if memory.total > self.space.job.limit:
            if len(self.large) < LARGE_TRIED:
                self.large.append(trial)
            return False
        self.fit += 1
        self.best.append((self._time(trial), trial))
        self.best.sort(key=lambda pair: pair[0])
        del self.best[self.wanted :]
        return True

    def _time(self, trial: Trial) -> float:
        job = self.space.job
        return step_time(trial.config, trial.layout, trial.workload, job.hardware, job.calibration).total


# Words


def why_slower(best: Answer, loser: Answer) -> str:
    """The parts of the step that make the difference, the largest first."""
    total = loser.time.total - best.time.total
    names = dict.fromkeys([*loser.time.parts, *best.time.parts])
    differences = {name: loser.time.parts.get(name, 0.0) - best.time.parts.get(name, 0.0) for name in names}
    worse = sorted(differences.items(), key=lambda pair: -pair[1])
    causes = [f"{name.replace('_', ' ')} +{seconds:.2f} s" for name, seconds in worse[:2] if seconds > 0.05 * total]
    gains = [f"{name.replace('_', ' ')} {seconds:.2f} s" for name, seconds in worse[-1:] if seconds < -0.25 * total]
    share = total / best.time.total
    if not causes or share < 5e-4:
        return "as fast within the last digit"
    return f"{share:.1%} slower: " + ", ".join(causes) + (f" (but {gains[0]})" if gains else "")


def why_too_large(best: Answer, loser: Answer) -> str:
    """By how much it does not fit, and what takes the room."""
    over = (loser.memory.total - loser.hardware.memory_bytes * (1.0 - loser.headroom)) / GIB
    part, size = max(loser.memory.parts.items(), key=lambda pair: pair[1])
    share = 1.0 - loser.time.total / best.time.total
    return (
        f"{share:.1%} faster, but {over:.1f} GiB too large: {part.replace('_', ' ')} take {size / GIB:.1f} of "
        f"{loser.memory.total / GIB:.1f} GiB"
    )


def _notes(best: Answer) -> tuple[str, ...]:
    notes = ["TP and ETP are kept inside an NVLink domain, and one clip stands in each pack."]
    batch, micro = best.config.train.global_batch_size, best.config.train.micro_batch_size
    world = best.layout.world_size
    if batch < world:
        notes.append(
            f"train.global_batch_size = {batch} packs bounds data parallelism: at most {batch} replicas of {world:,} "
            f"GPUs, so that every replica spans at least {-(-world // batch)}. A larger batch would allow more."
        )
    if best.microbatches < 4 * best.layout.pp and best.layout.pp > 1:
        notes.append(
            f"{best.microbatches} microbatches of {micro} for {best.layout.pp} stages: a larger "
            "train.global_batch_size would shrink the bubble."
        )
    return tuple(notes)


def _nothing_fits(space: Space, points: list[Point]) -> str:
    world, limit = space.job.world_size, space.job.limit / GIB
    if not points:
        kept = f" with {', '.join(sorted(space.pinned))} as given" if space.pinned else ""
        return (
            f"no layout of {world} GPUs{kept} is legal for train.global_batch_size = "
            f"{space.config.train.global_batch_size} and holds the state in {limit:.1f} GiB; change --world-size, "
            "--gpu or train.global_batch_size"
        )
    least = [point for point in points if point.recompute == RECOMPUTE[-1]][:SMALLEST_TRIED]
    sizes = [
        (worst_memory(trial.config, trial.layout, trial.workload)[1].total, trial.layout.describe())
        for point in least
        for trial in space.trials(point)
    ]
    size, layout = min(sizes, default=(0, "none is legal"))
    return (
        f"no layout of {world} GPUs fits: the smallest ({layout}, recompute full) needs {size / GIB:.1f} of "
        f"{limit:.1f} GiB; raise --world-size, take another --gpu, or shorten the clip"
    )
