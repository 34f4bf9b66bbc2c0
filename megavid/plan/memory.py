"""Bytes of accelerator memory that a rank needs, by part, and bytes of host memory for its checkpoints: closed form.

Owns the sum. Weights, gradients, optimizer and average are exact (``megavid.plan.buffers``), activations are those of
``megavid.plan.activations``, and what no formula of the model gives (context, communicators, slack) is a named constant
here, with its source or marked as an assumption.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megavid.config.schema import RunConfig
from megavid.plan.activations import (
    activation_bytes,
    context_parallel_bytes,
    dispatcher_bytes,
    in_flight,
    sent_bytes,
    working_bytes,
)
from megavid.plan.buffers import totals_of_rank
from megavid.plan.fp8 import history_bytes
from megavid.plan.hardware import Hardware
from megavid.plan.layout import FAST_DOMAIN, Layout, layers_of_chunk, microbatches_of_step
from megavid.plan.workload import Workload

PARTS = (
    "weights", "gradients", "optimizer", "ema", "activations", "dispatcher", "context_parallel", "fp8", "communicators",
    "cuda_context", "allocator_slack",
)  # fmt: skip

MIB, GIB = 2**20, 2**30
CUDA_CONTEXT_BYTES = 1 * GIB
"""CUDA context with its kernels loaded, and cuBLAS's workspaces (32 MiB for each handle and stream on Hopper, which
PyTorch documents under CUBLAS_WORKSPACE_CONFIG); assumption for the sum: half a GiB of context and as much of the rest,
what ``nvidia-smi`` shows above torch's own reserved memory in a training process."""
COMMUNICATOR_BYTES, PAIR_BYTES = 688 * MIB, 544 * MIB
"""Device memory of one NCCL communicator after its first all-reduce, of more than two GPUs and of two; every process
group has its own. Source: measured by a user on 4 A100 with NVLink (2023),
https://github.com/NVIDIA/nccl/issues/964; newer versions connect lazily and may take less."""
EXCHANGE_BYTES, EXCHANGE_PEERS = 3_280_000_000, 7
"""Besides, of a communicator that has run an all-to-all between so many peers in one NVLink domain. Source: 1.06 GB
before and 4.34 GB after the first one on 8 H100 (2025), https://github.com/NVIDIA/nccl/issues/1685. Peers elsewhere
share one buffer: https://github.com/NVIDIA/nccl/issues/1450."""
SLACK = 0.05
"""Share of activations and working memory that the caching allocator holds in pieces too small to use; assumption, for
``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True``."""
IMBALANCE_HEADROOM = 1.5
"""Rows that the busiest expert-parallel rank is given memory for, as a factor of the mean; assumption. Dropless routing
has no limit: a router that has not learnt its balance yet can exceed it."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by part."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class StateBytes:
    """What a rank keeps from step to step.

    Attributes:
        weights: parameters in their buffers, padding included, and the routers' bias.
        gradients: fp32 buffers, padding included.
        masters: fp32 copies of the numbers that this rank updates, where the parameter is not fp32 itself.
        moments: both of Adam's, fp32.
        ema: moving average, fp32; 0 where the run keeps none.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    ema: int


def rank_state(config: RunConfig, layout: Layout, rank: int) -> StateBytes:
    """Bytes that ``rank`` keeps from step to step, exactly."""
    place = layout.coordinates(rank)
    return _state(config, layout, place["pp"], place["cp"] + layout.cp * place["dp"], place["edp"])


def memory_of(
    config: RunConfig,
    layout: Layout,
    pp_rank: int,
    workload: Workload,
    *,
    hardware: Hardware | None = None,
    headroom: float = IMBALANCE_HEADROOM,
) -> Memory:
    """Bytes of the first rank of pipeline stage ``pp_rank`` at the peak of a step.

    Other ranks of the stage differ by the padding of their buckets: under 64 numbers for each parameter.

    Args:
        config: the run, in the layout's degrees.
        layout: its layout.
        pp_rank: pipeline stage.
        workload: what its packs hold.
        hardware: how many ranks NVLink joins; None for one node of 8.
        headroom: rows of the busiest expert-parallel rank over the mean.
    """
    domain = FAST_DOMAIN if hardware is None else hardware.nvlink_domain
    state = _state(config, layout, pp_rank, 0, 0)
    count = in_flight(layout, pp_rank, microbatches_of_step(config, layout))
    saved = sum(activation_bytes(config, layout, pp_rank, workload, headroom).values())
    if layout.pp > 1:
        saved += sent_bytes(config, layout, pp_rank, workload)
    working = working_bytes(config, layout, pp_rank, workload, headroom)
    dispatcher = dispatcher_bytes(config, layout, pp_rank, workload, headroom)
    context = context_parallel_bytes(config, layout, workload)
    activations = round(count * saved) + working
    return Memory(
        {
            "weights": state.weights,
            "gradients": state.gradients,
            "optimizer": state.masters + state.moments,
            "ema": state.ema,
            "activations": activations,
            "dispatcher": dispatcher,
            "context_parallel": context,
            # No copy of a matrix is kept in eight bits; inputs that are kept so are activations.
            "fp8": history_bytes(config, layout, pp_rank),
            "communicators": communicator_bytes(config, layout, domain),
            "cuda_context": CUDA_CONTEXT_BYTES,
            "allocator_slack": round(SLACK * (activations + dispatcher + context)),
        }
    )


