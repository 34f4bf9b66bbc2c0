"""The bridge to megatron-core: the one module that knows which version is installed (0.16.1, or 0.17 up to 0.19.x).

Owns the names of megatron-core that megavid uses (import them from here), the differences between its versions, and its
global state: process groups and random streams are opened and closed here. Owns no layer and no policy. What CPU ranks
need on top is in ``megavid.parallel.cpu``.

Differences that are hidden here, so that nothing else asks for a version:

========================================  ==========================  =========================================
what                                      0.16.1                      0.19.2
========================================  ==========================  =========================================
Transformer Engine names in moe_utils     NameError without it        None
experts of MoESubmodules                  class or ModuleSpec         any callable, called with ``name`` too
routers                                   (config, pg_collection)     also ``is_mtp_layer``
``config_overrides=None`` of the optimizer  standard ones              standard ones, applied one call earlier
``__version__``                           plain                       may carry the git revision around it
========================================  ==========================  =========================================
"""

import functools
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Module, Parameter

from megavid.ops.weight_gradient import GradientSum
from megavid.parallel.te import HAS_TE  # before megatron-core, see there
from megavid.plan.layout import Layout


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Without a GPU, ``torch.compile`` gives functions back as they are while this is open.

    megatron-core decorates its fused functions with it at import, and the first call imports torch's whole compiler: a
    third of what a rank's start takes. CPU ranks run these functions as they stand anyway (``megavid.parallel.cpu``).
    """
    if torch.cuda.is_available():
        yield
        return
    compiles = torch.compile

    def as_it_is(function: Any = None, **options: Any) -> Any:
        return (lambda decorated: decorated) if function is None else function

    torch.compile = as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiles


# isort: split
with warnings.catch_warnings(), _nothing_compiled():
    # "Transformer Engine and Apex are not installed": four times at import; `megavid doctor` says it once, and better.
    warnings.simplefilter("ignore")
    from megatron.core import package_info, parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.enums import ModelType
    from megatron.core.fp8_utils import get_fp8_align_size, get_fp8_context
    from megatron.core.optimizer import (
        ChainedOptimizer,
        MegatronOptimizer,
        OptimizerConfig,
        ParamKey,
        get_megatron_optimizer,
    )
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer_config import ParamPredicate
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
        get_cuda_rng_tracker,
        model_parallel_cuda_manual_seed,
        reduce_from_tensor_model_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
        scatter_to_sequence_parallel_region,
        scatter_to_tensor_model_parallel_region,
    )
    from megatron.core.tensor_parallel import layers as parallel_linears
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.token_dispatcher import (
        MoEAllGatherTokenDispatcher,
        MoEAlltoAllTokenDispatcher,
        MoEFlexTokenDispatcher,
        MoETokenDispatcher,
    )
    from megatron.core.utils import get_te_version, is_te_min_version

    if HAS_TE:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelGroupedLinear,
            TEColumnParallelLinear,
            TERowParallelGroupedLinear,
            TERowParallelLinear,
        )
    else:  # what megatron-core has under these names then is a mock
        TEColumnParallelGroupedLinear = TERowParallelGroupedLinear = None
        TEColumnParallelLinear = TERowParallelLinear = None

__all__ = [
    "COLLECTIVE_S",
    "HAS_TE",
    "ChainedOptimizer",
    "ColumnParallelLinear",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "DistributedOptimizer",
    "MegatronModule",
    "MegatronOptimizer",
    "MoEAllGatherTokenDispatcher",
    "MoEAlltoAllTokenDispatcher",
    "MoEFlexTokenDispatcher",
    "MoELayer",
    "MoESubmodules",
    "MoETokenDispatcher",
    "ModelType",
    "OptimizerConfig",
    "ParamKey",
    "ParamPredicate",
    "ProcessGroupCollection",
    "RowParallelLinear",
    "TEColumnParallelGroupedLinear",
    "TEColumnParallelLinear",
    "TERowParallelGroupedLinear",
    "TERowParallelLinear",
    "TransformerConfig",
    "build_moe_layer",
    "close_groups",
    "copy_to_tensor_model_parallel_region",
    "fuse_weight_gradient",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "get_cuda_rng_tracker",
    "get_forward_backward_func",
    "get_fp8_align_size",
    "get_fp8_context",
    "get_megatron_optimizer",
    "get_te_version",
    "is_te_min_version",
    "model_parallel_cuda_manual_seed",
    "open_groups",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "scatter_to_sequence_parallel_region",
    "scatter_to_tensor_model_parallel_region",
    "version",
    "without_weight_decay",
]

COLLECTIVE_S = 600.0
"""Limit of the rendezvous and of every collective where no other is given."""

# Names that moe_utils of 0.16.1 imports only with Transformer Engine and then uses: NameError in the router's backward
# without them, on GPUs too. 0.19 sets them to None itself.
TE_NAMES_OF_MOE_UTILS = (
    "te_general_gemm", "fused_permute", "fused_permute_with_probs", "fused_sort_chunks_by_index",
    "fused_sort_chunks_by_index_with_probs", "fused_topk_with_score_function", "fused_unpermute",
    "fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss",
)  # fmt: skip
for _name in TE_NAMES_OF_MOE_UTILS:
    vars(moe_utils).setdefault(_name, None)


def version() -> tuple[int, int, int]:
    """Version of megatron-core, as numbers; its ``__version__`` may carry the revision of a git checkout around it."""
    major, minor, patch = package_info.VERSION[:3]
    return (major, minor, patch)


def open_groups(layout: Layout, *, seed: int = 0, timeout_s: float = COLLECTIVE_S) -> Any:
    """Create every process group of ``layout`` and megatron-core's random streams.

    Args:
        layout: its world size must be that of ``torch.distributed``, which is initialised.
        seed: of megatron-core's own random streams (dropout); megavid's own numbers do not come from them.
        timeout_s: limit of every collective of these groups.

    Returns:
        A ``ProcessGroupCollection`` with every field of the installed version set, among them tp, cp, pp, dp, dp_cp,
        tp_cp, tp_dp_cp, mp, ep, expt_tp, expt_dp, tp_ep, tp_ep_pp, embd, pos_embd, intra_dp_cp, intra_expt_dp and
        intra_dist_opt. Some are None: hcp, inter_dist_opt, and embd and pos_embd on stages without an embedding.

    Ranks:
        Collective over the world. The coordinates in the groups are ``layout.coordinates(rank)``.
    """
    with _lone_groups_shared():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            # Only megatron-core's own checkpoint format uses a second, gloo, set of groups.
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeout_s / 60.0,
        )
    model_parallel_cuda_manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


@contextmanager
def _lone_groups_shared() -> Iterator[None]:
    """While open, megatron-core creates one group of each single rank instead of one for each axis of size 1.

    Such a group never communicates, but with gloo each costs threads and a connection: most of the time of opening a
    small layout. Larger groups stay apart even where their ranks are the same, because collectives of dense and expert
    gradients may come in another order on each rank.
    """
    create = parallel_state.create_group
    lone: dict[tuple[int, ...], Any] = {}

    def create_or_share(ranks: Sequence[int] | None = None, **kwargs: Any) -> Any:
        if ranks is None or len(ranks) > 1:
            return create(ranks, **kwargs)
        if tuple(ranks) not in lone:
            lone[tuple(ranks)] = create(ranks, **kwargs)
        return lone[tuple(ranks)]

    parallel_state.create_group = create_or_share
    try:
        yield
    finally:
        parallel_state.create_group = create


def close_groups() -> None:
    """Forget megatron-core's global state and destroy the process groups that ``open_groups`` created on this rank."""
    if not parallel_state.is_initialized():
        return
    groups = {}
    for group in vars(ProcessGroupCollection.use_mpu_process_groups()).values():
        if isinstance(group, dist.ProcessGroup) and group is not dist.group.WORLD:
            groups[group.group_name] = group
    parallel_state.destroy_model_parallel()
    for group in groups.values():
        dist.destroy_process_group(group)


