"""What a layout takes at least, for a search that cannot add up every layout in full.

Owns two bounds, each never above what it bounds, and made of few figures that many layouts share. Memory: the state of
the mean rank, and the blocks that the first stage keeps. Time: what one block does for one token is the same in every
pipeline, so a step's compute and the exchanges inside its blocks are taken from the same degrees without a pipeline,
experts apart from the rest, and stretched by the bubble; pipeline sends, data parallelism, host and optimizer are left
out.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Literal, NamedTuple

from megavid.config.schema import RunConfig
from megavid.errors import ConfigError
from megavid.plan.activations import block_bytes, in_flight
from megavid.plan.critical_path import Schedule, StepTime, bubble_share
from megavid.plan.job import Job
from megavid.plan.layout import Layout, layout_of
from megavid.plan.memory import CUDA_CONTEXT_BYTES, IMBALANCE_HEADROOM, SLACK
from megavid.plan.parameters import count
from megavid.plan.shapes import Shapes, layers_of_stage
from megavid.plan.time import step_time
from megavid.plan.workload import Workload, workload_of_clip

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
"""Least work first."""
Strategy = Literal["auto", "ulysses", "ring", "allgather", "hybrid"]
STRATEGIES: tuple[Strategy, ...] = ("ulysses", "ring", "allgather", "hybrid")

EXPERT_PARTS = ("experts", "expert", "imbalance")
"""Parts of a step that EP and ETP set."""
OTHER_PARTS = ("embedders", "head", "modulation", "pipeline", "data", "host", "bubble", "optimizer")
"""Parts that a block of a mean stage does not have, or that depend on more than the degrees inside a stage."""


class Stage(NamedTuple):
    """What is known of the first stage, which holds most blocks and keeps most microbatches.

    Attributes:
        stretch: its time, bubble included, over that of a mean stage without.
        dense: dense blocks times the microbatches that it keeps.
        moe: likewise of expert blocks.
    """

    stretch: float
    dense: float
    moe: float

    def kept(self, dense_bytes: float, moe_bytes: float) -> float:
        """Bytes that it keeps at its peak, from those of one block of each kind."""
        return (self.dense * dense_bytes + self.moe * moe_bytes) * (1.0 + SLACK)


class Bounds:
    """Bounds for one model, one job and one clip; every figure is added up once.

    Args:
        config: the run.
        job: what it runs on.
        clip: frames, height and width in pixels; one in each pack.
        strategies: of CP that may be taken.
    """

    def __init__(
        self, config: RunConfig, job: Job, clip: tuple[int, int, int], strategies: tuple[Strategy, ...] = STRATEGIES
    ) -> None:
        self.config, self.job = config, job
        self._clip, self._strategies = clip, strategies
        by_part = count(config.model).by_part
        self._experts = by_part["experts"]
        self._dense = sum(by_part.values()) - self._experts - by_part["embedders"]
        # In FP8 the first stage has blocks that are not; then it is no measure of the slowest one.
        kinds = {config.model.is_moe_layer(layer) for layer in range(config.model.num_layers)}
        self._is_uniform = len(kinds) == 1 and config.precision.fp8 == "off"
        self._has_experts = config.model.family == "wan_moe"
        # Not methods with a cache of their own: a cache on the class would keep every search alive.
        self.workload = lru_cache(maxsize=None)(self._workload)
        self.blocks = lru_cache(maxsize=None)(self._blocks)
        self.stage = lru_cache(maxsize=None)(self._stage)
        self.pace = lru_cache(maxsize=None)(self._pace)
        self.expert_s = lru_cache(maxsize=None)(self._expert_s)

    def state_bytes(self, tp: int, pp: int, ep: int, etp: int) -> float:
        """Bytes of weights, gradients and optimizer of the mean rank, the sharded state spread over all ranks."""
        held = self._dense / (tp * pp) + self._experts / (ep * etp * pp)
        is_bf16 = self.config.precision.dtype == "bf16"
        # In bf16 a shard has a master beside the moments and the average; in fp32 the weights are the masters.
        sharded = (12 if is_bf16 else 8) + (4 if self.config.optimizer.ema_decay > 0 else 0)
        shard = (self._dense + self._experts) / self.job.world_size
        return held * ((2 if is_bf16 else 4) + 4) + shard * sharded + CUDA_CONTEXT_BYTES

    def _blocks(
        self, tp: int, sequence: bool, cp: int, etp: int, micro: int, recompute: Recompute
    ) -> tuple[float, float]:
        """Bytes that a dense and an expert block keep of one microbatch."""
        config = replace(self.config, train=replace(self.config.train, micro_batch_size=micro))
        layout = Layout(tp=tp, cp=cp, etp=etp, sequence=sequence)
        shapes, model = Shapes.of(config, layout, self.workload(tp * cp)), config.model

        def least(is_moe: bool) -> float:
            kinds = (False, True) if config.precision.fp8 != "off" else (False,)
            found = (
                block_bytes(model, shapes, recompute, is_moe=is_moe, imbalance=IMBALANCE_HEADROOM, is_fp8=is_fp8)
                for is_fp8 in kinds
            )
            return min(sum(parts.values()) for parts in found)

        return least(False), least(True)

    def _stage(self, pp: int, vpp: int, microbatches: int) -> Stage:
        """The first stage of a pipeline."""
        layout, model = Layout(pp=pp, vpp=vpp), self.config.model
        dense, moe = layers_of_stage(model, layout, 0)
        flight = in_flight(layout, 0, microbatches)
        uneven = (dense + moe) * pp / model.num_layers if self._is_uniform else 1.0
        bubble = bubble_share(Schedule(microbatches, pp, vpp))
        return Stage(uneven * (1.0 + bubble), dense * flight, moe * flight)

    def _pace(self, tp: int, sequence: bool, cp: int, micro: int, recompute: Recompute) -> Mapping[Strategy, float]:
        """Seconds of a step on a mean stage without bubble and experts, for each legal strategy of CP."""
        found: dict[Strategy, float] = {}
        spread = math.gcd(self.job.world_size, self.config.model.moe.num_experts) if self._has_experts else 1
        for strategy in self._strategies if cp > 1 else ("auto",):
            time = self._without_pipeline(tp, sequence, cp, spread, 1, micro, recompute, strategy)
            if time is not None:
                left_out = EXPERT_PARTS + OTHER_PARTS
                found[strategy] = self._scaled(time, tp * cp, micro, keep=set(time.parts) - set(left_out))
        return found

    def _expert_s(self, ranks: int, ep: int, etp: int, micro: int) -> float:
        """Seconds of a step for the experts, with ``ranks`` ranks sharing a pack; infinite where that is not legal."""
        if not self._has_experts:
            return 0.0
        time = self._without_pipeline(1, False, ranks, ep, etp, micro, "none", "ring" if ranks > 1 else "auto")
        return math.inf if time is None else self._scaled(time, ranks, micro, keep=set(EXPERT_PARTS))

    def _without_pipeline(
        self, tp: int, sequence: bool, cp: int, ep: int, etp: int, micro: int, recompute: Recompute, strategy: Strategy
    ) -> StepTime | None:
        """A step of one microbatch on one stage; None where the layout is not legal."""
        workload = self.workload(tp * cp)
        parallel = replace(
            self.config.parallel, tensor=tp, context=cp, pipeline=1, virtual_pipeline=1, expert=ep, expert_tensor=etp,
            context_strategy=strategy, recompute=recompute, sequence="auto" if sequence or tp == 1 else False,
        )  # fmt: skip
        batch = micro * (self.job.world_size // (tp * cp))
        train = replace(self.config.train, micro_batch_size=micro, global_batch_size=batch)
        data = replace(self.config.data, pack_tokens=workload.pack_tokens)
        config = replace(self.config, parallel=parallel, train=train, data=data)
        try:
            layout = layout_of(config, self.job.world_size)
        except ConfigError:
            return None
        return step_time(config, layout, workload, self.job.hardware, self.job.calibration)

    def _scaled(self, time: StepTime, ranks: int, micro: int, *, keep: set[str]) -> float:
        """Seconds of those parts, from one microbatch to the config's global batch."""
        microbatches = self.config.train.global_batch_size * ranks / (micro * self.job.world_size)
        return sum(seconds for part, seconds in time.parts.items() if part in keep) * microbatches

    def _workload(self, ranks: int) -> Workload:
        """Packs that so many ranks of TP x CP share."""
        parallel = replace(self.config.parallel, tensor=1, sequence="auto", context=ranks, context_strategy="auto")
        return workload_of_clip(replace(self.config, parallel=parallel), *self._clip)
