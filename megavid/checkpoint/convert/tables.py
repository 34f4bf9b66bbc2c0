"""Which tensor of a checkpoint of another layout is which tensor in model space: one table a layout, used both ways.

Owns the tables, their few transforms, and the check that a source has exactly the tensors that its table asks for. The
model's own list of tensors is ``megavid.plan.parameters``'s; a tensor of it that no row matches is a mistake of the
table and raises. Reads no file.

Sources of the names: Wan 2.1's ``wan/modules/model.py``, and diffusers' ``WanTransformer3DModel``.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from megavid.checkpoint.convert.lazy import LazyTensor, stacked
from megavid.config.schema import ModelConfig
from megavid.errors import CheckpointError
from megavid.plan.parameters import tensors as model_tensors

Transform = Literal["same", "convolution", "leading_one", "channels_last", "stack"]
"""What is done to a tensor in model space to get the other one; the inverse is done on the way back.

- same: nothing.
- convolution: [D, P], P over (channel, frame, row, column), to the kernel [D, C, frames, rows, columns]: same bytes.
- leading_one: a dim of 1 in front: same bytes.
- channels_last: rows from (channel, frame, row, column) to (frame, row, column, channel), as Wan's head has them.
- stack: the tensors of all experts, in their order, along a new dim 0.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table. ``{n}`` stands for a layer, ``{e}`` for an expert, ``*`` for weight or bias."""

    model: str
    other: str
    transform: Transform = "same"


def _attention(model: str, other: str, names: Mapping[str, str]) -> tuple[Row, ...]:
    """Rows of one attention: four matrices and two norms."""
    parts = ("q.*", "k.*", "v.*", "out.*", "q_norm.weight", "k_norm.weight")
    return tuple(Row(f"blocks.{{n}}.{model}.{part}", f"blocks.{{n}}.{other}.{names[part]}") for part in parts)


_DIFFUSERS_ATTENTION = {
    "q.*": "to_q.*", "k.*": "to_k.*", "v.*": "to_v.*", "out.*": "to_out.0.*",
    "q_norm.weight": "norm_q.weight", "k_norm.weight": "norm_k.weight",
}  # fmt: skip
_ORIGINAL_ATTENTION = {
    "q.*": "q.*", "k.*": "k.*", "v.*": "v.*", "out.*": "o.*",
    "q_norm.weight": "norm_q.weight", "k_norm.weight": "norm_k.weight",
}  # fmt: skip

DIFFUSERS: tuple[Row, ...] = (
    Row("patch_embedder.weight", "patch_embedding.weight", "convolution"),
    Row("patch_embedder.bias", "patch_embedding.bias"),
    Row("time_embedder.up.*", "condition_embedder.time_embedder.linear_1.*"),
    Row("time_embedder.down.*", "condition_embedder.time_embedder.linear_2.*"),
    Row("time_embedder.projection.*", "condition_embedder.time_proj.*"),
    Row("text_embedder.up.*", "condition_embedder.text_embedder.linear_1.*"),
    Row("text_embedder.down.*", "condition_embedder.text_embedder.linear_2.*"),
    Row("image_embedder.norm_in.*", "condition_embedder.image_embedder.norm1.*"),
    Row("image_embedder.up.*", "condition_embedder.image_embedder.ff.net.0.proj.*"),
    Row("image_embedder.down.*", "condition_embedder.image_embedder.ff.net.2.*"),
    Row("image_embedder.norm_out.*", "condition_embedder.image_embedder.norm2.*"),
    Row("image_embedder.positions", "condition_embedder.image_embedder.pos_embed", "leading_one"),
    Row("blocks.{n}.modulation", "blocks.{n}.scale_shift_table", "leading_one"),
    *_attention("self_attention", "attn1", _DIFFUSERS_ATTENTION),
    *_attention("cross_attention", "attn2", _DIFFUSERS_ATTENTION),
    Row("blocks.{n}.cross_norm.*", "blocks.{n}.norm2.*"),
    Row("blocks.{n}.cross_attention.image_k.*", "blocks.{n}.attn2.add_k_proj.*"),
    Row("blocks.{n}.cross_attention.image_v.*", "blocks.{n}.attn2.add_v_proj.*"),
    Row("blocks.{n}.cross_attention.image_k_norm.weight", "blocks.{n}.attn2.norm_added_k.weight"),
    Row("blocks.{n}.ffn.up.*", "blocks.{n}.ffn.net.0.proj.*"),
    Row("blocks.{n}.ffn.down.*", "blocks.{n}.ffn.net.2.*"),
    Row("head.modulation", "scale_shift_table", "leading_one"),
    Row("head.projection.*", "proj_out.*", "channels_last"),
)
"""diffusers' WanTransformer3DModel."""

