"""The shared expert: a feed-forward that every token passes, tensor-parallel like a dense one.

Owns its shape and activation. megatron-core's shared expert has no bias; this one has, on the linears of every block.
"""

import torch
from torch import Tensor, nn

from megavid.models.build import Build, column_linear, row_linear


class SharedExpert(nn.Module):
    """GELU-tanh or SwiGLU feed-forward of width ``model.moe.shared_ffn_size``.

    Args:
        build: what the block is built from.
        name: name in model space, such as ``blocks.3.moe.shared``.
    """

    def __init__(self, build: Build, name: str) -> None:
        super().__init__()
        moe, width = build.model.moe, build.model.hidden_size
        self.is_gated, self.bias_gelu = moe.activation == "swiglu", build.ops.bias_gelu
        # One product for both matrices of SwiGLU: their local rows lie one after the other.
        names = [f"{name}.{which}" for which in (("gate", "up") if self.is_gated else ("up",))]
        self.up = column_linear(
            build, names, width, moe.shared_ffn_size, has_bias=moe.has_bias, leaves_bias=not self.is_gated
        )
        self.down = row_linear(build, f"{name}.down", moe.shared_ffn_size, width, has_bias=moe.has_bias)

    def forward(self, hidden_tBD: Tensor) -> Tensor:
        """The shared expert's output for this rank's tokens, same shape."""
        hidden, bias = self.up(hidden_tBD)
        if self.is_gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = torch.nn.functional.silu(gate) * up
        else:
            hidden = self.bias_gelu(hidden, bias)
        out: Tensor = self.down(hidden)[0]
        return out
