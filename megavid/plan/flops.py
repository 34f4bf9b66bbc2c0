"""FLOPs of a model by part: matrix products and attention, 2 FLOP per multiply-add, closed form.

Owns the one count that MFU, HFU and the step time are made of. Norms, modulation, activations and the optimizer are
left out, as in every published convention. Model FLOPs count clips only: what padding and recomputation cost is work
that a run does, not work that it is for, and has functions of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megavid.config.schema import ModelConfig
from megavid.plan.layout import Layout, layers_of_chunk

Part = Literal[
    "self_attention", "cross_attention", "projections", "dense_ffn", "experts", "shared_expert", "router",
    "modulation", "embedders", "head",
]  # fmt: skip
"""Parts that FLOPs are given by."""

PARTS: tuple[Part, ...] = (
    "self_attention", "cross_attention", "projections", "dense_ffn", "experts", "shared_expert", "router",
    "modulation", "embedders", "head",
)  # fmt: skip
"""Every part. ``self_attention`` and ``cross_attention`` are the products of queries with keys and of weights with
values; ``projections`` the matrices of both attentions; ``modulation`` the timestep's MLP; ``embedders`` patches,
text and images."""

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Flops:
    """FLOPs by part; parts that are missing are zero."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts.values())

    def __getitem__(self, part: str) -> float:
        return self.parts.get(part, 0.0)

    def __add__(self, other: "Flops") -> "Flops":
        names = [part for part in PARTS if part in self.parts or part in other.parts]
        return Flops({part: self[part] + other[part] for part in names})

    def __sub__(self, other: "Flops") -> "Flops":
        return self + other * -1.0

    def __mul__(self, factor: float) -> "Flops":
        return Flops({part: value * factor for part, value in self.parts.items()})

    __rmul__ = __mul__


def forward_flops(model: ModelConfig, clip_tokens: Sequence[int], *, padding: int = 0) -> Flops:
    """One forward pass of these clips.

    Args:
        model: the whole model.
        clip_tokens: tokens of each clip.
        padding: tokens without a clip that the same packs hold; they pass every matrix but the experts'. 0 counts
            model FLOPs.
    """
    total = embedder_flops(model, clip_tokens, padding=padding) + modulation_flops(model, len(clip_tokens))
    total += prompt_embedder_flops(model, len(clip_tokens)) + head_flops(model, clip_tokens, padding=padding)
    moe_layers = sum(model.is_moe_layer(layer) for layer in range(model.num_layers))
    total += block_flops(model, clip_tokens, is_moe=False, padding=padding) * (model.num_layers - moe_layers)
    if moe_layers:
        total += block_flops(model, clip_tokens, is_moe=True, padding=padding) * moe_layers
    return total


def model_flops(model: ModelConfig, clip_tokens: Sequence[int]) -> Flops:
    """Forward and backward pass of these clips, as MFU counts them: three forward passes, no recomputation."""
    return forward_flops(model, clip_tokens) * 3.0


def recompute_flops(
    model: ModelConfig, clip_tokens: Sequence[int], recompute: Recompute | str, *, padding: int = 0
) -> Flops:
    """What the backward pass computes again: nothing, the blocks without their self-attention products, the blocks."""
    if recompute == "none":
        return Flops({})
    moe_layers = sum(model.is_moe_layer(layer) for layer in range(model.num_layers))
    blocks = block_flops(model, clip_tokens, is_moe=False, padding=padding) * (model.num_layers - moe_layers)
    if moe_layers:
        blocks += block_flops(model, clip_tokens, is_moe=True, padding=padding) * moe_layers
    return blocks if recompute == "full" else _without_self_attention(blocks)