INFERENCE: tuple[Row, ...] = (
    *DIFFUSERS,
    Row("blocks.{n}.moe.router.weight", "blocks.{n}.ffn.router.weight"),
    Row("blocks.{n}.moe.router.expert_bias", "blocks.{n}.ffn.router.expert_bias"),
    Row("blocks.{n}.moe.experts.{e}.up.*", "blocks.{n}.ffn.experts.up.*", "stack"),
    Row("blocks.{n}.moe.experts.{e}.gate.*", "blocks.{n}.ffn.experts.gate.*", "stack"),
    Row("blocks.{n}.moe.experts.{e}.down.*", "blocks.{n}.ffn.experts.down.*", "stack"),
    Row("blocks.{n}.moe.shared.up.*", "blocks.{n}.ffn.shared.up.*"),
    Row("blocks.{n}.moe.shared.gate.*", "blocks.{n}.ffn.shared.gate.*"),
    Row("blocks.{n}.moe.shared.down.*", "blocks.{n}.ffn.shared.down.*"),
)
"""megavid.inference's MegavidTransformer3DModel: diffusers' names, and expert layers of its own."""

ORIGINAL: tuple[Row, ...] = (
    Row("patch_embedder.weight", "patch_embedding.weight", "convolution"),
    Row("patch_embedder.bias", "patch_embedding.bias"),
    Row("time_embedder.up.*", "time_embedding.0.*"),
    Row("time_embedder.down.*", "time_embedding.2.*"),
    Row("time_embedder.projection.*", "time_projection.1.*"),
    Row("text_embedder.up.*", "text_embedding.0.*"),
    Row("text_embedder.down.*", "text_embedding.2.*"),
    Row("image_embedder.norm_in.*", "img_emb.proj.0.*"),
    Row("image_embedder.up.*", "img_emb.proj.1.*"),
    Row("image_embedder.down.*", "img_emb.proj.3.*"),
    Row("image_embedder.norm_out.*", "img_emb.proj.4.*"),
    Row("image_embedder.positions", "img_emb.emb_pos", "leading_one"),
    Row("blocks.{n}.modulation", "blocks.{n}.modulation", "leading_one"),
    *_attention("self_attention", "self_attn", _ORIGINAL_ATTENTION),
    *_attention("cross_attention", "cross_attn", _ORIGINAL_ATTENTION),
    Row("blocks.{n}.cross_norm.*", "blocks.{n}.norm3.*"),
    Row("blocks.{n}.cross_attention.image_k.*", "blocks.{n}.cross_attn.k_img.*"),
    Row("blocks.{n}.cross_attention.image_v.*", "blocks.{n}.cross_attn.v_img.*"),
    Row("blocks.{n}.cross_attention.image_k_norm.weight", "blocks.{n}.cross_attn.norm_k_img.weight"),
    Row("blocks.{n}.ffn.up.*", "blocks.{n}.ffn.0.*"),
    Row("blocks.{n}.ffn.down.*", "blocks.{n}.ffn.2.*"),
    Row("head.modulation", "head.modulation", "leading_one"),
    Row("head.projection.*", "head.head.*", "channels_last"),
)
"""The files that the makers of Wan published."""

ALWAYS_FP32 = ("blocks.{n}.moe.router.weight", "blocks.{n}.moe.router.expert_bias")
"""fp32 in whatever is written: which experts a token goes to must not hang on rounding."""
KEPT_FP32 = (
    *ALWAYS_FP32,
    "time_embedder.up.*", "time_embedder.down.*", "time_embedder.projection.*",
    "image_embedder.norm_in.*", "image_embedder.norm_out.*",
    "blocks.{n}.modulation", "blocks.{n}.cross_norm.*", "head.modulation",
    "blocks.{n}.self_attention.q_norm.weight", "blocks.{n}.self_attention.k_norm.weight",
    "blocks.{n}.cross_attention.q_norm.weight", "blocks.{n}.cross_attention.k_norm.weight",
    "blocks.{n}.cross_attention.image_k_norm.weight",
)  # fmt: skip
"""fp32 where the rest is converted to a narrower format: what the engine itself holds in fp32 beside bf16 matrices."""

LISTED = 12
"""Names that a message lists before it only counts."""


