"""Bytes that one block of the model takes on a context-parallel rank, counted at the allocator.

Owns the probe only: the model's own block, forward and backward, on the ranks of a running world. Attention's bytes do
not depend on its numbers, so a kernel that allocates what the real one gives back, and computes nothing, may stand in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megavid.config.schema import DataConfig, ModelConfig, RunConfig
from megavid.models.attention import Prompts
from megavid.models.block import Block, Conditioning
from megavid.models.build import Build
from megavid.models.moe.tokens import TokenInfo
from megavid.models.transformer import transformer_config
from megavid.ops.block_attention import BlockAttention, BlockGradients, wide_dtype
from megavid.ops.packs import Clip, Pack
from megavid.parallel.context.attention import ContextParallelAttention
from megavid.parallel.context.attn_plan import AttnPlan
from megavid.parallel.mesh import Mesh
from megavid.plan.context import ContextPlan
from megavid.plan.layout import Layout
from megavid.profiling.allocations import AllocationMeter

REPEATS = 3


@dataclass(frozen=True)
class ContextMemory:
    """Peak bytes of one rank.

    Attributes:
        plan: the strategy.
        layer: one block, forward and backward; its weights and their gradients were there before.
        attention: self-attention alone, forward and backward, its inputs counted.
        shard: bytes of one tensor of this rank's tokens and the model's width.
    """

    plan: ContextPlan
    layer: int
    attention: int
    shard: int


class HollowAttention:
    """A kernel that allocates what the CPU's flash kernel gives back, and computes nothing."""

    def forward(self, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor) -> tuple[Tensor, Tensor]:
        """See ``BlockAttention``; zeros."""
        return _zeros(q_BNTA), q_BNTA.new_zeros(q_BNTA.shape[:3], dtype=wide_dtype(q_BNTA.dtype))

    def backward(
        self, grad_BNTA: Tensor, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor, out_BNTA: Tensor, lse_BNT: Tensor
    ) -> BlockGradients:
        """See ``BlockAttention``; zeros."""
        return BlockGradients(_zeros(q_BNTA), _zeros(k_BNTA), _zeros(v_BNTA))


def _zeros(like_BNTA: Tensor) -> Tensor:
    batch, heads, tokens, width = like_BNTA.shape
    return like_BNTA.new_zeros(batch, tokens, heads, width).transpose(1, 2)


def measure_context_memory(
    plan: ContextPlan, *, tokens: int = 8192, heads: int = 8, head_size: int = 16, is_hollow: bool = True
) -> ContextMemory:
    """Peak bytes of one block with ``plan`` on the ``plan.cp`` ranks of the running world.

    Args:
        plan: degrees and kind.
        tokens: of one pack, all of it one clip; the ranks divide them.
        heads: of the model; the Ulysses degree divides them.
        head_size: width of one.
        is_hollow: let no kernel compute self-attention.
    """
    config = RunConfig(
        model=ModelConfig(
            family="wan", num_layers=1, hidden_size=heads * head_size, num_heads=heads, ffn_size=4 * heads * head_size,
            text_length=32,
        ),
        data=DataConfig(pack_tokens=tokens),
    )  # fmt: skip
    layout = Layout(cp=plan.cp, context=plan)
    assert dist.get_world_size() == layout.world_size
    backend: str | BlockAttention = HollowAttention() if is_hollow else "aten"
    with Mesh.open(layout) as mesh:
        span = mesh.token_span(tokens)
        shape = (span.tokens, 1, heads, head_size)
        attention = ContextParallelAttention(mesh.cp_layout(tokens), plan.kind, backend)
        attend = partial(attention, plans=(AttnPlan.bidirectional(tokens),))
        block = Block(Build(config.model, transformer_config(config, layout, mesh.device), mesh, True), 0, "none")
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
            parameter.grad = torch.zeros_like(parameter)
        given = _conditioning(config.model, tokens, mesh, attend)

        def attend_alone() -> None:
            q, k, v = (torch.zeros(shape).requires_grad_() for _ in range(3))
            out = attend(q, k, v)
            torch.autograd.backward(out, torch.ones_like(out))

        def run_block() -> None:
            x_tBD = torch.zeros(span.tokens, 1, config.model.hidden_size).requires_grad_()
            y_tBD, _ = block(x_tBD, given)
            torch.autograd.backward(y_tBD, torch.ones_like(y_tBD))

        return ContextMemory(plan, _peak(run_block), _peak(attend_alone), torch.zeros(shape).nbytes)


def _peak(function: Callable[[], None]) -> int:
    """Peak bytes of a call, the lowest of a few: gloo's threads now and then let go of a buffer late."""
    peaks = []
    for _ in range(REPEATS):
        dist.barrier()
        with AllocationMeter() as meter:
            function()
        peaks.append(meter.peak_bytes)
    return min(peaks)


def _conditioning(model: ModelConfig, tokens: int, mesh: Mesh, attend: partial[Tensor]) -> Conditioning:
    """One clip of one frame, a row of ``tokens``."""
    span, width = mesh.token_span(tokens), model.hidden_size
    clip = Clip(draw=0, sample=0, start=0, grid=(1, 1, tokens), frame_rate=4.0)
    nowhere = torch.zeros(span.tokens, dtype=torch.int64)
    return Conditioning(
        packs=(Pack((clip,), tokens),),
        span=span,
        attend=attend,
        modulation_R6D=torch.zeros(1, 6, width),
        row_tB=nowhere.unsqueeze(1),
        prompts=Prompts(torch.zeros(model.text_length, 1, width)),
        cos=torch.ones(span.tokens, 1, 1, model.head_size // 2),
        sin=torch.zeros(span.tokens, 1, 1, model.head_size // 2),
        tokens=TokenInfo(nowhere, nowhere, 1, torch.tensor([tokens]), 0.0),
    )
