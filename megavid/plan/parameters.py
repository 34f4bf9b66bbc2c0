"""How many parameters a model has, by part, and how many each rank of a layout holds: closed form.

Owns the list of a model's tensors in model space (name, shape, which axis cuts which dim) and the sums over it. The
models build the same tensors; a test compares names and shapes. The skeleton is Wan 2.1's (diffusers'
WanTransformer3DModel), parameter by parameter.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from megavid.config.schema import ModelConfig
from megavid.plan.layout import Layout, layers_of_chunk

Part = Literal["embedders", "attention", "modulation", "dense_ffn", "router", "experts", "shared_expert", "head"]
"""Parts that counts are given by; the norms of a block count with what they feed."""

PARTS: tuple[Part, ...] = (
    "embedders", "attention", "modulation", "dense_ffn", "router", "experts", "shared_expert", "head",
)  # fmt: skip
"""Every part, in the order of the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One tensor in model space.

    Attributes:
        name: global name, as in checkpoints.
        shape: global shape.
        part: what it is counted with.
        cut_over: axis that cuts it ("tp" or "etp"), "" where every rank of the axis holds all of it.
        cut_dim: dim that is cut; rows (0) for the matrix that widens, columns (1) for the one that narrows.
        expert: number of the routed expert it belongs to; -1 for none.
        stages: "all" for tensors on every pipeline stage, "first", "last", or "block".
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    cut_over: Literal["", "tp", "etp"] = ""
    cut_dim: int = 0
    expert: int = -1
    stages: Literal["all", "first", "last", "block"] = "block"

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Parameters of a whole model."""

    by_part: dict[Part, int]
    """Parameters of each part."""
    active_experts: int
    """Routed experts' parameters that one token passes: top_k / num_experts of them."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.by_part.values())

    @property
    def active(self) -> int:
        """Parameters that one token passes."""
        return self.total - self.by_part["experts"] + self.active_experts


@dataclass(frozen=True, kw_only=True, slots=True)
class RankCounts:
    """Parameters that one rank holds before data parallelism shards anything.

    Attributes:
        unique: parameters of which this rank's copy is the one that counts; over all ranks they sum to the model's
            total.
        replicated: parameters that another rank holds too and counts.
        by_part: both together, by part.
    """

    unique: int
    replicated: int
    by_part: dict[Part, int] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Parameters in this rank's memory."""
        return self.unique + self.replicated


def count(model: ModelConfig) -> Counts:
    """Parameters of ``model``, total and active."""
    by_part: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for tensor in tensors(model):
        by_part[tensor.part] += tensor.numel
    active = by_part["experts"] * model.moe.top_k // model.moe.num_experts
    return Counts(by_part=by_part, active_experts=active)


def count_rank(model: ModelConfig, layout: Layout, rank: int) -> RankCounts:
    """Parameters that ``rank`` holds in ``layout``.

    A copy is unique on the first rank that holds it: tensor-parallel rank 0 for what the tensor axis does not cut,
    expert-tensor rank 0 likewise, expert-data rank 0 of an expert, the first stage of what all stages hold.
    """
    place = layout.coordinates(rank)
    unique, by_part = 0, dict.fromkeys(PARTS, 0)
    for tensor in held_tensors(model, layout, place["pp"]):
        if not _holds_expert(model, layout, tensor, place["ep"]):
            continue
        size = tensor.numel // (layout.size(tensor.cut_over) if tensor.cut_over else 1)
        by_part[tensor.part] += size
        if _is_first_copy(tensor, place):
            unique += size
    return RankCounts(unique=unique, replicated=sum(by_part.values()) - unique, by_part=by_part)