def build_moe_layer(
    config: TransformerConfig,
    groups: Any,
    *,
    layer_number: int,
    router: Callable[[TransformerConfig, Any], Module],
    experts: Callable[[int, TransformerConfig, Any], Module],
    shared_experts: Callable[[TransformerConfig, Any], Module] | None = None,
    layer_class: type[Module] = MoELayer,
) -> Any:
    """Build megatron-core's ``MoELayer`` from plain builders, the same in every version.

    Args:
        config: ``moe_shared_expert_intermediate_size`` decides whether ``shared_experts`` is built.
        groups: the ``ProcessGroupCollection`` of ``open_groups``.
        layer_number: counted from 1, as megatron-core does.
        router: (config, groups) -> module that maps hidden states to (probs, routing_map).
        experts: (experts on this rank, config, groups) -> module (tokens, tokens_per_expert, probs) -> (output, None).
        shared_experts: (config, groups) -> module.
        layer_class: ``MoELayer`` or a subclass of it.
    """
    submodules = MoESubmodules(
        experts=_builder(lambda count, config, pg_collection: experts(count, config, pg_collection)),
        router=_builder(lambda config, pg_collection: router(config, pg_collection)),
        shared_experts=shared_experts and _builder(lambda config, pg_collection: shared_experts(config, pg_collection)),
    )
    return layer_class(config=config, submodules=submodules, layer_number=layer_number, pg_collection=groups)


