"""The mixture-of-experts feed-forward of one block: route, dispatch, compute, combine, and the shared expert beside it.

Owns the order of these steps and how they are built; each step is its own module. The statistics of routing are
returned with the output.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megavid.models.build import Build
from megavid.models.moe.dispatcher import build_dispatcher
from megavid.models.moe.experts import GroupedExperts
from megavid.models.moe.router import Router
from megavid.models.moe.shared import SharedExpert
from megavid.models.moe.stats import RoutingStats, routing_stats
from megavid.models.moe.te_experts import TEExperts
from megavid.models.moe.tokens import TokenInfo
from megavid.ops.norm import residual
from megavid.ops.regions import region
from megavid.parallel.placement import Init


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


def build_moe(build: Build, layer: int) -> VideoMoELayer:
    """The expert layer of block ``layer`` (from 0 in the whole model), with no values in its parameters yet.

    Args:
        build: what the block is built from.
        layer: number of the block.

    Raises:
        ConfigError: the dispatcher cannot run here, or the layout does not divide the experts.
    """
    moe, name, groups, ops = build.model.moe, f"blocks.{layer}.moe", build.mesh.groups, build.ops.moe
    experts = build_experts(build, name)
    return VideoMoELayer(
        router=build_router(build, name),
        experts=experts,
        dispatcher=build_dispatcher(moe, experts.share.count, build.transformer, groups, ops.permutation),
        shared=SharedExpert(build, f"{name}.shared") if moe.shared_ffn_size else None,
        overlaps_shared=bool(build.transformer.moe_shared_expert_overlap),
    )


def build_experts(build: Build, name: str) -> GroupedExperts | TEExperts:
    """The experts of the expert layer ``name``, on whose linears the run has; in four bits they are always our own."""
    if build.is_te and build.precision.fp8_experts == "same":
        return TEExperts(build, name)
    experts = GroupedExperts(build, name)
    return experts if build.fp8 is None else experts.in_fp8(build.fp8, build.mesh.groups.tp_ep)


def build_router(build: Build, name: str) -> Router:
    """The router of the expert layer ``name``; its weight is fp32 in every precision of the model."""
    model, layout = build.model, build.mesh.layout
    weight = build.empty(model.moe.num_experts, model.hidden_size, is_fp32=True)
    # Every tensor-parallel rank routes its own tokens, so its gradient is a part of the sum.
    init = Init(std=model.hidden_size**-0.5)
    build.place_whole(weight, f"{name}.router.weight", init=init, is_partial=True, has_decay=False)
    is_shared = layout.sequence or layout.cp > 1
    return Router(model.moe, weight, build.mesh.groups.tp_cp if is_shared else None, build.ops.moe)
