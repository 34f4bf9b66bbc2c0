"""Experts in place of a dense feed-forward, on one device or shared by ranks.

Owns parameters and the order route, permute, compute, combine. The choice of experts is ``megavid.ops.moe_math``'s and
the matrix products are ``megavid.ops.grouped_experts``'s, the same that train. Numbers of rows depend on shapes alone,
never on what was routed, so nothing here waits for the device and a graph compiler sees one graph; experts in eight
bits are the exception, see ``_one_by_one``.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from megavid.config.schema import MoEConfig
from megavid.inference.fp8 import dequantize_rows, quantize_rows
from megavid.ops import moe_math
from megavid.ops.grouped_experts import ExpertWeights, grouped_experts
from megavid.ops.norm import wide


class Slots(NamedTuple):
    """Which token goes to which expert, one entry for each (token, expert) pair.

    Attributes:
        token_S: row of the token, int64.
        expert_S: number of the expert, int64.
        gate_S: factor on the expert's output, fp32.
        per_token: slots of every token, if each has as many and they stand together; else 0.
    """

    token_S: Tensor
    expert_S: Tensor
    gate_S: Tensor
    per_token: int

    def by_expert(self) -> Tensor:
        """Order of the slots by expert, and within an expert as they are."""
        return self.expert_S.argsort(stable=True)

    def counts(self, num_experts: int) -> Tensor:
        """Slots of each expert, [E] int64."""
        zero = torch.zeros(num_experts, dtype=torch.int64, device=self.expert_S.device)
        return zero.scatter_add(0, self.expert_S, torch.ones_like(self.expert_S))

    def combine(self, out_SD: Tensor, order_S: Tensor, num_tokens: int) -> Tensor:
        """Sum of the experts' outputs for each token, [T, D]; ``out_SD`` in the order of ``order_S``."""
        if self.per_token:  # in a fixed order of additions
            own = out_SD.index_select(0, order_S.argsort())
            return own.view(num_tokens, self.per_token, -1).sum(1)
        total = wide(out_SD.new_zeros(num_tokens, out_SD.shape[1]))
        return total.index_add(0, self.token_S[order_S], wide(out_SD)).type_as(out_SD)


