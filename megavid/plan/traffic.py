"""Bytes that one rank sends in one optimizer step, by axis, operation and fabric: closed form.

Owns the list of every collective and send of the engine. Tests record a real step's calls and compare both numbers.

Bytes are what this rank sends by the algorithm that moves the fewest, a ring, its own part not counted: ``all_gather``
(n - 1) x its shard, ``reduce_scatter`` (n - 1) / n x the whole tensor, ``all_reduce`` both, ``all_to_all`` (n - 1) / n
of its rows (experts balanced), ``send`` the message.

=========  ==========================================================================================================
axis       groups and what travels in them
=========  ==========================================================================================================
tp         ranks that share a matrix: activations around matrices, sums of squares of the norms across heads, gradients
           of what all of them hold, the velocity
cp         ranks that share a pack's tokens: their Ulysses groups (all_to_all) and ring groups (send, or all_gather and
           reduce_scatter)
ep         tokens to experts and back (all_to_all over ep; with the allgather dispatcher all_gather and reduce_scatter
           over etp x ep), counts of tokens (all_gather over etp x ep), what routers ask of the ranks that share a
           pack's tokens (tp x cp)
etp        tokens and outputs of experts whose matrices are shared
pp         activations to the next stage, gradients to the one before
dp         gradients (reduce_scatter) and weights (all_gather) over dp x cp
edp        the same of experts
embedders  gradients of what every stage holds, over pp
amax       largest magnitudes of operands in FP8 under ``tensorwise``, over the ranks that share a layer's scales
scalars    loss, gradient norm, counts and routing statistics, histories of FP8
=========  ==========================================================================================================

The flex dispatcher is taken for all-to-alls of the same rows.
"""

from dataclasses import dataclass, field
from typing import Literal

from megavid.config.schema import ModelConfig, RunConfig
from megavid.plan.buffers import buckets_of_rank, chunk_parameters
from megavid.plan.context import exchange_bytes
from megavid.plan.fp8 import FIGURES, fp8_layers_of_stage, scaled_layers
from megavid.plan.layout import Layout, microbatches_of_step
from megavid.plan.shapes import Shapes, layers_of_stage
from megavid.plan.workload import Workload

Fabric = Literal["nvlink", "network", "none"]
Operation = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send"]

WIDE = 4
"""Bytes of an fp32 number: gradients, gates, sums of squares."""
INDEX = 8
"""Bytes of an int64 or fp64 number: counts, losses."""
NOISE_BUCKETS = 4
"""Noise buckets of the routing statistics (megavid.models.moe.tokens)."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One kind of call that a rank makes in a step.

    Attributes:
        axis: what it is for, see the table above.
        operation: c10d's name.
        calls: of one rank in one step.
        bytes: that this rank sends in all of them.
        group_size: ranks of the group.
        fabric: the slowest that two ranks of the group need.
        is_overlapped: whether the engine computes while they run.
    """

    axis: str
    operation: str
    calls: float
    bytes: float
    group_size: int
    fabric: Fabric
    is_overlapped: bool


def traffic_of(
    config: RunConfig, layout: Layout, pp_rank: int, workload: Workload, nvlink_domain: int
) -> tuple[Transfer, ...]:
    """What a rank of stage ``pp_rank`` sends in one optimizer step; groups of one rank are left out.

    Args:
        config: the run.
        layout: its layout.
        pp_rank: pipeline stage.
        workload: what its packs hold.
        nvlink_domain: ranks that NVLink joins; consecutive ones.
    """
    step = _Step(config, layout, pp_rank, workload, nvlink_domain)
    step.blocks()
    step.ends()
    step.pipeline()
    step.gradients()
    step.scalars()
    return tuple(
        Transfer(axis, operation, calls, size, group_size, fabric, is_overlapped)
        for (axis, operation, group_size, fabric, is_overlapped), (calls, size) in step.found.items()
    )