def held_tensors(model: ModelConfig, layout: Layout, pp_rank: int) -> Iterator[Tensor]:
    """Tensors of one pipeline stage, in model space; one on every stage comes once."""
    yield from embedder_tensors(model, is_first=pp_rank == 0)
    for chunk in range(layout.vpp):
        for layer in layers_of_chunk(model, layout, pp_rank, chunk):
            yield from block_tensors(model, layer)
    if pp_rank == layout.pp - 1:
        yield from head_tensors(model)


def tensors(model: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the model once, in the order of the model."""
    yield from embedder_tensors(model, is_first=True)
    for layer in range(model.num_layers):
        yield from block_tensors(model, layer)
    yield from head_tensors(model)


def block_tensors(model: ModelConfig, layer: int) -> Iterator[Tensor]:
    """Tensors of block ``layer`` (from 0)."""
    name, width = f"blocks.{layer}", model.hidden_size
    yield Tensor(name=f"{name}.modulation", shape=(6, width), part="modulation")
    yield from _attention(f"{name}.self_attention", width)
    for kind in ("weight", "bias"):
        yield Tensor(name=f"{name}.cross_norm.{kind}", shape=(width,), part="attention")
    yield from _attention(f"{name}.cross_attention", width)
    if model.image_size:
        yield from _image_attention(f"{name}.cross_attention", width)
    if not model.is_moe_layer(layer):
        yield from _pair(f"{name}.ffn", width, model.ffn_size, part="dense_ffn", cut_over="tp")
        return
    moe = model.moe
    yield Tensor(name=f"{name}.moe.router.weight", shape=(moe.num_experts, width), part="router")
    for expert in range(moe.num_experts):
        yield from _expert(model, f"{name}.moe.experts.{expert}", moe.expert_ffn_size, expert)
    if moe.shared_ffn_size:
        yield from _expert(model, f"{name}.moe.shared", moe.shared_ffn_size, -1)


# Which rank holds what


def _holds_expert(model: ModelConfig, layout: Layout, tensor: Tensor, ep_rank: int) -> bool:
    return tensor.expert < 0 or tensor.expert // (model.moe.num_experts // layout.ep) == ep_rank


def _is_first_copy(tensor: Tensor, place: dict[str, int]) -> bool:
    if tensor.stages == "all" and place["pp"] != 0:
        return False
    if tensor.expert >= 0:
        # Experts are cut over the ranks by axes of their own; along "edp" they repeat.
        return place["edp"] == 0 and (tensor.cut_over == "etp" or place["etp"] == 0)
    copies = place["dp"] == 0 and place["cp"] == 0
    return copies and (tensor.cut_over == "tp" or place["tp"] == 0)


# What the parts are made of


def embedder_tensors(model: ModelConfig, *, is_first: bool) -> Iterator[Tensor]:
    """The patch embedding (first stage), and the time, text and image MLPs, which every stage holds."""
    width, patch = model.hidden_size, model.in_channels * model.patch_volume
    if is_first:
        yield Tensor(name="patch_embedder.weight", shape=(width, patch), part="embedders", stages="first")
        yield Tensor(name="patch_embedder.bias", shape=(width,), part="embedders", stages="first")
    for name, rows, columns in (
        ("time_embedder.up", width, model.frequency_size),
        ("time_embedder.down", width, width),
        ("time_embedder.projection", 6 * width, width),
        ("text_embedder.up", width, model.text_size),
        ("text_embedder.down", width, width),
    ):
        yield Tensor(name=f"{name}.weight", shape=(rows, columns), part="embedders", stages="all")
        yield Tensor(name=f"{name}.bias", shape=(rows,), part="embedders", stages="all")
    if model.image_size:
        yield from _image_embedder(model)


def _image_embedder(model: ModelConfig) -> Iterator[Tensor]:
    """Image features to the model's width: two norms, two matrices, and in some models a position for each token."""
    width, image = model.hidden_size, model.image_size
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("norm_in.weight", (image,)), ("norm_in.bias", (image,)),
        ("norm_out.weight", (width,)), ("norm_out.bias", (width,)),
        *([("positions", (model.image_positions, image))] if model.image_positions else []),
        ("up.weight", (image, image)), ("up.bias", (image,)),
        ("down.weight", (width, image)), ("down.bias", (width,)),
    ]  # fmt: skip
    for name, shape in shapes:
        yield Tensor(name=f"image_embedder.{name}", shape=shape, part="embedders", stages="all")


