"""The mixture-of-experts feed-forward of one block: route, dispatch, compute, combine, and the shared expert beside it.

Owns the order of these steps and how they are built; each step is its own module. The statistics of routing are
returned with the output.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megavid.config.schema import ModelConfig
from megavid.models.fp8 import Fp8Build
from megavid.models.moe.dispatcher import build_dispatcher
from megavid.models.moe.experts import GroupedExperts
from megavid.models.moe.router import Router
from megavid.models.moe.shared import SharedExpert
from megavid.models.moe.stats import RoutingStats, routing_stats
from megavid.models.moe.tokens import TokenInfo
from megavid.ops.moe_ops import REFERENCE_MOE, MoEOps
from megavid.ops.norm import residual
from megavid.ops.regions import region
from megavid.parallel import mcore
from megavid.parallel.placement import Init, Piece, Placement, place
from megavid.plan.layout import Layout


class VideoMoELayer(nn.Module):
    """Experts in place of a dense feed-forward; ``build_moe`` builds it.

    Args:
        router: chooses experts and gates.
        experts: this rank's experts, (rows, rows of each expert, gates) -> (output, None).
        dispatcher: one of megatron-core's, see ``megavid.models.moe.dispatcher``.
        shared: the shared expert, or None.
        overlaps_shared: compute the shared expert on a stream of its own while tokens travel.
    """

    def __init__(
        self, router: Router, experts: nn.Module, dispatcher: Any, shared: nn.Module | None, overlaps_shared: bool
    ) -> None:
        super().__init__()
        self.router, self.experts, self.dispatcher, self.shared = router, experts, dispatcher, shared
        self.side_stream: Any = None
        if overlaps_shared and shared is not None:
            self.side_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def forward(self, hidden_tBD: Tensor, info: TokenInfo) -> tuple[Tensor, RoutingStats]:
        """Output for this rank's tokens, and what the router did with them.

        Args:
            hidden_tBD: this rank's tokens (T / tp of each pack under sequence parallelism).
            info: whose tokens they are.

        Ranks:
            Exchanges tokens within the expert and expert-tensor ranks: all of them must call together.
        """
        hidden_tBD = hidden_tBD.contiguous()
        routing = self.router(hidden_tBD.view(-1, hidden_tBD.shape[-1]), info)
        shared_tBD = self._shared(hidden_tBD)
        out_tBD = self._routed(hidden_tBD, routing.map_TE, routing.probs_TE)
        if shared_tBD is not None:
            if self.side_stream is not None:
                torch.cuda.current_stream().wait_stream(self.side_stream)
                _keep_for(shared_tBD, torch.cuda.current_stream())
            out_tBD = residual(out_tBD, shared_tBD)
        with region("routing_statistics"):
            return out_tBD, routing_stats(routing, info)

    def _routed(self, hidden_tBD: Tensor, map_TE: Tensor, probs_TE: Tensor) -> Tensor:
        with region("dispatch"):
            rows, probs = self.dispatcher.dispatch_preprocess(hidden_tBD, map_TE, probs_TE)
            rows, probs = self.dispatcher.token_dispatch(rows, probs)
            rows_SD, tokens_per_expert, probs_S = self.dispatcher.dispatch_postprocess(rows, probs)
        out_SD, _ = self.experts(rows_SD, tokens_per_expert, probs_S)
        with region("dispatch"):
            out = self.dispatcher.combine_preprocess(out_SD)
            out = self.dispatcher.token_combine(out)
            out_tBD: Tensor = self.dispatcher.combine_postprocess(out)
        return out_tBD

    def _shared(self, hidden_tBD: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        if self.side_stream is None:
            out: Tensor = self.shared(hidden_tBD)
            return out
        self.side_stream.wait_stream(torch.cuda.current_stream())
        _keep_for(hidden_tBD, self.side_stream)
        with torch.cuda.stream(self.side_stream):
            out = self.shared(hidden_tBD)
        return out


def _keep_for(tensor: Tensor, stream: Any) -> None:
    """Let the allocator give the memory of ``tensor`` to nobody before ``stream`` is done with it."""
    if tensor.is_cuda:
        tensor.record_stream(stream)


def build_moe(
    config: Any,
    model: ModelConfig,
    layer: int,
    groups: Any,
    layout: Layout,
    coordinates: dict[str, int],
    ops: MoEOps = REFERENCE_MOE,
    *,
    fp8: Fp8Build | None = None,
) -> VideoMoELayer:
    """The expert layer of block ``layer`` (from 0 in the whole model), with no values in its parameters yet.

    Args:
        config: megatron-core's TransformerConfig of this layout.
        model: the model's config.
        layer: number of the block.
        groups: megatron-core's ProcessGroupCollection.
        layout: the run's layout.
        coordinates: where this rank stands on its axes.
        ops: what the layer computes between its matrix products.
        fp8: how experts and the shared one are in FP8; None for not at all.

    Raises:
        ConfigError: the dispatcher cannot run here, or the layout does not divide the experts.
    """
    moe, name = model.moe, f"blocks.{layer}.moe"
    device = _device(config)
    shared = None
    if moe.shared_ffn_size:
        shared = SharedExpert(config, model, f"{name}.shared", groups, layout, coordinates, fp8=fp8)
    num_local_experts = moe.num_experts // layout.ep
    dtype: torch.dtype = config.params_dtype
    experts = GroupedExperts(
        num_local_experts, model, name, layout, coordinates, dtype=dtype, device=device, activate=ops.activate
    )
    return VideoMoELayer(
        router=build_router(model, name, groups, layout, dtype=dtype, device=device, ops=ops),
        experts=experts if fp8 is None else experts.in_fp8(fp8, groups.tp_ep),
        dispatcher=build_dispatcher(moe, num_local_experts, config, groups, ops.permutation),
        shared=shared,
        overlaps_shared=bool(config.moe_shared_expert_overlap),
    )


def build_router(
    model: ModelConfig,
    name: str,
    groups: Any,
    layout: Layout,
    *,
    dtype: torch.dtype,
    device: torch.device,
    ops: MoEOps = REFERENCE_MOE,
) -> Router:
    """The router of the expert layer ``name``; its weight is fp32 in every precision of the model."""
    shape = (model.moe.num_experts, model.hidden_size)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = nn.Parameter(torch.empty(shape, dtype=wide, device=device))
    piece = Piece(f"{name}.router.weight", shape, (0, 0), shape)
    # Every tensor-parallel rank routes its own tokens, so its gradient is a part of the sum.
    placement = Placement(
        (piece,),
        is_partial_over_tp=layout.sequence,
        has_decay=False,
        init=Init(std=model.hidden_size**-0.5),
    )
    place(weight, placement)
    is_shared = layout.sequence or layout.cp > 1
    return Router(model.moe, weight, groups.tp_cp if is_shared else None, ops)


def _device(config: Any) -> torch.device:
    """Where parameters live; a ``torch.device("meta")`` context wins, to count a model without building it."""
    default = torch.get_default_device()
    if default.type == "meta":
        return default
    return torch.device("cpu") if config.use_cpu_initialization else mcore.current_device()
