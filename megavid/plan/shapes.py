"""Sizes of one microbatch on one rank, and how many blocks of each kind a stage has: what the closed forms are made of.

Owns the notation: ``own`` tokens stand on the rank between tensor-parallel products, ``span`` tokens inside them;
``wide`` is fp32, ``narrow`` the activations' dtype.
"""

from dataclasses import dataclass

from megavid.config.schema import ModelConfig, PrecisionConfig, RunConfig
from megavid.plan.layout import Layout, layers_of_chunk
from megavid.plan.workload import Workload

WIDE, INDEX = 4, 8
"""Bytes of an fp32 number and of an int64 index."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """Sizes of one microbatch on one rank.

    Attributes:
        own: tokens between tensor-parallel products: all / (tp x cp) under sequence parallelism, else all / cp.
        span: tokens inside them: all / cp.
        valid: share of tokens that belong to clips.
        clips: clips of the microbatch, whole packs: their captions stand on every rank.
        tp: tensor-parallel ranks.
        etp: expert-tensor ranks.
        ulysses: ranks that exchange tokens for heads.
        ring: ranks that keys and values travel between.
        rectangle: ranks whose keys and values are in one rectangle at once: the ring's under all-gather, else 1.
        narrow: bytes of an activation.
        has_copies: activations are not fp32, so that what is computed in fp32 is a copy.
        local_experts: experts of a layer that this rank has.
        precision: number formats of the run.
        is_fused: norms, modulation, residuals, rotation, the choice of experts, their activation and the order of their
            rows are one op each, which keep their inputs as they come (``train.ops = "compiled"``; "auto" is counted
            as plain torch, which needs more).
    """

    own: int
    span: int
    valid: float
    clips: int
    tp: int
    etp: int
    ulysses: int
    ring: int
    rectangle: int
    narrow: int
    has_copies: bool
    local_experts: int
    precision: PrecisionConfig
    is_fused: bool

    @classmethod
    def of(cls, config: RunConfig, layout: Layout, workload: Workload) -> "Shapes":
        """Sizes of a microbatch of ``workload`` in ``layout``."""
        packs = config.train.micro_batch_size
        span = packs * workload.pack_tokens // layout.cp
        is_bf16 = config.precision.dtype == "bf16"
        return cls(
            own=span // layout.tp if layout.sequence else span,
            span=span,
            valid=workload.tokens / workload.pack_tokens,
            clips=packs * len(workload.clip_tokens),
            tp=layout.tp,
            etp=layout.etp,
            ulysses=layout.context_plan.ulysses,
            ring=layout.context_plan.ring,
            rectangle=layout.context_plan.ring if layout.context_plan.kind == "allgather" else 1,
            narrow=2 if is_bf16 else WIDE,
            has_copies=is_bf16,
            local_experts=config.model.moe.num_experts // layout.ep,
            precision=config.precision,
            is_fused=config.train.ops == "compiled",
        )


def layers_of_stage(model: ModelConfig, layout: Layout, pp_rank: int) -> tuple[int, int]:
    """Dense and expert layers of a stage, all its chunks."""
    layers = [i for chunk in range(layout.vpp) for i in layers_of_chunk(model, layout, pp_rank, chunk)]
    moe = sum(model.is_moe_layer(layer) for layer in layers)
    return len(layers) - moe, moe


def expert_rows_of_rank(model: ModelConfig, shapes: Shapes, imbalance: float) -> float:
    """Rows that this rank's experts compute; over expert-tensor ranks each has the rows of all of them."""
    return shapes.own * shapes.valid * model.moe.top_k * shapes.etp * imbalance
