"""The shared expert: a feed-forward that every token passes, tensor-parallel like a dense one.

Owns its parameters and placements. megatron-core's shared expert has no bias; this one has, on the same linears.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from megavid.config.schema import ModelConfig
from megavid.models.fp8 import Fp8Build, column_class, row_class
from megavid.parallel.placement import Init, Piece, Placement, place
from megavid.plan.layout import Layout


class SharedExpert(nn.Module):
    """GELU-tanh or SwiGLU feed-forward of width ``model.moe.shared_ffn_size``.

    Args:
        config: megatron-core's TransformerConfig.
        model: the model's config.
        name: name in model space, such as ``blocks.3.moe.shared``.
        groups: megatron-core's ProcessGroupCollection.
        layout: the run's layout.
        coordinates: where this rank stands on its axes.
        fp8: how its products are in FP8; None for not at all.
    """

    def __init__(
        self,
        config: Any,
        model: ModelConfig,
        name: str,
        groups: Any,
        layout: Layout,
        coordinates: dict[str, int],
        *,
        fp8: Fp8Build | None = None,
    ) -> None:
        super().__init__()
        moe, width = model.moe, model.hidden_size
        self.is_gated = moe.activation == "swiglu"
        self.name, self.local = name, moe.shared_ffn_size // layout.tp
        self.first = coordinates["tp"] * self.local
        # One product for both matrices of SwiGLU: their local rows lie one after the other.
        matrices = ["gate", "up"] if self.is_gated else ["up"]
        common: dict[str, Any] = {
            "config": config,
            "init_method": nn.Identity(),
            "bias": moe.has_bias,
            "skip_bias_add": False,
            "tp_group": groups.tp,
        }
        column = column_class(fp8, f"{name}.{matrices[0]}", groups.tp_cp)
        row = row_class(fp8, f"{name}.down", groups.tp_cp)
        self.up = column(width, moe.shared_ffn_size * len(matrices), gather_output=False, **common)
        self.down = row(moe.shared_ffn_size, width, input_is_parallel=True, **common)
        self._place(matrices, width, moe.shared_ffn_size, layout.sequence)

    def forward(self, hidden_tBD: Tensor) -> Tensor:
        """The shared expert's output for this rank's tokens, same shape."""
        hidden = self.up(hidden_tBD)[0]
        if self.is_gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = torch.nn.functional.silu(gate) * up
        else:
            hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
        out: Tensor = self.down(hidden)[0]
        return out

    def _place(self, matrices: list[str], width: int, ffn_size: int, is_sequence_parallel: bool) -> None:
        local, first = self.local, self.first
        sharded: frozenset[Literal["tp", "ep", "etp"]] = frozenset({"tp"})
        weights = [
            Piece(f"{self.name}.{which}.weight", (ffn_size, width), (first, 0), (local, width), i * local * width)
            for i, which in enumerate(matrices)
        ]
        place(self.up.weight, Placement(tuple(weights), sharded, init=Init(std=width**-0.5)))
        down = Piece(f"{self.name}.down.weight", (width, ffn_size), (0, first), (width, local))
        place(self.down.weight, Placement((down,), sharded, init=Init(std=ffn_size**-0.5)))
        if self.up.bias is None:
            return
        biases = [
            Piece(f"{self.name}.{which}.bias", (ffn_size,), (first,), (local,), i * local)
            for i, which in enumerate(matrices)
        ]
        place(self.up.bias, Placement(tuple(biases), sharded, has_decay=False))
        whole = Piece(f"{self.name}.down.bias", (width,), (0,), (width,))
        place(
            self.down.bias,
            Placement((whole,), is_partial_over_tp=is_sequence_parallel, has_decay=False),
        )
