"""Self- and cross-attention of Wan's block, tensor-parallel over heads.

q and k are normalised across all heads, which tensor-parallel ranks share: one all-reduce of a sum of squares per token
in the forward pass and one in the backward pass. The norm's weight is sharded like the heads.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megavid.models.build import Build, column_linear, row_linear
from megavid.ops.attention import cross_attention
from megavid.ops.block_attention_fp8 import AttentionRounding
from megavid.ops.block_ops import BlockOps
from megavid.ops.packs import Pack, Span
from megavid.parallel import mcore
from megavid.parallel.placement import Init, Piece, Placement, place


class Attend(Protocol):
    """Queries, keys and values [T, B, N, A] of this rank's tokens and heads to what the queries gather."""

    def __call__(
        self, q_TBNA: Tensor, k_TBNA: Tensor, v_TBNA: Tensor, /, *, rounding: AttentionRounding | None = None
    ) -> Tensor:
        """In FP8 where ``rounding`` is given."""
        ...


class AcrossHeadsNorm(nn.Module):
    """RMSNorm of tensors of width D of which each tensor-parallel rank holds its heads' part.

    Ranks: each holds the last dim's shard before and after. Gradient: one all-reduce of a number per token and tensor.
    """

    def __init__(self, build: Build, names: tuple[str, ...], ops: BlockOps) -> None:
        super().__init__()
        self.width, self.eps = build.model.hidden_size, build.model.norm_eps
        self.group, self.tp, self.ops = build.mesh.group("tp"), build.tp, ops
        local = self.width // build.tp
        self.weights = nn.ParameterList([build.empty(local, is_fp32=True) for _ in names])
        for name, weight in zip(names, self.weights):
            piece = Piece(name, (self.width,), (build.tp_rank * local,), (local,))
            place(weight, Placement((piece,), frozenset({"tp"}), has_decay=False, init=Init(mean=1.0)))

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """Normalised tensors [..., D / tp], in one all-reduce if they have the same leading shape."""
        return [
            self.ops.rms_norm(x, total, self.width, weight, self.eps)
            for x, total, weight in zip(tensors, self.sums_of_squares(*tensors), self.weights)
        ]

    def sums_of_squares(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Sum of squares of each tensor over all heads, [..., 1] in fp32 or wider."""
        sums = torch.cat([self.ops.sum_of_squares(x) for x in tensors], dim=-1)
        if self.tp > 1:
            # Forward: sum over ranks. Backward: the sum's gradient has a part from every rank's heads, so sum it too.
            sums = mcore.reduce_from_tensor_model_parallel_region(sums, group=self.group)
            sums = mcore.copy_to_tensor_model_parallel_region(sums, group=self.group)
        return torch.split(sums, 1, dim=-1)


class SelfAttention(nn.Module):
    """Bidirectional attention of every clip to itself, with 3D RoPE."""

    def __init__(self, build: Build, name: str) -> None:
        super().__init__()
        width = build.model.hidden_size
        self.head_size, self.ops = build.model.head_size, build.capture.ops
        self.qkv = column_linear(build, [f"{name}.q", f"{name}.k", f"{name}.v"], width, width)
        self.norm = AcrossHeadsNorm(build, (f"{name}.q_norm.weight", f"{name}.k_norm.weight"), self.ops)
        self.out = row_linear(build, f"{name}.out", width, width)
        self.rounding = None if build.fp8 is None else build.fp8.attention(name)

    def forward(self, x_tBD: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Attention of this rank's tokens [t, B, D]; inside, every rank has its span's T tokens and its own heads.

        Args:
            x_tBD: normed and modulated tokens.
            cos: cosines of the angles of the T tokens, [T, B, 1, A / 2].
            sin: sines, likewise.
            attend: the attention itself, of these packs, over all context-parallel ranks.
        """
        q, k, v = self.qkv(x_tBD)[0].chunk(3, dim=-1)
        q_TBNA, k_TBNA = (
            self.ops.norm_rope(x, total, weight, cos, sin, self.norm.width, self.norm.eps)
            for x, total, weight in zip((q, k), self.norm.sums_of_squares(q, k), self.norm.weights)
        )
        attended = attend(q_TBNA, k_TBNA, v.unflatten(-1, (-1, self.head_size)), rounding=self.rounding)
        out: Tensor = self.out(attended.flatten(-2))[0]
        return out


@dataclass(frozen=True)
class Prompts:
    """What cross-attention attends to: on every rank whole, the same for all blocks.

    Attributes:
        text_LGD: captions at the model's width.
        image_LGD: image tokens at the model's width; None for a model without image branch.
        has_image_G: bool, the clips whose image tokens count.
    """

    text_LGD: Tensor
    image_LGD: Tensor | None = None
    has_image_G: Tensor | None = None


class CrossAttention(nn.Module):
    """Attention of every clip's tokens to its caption, and in models with an image branch to its image tokens: two
    softmaxes of the same queries, added. Keys and values of all clips stand on every rank's heads.

    Source of the image branch: Wan 2.1's image-to-video models, as diffusers' WanAttnProcessor has it; a clip without
    image adds nothing.
    """

    def __init__(self, build: Build, name: str) -> None:
        super().__init__()
        width = build.model.hidden_size
        self.head_size = build.model.head_size
        self.q = column_linear(build, [f"{name}.q"], width, width)
        self.kv: Any = column_linear(build, [f"{name}.k", f"{name}.v"], width, width, of_text=True)
        self.q_norm = AcrossHeadsNorm(build, (f"{name}.q_norm.weight",), build.capture.ops)
        self.k_norm = AcrossHeadsNorm(build, (f"{name}.k_norm.weight",), build.ops)
        self.out = row_linear(build, f"{name}.out", width, width)
        self.has_image = build.model.image_size > 0
        if self.has_image:
            self.image_kv: Any = column_linear(
                build, [f"{name}.image_k", f"{name}.image_v"], width, width, of_text=True
            )
            self.image_k_norm = AcrossHeadsNorm(build, (f"{name}.image_k_norm.weight",), build.ops)

    def forward(self, x_tBD: Tensor, prompts: Prompts, packs: tuple[Pack, ...], span: Span) -> Tensor:
        """Attention of this rank's tokens [t, B, D], T of ``span`` inside, to the prompts of their clips."""
        (q,) = self.q_norm(self.q(x_tBD)[0])
        q_TBNA = q.unflatten(-1, (-1, self.head_size))
        k, v = self._keys_and_values(self.kv, self.k_norm, prompts.text_LGD)
        attended = cross_attention(q_TBNA, k, v, packs, span)
        if self.has_image:
            assert prompts.image_LGD is not None
            assert prompts.has_image_G is not None
            k, v = self._keys_and_values(self.image_kv, self.image_k_norm, prompts.image_LGD)
            # Values of zero instead of a branch: all weights take part in every backward pass, on every rank.
            v = v * prompts.has_image_G.view(1, -1, 1, 1)
            attended = attended + cross_attention(q_TBNA, k, v, packs, span)
        out: Tensor = self.out(attended.flatten(-2))[0]
        return out

    def _keys_and_values(self, linear: Any, norm: AcrossHeadsNorm, prompt_LGD: Tensor) -> tuple[Tensor, Tensor]:
        k, v = linear(prompt_LGD)[0].chunk(2, dim=-1)
        (k,) = norm(k)
        return k.unflatten(-1, (-1, self.head_size)), v.unflatten(-1, (-1, self.head_size))
