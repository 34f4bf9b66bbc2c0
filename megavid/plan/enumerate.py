"""Every layout that a search tries, with bounds of what it takes.

Owns the enumeration. Enumerated: TP, SP (dense models), CP and its strategy, PP, VPP, EP, ETP, recomputation, micro
batch; data-parallel communication overlaps. Everything else, the global batch among it, stays as the config has it, as
does every key that is pinned. TP and ETP stay inside an NVLink domain. Only divisors are formed; what is legal stands
in ``megavid.plan.layout`` alone, which is asked for the few layouts that the bounds (``bounds``) leave over.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from megavid.config.schema import RunConfig
from megavid.errors import ConfigError
from megavid.plan.bounds import RECOMPUTE, STRATEGIES, Bounds, Recompute, Strategy
from megavid.plan.context import ContextPlan
from megavid.plan.job import Job
from megavid.plan.layout import Layout, layout_of
from megavid.plan.workload import Workload

Value = TypeVar("Value")
MICRO_BATCHES = (1, 2, 4)
"""Micro batches that are tried, beside the config's own."""
UNEVEN_VPP = 2
"""Model chunks of a stage that are tried where chunks cannot hold equal numbers of blocks."""


class Point(NamedTuple):
    """Degrees of every axis and what else is enumerated, but for the strategy of CP.

    Attributes:
        floor_s: seconds that a step takes at least.
        tp: tensor.
        sequence: Megatron's sequence parallelism.
        cp: context.
        pp: pipeline.
        vpp: chunks of a stage.
        ep: expert.
        etp: expert-tensor.
        micro: packs of a microbatch.
        mode: recomputation, as an index into ``RECOMPUTE``.
    """

    floor_s: float
    tp: int
    sequence: bool
    cp: int
    pp: int
    vpp: int
    ep: int
    etp: int
    micro: int
    mode: int

    @property
    def recompute(self) -> Recompute:
        """What the backward pass computes again."""
        return RECOMPUTE[self.mode]

    @property
    def base(self) -> tuple[object, ...]:
        """The same for points that differ in recomputation only."""
        return tuple(self[1:-1])


@dataclass(frozen=True, slots=True)
class Trial:
    """A legal layout: the run in it, the layout, its packs."""

    config: RunConfig
    layout: Layout
    workload: Workload