@dataclass
class _Step:
    """Adds up the calls of one rank."""

    config: RunConfig
    layout: Layout
    pp_rank: int
    workload: Workload
    nvlink_domain: int
    found: dict[tuple[str, Operation, int, Fabric, bool], tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layout = self.layout
        self.model: ModelConfig = self.config.model
        self.shapes = Shapes.of(self.config, layout, self.workload)
        self.microbatches = microbatches_of_step(self.config, layout)
        recompute = self.config.parallel.recompute
        self.forwards = 1 if recompute == "none" else 2
        # Under selective recomputation a branch stops before its last sum over ranks: no backward pass needs it.
        self.last_forwards = 2 if recompute == "full" else 1
        dense, expert = layout.tp * layout.cp, layout.etp * layout.ep
        ulysses = layout.context_plan.ulysses
        # Ranks of each group, and how many consecutive ranks it spans.
        self.groups = {
            "tp": (layout.tp, layout.tp),
            "tp_cp": (dense, dense),
            "ulysses": (ulysses, layout.tp * ulysses),
            "ring": (layout.cp // ulysses, dense),
            "dp": (layout.dp, dense * layout.dp),
            "dp_cp": (layout.dp * layout.cp, dense * layout.dp),
            "pp": (layout.pp, layout.world_size),
            "etp": (layout.etp, layout.etp),
            "ep": (layout.ep, expert),
            "tp_ep": (expert, expert),
            "edp": (layout.edp, expert * layout.edp),
            "stage": (layout.world_size // layout.pp, layout.world_size // layout.pp),
            "world": (layout.world_size, layout.world_size),
        }

    # Bookkeeping

    def add(
        self, axis: str, group: str, operation: Operation, calls: float, size: float, *, is_overlapped: bool = False
    ) -> None:
        """Count ``calls`` calls that send ``size`` bytes each."""
        ranks, span = self.groups[group]
        if ranks == 1 or calls == 0 or size == 0:
            return
        is_near = self.nvlink_domain % span == 0 or self.layout.world_size <= self.nvlink_domain
        fabric: Fabric = "nvlink" if is_near else "network"
        key = (axis, operation, ranks, fabric, is_overlapped)
        before = self.found.get(key, (0.0, 0.0))
        self.found[key] = (before[0] + calls, before[1] + calls * size)

    def gather(self, axis: str, group: str, calls: float, shard: float, *, is_overlapped: bool = False) -> None:
        """All-gathers of ``shard`` bytes on each rank."""
        size = shard * (self.groups[group][0] - 1)
        self.add(axis, group, "all_gather", calls, size, is_overlapped=is_overlapped)

    def scatter(self, axis: str, group: str, calls: float, shard: float, *, is_overlapped: bool = False) -> None:
        """Reduce-scatters that leave ``shard`` bytes on each rank."""
        size = shard * (self.groups[group][0] - 1)
        self.add(axis, group, "reduce_scatter", calls, size, is_overlapped=is_overlapped)

    def reduce(self, axis: str, group: str, calls: float, whole: float, *, is_overlapped: bool = False) -> None:
        """All-reduces of ``whole`` bytes."""
        ranks = self.groups[group][0]
        self.add(axis, group, "all_reduce", calls, 2 * whole * (ranks - 1) / ranks, is_overlapped=is_overlapped)

    # Parts of a step

    def blocks(self) -> None:
        """Forward and backward passes of the blocks, and what is computed again."""
        dense, moe = layers_of_stage(self.model, self.layout, self.pp_rank)
        has_shared = moe > 0 and self.model.moe.shared_ffn_size > 0
        self._attention((dense + moe) * self.microbatches)
        self._around_matrices(dense * self.microbatches, moe * self.microbatches, has_shared=has_shared)
        self._context((dense + moe) * self.microbatches)
        if moe:
            self._router(moe * self.microbatches)
            self._dispatch(moe * self.microbatches)
        self._amaxes()

    def _attention(self, calls: int) -> None:
        """Norms across heads, and gradients of captions and images, which every tensor-parallel rank holds whole."""
        for numbers in (2 * self.shapes.span, self.shapes.span):  # q with k, q of the attention to the prompts
            self.reduce("tp", "tp", calls * (self.forwards + 1), numbers * WIDE)
        for length in filter(None, (self.model.text_length, self.model.image_tokens)):
            keys = self.shapes.clips * length
            self.reduce("tp", "tp", calls * (self.forwards + 1), keys * WIDE)
            self.reduce("tp", "tp", calls, keys * self.model.hidden_size * self.shapes.narrow, is_overlapped=True)

    def _around_matrices(self, dense: int, moe: int, *, has_shared: bool) -> None:
        """Column-parallel matrices gather tokens, row-parallel ones scatter sums; without sequence parallelism both
        are all-reduces, of gradients and of sums. Of a column-parallel matrix's gradient, one product hides each call;
        in FP8 none does, and the tokens that it has gathered are kept.
        """
        pairs = 3 * dense + (3 if has_shared else 2) * moe
        fp8_dense, fp8_moe = fp8_layers_of_stage(self.config, self.layout, self.pp_rank)
        narrow = (3 * fp8_dense + (3 if has_shared else 2) * fp8_moe) * self.microbatches
        # The shared expert is not the end of its branch.
        inside = moe if has_shared else 0
        again = pairs * self.last_forwards + inside * (self.forwards - self.last_forwards)
        size = self.shapes.own * self.model.hidden_size * self.shapes.narrow
        if not self.layout.sequence:
            self.reduce("tp", "tp", again, size)
            self.reduce("tp", "tp", pairs - narrow, size, is_overlapped=True)
            self.reduce("tp", "tp", narrow, size)
            return
        self.gather("tp", "tp", pairs * self.forwards, size)
        self.scatter("tp", "tp", again, size)
        self.gather("tp", "tp", pairs, size)  # gradients of row-parallel matrices' outputs
        self.gather("tp", "tp", pairs - narrow, size, is_overlapped=True)
        self.scatter("tp", "tp", pairs - narrow, size, is_overlapped=True)
        self.scatter("tp", "tp", narrow, size)

    def _context(self, calls: int) -> None:
        """Tokens for heads and back, and the ring; the ring overlaps, the rest does not."""
        plan, recompute = self.layout.context_plan, self.config.parallel.recompute
        if plan.cp == 1:
            return
        sent = exchange_bytes(
            plan,
            tokens=self.workload.pack_tokens,
            hidden_per_tp=self.model.hidden_size // self.layout.tp,
            batch=self.config.train.micro_batch_size,
            bytes_per_number=self.shapes.narrow,
            kv_grad_bytes=WIDE,
        )
        if plan.ulysses > 1:
            size = sent.forward_a2a + sent.backward_a2a + (self.forwards - 1) * sent.recompute_a2a
            count = 2 * (self.forwards + 1)
            self.add("cp", "ulysses", "all_to_all", calls * count, size / count)
        if plan.ring == 1:
            return
        # Only full recomputation runs the ring's forward pass again: selective keeps what it made.
        forwards = 2 if recompute == "full" else 1
        kv = sent.forward_ring
        gradients = sent.backward_ring - kv
        if plan.kind == "ring":
            hops = (plan.ring - 1) * (forwards + 1)
            self.add("cp", "ring", "send", calls * hops, kv / (plan.ring - 1), is_overlapped=True)
            self.add("cp", "ring", "send", calls * plan.ring, gradients / plan.ring, is_overlapped=True)
        else:
            self.add("cp", "ring", "all_gather", calls * (forwards + 1), kv)
            self.add("cp", "ring", "reduce_scatter", calls, gradients)

    def _router(self, calls: int) -> None:
        """What routers need of tokens that other ranks hold of the same clips; no gradient."""
        if not (self.layout.sequence or self.layout.cp > 1):
            return
        moe = self.model.moe
        if moe.router == "expert_choice":
            self.gather("ep", "tp_cp", calls * self.forwards, self.shapes.own * moe.num_experts * WIDE)
            self.gather("ep", "tp_cp", calls * self.forwards, self.shapes.own * INDEX)
        if moe.aux_loss_weight > 0:
            self.reduce("ep", "tp_cp", calls * self.forwards, self.shapes.clips * moe.num_experts * WIDE)

    def _dispatch(self, calls: int) -> None:
        """Tokens and gates to experts and outputs back; in the backward pass their gradients."""
        layout, moe, both = self.layout, self.model.moe, self.forwards + 1
        if layout.etp * layout.ep == 1:
            return
        if self.config.parallel.dispatcher == "allgather":
            token = self.shapes.own * self.model.hidden_size * self.shapes.narrow
            gates = self.shapes.own * moe.num_experts
            self.gather("ep", "tp_ep", calls * self.forwards, gates)  # the map, one byte each
            self.gather("ep", "tp_ep", calls * self.forwards, gates * WIDE)
            self.scatter("ep", "tp_ep", calls, gates * WIDE)
            self.gather("ep", "tp_ep", calls * both, token)
            self.scatter("ep", "tp_ep", calls * (self.last_forwards + 1), token)
            return
        self.gather("ep", "tp_ep", calls * self.forwards, moe.num_experts * INDEX)  # how many go where
        rows = self.shapes.own * self.shapes.valid * moe.top_k
        row = self.model.hidden_size * self.shapes.narrow
        beside = self.config.parallel.shared_expert_overlap
        away = (layout.ep - 1) / layout.ep
        self.add("ep", "ep", "all_to_all", calls * 2 * both, rows * row * away, is_overlapped=beside)
        self.add("ep", "ep", "all_to_all", calls * both, rows * WIDE * away, is_overlapped=beside)
        self.gather("etp", "etp", calls * both, rows * row)
        self.scatter("etp", "etp", calls * both, rows * row)
        self.gather("etp", "etp", calls * self.forwards, rows * WIDE)
        self.scatter("etp", "etp", calls, rows * WIDE)

    def _amaxes(self) -> None:
        """Of each layer in FP8 those of the input and the matrix forward, of the gradient backward."""
        if self.config.precision.fp8 != "tensorwise":
            return
        linears, experts = scaled_layers(self.config, *fp8_layers_of_stage(self.config, self.layout, self.pp_rank))
        for group, layers in (("tp_cp", linears), ("tp_ep", experts)):
            self.reduce("amax", group, layers * self.microbatches * self.forwards, 2 * WIDE)
            self.reduce("amax", group, layers * self.microbatches, WIDE)

    def ends(self) -> None:
        """The velocity of all tokens, on every tensor-parallel rank of the last stage."""
        if self.layout.sequence and self.pp_rank == self.layout.pp - 1:
            patch = self.model.out_channels * self.model.patch_volume
            self.gather("tp", "tp", self.microbatches, self.shapes.own * patch * self.shapes.narrow)

    def pipeline(self) -> None:
        """Hidden states after every chunk but the model's last, their gradients before every one but its first."""
        layout = self.layout
        size = self.shapes.own * self.model.hidden_size * self.shapes.narrow
        chunks = 2 * layout.vpp - (self.pp_rank == layout.pp - 1) - (self.pp_rank == 0)
        self.add("pp", "pp", "send", chunks * self.microbatches, size)

    def gradients(self) -> None:
        """Gradients reduced and weights gathered over data-parallel ranks, and gradients that other axes share."""
        config, layout = self.config, self.layout
        is_bf16, parallel = config.precision.dtype == "bf16", config.parallel
        for bucket in buckets_of_rank(config, layout, self.pp_rank):
            axis, group = ("edp", "edp") if bucket.is_expert else ("dp", "dp_cp")
            shard = bucket.numel // bucket.ranks
            self.scatter(axis, group, 1, shard * WIDE, is_overlapped=parallel.overlap_grad_reduce)
            weight = 2 if is_bf16 and not bucket.is_fp32 else WIDE
            self.gather(axis, group, 1, shard * weight, is_overlapped=parallel.overlap_param_gather)
        held = [chunk_parameters(self.model, layout, self.pp_rank, chunk) for chunk in range(layout.vpp)]
        embedders = sum(parameter.numel for parameter in held[0] if parameter.has_own_bucket)
        self.reduce("embedders", "pp", 1, embedders * WIDE)
        partial = sum(p.numel for chunk in held for p in chunk if p.is_partial) if layout.sequence else 0
        self.reduce("tp", "tp", 1, partial * WIDE)

    def scalars(self) -> None:
        """Counts, loss, gradient norm and routing statistics."""
        _, moe = layers_of_stage(self.model, self.layout, self.pp_rank)
        self.reduce("scalars", "dp", 1, 2 * INDEX)  # elements and clips of the step
        self.reduce("scalars", "dp_cp", 1, INDEX)  # loss
        self.reduce("scalars", "pp", 1, INDEX)
        self.reduce("scalars", "world", 1, WIDE)  # gradient norm
        if self.config.precision.fp8 == "delayed":
            layers = sum(scaled_layers(self.config, *fp8_layers_of_stage(self.config, self.layout, self.pp_rank)))
            self.reduce("scalars", "stage", 1, layers * FIGURES * WIDE)
        statistics = NOISE_BUCKETS * (2 * self.model.moe.num_experts + 3) + 2
        self.reduce("scalars", "dp_cp", moe, statistics * INDEX)
        if self.layout.sequence:
            self.reduce("scalars", "tp", moe, statistics * INDEX)
