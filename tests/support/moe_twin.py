"""The plain twin of the expert layer: all tokens, all experts, one device, one loop; and values by name for both.

Owns what the ranks are compared with. Nothing here is shared with the layer but the choice of experts, which has unit
tests of its own.
"""

import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megavid.config.schema import ModelConfig
from megavid.ops import moe_math
from megavid.parallel.placement import placement_of

LAYER = "blocks.1.moe"


def values(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers of a tensor in model space, a function of its name; fp64."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.3


def fill(module: nn.Module) -> None:
    """Give every placed parameter of ``module`` its part of the values of its name."""
    for parameter in module.parameters():
        for piece in placement_of(parameter).pieces:
            size = torch.Size(piece.shape).numel()
            box = values(piece.name, piece.global_shape)[
                tuple(slice(o, o + s) for o, s in zip(piece.offset, piece.shape))
            ]
            with torch.no_grad():
                parameter.view(-1)[piece.start : piece.start + size] = box.reshape(-1).to(parameter.dtype)


@dataclass
class Twin:
    """The layer as one device would compute it, in fp64; ``leaves`` collects its parameters by name."""

    model: ModelConfig
    bias_E: Tensor
    leaves: dict[str, Tensor] = field(default_factory=dict)
    counts_E: Tensor = field(default_factory=lambda: torch.zeros(()))

    def leaf(self, name: str, *shape: int) -> Tensor:
        """The parameter ``name`` of the layer, made at its first use."""
        full = f"{LAYER}.{name}"
        if full not in self.leaves:
            self.leaves[full] = values(full, shape).requires_grad_()
        return self.leaves[full]

    def feed_forward(self, x_TD: Tensor, name: str, hidden: int) -> Tensor:
        """One expert, without its gate."""
        moe, width = self.model.moe, self.model.hidden_size

        def linear(x: Tensor, which: str, rows: int, columns: int) -> Tensor:
            bias = self.leaf(f"{name}.{which}.bias", rows) if moe.has_bias else None
            return torch.nn.functional.linear(x, self.leaf(f"{name}.{which}.weight", rows, columns), bias)

        up = linear(x_TD, "up", hidden, width)
        if moe.activation == "swiglu":
            inner = torch.nn.functional.silu(linear(x_TD, "gate", hidden, width)) * up
        else:
            inner = torch.nn.functional.gelu(up, approximate="tanh")
        return linear(inner, "down", width, hidden)

    def probs(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gates, scores and logits of the tokens of one clip."""
        moe = self.model.moe
        logits = x_TD @ self.leaf("router.weight", moe.num_experts, self.model.hidden_size).T
        scores = logits.sigmoid() if moe.router == "sigmoid" else logits.softmax(-1)
        if moe.router == "expert_choice":
            one = torch.zeros(x_TD.shape[0], dtype=torch.int64)
            sizes = torch.tensor([x_TD.shape[0]])
            capacity = moe_math.expert_capacity(sizes, top_k=moe.top_k, num_experts=moe.num_experts)
            return torch.where(moe_math.expert_choice_reference(scores, one, capacity), scores, 0.0), scores, logits
        ids = moe_math.top_experts(scores.detach() + self.bias_E, moe.top_k)
        gates = moe_math.gates_of(scores, ids) * moe.route_scale
        return torch.zeros_like(scores).scatter(1, ids, gates), scores, logits

    def forward(self, x_TBD: Tensor, clip_TB: Tensor, aux_scale: float) -> tuple[Tensor, Tensor]:
        """Output of all tokens, and the weighted router losses of all clips."""
        moe, out_TBD, losses = self.model.moe, torch.zeros_like(x_TBD), torch.zeros((), dtype=x_TBD.dtype)
        counts = torch.zeros(moe.num_experts)
        for clip in range(int(clip_TB.max()) + 1):
            own = clip_TB == clip
            x_TD = x_TBD[own]
            probs, scores, logits = self.probs(x_TD)
            out = sum(
                probs[:, e : e + 1] * self.feed_forward(x_TD, f"experts.{e}", moe.expert_ffn_size)
                for e in range(moe.num_experts)
            )
            out_TBD = out_TBD.masked_scatter(own.unsqueeze(-1), out)
            share = (probs != 0).double().mean(0)
            counts += (probs != 0).sum(0)
            balance = moe.num_experts / moe.top_k * (share * scores.mean(0)).sum()
            losses = losses + aux_scale * moe.aux_loss_weight * balance
            losses = losses + aux_scale * moe.z_loss_weight * logits.logsumexp(-1).square().mean()
        if moe.shared_ffn_size:
            out_TBD = out_TBD + self.feed_forward(x_TBD, "shared", moe.shared_ffn_size)
        self.counts_E = counts
        return out_TBD, losses