class Space:
    """All points for one model, one job and one clip.

    Args:
        config: the run.
        job: what it runs on.
        clip: frames, height and width in pixels; one in each pack.
        pinned: keys of the config, such as ``parallel.tensor``, that keep their values.
    """

    def __init__(self, config: RunConfig, job: Job, clip: tuple[int, int, int], pinned: Collection[str] = ()) -> None:
        self.pinned = frozenset(pinned)
        self.config, self.job = config, job
        self.tried = 0
        """Points formed so far."""
        strategies = self._free("parallel.context_strategy", STRATEGIES, config.parallel.context_strategy)
        self.bounds = Bounds(config, job, clip, strategies)

    def points(self) -> list[Point]:
        """Every point that may fit, those with the lowest bound first."""
        found = [point for degrees in self._degrees() for point in self._variants(*degrees)]
        return sorted(point for point in found if point.floor_s < math.inf)

    def trials(self, point: Point, within_s: float = math.inf) -> Iterator[Trial]:
        """The legal layouts of a point, one for each strategy of CP that means other degrees there.

        Args:
            point: degrees.
            within_s: strategies whose bound is above this are left out.
        """
        paces = self.bounds.pace(point.tp, point.sequence, point.cp, point.micro, point.recompute)
        # What the strategies add to the point's bound, which holds for the best of them.
        best = min(paces.values())
        seen: set[ContextPlan | None] = set()
        for strategy, pace in paces.items():
            if point.floor_s * (1.0 + (pace - best) / (best + self._expert_s(point))) > within_s:
                continue
            config = self._config(point, strategy)
            try:
                layout = layout_of(config, self.job.world_size)
            except ConfigError:
                continue
            if layout.context not in seen:
                seen.add(layout.context)
                yield Trial(config, layout, self.bounds.workload(point.tp * point.cp))

    def _expert_s(self, point: Point) -> float:
        return self.bounds.expert_s(point.tp * point.cp, point.ep, point.etp, point.micro)

    def _config(self, point: Point, strategy: Strategy) -> RunConfig:
        parallel = replace(
            self.config.parallel, tensor=point.tp, pipeline=point.pp, virtual_pipeline=point.vpp, context=point.cp,
            expert=point.ep, expert_tensor=point.etp, context_strategy=strategy, recompute=point.recompute,
            sequence="auto" if point.sequence or point.tp == 1 else False,
            overlap_grad_reduce=self._overlap[0], overlap_param_gather=self._overlap[1],
        )  # fmt: skip
        return replace(
            self.config,
            parallel=parallel,
            train=replace(self.config.train, micro_batch_size=point.micro),
            data=replace(self.config.data, pack_tokens=self.bounds.workload(point.tp * point.cp).pack_tokens),
        )

    @property
    def _overlap(self) -> tuple[bool, bool]:
        """Whether gradients and weights travel beside computation: always, unless the config pins it otherwise."""
        parallel = self.config.parallel
        reduce = parallel.overlap_grad_reduce if "parallel.overlap_grad_reduce" in self.pinned else True
        gather = parallel.overlap_param_gather if "parallel.overlap_param_gather" in self.pinned else reduce
        return reduce, gather

    def _free(self, key: str, values: tuple[Value, ...], pinned: Value) -> tuple[Value, ...]:
        """The values of a key that may be tried: all, or the one that is pinned."""
        return (pinned,) if key in self.pinned else values

    def _factors(self, key: str, number: int, most: int, pinned: int) -> tuple[int, ...]:
        """Divisors of ``number`` up to ``most`` that a key may take; one that is pinned may be larger than ``most``."""
        if key in self.pinned:
            return (pinned,) if number % pinned == 0 else ()
        return _divisors(number, most)

    # Enumeration

    def _degrees(self) -> Iterator[tuple[int, bool, int, int, int, int]]:
        """(tp, sequence, cp, pp, ep, etp) that divide what they have to divide."""
        model, world, domain = self.config.model, self.job.world_size, self.job.hardware.nvlink_domain
        has_experts = model.family == "wan_moe"
        experts = model.moe.num_experts if has_experts else 1
        parallel, factors = self.config.parallel, self._factors
        is_free = "parallel.sequence" not in self.pinned and not has_experts
        for tp in factors("parallel.tensor", math.gcd(world, model.num_heads), domain, parallel.tensor):
            sequences = (True, False) if tp > 1 and is_free else (tp > 1 and parallel.sequence is not False,)
            for pp in factors("parallel.pipeline", world // tp, model.num_layers, parallel.pipeline):
                for cp in factors("parallel.context", world // (tp * pp), world, parallel.context):
                    for ep in factors("parallel.expert", math.gcd(world // pp, experts), experts, parallel.expert):
                        most = domain if has_experts else 1
                        for etp in factors("parallel.expert_tensor", world // (pp * ep), most, parallel.expert_tensor):
                            for sequence in sequences:
                                yield tp, sequence, cp, pp, ep, etp

    def _variants(self, tp: int, sequence: bool, cp: int, pp: int, ep: int, etp: int) -> Iterator[Point]:
        """Micro batches, chunks and recomputation of these degrees that may fit."""
        replicas = self.job.world_size // (tp * cp * pp)
        bounds, state = self.bounds, self.bounds.state_bytes(tp, pp, ep, etp)
        batch = self.config.train.global_batch_size
        usual = tuple(sorted({*MICRO_BATCHES, self.config.train.micro_batch_size}))
        for micro in self._free("train.micro_batch_size", usual, self.config.train.micro_batch_size):
            microbatches, rest = divmod(batch, micro * replicas)
            if rest:
                continue
            chunks = _chunks(self.config.model.num_layers, pp)
            for vpp in self._free("parallel.virtual_pipeline", chunks, self.config.parallel.virtual_pipeline):
                if vpp > 1 and microbatches % pp:
                    continue
                stage = bounds.stage(pp, vpp, microbatches)
                for recompute in self._free("parallel.recompute", RECOMPUTE, self.config.parallel.recompute):
                    self.tried += 1
                    if state + stage.kept(*bounds.blocks(tp, sequence, cp, etp, micro, recompute)) > self.job.limit:
                        continue
                    paces = bounds.pace(tp, sequence, cp, micro, recompute)
                    if paces:
                        floor_s = (min(paces.values()) + bounds.expert_s(tp * cp, ep, etp, micro)) * stage.stretch
                        yield Point(floor_s, tp, sequence, cp, pp, vpp, ep, etp, micro, RECOMPUTE.index(recompute))

    # Bounds

    def memory_floor(self, point: Point) -> float:
        """Bytes that the fullest rank of a point needs at least."""
        replicas = self.job.world_size // (point.tp * point.cp * point.pp)
        microbatches = self.config.train.global_batch_size // (point.micro * replicas)
        stage = self.bounds.stage(point.pp, point.vpp, microbatches)
        kept = self.bounds.blocks(point.tp, point.sequence, point.cp, point.etp, point.micro, point.recompute)
        return self.bounds.state_bytes(point.tp, point.pp, point.ep, point.etp) + stage.kept(*kept)


def _chunks(num_layers: int, pp: int) -> tuple[int, ...]:
    """Chunks of each stage: those that hold equal numbers of blocks, and few otherwise."""
    if pp == 1:
        return (1,)
    most = num_layers // pp
    even = tuple(vpp for vpp in range(1, most + 1) if num_layers % (pp * vpp) == 0)
    return even or tuple(range(1, min(most, UNEVEN_VPP) + 1))


def _divisors(number: int, most: int = 0) -> tuple[int, ...]:
    """Divisors of ``number``, ascending, up to ``most`` (0: all)."""
    return tuple(d for d in range(1, min(number, most or number) + 1) if number % d == 0)