def worst_memory(
    config: RunConfig,
    layout: Layout,
    workload: Workload,
    *,
    hardware: Hardware | None = None,
    headroom: float = IMBALANCE_HEADROOM,
) -> tuple[int, Memory]:
    """The pipeline stage that needs most, and what it needs."""
    found = [
        (stage, memory_of(config, layout, stage, workload, hardware=hardware, headroom=headroom))
        for stage in range(layout.pp)
    ]
    return max(found, key=lambda pair: pair[1].total)


def communicators(config: RunConfig, layout: Layout) -> dict[str, int]:
    """Ranks of every process group that a step communicates in; groups of one rank are left out."""
    plan, moe = layout.context_plan, config.model.moe
    asks_tokens = config.model.family == "wan_moe" and (moe.router == "expert_choice" or moe.aux_loss_weight > 0)
    sizes = {
        "tp": layout.tp,
        "tp_cp": layout.tp * layout.cp if asks_tokens else 1,
        "ulysses": plan.ulysses,
        "ring": plan.ring,
        "dp": layout.dp,
        "dp_cp": layout.dp * layout.cp,
        "pp": layout.pp,
        "etp": layout.etp,
        "ep": layout.ep,
        "tp_ep": layout.etp * layout.ep,
        "edp": layout.edp if config.model.family == "wan_moe" else 1,
        "intra_dist_opt": layout.world_size,
        "world": layout.world_size,
    }
    return {name: size for name, size in sizes.items() if size > 1}


def communicator_bytes(config: RunConfig, layout: Layout, nvlink_domain: int) -> int:
    """Memory of all communicators of a rank."""
    groups = communicators(config, layout)
    total = sum(COMMUNICATOR_BYTES if size > 2 else PAIR_BYTES for size in groups.values())
    for name in ("ep", "ulysses"):
        peers = min(groups.get(name, 1), nvlink_domain) - 1
        total += EXCHANGE_BYTES * min(peers, EXCHANGE_PEERS) // EXCHANGE_PEERS
    return total


def host_bytes(config: RunConfig, layout: Layout, pp_rank: int) -> int:
    """Host memory of one rank that an asynchronous checkpoint takes: a copy of all that the rank owns.

    Masters (for fp32 parameters the parameter itself), both moments and the average of the rank's ranges, which stay
    staged until the next save, so that this is held for the whole run.
    """
    owned = _owned(config, layout, pp_rank, 0, 0)
    return 4 * owned * (4 if config.optimizer.ema_decay > 0 else 3)


def _state(config: RunConfig, layout: Layout, pp_rank: int, dense_rank: int, expert_rank: int) -> StateBytes:
    held = totals_of_rank(config, layout, pp_rank, dense_rank, expert_rank)
    owned = held.owned_narrow + held.owned_wide
    weights = 2 * held.narrow + 4 * held.wide
    if config.model.moe.router == "sigmoid":
        weights += 4 * config.model.moe.num_experts * _moe_layers(config, layout, pp_rank)
    return StateBytes(
        weights=weights,
        gradients=4 * (held.narrow + held.wide),
        masters=4 * held.owned_narrow,
        moments=8 * owned,
        ema=4 * owned if config.optimizer.ema_decay > 0 else 0,
    )


def _owned(config: RunConfig, layout: Layout, pp_rank: int, dense_rank: int, expert_rank: int) -> int:
    held = totals_of_rank(config, layout, pp_rank, dense_rank, expert_rank)
    return held.owned_narrow + held.owned_wide


def _moe_layers(config: RunConfig, layout: Layout, pp_rank: int) -> int:
    layers = (layer for chunk in range(layout.vpp) for layer in layers_of_chunk(config.model, layout, pp_rank, chunk))
    return sum(config.model.is_moe_layer(layer) for layer in layers)