def _image_attention(name: str, width: int) -> Iterator[Tensor]:
    """Keys and values of the image tokens, beside those of the text."""
    for matrix in ("image_k", "image_v"):
        yield Tensor(name=f"{name}.{matrix}.weight", shape=(width, width), part="attention", cut_over="tp")
        yield Tensor(name=f"{name}.{matrix}.bias", shape=(width,), part="attention", cut_over="tp")
    yield Tensor(name=f"{name}.image_k_norm.weight", shape=(width,), part="attention", cut_over="tp")


def _attention(name: str, width: int) -> Iterator[Tensor]:
    for matrix in ("q", "k", "v"):
        yield Tensor(name=f"{name}.{matrix}.weight", shape=(width, width), part="attention", cut_over="tp")
        yield Tensor(name=f"{name}.{matrix}.bias", shape=(width,), part="attention", cut_over="tp")
    for norm in ("q_norm", "k_norm"):
        yield Tensor(name=f"{name}.{norm}.weight", shape=(width,), part="attention", cut_over="tp")
    yield Tensor(name=f"{name}.out.weight", shape=(width, width), part="attention", cut_over="tp", cut_dim=1)
    yield Tensor(name=f"{name}.out.bias", shape=(width,), part="attention")


def _expert(model: ModelConfig, name: str, ffn_size: int, expert: int) -> Iterator[Tensor]:
    """A routed expert, or the shared one (expert = -1)."""
    moe = model.moe
    yield from _pair(
        name,
        model.hidden_size,
        ffn_size,
        part="shared_expert" if expert < 0 else "experts",
        cut_over="tp" if expert < 0 else "etp",
        expert=expert,
        has_gate=moe.activation == "swiglu",
        has_bias=moe.has_bias,
    )


def _pair(
    name: str,
    width: int,
    ffn_size: int,
    *,
    part: Part,
    cut_over: Literal["tp", "etp"],
    expert: int = -1,
    has_gate: bool = False,
    has_bias: bool = True,
) -> Iterator[Tensor]:
    """The matrices that widen (``up``, and ``gate`` of SwiGLU) and the one that narrows (``down``)."""
    rows = ("gate", "up") if has_gate else ("up",)
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for matrix in rows:
        shapes.append((f"{matrix}.weight", (ffn_size, width)))
        shapes += [(f"{matrix}.bias", (ffn_size,))] if has_bias else []
    for suffix, shape in shapes:
        yield Tensor(name=f"{name}.{suffix}", shape=shape, part=part, cut_over=cut_over, expert=expert)
    down = f"{name}.down"
    shape = (width, ffn_size)
    yield Tensor(name=f"{down}.weight", shape=shape, part=part, cut_over=cut_over, cut_dim=1, expert=expert)
    if has_bias:
        # It is added to a part of a sum, so expert-tensor ranks hold ranges of it instead of copies.
        over: Literal["", "etp"] = "etp" if cut_over == "etp" else ""
        yield Tensor(name=f"{down}.bias", shape=(width,), part=part, cut_over=over, expert=expert)


def head_tensors(model: ModelConfig) -> Iterator[Tensor]:
    """Tensors of the head, which only the last chunk has."""
    width, patch = model.hidden_size, model.out_channels * model.patch_volume
    yield Tensor(name="head.modulation", shape=(2, width), part="head", stages="last")
    yield Tensor(name="head.projection.weight", shape=(patch, width), part="head", stages="last")
    yield Tensor(name="head.projection.bias", shape=(patch,), part="head", stages="last")
