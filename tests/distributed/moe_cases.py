"""What the ranks of ``test_moe_ranks`` do: build the expert layer in a layout, run it, compare with the plain twin.

Run as ``python -m tests.distributed.moe_cases``: one interpreter, from which the ranks of all sizes are forked.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from megavid.config.schema import ModelConfig, MoEConfig
from megavid.models.build import Build
from megavid.models.moe.layer import VideoMoELayer, build_moe
from megavid.models.moe.stats import RoutingStats
from megavid.models.moe.tokens import TokenInfo
from megavid.parallel import mcore
from megavid.parallel.launch import RankEnv, init_distributed, run_local_ranks
from megavid.parallel.mesh import Mesh
from megavid.parallel.placement import placement_of
from megavid.plan.layout import Layout
from tests.support.moe_twin import Twin, fill, values

TOKENS, PACKS, WIDTH = 12, 4, 16
AUX_SCALE = 0.125
# Clip of every token of the whole batch, [T, B]; the numbers run over packs; -1 is padding.
CLIPS_TB = torch.tensor([[0] * 12, [1] * 5 + [2] * 4 + [-1] * 3, [3] * 12, [4] * 2 + [5] * 9 + [-1]]).T


@dataclass(frozen=True)
class Case:
    """One layer in one layout."""

    layout: Layout
    dispatcher: str = "alltoall"
    moe: dict[str, Any] = field(default_factory=dict)
    # Experts that the balancing bias makes every token go to.
    favourites: tuple[int, ...] = ()
    recompute: bool = False
    overlap: bool = False
    dtype: torch.dtype = torch.float64

    @property
    def model(self) -> ModelConfig:
        keys = {"num_experts": 8, "top_k": 2, "expert_ffn_size": 8, "shared_ffn_size": 8} | self.moe
        return ModelConfig(hidden_size=WIDTH, num_heads=2, ffn_size=32, moe=MoEConfig(**keys))


def bias_of(model: ModelConfig, favourites: tuple[int, ...]) -> Tensor:
    """A balancing bias that makes every token go to the favourites."""
    bias = torch.zeros(model.moe.num_experts)
    bias[list(favourites)] = 10.0
    return bias


def build(case: Case, mesh: Mesh) -> VideoMoELayer:
    """The layer of this rank, with the values of its names."""
    layout, moe = case.layout, case.model.moe
    config = mcore.TransformerConfig(
        num_layers=4,
        hidden_size=WIDTH,
        num_attention_heads=2,
        ffn_hidden_size=32,
        add_bias_linear=False,
        num_moe_experts=moe.num_experts,
        moe_router_topk=moe.top_k,
        moe_ffn_hidden_size=moe.expert_ffn_size,
        moe_token_dispatcher_type=case.dispatcher,
        moe_shared_expert_intermediate_size=moe.shared_ffn_size or None,
        moe_shared_expert_overlap=case.overlap,
        moe_router_load_balancing_type="none",
        moe_router_pre_softmax=True,  # otherwise top_k = 1 is refused; megavid brings its own routers
        moe_router_dtype="fp32",
        tensor_model_parallel_size=layout.tp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        perform_initialization=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        params_dtype=case.dtype,
    )
    layer = build_moe(Build(case.model, config, mesh, is_first_chunk=True), 1)
    fill(layer)
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.copy_(bias_of(case.model, case.favourites))
    return layer


@dataclass(frozen=True)
class Share:
    """This rank's tokens: some packs of the data-parallel axis, some tokens of context and tensor axes."""

    hidden_tBD: Tensor
    cotangent_tBD: Tensor
    info: TokenInfo
    clip_tB: Tensor
    tokens: slice
    packs: slice

    @classmethod
    def of(cls, case: Case, mesh: Mesh) -> "Share":
        packs_here, dp = PACKS // mesh.size("dp"), mesh.coordinate("dp")
        packs = slice(dp * packs_here, (dp + 1) * packs_here)
        tp = mesh.size("tp") if mesh.is_sequence_parallel else 1
        parts = mesh.size("cp") * tp
        part = mesh.coordinate("cp") * tp + (mesh.coordinate("tp") if tp > 1 else 0)
        tokens = slice(part * TOKENS // parts, (part + 1) * TOKENS // parts)
        clip_TB = CLIPS_TB[:, packs]
        first = int(clip_TB[clip_TB >= 0].min())
        clip_TB = torch.where(clip_TB < 0, -1, clip_TB - first)
        clip_tB = clip_TB[tokens]
        info = TokenInfo(
            clip_T=clip_tB.reshape(-1),
            bucket_T=clip_tB.reshape(-1).clamp_min(0) % 4,
            num_clips=int(clip_TB.max()) + 1,
            tokens_of_clip_G=torch.bincount(clip_TB[clip_TB >= 0]),
            aux_scale=AUX_SCALE,
        )
        hidden = values("hidden", (TOKENS, PACKS, WIDTH))[tokens, packs].to(case.dtype).requires_grad_()
        cotangent = values("cotangent", (TOKENS, PACKS, WIDTH))[tokens, packs].to(case.dtype)
        return cls(hidden, cotangent, info, clip_tB, tokens, packs)


@functools.cache
def expectation(model: ModelConfig, favourites: tuple[int, ...]) -> tuple[Twin, Tensor, Tensor, Tensor]:
    """The twin after its backward pass, its input and output, and the weighted router losses."""
    twin = Twin(model, bias_of(model, favourites))
    hidden = values("hidden", (TOKENS, PACKS, WIDTH)).requires_grad_()
    expected, losses = twin.forward(hidden, CLIPS_TB, AUX_SCALE)
    ((expected * values("cotangent", (TOKENS, PACKS, WIDTH))).sum() + losses).backward()
    return twin, hidden, expected.detach(), losses.detach()


def layer_equals_twin(case: Case, mesh: Mesh) -> None:
    """Output, input gradient, every weight gradient and the statistics equal those of one device."""
    tolerance = 1e-10 if case.dtype == torch.float64 else 1e-5
    layer, share = build(case, mesh), Share.of(case, mesh)
    if case.recompute:
        out, stats = checkpoint(layer, share.hidden_tBD, share.info, use_reentrant=False, preserve_rng_state=False)
    else:
        out, stats = layer(share.hidden_tBD, share.info)
    (out * share.cotangent_tBD).sum().backward()

    twin, hidden, expected, losses = expectation(case.model, case.favourites)
    assert hidden.grad is not None
    close(out, expected[share.tokens, share.packs], tolerance, "output")
    close(share.hidden_tBD.grad, hidden.grad[share.tokens, share.packs], tolerance, "input gradient")
    for parameter in layer.parameters():
        assert parameter.grad is not None
        compare_gradient(parameter, twin, mesh, tolerance)
    counts = whole_batch(stats.counts_QE.sum(0), mesh)
    assert torch.equal(counts, twin.counts_E), (counts, twin.counts_E)
    assert whole_batch(stats.tokens_Q.sum(), mesh) == (CLIPS_TB >= 0).sum()
    moe = case.model.moe
    logged = moe.aux_loss_weight * stats.aux_loss + moe.z_loss_weight * stats.z_loss
    close(whole_batch(logged, mesh).double(), losses, 1e-5, "router losses")


def whole_batch(tensor: Tensor, mesh: Mesh) -> Tensor:
    """Sum over the ranks that hold different tokens."""
    tensor = mesh.sum(tensor, over="dp_cp")
    return mesh.sum(tensor, over="tp") if mesh.is_sequence_parallel else tensor


def compare_gradient(parameter: nn.Parameter, twin: Twin, mesh: Mesh, tolerance: float) -> None:
    """A parameter's gradient, reduced as its placement says, against its boxes of the twin's."""
    placement, grad = placement_of(parameter), parameter.grad
    assert grad is not None
    if placement.is_expert:
        grad = mesh.sum(grad, over="edp")
    else:
        grad = mesh.sum(grad, over="dp_cp")
        if placement.is_partial_over_tp:
            grad = mesh.sum(grad, over="tp")
    for piece in placement.pieces:
        whole = twin.leaves[piece.name].grad
        assert whole is not None
        box = whole[tuple(slice(o, o + s) for o, s in zip(piece.offset, piece.shape))]
        own = grad.reshape(-1)[piece.start : piece.start + box.numel()].view(box.shape)
        close(own, box, tolerance, piece.name)


def close(got: Tensor | None, expected: Tensor, tolerance: float, what: str) -> None:
    """Raise if two tensors differ by more than ``tolerance`` of the larger's largest number."""
    assert got is not None
    scale = max(float(expected.abs().max()), 1e-3)
    worst = float((got.detach().double() - expected.detach().double()).abs().max())
    assert worst <= tolerance * scale, f"{what}: differs by {worst:.3e}, largest {scale:.3e}"


class Identity(nn.Module):
    """Experts that return their input times its gate, and count what they got.

    Every expert-tensor rank sees all rows and returns its part of a sum: here equal parts.
    """

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts, self.rows = parts, torch.zeros(())

    def forward(self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        assert int(tokens_per_expert.sum()) == rows.shape[0]
        self.rows = tokens_per_expert.double()
        return rows * probs.reshape(-1, 1) / self.parts, None


def dispatch_and_combine_is_the_identity(case: Case, mesh: Mesh) -> None:
    """With experts that do nothing every token comes back as it went, and as many rows arrive as were sent."""
    layer, share = build(case, mesh), Share.of(case, mesh)
    layer.experts, layer.shared = Identity(case.layout.etp), None
    out, _ = layer(share.hidden_tBD, share.info)
    is_clip = (share.clip_tB >= 0).unsqueeze(-1)
    close(out, torch.where(is_clip, share.hidden_tBD, 0.0), 1e-12, "tokens")
    # The gates sum to 1, so there is no gradient through them, and the router's is nothing but rounding.
    out.sum().backward()
    close(share.hidden_tBD.grad, is_clip.double().expand_as(out), 1e-12, "gradient of the tokens")
    rows = layer.experts.rows.sum()
    arrived = mesh.sum(mesh.sum(rows, over="ep"), over="edp")
    assert arrived == (CLIPS_TB >= 0).sum() * case.model.moe.top_k


def recompute_gives_the_same_statistics(case: Case, mesh: Mesh) -> None:
    """The second forward pass of activation recomputation chooses as the first did."""
    seen: list[RoutingStats] = []
    layer, share = build(case, mesh), Share.of(case, mesh)

    def run(hidden: Tensor) -> Tensor:
        out, stats = layer(hidden, share.info)
        seen.append(stats)
        return out

    # Otherwise the second pass ends at the last tensor that the backward pass needs, inside the layer.
    with set_checkpoint_early_stop(False):
        out = checkpoint(run, share.hidden_tBD, use_reentrant=False, preserve_rng_state=False)
    (out * share.cotangent_tBD).sum().backward()
    first, second = seen
    assert all(torch.equal(a, b) for a, b in zip(first, second))


CHECKS: dict[str, Callable[[Case, Mesh], None]] = {
    "twin": layer_equals_twin,
    "identity": dispatch_and_combine_is_the_identity,
    "recompute": recompute_gives_the_same_statistics,
}


LAYOUTS = {
    1: {"one": Layout()},
    2: {
        "dp2": Layout(dp=2, edp=2),
        "ep2": Layout(dp=2, ep=2),
        "etp2": Layout(dp=2, etp=2),
        "tp2": Layout(tp=2, edp=2, sequence=True),
        "tp2_ep2": Layout(tp=2, ep=2, sequence=True),
        "tp2_etp2": Layout(tp=2, etp=2, sequence=True),
        "cp2": Layout(cp=2, edp=2),
        "cp2_ep2": Layout(cp=2, ep=2),
    },
    4: {
        "ep4": Layout(dp=4, ep=4),
        "ep2_etp2": Layout(dp=4, ep=2, etp=2),
        "tp2_ep2_edp2": Layout(tp=2, dp=2, ep=2, edp=2, sequence=True),
        "tp2_ep2_etp2": Layout(tp=2, dp=2, ep=2, etp=2, sequence=True),
        "tp2_cp2_ep2_etp2": Layout(tp=2, cp=2, ep=2, etp=2, sequence=True),
        "cp2_dp2_ep4": Layout(cp=2, dp=2, ep=4),
    },
    8: {"tp2_dp4_ep2_etp2_edp2": Layout(tp=2, dp=4, ep=2, etp=2, edp=2, sequence=True)},
}


def cases(layout: Layout) -> dict[str, tuple[str, Case]]:
    """Every check of rung 4 in one layout, by name."""
    found: dict[str, tuple[str, Case]] = {}
    for dispatcher in ("alltoall", "allgather"):
        ways = {
            "sigmoid": Case(layout, dispatcher, {"z_loss_weight": 0.01}),
            "expert_choice": Case(layout, dispatcher, {"router": "expert_choice"}),
            "experts_without_tokens": Case(layout, dispatcher, {"activation": "swiglu"}, favourites=(1, 6)),
        }
        found |= {f"{dispatcher}_{way}": ("twin", case) for way, case in ways.items()}
        found[f"{dispatcher}_identity"] = ("identity", Case(layout, dispatcher))
    softmax = {"router": "softmax", "aux_loss_weight": 0.1, "z_loss_weight": 0.01, "num_groups": 4, "top_groups": 2}
    ways = {
        "softmax_with_losses": Case(layout, moe=softmax | {"activation": "swiglu", "has_bias": False}),
        "all_tokens_to_one_expert": Case(layout, moe={"top_k": 1}, favourites=(3,)),
        "no_shared_expert": Case(layout, moe={"shared_ffn_size": 0, "route_scale": 1.7}),
        "shared_expert_overlapped": Case(layout, overlap=True),
        "recomputed": Case(layout, recompute=True),
        "fp32": Case(layout, dtype=torch.float32),
    }
    found |= {way: ("twin", case) for way, case in ways.items()}
    found["statistics_of_recomputation"] = ("recompute", Case(layout))
    return found


def main(env: RankEnv) -> None:
    """Entry point of a rank: every case of every layout of this many ranks; rank 0 says what is done."""
    init_distributed(env, "cpu", timeout_s=60.0)
    for layout_name, layout in LAYOUTS[env.world_size].items():
        with Mesh.open(layout) as mesh:
            for name, (check, case) in cases(layout).items():
                CHECKS[check](case, mesh)
                if mesh.is_main:
                    print(f"done {env.world_size} {layout_name} {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    for num_ranks in (8, 4, 2, 1):  # one rank runs in this process, so it comes last
        for name, layout in LAYOUTS[num_ranks].items():
            print("\n".join(f"want {num_ranks} {name} {case}" for case in cases(layout)), flush=True)
    for num_ranks in (8, 4, 2, 1):
        run_local_ranks(main, num_ranks)