@dataclass(frozen=True, slots=True)
class Link:
    """One tensor of another layout, and what it is made of.

    Attributes:
        other: its name.
        shape: its shape.
        names: the tensors in model space that it holds; several where experts are stacked.
        transform: see ``Transform``.
        order: rows in model space by row of the other tensor (channels_last).
    """

    other: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    transform: Transform
    order: tuple[int, ...] = ()

    def to_model(self, tensor: LazyTensor, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, LazyTensor]]:
        """The tensors in model space that are in ``tensor``, by name."""
        if self.transform == "stack":
            yield from ((name, tensor.row(number)) for number, name in enumerate(self.names))
            return
        (name,) = self.names
        if self.transform == "channels_last":
            back = sorted(range(len(self.order)), key=self.order.__getitem__)
            yield name, tensor.permuted(back)
        else:
            yield name, tensor.viewed(shapes[name])

    def from_model(self, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
        """The other layout's tensor, of tensors in model space."""
        if self.transform == "stack":
            return stacked([tensors[name] for name in self.names], self.other)
        tensor = tensors[self.names[0]]
        if self.transform == "channels_last":
            return tensor.permuted(self.order)
        return tensor.viewed(self.shape)


def expected_tensors(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of everything that a converted model consists of, by name in model space, routers' bias included."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in model_tensors(model):
        shapes[tensor.name] = tensor.shape
        if tensor.part == "router" and model.moe.router == "sigmoid":
            shapes[tensor.name.replace(".weight", ".expert_bias")] = (model.moe.num_experts,)
    return shapes


def links(model: ModelConfig, table: Sequence[Row]) -> list[Link]:
    """Every tensor of the other layout for this model, in the order of the model.

    Raises:
        CheckpointError: the layout has no place for a tensor of the model.
    """
    found: dict[str, Link] = {}
    for name, shape in expected_tensors(model).items():
        row, other = _row_of(name, table)
        if row.transform == "stack":
            names = (*found[other].names, name) if other in found else (name,)
            found[other] = Link(other, (len(names), *shape), names, row.transform)
            continue
        assert other not in found, f"two tensors for {other}"
        order: tuple[int, ...] = ()
        if row.transform == "convolution":
            shape = (shape[0], shape[1] // model.patch_volume, *model.patch_size)
        elif row.transform == "leading_one":
            shape = (1, *shape)
        elif row.transform == "channels_last":
            channels, volume = shape[0] // model.patch_volume, model.patch_volume
            order = tuple(channel * volume + place for place in range(volume) for channel in range(channels))
        found[other] = Link(other, shape, (name,), row.transform, order)
    return list(found.values())


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name in model space is one of ``patterns``, which are written as in a ``Row``."""
    return any(_pattern(pattern).fullmatch(name) for pattern in patterns)


def to_model_space(
    model: ModelConfig, table: Sequence[Row], source: Mapping[str, LazyTensor], where: str
) -> dict[str, LazyTensor]:
    """All tensors of the model, lazily, out of a source that holds exactly those that the table asks for.

    Raises:
        CheckpointError: tensors are missing, unexpected, or of another shape; lists them.
    """
    shapes, found = expected_tensors(model), links(model, table)
    check_same_tensors({link.other: link.shape for link in found}, source, where)
    tensors = dict(pair for link in found for pair in link.to_model(source[link.other], shapes))
    return {name: tensors[name] for name in shapes}


def check_same_tensors(expected: Mapping[str, tuple[int, ...]], source: Mapping[str, LazyTensor], where: str) -> None:
    """Check that ``source`` has every expected tensor, in its shape, and no other.

    Raises:
        CheckpointError: it does not; lists them all, up to ``LISTED`` of a kind.
    """
    missing = [name for name in expected if name not in source]
    unexpected = [name for name in source if name not in expected]
    wrong = [name for name, shape in expected.items() if name in source and source[name].shape != shape]
    parts = []
    if wrong:
        told = [f"{name} has shape {list(source[name].shape)}, expected {list(expected[name])}" for name in wrong]
        parts.append("; ".join(told[:LISTED]) + _more(told))
    if missing:
        told = [name + _hint(name, unexpected) for name in missing]
        parts.append(f"missing: {', '.join(told[:LISTED])}{_more(told)}")
    if unexpected:
        parts.append(f"unexpected: {', '.join(unexpected[:LISTED])}{_more(unexpected)}")
    if parts:
        raise CheckpointError(f"{where} is not of the model that its config describes: {'; '.join(parts)}")


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - LISTED} more" if len(names) > LISTED else ""


def _hint(name: str, unexpected: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, unexpected, n=1, cutoff=0.8)
    return f" (is it {near[0]}?)" if near else ""


def _row_of(name: str, table: Sequence[Row]) -> tuple[Row, str]:
    """The row that matches a name in model space, and the name on its other side."""
    for row in table:
        match = _pattern(row.model).fullmatch(name)
        if match:
            other = row.other
            for part, value in match.groupdict().items():
                other = other.replace("*" if part == "kind" else f"{{{part}}}", value)
            return row, other
    raise CheckpointError(
        f"tensor {name} has no name in the layout asked for, which holds dense Wan models only; use --to diffusers"
        if ".moe." in name
        else f"tensor {name} has no row in the table of names; it cannot be converted"
    )


@cache
def _pattern(text: str) -> re.Pattern[str]:
    escaped = re.escape(text).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{e\}", r"(?P<e>\d+)")
    return re.compile(escaped.replace(r"\*", "(?P<kind>weight|bias)"))