def _builder(build: Callable[..., Module]) -> type:
    """``build`` as something that both versions construct.

    0.16.1 builds experts with ``build_module``, which takes classes and returns plain functions uncalled; 0.19 calls
    what it is given, with ``name`` (and ``is_mtp_layer`` for routers) besides. A class whose construction is ``build``
    suits both.
    """

    class Builder:
        def __new__(cls, *args: Any, pg_collection: Any, **kwargs: Any) -> Any:
            for newer in ("name", "is_mtp_layer", "gate"):
                kwargs.pop(newer, None)
            return build(*args, pg_collection=pg_collection, **kwargs)

    return Builder


def without_weight_decay(is_exempt: Callable[[Parameter], bool]) -> dict[Any, Any]:
    """``config_overrides`` for ``get_megatron_optimizer``: parameters that ``is_exempt`` names take no weight decay.

    They replace megatron-core's own rule (biases and one-dimensional parameters take none), which both versions apply
    when no overrides are given.
    """
    return {ParamKey(predicate=ParamPredicate(name="no_weight_decay", fn=is_exempt)): {"wd_mult": 0.0}}


def current_device() -> torch.device:
    """The device that megatron-core allocates on: the rank's GPU, or the CPU once ``cpu.install()`` has run."""
    device = torch.cuda.current_device()
    return device if isinstance(device, torch.device) else torch.device("cuda", device)


def fuse_weight_gradient(
    linear: Any, add_product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None], total: GradientSum
) -> None:
    """Let a column- or row-parallel linear add its matrix' gradient to ``main_grad`` in its backward pass.

    It is what megatron-core calls gradient accumulation fusion, with a product of our own: it looks for one in
    ``fused_weight_gradient_mlp_cuda``, an extension of NVIDIA's apex that has to be compiled.

    Args:
        linear: its matrix has a ``main_grad`` in fp32, and is multiplied nowhere else.
        add_product: (sum so far [O, I], gradient of the output [S, O], input [S, I]), for all linears of the process.
        total: ``main_grad``, and what tells megatron-core's hook that something was added to it.
    """

    def wgrad_gemm_accum_fp32(x_SI: torch.Tensor, grad_SO: torch.Tensor, total_OI: torch.Tensor) -> None:
        add_product(total_OI, grad_SO, x_SI)

    extension = types.SimpleNamespace(wgrad_gemm_accum_fp32=wgrad_gemm_accum_fp32)
    vars(parallel_linears)["fused_weight_gradient_mlp_cuda"] = extension
    _tell_under_recomputation()
    linear.weight.main_grad.gradient_sum = total
    linear.gradient_accumulation_fusion = True


@functools.cache
def _tell_under_recomputation() -> None:
    """Let megatron-core's linear say what it added where its matrix comes back from recomputation, too.

    It marks the matrix that it saved, and gives no gradient where that has no mark. Recomputation gives it another
    tensor, without one, and then the hook that overlaps the reduction refuses to go on without a gradient.
    """
    function = parallel_linears.LinearWithGradAccumulationAndAsyncCommunication
    original = function.backward

    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_input, grad_weight, *others = original(ctx, grad_output)
        if grad_weight is None and ctx.gradient_accumulation_fusion and ctx.needs_input_grad[1]:
            total: GradientSum = ctx.main_grad.gradient_sum
            total.tell()
            grad_weight = total.stand_in(grad_output.dtype)
        return grad_input, grad_weight, *others

    function.backward = staticmethod(backward)
