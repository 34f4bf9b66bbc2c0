"""One block of the family ``wan`` for one device, under diffusers' names; the arithmetic of ``megavid.models.block``.

Blocks take plain tensors only: accelerate's hooks move those to the device of the block, and a graph compiler sees no
object of ours.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from megavid.config.schema import ModelConfig
from megavid.inference.moe import MoEFeedForward
from megavid.ops.norm import gated_residual, layer_norm, modulated_norm, rms_norm_of_sum, wide
from megavid.ops.rope import rotate


class AcrossHeadsNorm(nn.Module):
    """RMSNorm over all heads of a query or key."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The same shape and dtype; statistics in fp32."""
        total = wide(x_BTD).square().sum(-1, keepdim=True)
        return rms_norm_of_sum(x_BTD, total, self.width, self.weight, self.eps)


class AffineNorm(nn.Module):
    """LayerNorm with weight and bias, in fp32 inside."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The same shape and dtype."""
        return layer_norm(x_BTD, self.eps, self.weight, self.bias)


class SelfAttention(nn.Module):
    """Attention of a clip's tokens to themselves, with RoPE."""

    def __init__(self, width: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q, self.norm_k = AcrossHeadsNorm(width, eps), AcrossHeadsNorm(width, eps)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The same shape; cosines and sines of RoPE are [1, T, 1, A / 2]."""
        q = heads(self.norm_q(self.to_q(x_BTD)), self.num_heads)
        k = heads(self.norm_k(self.to_k(x_BTD)), self.num_heads)
        v = heads(self.to_v(x_BTD), self.num_heads)
        out: Tensor = self.to_out[0](attend(rotate(q, cos, sin), rotate(k, cos, sin), v))
        return out


class CrossAttention(nn.Module):
    """Attention of a clip's tokens to its caption and, with ``has_image``, by the same queries to its image."""

    def __init__(self, width: int, num_heads: int, eps: float, has_image: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q, self.norm_k = AcrossHeadsNorm(width, eps), AcrossHeadsNorm(width, eps)
        if has_image:
            self.add_k_proj, self.add_v_proj = nn.Linear(width, width), nn.Linear(width, width)
            self.norm_added_k = AcrossHeadsNorm(width, eps)

    def forward(self, x_BTD: Tensor, text_BLD: Tensor, image_BxD: Tensor | None) -> Tensor:
        """The same shape; caption and image are at the model's width."""
        q = heads(self.norm_q(self.to_q(x_BTD)), self.num_heads)
        k = heads(self.norm_k(self.to_k(text_BLD)), self.num_heads)
        attended = attend(q, k, heads(self.to_v(text_BLD), self.num_heads))
        if image_BxD is not None:
            k = heads(self.norm_added_k(self.add_k_proj(image_BxD)), self.num_heads)
            attended = attended + attend(q, k, heads(self.add_v_proj(image_BxD), self.num_heads))
        out: Tensor = self.to_out[0](attended)
        return out


def heads(x_BTD: Tensor, num_heads: int) -> Tensor:
    """The width cut into heads, [B, T, N, A]."""
    return torch.unflatten(x_BTD, -1, (num_heads, -1))


def attend(q_BTNA: Tensor, k_BTNA: Tensor, v_BTNA: Tensor) -> Tensor:
    """Attention, heads side by side again: [B, T, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTNA, k_BTNA, v_BTNA))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class GeluLinear(nn.Module):
    """A matrix with GELU-tanh behind it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, hidden]."""
        return torch.nn.functional.gelu(self.proj(x_BTD), approximate="tanh")


class FeedForward(nn.Module):
    """The dense feed-forward; the identity in the middle is diffusers' dropout, which owns number 1."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GeluLinear(width, hidden), nn.Identity(), nn.Linear(hidden, width)])

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The same shape."""
        out: Tensor = self.net[2](self.net[0](x_BTD))
        return out


class MegavidTransformerBlock(nn.Module):
    """Block number ``layer`` (from 0): self-attention, attention to the caption, and a feed-forward or experts."""

    def __init__(self, model: ModelConfig, layer: int, has_image: bool) -> None:
        super().__init__()
        width, num_heads, eps = model.hidden_size, model.num_heads, model.norm_eps
        self.eps = eps
        self.attn1 = SelfAttention(width, num_heads, eps)
        self.attn2 = CrossAttention(width, num_heads, eps, has_image)
        self.norm2 = AffineNorm(width, eps)
        is_moe = model.is_moe_layer(layer)
        self.ffn = MoEFeedForward(model.moe, width) if is_moe else FeedForward(width, model.ffn_size)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) * width**-0.5)

    def forward(
        self,
        x_BTD: Tensor,
        text_BLD: Tensor,
        image_BxD: Tensor | None,
        modulation_R6D: Tensor,
        row_BT: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """Tokens after this block.

        Args:
            x_BTD: residual stream.
            text_BLD: captions at the model's width.
            image_BxD: image features at the model's width, or None.
            modulation_R6D: six vectors for each row of the timestep table, fp32.
            row_BT: row of every token.
            cos: cosines of RoPE, [1, T, 1, A / 2].
            sin: sines, likewise.
        """
        table_R6D = wide(self.scale_shift_table) + modulation_R6D
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table_R6D.unbind(1)
        update = self.attn1(modulated_norm(x_BTD, shift, scale, row_BT, self.eps), cos, sin)
        x_BTD = gated_residual(x_BTD, update, gate, row_BT)
        x_BTD = x_BTD + self.attn2(self.norm2(x_BTD), text_BLD, image_BxD)
        update = self.ffn(modulated_norm(x_BTD, ffn_shift, ffn_scale, row_BT, self.eps))
        return gated_residual(x_BTD, update, ffn_gate, row_BT)
