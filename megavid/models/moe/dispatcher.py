"""How tokens travel to the ranks of their experts and back: megatron-core's dispatchers, for any routing map.

Owns what they need beyond megatron-core: rows that are not tokens x top_k (padding goes nowhere; expert choice gives a
token any number of experts), and the question whether a dispatcher can run here.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from megavid.config.schema import MoEConfig
from megavid.errors import ConfigError
from megavid.ops.moe_ops import Permutation
from megavid.ops.moe_permute import Rows
from megavid.parallel import mcore


class AllToAllDispatcher(mcore.MoEAlltoAllTokenDispatcher):  # type: ignore[misc]  # megatron-core has no type stubs
    """All-to-all over expert ranks, all-gather and reduce-scatter over expert-tensor ranks; dropless."""

    permutation: Permutation | None = None
    """Rows and tokens; None: megatron-core's own."""
    rows: Rows | None = None
    probs: Any
    routing_map: Any

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Counts for the exchange; megatron-core takes the number of rows to be tokens x top_k, here it is counted."""
        tokens_per_expert: Tensor = super().preprocess(routing_map)
        # The permutation needs the number on the host: megatron-core fetches it together with the other counts.
        self.num_out_tokens = routing_map.sum()
        self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_expert

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Rows sorted by expert, and their gates; as megatron-core has it but for the permutation."""
        if self.permutation is None:
            rows, row_probs = super().dispatch_preprocess(hidden_states, routing_map, probs)
            return rows, row_probs
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        tokens_per_expert = self.preprocess(routing_map)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", tokens_per_expert)
        x_TD = hidden_states.view(-1, self.hidden_shape[-1])
        self.rows = self.permutation.forth(x_TD, probs, routing_map, int(self.num_out_tokens))
        return self.rows.x_SD, self.rows.probability_S

    def dispatch_postprocess(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows sorted by local expert. On a rank of its own they are, and megatron-core would copy them."""
        if self.permutation is None or self.tp_size * self.ep_size > 1:
            rows, tokens_per_expert, probs = super().dispatch_postprocess(rows, probs)
            return rows, tokens_per_expert, probs
        tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_2", self.tokens_per_expert)
        tokens_per_expert = self._maybe_dtoh_and_synchronize("before_finish", tokens_per_expert)
        self.tokens_per_expert = None
        return rows, tokens_per_expert, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Rows as they came; see ``dispatch_postprocess``."""
        if self.permutation is None or self.tp_size * self.ep_size > 1:
            hidden_states = super().combine_preprocess(hidden_states)
        return hidden_states

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """Tokens in their own order again; lets go of the gates, which would keep the autograd graph alive."""
        output: Tensor
        if self.permutation is None:
            output = super().combine_postprocess(permutated_local_input_tokens)
        else:
            assert self.rows is not None
            output = self.permutation.back(permutated_local_input_tokens, self.rows).view(self.hidden_shape)
        self.probs = self.routing_map = None
        self.rows = None
        return output


class AllGatherDispatcher(mcore.MoEAllGatherTokenDispatcher):  # type: ignore[misc]
    """All tokens to all ranks of the expert group and the sum back; for few experts and few ranks."""

    permutation: Permutation | None = None
    """Rows and tokens; None: megatron-core's own."""
    rows: Rows | None = None
    local_probs: Any
    routing_map: Any

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, gates and routing map of all ranks of the group.

        megatron-core (0.16.1 and 0.19.2) gathers into its one global buffer, and returns the gradient of the tokens in
        it too. The shared expert's column-parallel backward writes the same buffer before autograd has added the two:
        wrong input gradients, silently. So here the tensors are of their own.
        """
        if self.tp_size * self.ep_size > 1:
            gather, group = mcore.gather_from_sequence_parallel_region, self.tp_ep_group
            with torch.no_grad():
                self.routing_map = gather(self.routing_map, group=group)  # set in dispatch_preprocess
            probs, hidden_states = gather(probs, group=group), gather(hidden_states, group=group)
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the local experts, sorted by expert; as megatron-core has it but for the permutation."""
        if self.permutation is None:
            rows, tokens_per_expert, row_probs = super().dispatch_postprocess(hidden_states, probs)
            return rows, tokens_per_expert, row_probs
        local = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        map_Te = self.routing_map[:, local]
        self.local_probs = probs[:, local]
        self.routing_map = None
        tokens_per_expert = map_Te.sum(0).cpu()
        num_rows = int(tokens_per_expert.sum())
        self.rows = self.permutation.forth(hidden_states, self.local_probs, map_Te, num_rows)
        return self.rows.x_SD, tokens_per_expert, self.rows.probability_S

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The sum of each token's rows."""
        if self.permutation is None:
            summed: Tensor = super().combine_preprocess(hidden_states)
            return summed
        assert self.rows is not None
        return self.permutation.back(hidden_states, self.rows)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Tokens in their own shape again; lets go of the gates, which would keep the autograd graph alive."""
        output: Tensor = super().combine_postprocess(hidden_states)
        self.local_probs = self.local_map = None
        self.rows = None
        return output


def flex_missing() -> str:
    """Why ``parallel.dispatcher = "flex"`` cannot run on this machine; empty if it can. For ``megavid doctor`` too."""
    if importlib.util.find_spec("deep_ep") is None:
        return "the package deep_ep (DeepEP or its HybridEP branch) is not installed"
    return ""


def build_dispatcher(
    moe: MoEConfig, num_local_experts: int, config: Any, groups: Any, permutation: Permutation | None = None
) -> Any:
    """The dispatcher that ``config.moe_token_dispatcher_type`` names.

    Args:
        moe: the experts' config.
        num_local_experts: experts on this rank.
        config: megatron-core's TransformerConfig.
        groups: its ProcessGroupCollection.
        permutation: of rows and tokens; None: megatron-core's own, which flex has in any case.

    Raises:
        ConfigError: flex without DeepEP or HybridEP, on a single rank, or with expert choice on DeepEP.
    """
    first = groups.ep.rank() * num_local_experts
    local = list(range(first, first + num_local_experts))
    kind = config.moe_token_dispatcher_type
    own: dict[str, type[AllToAllDispatcher] | type[AllGatherDispatcher]]
    own = {"alltoall": AllToAllDispatcher, "allgather": AllGatherDispatcher}
    if kind in own:
        dispatcher = own[kind](num_local_experts, local, config=config, pg_collection=groups)
        dispatcher.permutation = permutation
        return dispatcher
    if kind != "flex":
        raise ConfigError(f"parallel.dispatcher = '{kind}' must be one of 'alltoall', 'allgather', 'flex'")
    other = "set parallel.dispatcher = 'alltoall' or 'allgather'"
    if missing := flex_missing():
        raise ConfigError(f"parallel.dispatcher = 'flex': {missing}; {other}")
    if groups.tp_ep.size() == 1:
        raise ConfigError(f"parallel.dispatcher = 'flex' needs parallel.expert x expert_tensor > 1, got 1; {other}")
    if moe.router == "expert_choice" and config.moe_flex_dispatcher_backend == "deepep":
        raise ConfigError(
            f"parallel.dispatcher = 'flex' on DeepEP sends a token to at most top_k = {moe.top_k} experts, and "
            f"model.moe.router = 'expert_choice' may give it more; {other}"
        )
    # DeepEP sends padding too, with gate 0: its rows add nothing to outputs and gradients.
    return mcore.MoEFlexTokenDispatcher(num_local_experts, local, config=config, pg_collection=groups)