def stage_flops(
    model: ModelConfig, layout: Layout, pp_rank: int, clip_tokens: Sequence[int], *, padding: int = 0
) -> Flops:
    """Forward pass of one pipeline stage, summed over the tp x cp ranks of one model replica.

    What ranks do alike counts once for each: timestep, text and image embedders on every rank and chunk, keys and
    values of text and images on every context-parallel rank, and without sequence parallelism the patches, the head and
    the router. So the stages' sum is above ``forward_flops``; a rank's share is this divided by tp x cp.
    """
    clips, ranks = len(clip_tokens), layout.tp * layout.cp
    alike = 1 if layout.sequence else layout.tp
    total = (modulation_flops(model, clips) + prompt_embedder_flops(model, clips)) * (layout.vpp * ranks)
    if pp_rank == 0:
        total += embedder_flops(model, clip_tokens, padding=padding) * alike
    for chunk in range(layout.vpp):
        for layer in layers_of_chunk(model, layout, pp_rank, chunk):
            total += block_flops(model, clip_tokens, is_moe=model.is_moe_layer(layer), padding=padding)
            total += Flops({"projections": float(_prompt_projections(model, clips))}) * (layout.cp - 1)
    if pp_rank == layout.pp - 1:
        total += head_flops(model, clip_tokens, padding=padding) * alike
    return total


# Parts of a forward pass


def block_flops(model: ModelConfig, clip_tokens: Sequence[int], *, is_moe: bool, padding: int = 0) -> Flops:
    """One block."""
    width, clips = model.hidden_size, len(clip_tokens)
    tokens = sum(clip_tokens) + padding
    parts = {
        "self_attention": 4.0 * width * sum(clip * clip for clip in clip_tokens),
        "cross_attention": 4.0 * width * model.prompt_tokens * sum(clip_tokens),
        # q, k, v and out of self-attention; q and out of cross-attention.
        "projections": 12.0 * tokens * width * width + _prompt_projections(model, clips),
    }
    if not is_moe:
        return Flops({**parts, "dense_ffn": 4.0 * tokens * width * model.ffn_size})
    moe = model.moe
    matrices = 3 if moe.activation == "swiglu" else 2
    parts["experts"] = 2.0 * matrices * width * moe.expert_ffn_size * expert_rows(model, clip_tokens)
    if moe.shared_ffn_size:
        parts["shared_expert"] = 2.0 * matrices * width * moe.shared_ffn_size * tokens
    return Flops({**parts, "router": 2.0 * tokens * width * moe.num_experts})


def expert_rows(model: ModelConfig, clip_tokens: Sequence[int]) -> int:
    """Rows (token, expert) that the routed experts of one layer compute; padding goes to none of them."""
    moe = model.moe
    if moe.router != "expert_choice":
        return sum(clip_tokens) * moe.top_k
    capacities = (min(-(-clip * moe.top_k // moe.num_experts), clip) for clip in clip_tokens)
    return moe.num_experts * sum(capacities)


def embedder_flops(model: ModelConfig, clip_tokens: Sequence[int], *, padding: int = 0) -> Flops:
    """Patches to tokens; the first stage only."""
    tokens = sum(clip_tokens) + padding
    return Flops({"embedders": 2.0 * tokens * model.in_channels * model.patch_volume * model.hidden_size})


def prompt_embedder_flops(model: ModelConfig, clips: int) -> Flops:
    """The text's MLP for the captions of ``clips`` clips, and the image's for their images."""
    width, image = model.hidden_size, model.image_size
    text = 2.0 * clips * model.text_length * width * (model.text_size + width)
    return Flops({"embedders": text + 2.0 * clips * model.image_tokens * image * (image + width)})


def modulation_flops(model: ModelConfig, clips: int) -> Flops:
    """The timestep's MLP for ``clips`` clips: one row of the timestep table for each, or two (task ``ti2v``, where
    every clip is taken to have known frames)."""
    width, rows = model.hidden_size, clips * model.timesteps_of_clip
    return Flops({"modulation": 2.0 * rows * width * (model.frequency_size + width + 6 * width)})


def head_flops(model: ModelConfig, clip_tokens: Sequence[int], *, padding: int = 0) -> Flops:
    """Tokens to velocities; the last stage only."""
    tokens = sum(clip_tokens) + padding
    return Flops({"head": 2.0 * tokens * model.hidden_size * model.out_channels * model.patch_volume})


def _prompt_projections(model: ModelConfig, clips: int) -> float:
    """Keys and values of captions and images in one block."""
    return 4.0 * clips * model.prompt_tokens * model.hidden_size**2


def _without_self_attention(flops: Flops) -> Flops:
    """The output of self-attention is kept under selective recomputation; all else of the branches is not."""
    return Flops({part: value for part, value in flops.parts.items() if part != "self_attention"})
