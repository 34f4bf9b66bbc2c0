"""Self- and cross-attention of Wan's block, tensor-parallel over heads.

q and k are normalised across all heads, which tensor-parallel ranks share: one all-reduce of a sum of squares per token
in the forward pass and one in the backward pass. The norm's weight is sharded like the heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megavid.models.build import Build, column_linear, row_linear
from megavid.ops.attention import cross_attention
from megavid.ops.norm import rms_norm_of_sum, wide
from megavid.ops.packs import Pack, Span
from megavid.ops.rope import rotate
from megavid.parallel import mcore
from megavid.parallel.placement import Init, Piece, Placement, place

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values [T, B, N, A] of this rank's tokens and heads to what the queries gather."""


class AcrossHeadsNorm(nn.Module):
    """RMSNorm of tensors of width D of which each tensor-parallel rank holds its heads' part.

    Ranks: each holds the last dim's shard before and after. Gradient: one all-reduce of a number per token and tensor.
    """

    def __init__(self, build: Build, names: tuple[str, ...]) -> None:
        super().__init__()
        self.width, self.eps = build.model.hidden_size, build.model.norm_eps
        self.group, self.tp = build.mesh.group("tp"), build.tp
        local = self.width // build.tp
        self.weights = nn.ParameterList([build.empty(local, is_fp32=True) for _ in names])
        for name, weight in zip(names, self.weights):
            piece = Piece(name, (self.width,), (build.tp_rank * local,), (local,))
            place(
                weight,
                Placement((piece,), frozenset({"tp"}), has_decay=False, keeps_fp32=True, init=Init(mean=1.0)),
            )

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """Normalised tensors [..., D / tp], in one all-reduce if they have the same leading shape."""
        sums = torch.cat([wide(x).square().sum(-1, keepdim=True) for x in tensors], dim=-1)
        if self.tp > 1:
            # Forward: sum over ranks. Backward: the sum's gradient has a part from every rank's heads, so sum it too.
            sums = mcore.reduce_from_tensor_model_parallel_region(sums, group=self.group)
            sums = mcore.copy_to_tensor_model_parallel_region(sums, group=self.group)
        return [
            rms_norm_of_sum(x, total, self.width, weight, self.eps)
            for x, total, weight in zip(tensors, torch.split(sums, 1, dim=-1), self.weights)
        ]


class SelfAttention(nn.Module):
    """Bidirectional attention of every clip to itself, with 3D RoPE."""

    def __init__(self, build: Build, name: str) -> None:
        super().__init__()
        width = build.model.hidden_size
        self.head_size = build.model.head_size
        self.qkv = column_linear(build, [f"{name}.q", f"{name}.k", f"{name}.v"], width, width)
        self.norm = AcrossHeadsNorm(build, (f"{name}.q_norm.weight", f"{name}.k_norm.weight"))
        self.out = row_linear(build, f"{name}.out", width, width)

    def forward(self, x_tBD: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Attention of this rank's tokens [t, B, D]; inside, every rank has its span's T tokens and its own heads.

        Args:
            x_tBD: normed and modulated tokens.
            cos: cosines of the angles of the T tokens, [T, B, 1, A / 2].
            sin: sines, likewise.
            attend: the attention itself, of these packs, over all context-parallel ranks.
        """
        q, k, v = self.qkv(x_tBD)[0].chunk(3, dim=-1)
        q, k = self.norm(q, k)
        q, k, v = (x.unflatten(-1, (-1, self.head_size)) for x in (q, k, v))
        attended = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        out: Tensor = self.out(attended.flatten(-2))[0]
        return out


class CrossAttention(nn.Module):
    """Attention of every clip's tokens to its caption; keys and values of all captions stand on every rank's heads."""

    def __init__(self, build: Build, name: str) -> None:
        super().__init__()
        width = build.model.hidden_size
        self.head_size = build.model.head_size
        self.q = column_linear(build, [f"{name}.q"], width, width)
        self.kv: Any = column_linear(build, [f"{name}.k", f"{name}.v"], width, width, of_text=True)
        self.q_norm = AcrossHeadsNorm(build, (f"{name}.q_norm.weight",))
        self.k_norm = AcrossHeadsNorm(build, (f"{name}.k_norm.weight",))
        self.out = row_linear(build, f"{name}.out", width, width)

    def forward(self, x_tBD: Tensor, text_LGD: Tensor, packs: tuple[Pack, ...], span: Span) -> Tensor:
        """Attention of this rank's tokens [t, B, D], T of ``span`` inside, to the captions [L, G, D]."""
        (q,) = self.q_norm(self.q(x_tBD)[0])
        k, v = self.kv(text_LGD)[0].chunk(2, dim=-1)
        (k,) = self.k_norm(k)
        q, k, v = (x.unflatten(-1, (-1, self.head_size)) for x in (q, k, v))
        out: Tensor = self.out(cross_attention(q, k, v, packs, span).flatten(-2))[0]
        return out
