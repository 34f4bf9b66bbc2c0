"""One block of the family ``wan``: self-attention, attention to the text, feed-forward, each behind its norm.

LayerNorm without affine, modulated by the clip's timestep, then gated into the residual stream; the middle attention
has an affine LayerNorm and no gate. The feed-forward is dense, or experts.

Source: Wan 2.1 (arXiv:2503.20314).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from megavid.models.attention import Attend, CrossAttention, Prompts, SelfAttention
from megavid.models.build import Build, column_linear, row_linear
from megavid.models.moe.layer import build_moe
from megavid.models.moe.stats import RoutingStats
from megavid.models.moe.tokens import TokenInfo
from megavid.ops.norm import wide
from megavid.ops.packs import Pack, Span
from megavid.ops.regions import region
from megavid.parallel.context.recompute import keep_attention
from megavid.parallel.placement import Init


@dataclass(frozen=True)
class Conditioning:
    """What every block of a stage shares for one microbatch.

    Attributes:
        packs: the segment tables, of whole packs.
        span: the tokens of every pack that stand on this context-parallel rank, T of them.
        attend: attention of the clips of these packs to themselves, over all context-parallel ranks.
        modulation_R6D: six modulation vectors of each row of the timestep table, fp32.
        row_tB: row of every token of this rank.
        prompts: captions, and images where the model has a branch for them, at the model's width.
        cos: cosines of RoPE for the T tokens, [T, B, 1, A / 2] fp32.
        sin: sines, likewise.
        tokens: what routers know of this rank's tokens.
    """

    packs: tuple[Pack, ...]
    span: Span
    attend: Attend
    modulation_R6D: Tensor
    row_tB: Tensor
    prompts: Prompts
    cos: Tensor
    sin: Tensor
    tokens: TokenInfo


class FeedForward(nn.Module):
    """Two matrices with GELU-tanh between them, tensor-parallel over the hidden width."""

    def __init__(self, build: Build, name: str) -> None:
        super().__init__()
        width, hidden = build.model.hidden_size, build.model.ffn_size
        self.bias_gelu = build.ops.bias_gelu
        self.up = column_linear(build, [f"{name}.up"], width, hidden, leaves_bias=True)
        self.down = row_linear(build, f"{name}.down", hidden, width)

    def forward(self, x_tBD: Tensor) -> Tensor:
        """The feed-forward of this rank's tokens."""
        out: Tensor = self.down(self.bias_gelu(*self.up(x_tBD)))[0]
        return out


class Block(nn.Module):
    """Transformer block number ``layer`` (from 0) of the whole model."""

    def __init__(self, build: Build, layer: int, recompute: str) -> None:
        super().__init__()
        build = build.in_block(layer)
        model, name = build.model, f"blocks.{layer}"
        self.layer, self.eps, self.recompute, self.ops = layer, model.norm_eps, recompute, build.capture.ops
        self.table = build.empty(6, model.hidden_size, is_fp32=True)
        self.self_attention = SelfAttention(build, f"{name}.self_attention")
        self.cross_norm_weight = build.empty(model.hidden_size, is_fp32=True)
        self.cross_norm_bias = build.empty(model.hidden_size, is_fp32=True)
        self.cross_attention = CrossAttention(build, f"{name}.cross_attention")
        self.is_moe = model.is_moe_layer(layer)
        self.feed_forward: Any
        if self.is_moe:
            self.feed_forward = build_moe(build, layer)
        else:
            self.feed_forward = FeedForward(build, f"{name}.ffn")
        for parameter, suffix, init in (
            (self.table, "modulation", Init(std=model.hidden_size**-0.5)),
            (self.cross_norm_weight, "cross_norm.weight", Init(mean=1.0)),
            (self.cross_norm_bias, "cross_norm.bias", Init()),
        ):
            build.place_whole(parameter, f"{name}.{suffix}", init=init, is_partial=True, has_decay=False)

    def forward(self, x_tBD: Tensor, given: Conditioning) -> tuple[Tensor, RoutingStats | None]:
        """Tokens after this block, and the routing statistics of its experts.

        Statistics are returned, not kept, because recomputation runs a forward pass twice.
        """
        if self.recompute == "full" and torch.is_grad_enabled():
            result: tuple[Tensor, RoutingStats | None] = checkpoint(
                self._block, x_tBD, given, use_reentrant=False, preserve_rng_state=False
            )
            return result
        return self._block(x_tBD, given)

    def _block(self, x_tBD: Tensor, given: Conditioning) -> tuple[Tensor, RoutingStats | None]:
        with region("modulation"):
            shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (wide(self.table) + given.modulation_R6D).unbind(1)
        update = self._maybe_again(self._attend, x_tBD, shift, scale, given, context_fn=keep_attention)
        x_tBD, update = self._maybe_again(self._attend_to_text, x_tBD, update, gate, given)
        x_tBD, update, stats = self._maybe_again(self._feed, x_tBD, update, ffn_shift, ffn_scale, given)
        return self.ops.gated_residual(x_tBD, update, ffn_gate, given.row_tB), stats

    def _attend(self, x_tBD: Tensor, shift: Tensor, scale: Tensor, given: Conditioning) -> Tensor:
        """What self-attention adds to the stream."""
        normed = self.ops.modulated_norm(x_tBD, shift, scale, given.row_tB, self.eps)
        out: Tensor = self.self_attention(normed, given.cos, given.sin, given.attend)
        return out

    def _attend_to_text(
        self, x_tBD: Tensor, update_tBD: Tensor, gate: Tensor, given: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """The stream with the update, and what attention to the text adds to it."""
        x_tBD, normed = self.ops.residual_affine_norm(
            x_tBD, update_tBD, gate, given.row_tB, self.cross_norm_weight, self.cross_norm_bias, self.eps
        )
        return x_tBD, self.cross_attention(normed, given.prompts, given.packs, given.span)

    def _feed(
        self, x_tBD: Tensor, update_tBD: Tensor, shift: Tensor, scale: Tensor, given: Conditioning
    ) -> tuple[Tensor, Tensor, RoutingStats | None]:
        """The stream with the update, what the feed-forward adds to it, and the routing statistics of its experts."""
        x_tBD, normed = self.ops.residual_modulated_norm(x_tBD, update_tBD, shift, scale, given.row_tB, self.eps)
        if self.is_moe:
            update_tBD, stats = self.feed_forward(normed, given.tokens)
            return x_tBD, update_tBD, stats
        return x_tBD, self.feed_forward(normed), None

    def _maybe_again(self, part: Any, *args: Any, context_fn: Any = noop_context_fn) -> Any:
        """Call ``part``, and under selective recomputation keep only its inputs for the backward pass.

        Each part is one branch of the residual stream, and begins with adding the branch before to the stream: what
        stays in memory is the stream and the branches' outputs, and not what is inside them; ``context_fn`` may keep
        more.
        """
        if self.recompute == "selective" and torch.is_grad_enabled():
            return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn)
        return part(*args)