class Router(nn.Module):
    """A linear router in fp32; see ``megavid.models.moe.router`` for its three kinds."""

    expert_bias: Tensor

    def __init__(self, moe: MoEConfig, width: int) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.randn(moe.num_experts, width) * width**-0.5)
        if moe.router == "sigmoid":
            self.register_buffer("expert_bias", torch.zeros(moe.num_experts))

    def forward(self, x_BTD: Tensor) -> Slots:
        """Where the tokens of B clips go."""
        logits_BTE = torch.nn.functional.linear(wide(x_BTD), wide(self.weight))
        if self.moe.router == "expert_choice":
            return self._expert_choice(logits_BTE.softmax(-1))
        logits_TE = logits_BTE.flatten(0, 1)
        if self.moe.router == "softmax":
            scores_TE = logits_TE.softmax(-1)
            return self._token_choice(scores_TE, None, 1.0)
        scores_TE = logits_TE.sigmoid()
        return self._token_choice(scores_TE, wide(self.expert_bias), self.moe.route_scale)

    def _token_choice(self, scores_TE: Tensor, bias_E: Tensor | None, scale: float) -> Slots:
        moe = self.moe
        ids_TK = moe_math.choose(
            scores_TE, bias_E, top_k=moe.top_k, num_groups=moe.num_groups, top_groups=moe.top_groups
        )
        gates_TK = moe_math.gates_of(scores_TE, ids_TK) * scale
        slot = torch.arange(ids_TK.numel(), device=ids_TK.device)
        return Slots(slot // moe.top_k, ids_TK.flatten(), gates_TK.flatten(), moe.top_k)

    def _expert_choice(self, scores_BTE: Tensor) -> Slots:
        batch, tokens, experts = scores_BTE.shape
        capacity = min(tokens, -(-tokens * self.moe.top_k // experts))  # moe_math.expert_capacity, on the host
        best_BcE = scores_BTE.sort(dim=1, descending=True, stable=True).indices[:, :capacity]
        clip_B11 = torch.arange(batch, device=scores_BTE.device).view(-1, 1, 1)
        expert_BcE = torch.arange(experts, device=scores_BTE.device).expand_as(best_BcE)
        gates_BcE = scores_BTE.gather(1, best_BcE)
        return Slots((best_BcE + clip_B11 * tokens).flatten(), expert_BcE.flatten(), gates_BcE.flatten(), 0)


class ExpertMatrix(nn.Module):
    """One matrix of every expert, stacked, with its bias.

    Its call gives both, for the one grouped product to use: a layer whose weights are loaded when it is called
    (offloading) works too.
    """

    def __init__(self, num_experts: int, input_size: int, output_size: int, has_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, output_size, input_size) * input_size**-0.5)
        self.bias = nn.Parameter(torch.zeros(num_experts, output_size)) if has_bias else None

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight [e, O, I] and bias [e, O] of the experts of this rank, in ``dtype``."""
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)


class PackedExperts(NamedTuple):
    """One matrix of every expert in eight bits, and its bias.

    Attributes:
        bits_eOI: e4m3, uint8.
        scale_eO: of each row, fp32.
        bias_eO: or None.
    """

    bits_eOI: Tensor
    scale_eO: Tensor
    bias_eO: Tensor | None

    def expert(self, number: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight [1, O, I] and bias [1, O] of one expert in ``dtype``."""
        one = slice(number, number + 1)
        weight = dequantize_rows(self.bits_eOI[one], self.scale_eO[one], dtype)
        return weight, None if self.bias_eO is None else self.bias_eO[one].to(dtype)


class Fp8ExpertMatrix(nn.Module):
    """``ExpertMatrix`` in eight bits (``megavid.inference.fp8``); a layer has all of its matrices so, or none."""

    def __init__(self, matrix: ExpertMatrix) -> None:
        super().__init__()
        bits, scale = quantize_rows(matrix.weight.detach())
        self.weight_fp8 = nn.Parameter(bits, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = matrix.bias

    def forward(self) -> PackedExperts:
        """The experts of this rank as they are kept."""
        return PackedExperts(self.weight_fp8, self.weight_scale, self.bias)


class Experts(nn.Module):
    """The routed experts, all of them or those of one rank."""

    def __init__(self, moe: MoEConfig, width: int) -> None:
        super().__init__()
        number, hidden, has_bias = moe.num_experts, moe.expert_ffn_size, moe.has_bias
        self.up: nn.Module = ExpertMatrix(number, width, hidden, has_bias)
        is_gated = moe.activation == "swiglu"
        self.gate: nn.Module | None = ExpertMatrix(number, width, hidden, has_bias) if is_gated else None
        self.down: nn.Module = ExpertMatrix(number, hidden, width, has_bias)

    def forward(self, rows_SD: Tensor, tokens_per_expert: Tensor, gate_S: Tensor) -> Tensor:
        """Outputs times gates of rows sorted by expert, [S, D]."""
        if isinstance(self.up, Fp8ExpertMatrix):
            packed = (self.up(), None if self.gate is None else self.gate(), self.down())
            out_SD: Tensor = _one_by_one(rows_SD, tokens_per_expert, gate_S, *packed)
            return out_SD
        up, up_bias = self.up(rows_SD.dtype)
        gate, gate_bias = (None, None) if self.gate is None else self.gate(rows_SD.dtype)
        down, down_bias = self.down(rows_SD.dtype)
        weights = ExpertWeights(up, down, gate, up_bias, gate_bias, down_bias)
        compute = grouped_experts if rows_SD.dtype == torch.bfloat16 else _untraced_grouped_experts
        return compute(rows_SD, tokens_per_expert, weights, gate_S)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _untraced_grouped_experts(rows_SD: Tensor, counts: Tensor, weights: ExpertWeights, gate_S: Tensor) -> Tensor:
    """``grouped_experts`` behind a graph break: torch 2.13 traces its grouped product in bf16 only."""
    return grouped_experts(rows_SD, counts, weights, gate_S)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _one_by_one(
    rows_SD: Tensor, counts: Tensor, gate_S: Tensor, up: PackedExperts, gate: PackedExperts | None, down: PackedExperts
) -> Tensor:
    """``grouped_experts`` with the matrices of one expert at a time in full; those of one without rows never are.

    Waits for the device to say how many rows each expert has: what that costs is little beside the memory of all
    experts of a layer.
    """
    outputs = []
    sizes = counts.tolist()
    for number, (x_SD, own_S) in enumerate(zip(torch.split(rows_SD, sizes), torch.split(gate_S, sizes), strict=True)):
        if not sizes[number]:
            continue
        up_1MD, up_bias = up.expert(number, rows_SD.dtype)
        gate_1MD, gate_bias = (None, None) if gate is None else gate.expert(number, rows_SD.dtype)
        down_1DM, down_bias = down.expert(number, rows_SD.dtype)
        weights = ExpertWeights(up_1MD, down_1DM, gate_1MD, up_bias, gate_bias, down_bias)
        outputs.append(grouped_experts(x_SD, counts[number : number + 1], weights, own_S))
    return torch.cat(outputs) if outputs else torch.empty_like(rows_SD)


class SharedExpert(nn.Module):
    """The feed-forward that every token passes."""

    def __init__(self, moe: MoEConfig, width: int) -> None:
        super().__init__()
        hidden, has_bias = moe.shared_ffn_size, moe.has_bias
        self.up = nn.Linear(width, hidden, bias=has_bias)
        self.gate = nn.Linear(width, hidden, bias=has_bias) if moe.activation == "swiglu" else None
        self.down = nn.Linear(hidden, width, bias=has_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Output for every token, same shape."""
        hidden = self.up(x_BTD)
        if self.gate is None:
            hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
        else:
            hidden = torch.nn.functional.silu(self.gate(x_BTD)) * hidden
        out: Tensor = self.down(hidden)
        return out


class Exchange(Protocol):
    """How tokens reach experts that stand on several ranks."""

    def __call__(self, x_TD: Tensor, slots: Slots, experts: Experts) -> Tensor:
        """Sum of the experts' outputs for each of this rank's tokens, [T, D]; every rank calls it together."""
        ...


class MoEFeedForward(nn.Module):
    """Router, experts and, where the model has one, the shared expert."""

    def __init__(self, moe: MoEConfig, width: int) -> None:
        super().__init__()
        self.moe = moe
        self.router = Router(moe, width)
        self.experts = Experts(moe, width)
        self.shared = SharedExpert(moe, width) if moe.shared_ffn_size else None
        self.exchange: Exchange | None = None
        """Set where each rank holds a part of the experts only."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Output for every token of B clips, same shape."""
        slots: Slots = self.router(x_BTD)
        x_TD = x_BTD.flatten(0, 1)
        if self.exchange is None:
            order_S = slots.by_expert()
            rows_SD = x_TD.index_select(0, slots.token_S[order_S])
            out_SD = self.experts(rows_SD, slots.counts(self.moe.num_experts), slots.gate_S[order_S])
            out_TD = slots.combine(out_SD, order_S, x_TD.shape[0])
        else:
            out_TD = self.exchange(x_TD, slots, self.experts)
        out_BTD = out_TD.view_as(x_BTD)
        return out_BTD if self.shared is None else out_BTD + self.shared(x_BTD)
