"""The flat buffers that a rank keeps its weights and gradients in, and the ranges that its optimizer owns: closed form.

Owns the list of a chunk's parameters as they are built (fused matrices, their order and dtype) and the arithmetic of
megatron-core's DistributedDataParallel and DistributedOptimizer on it: where parameters start, where buckets end, which
numbers are padding, and which data-parallel rank updates what. The models build the same parameters; a test compares.

Source: megatron-core 0.16.1 and 0.19.2, distributed/param_and_grad_buffer.py and optimizer/distrib_optimizer.py.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megavid.config.schema import ModelConfig, RunConfig
from megavid.plan.layout import Layout, layers_of_chunk
from megavid.plan.parameters import Tensor, block_tensors, embedder_tensors, head_tensors

PARAMETER_UNIT = 64
"""Parameters start at a multiple of this many numbers."""
BUCKET_UNIT = 128
"""Buckets end at a multiple of this many numbers, and of the ranks that share them."""
BUCKET_SIZE, BUCKET_SIZE_PER_RANK = 40_000_000, 1_000_000
"""With overlapped reduction a bucket is closed at this many numbers, or this many for each data-parallel rank."""

# Parameters of a block in the order of its modules, each with the tensors of the model that are fused in it.
_BLOCK: tuple[tuple[str, ...], ...] = (
    ("modulation",), ("cross_norm.weight",), ("cross_norm.bias",),
    ("self_attention.q.weight", "self_attention.k.weight", "self_attention.v.weight"),
    ("self_attention.q.bias", "self_attention.k.bias", "self_attention.v.bias"),
    ("self_attention.q_norm.weight",), ("self_attention.k_norm.weight",),
    ("self_attention.out.weight",), ("self_attention.out.bias",),
    ("cross_attention.q.weight",), ("cross_attention.q.bias",),
    ("cross_attention.k.weight", "cross_attention.v.weight"), ("cross_attention.k.bias", "cross_attention.v.bias"),
    ("cross_attention.q_norm.weight",), ("cross_attention.k_norm.weight",),
    ("cross_attention.out.weight",), ("cross_attention.out.bias",),
    ("cross_attention.image_k.weight", "cross_attention.image_v.weight"),
    ("cross_attention.image_k.bias", "cross_attention.image_v.bias"), ("cross_attention.image_k_norm.weight",),
    ("ffn.up.weight",), ("ffn.up.bias",), ("ffn.down.weight",), ("ffn.down.bias",),
    ("moe.router.weight",),
    ("moe.experts.up.weight",), ("moe.experts.up.bias",), ("moe.experts.gate.weight",), ("moe.experts.gate.bias",),
    ("moe.experts.down.weight",), ("moe.experts.down.bias",),
    ("moe.shared.gate.weight", "moe.shared.up.weight"), ("moe.shared.gate.bias", "moe.shared.up.bias"),
    ("moe.shared.down.weight",), ("moe.shared.down.bias",),
)  # fmt: skip
_FP32 = ("modulation", "cross_norm.", "q_norm.", "k_norm.", "router.", "time_embedder.", "image_embedder.norm_")
"""Names whose parameters stay fp32 in bf16 runs: norms, modulation, the timestep's MLP and the routers."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a built chunk, as this rank holds it.

    Attributes:
        name: the first of the model's tensors that are fused in it.
        numel: local numbers.
        is_fp32: stays fp32 in bf16 runs.
        is_expert: reduced over the ranks "edp" instead of "dp" x "cp".
        has_own_bucket: on every pipeline stage, each in a bucket of its own.
        is_partial: acts on a rank's own tokens only under sequence parallelism; its gradient is a part of a sum.
    """

    name: str
    numel: int
    is_fp32: bool
    is_expert: bool
    has_own_bucket: bool
    is_partial: bool


@dataclass(frozen=True, slots=True)
class Bucket:
    """Numbers that are reduced and gathered in one call.

    Attributes:
        numel: numbers, padding included; a multiple of ``ranks``.
        spans: [start, stop) of each parameter in it.
        is_fp32: dtype of its parameters in bf16 runs.
        is_expert: shared by the ranks "edp" instead of "dp" x "cp".
        ranks: ranks that share it.
    """

    numel: int
    spans: tuple[tuple[int, int], ...]
    is_fp32: bool
    is_expert: bool
    ranks: int

    def owned(self, rank: int) -> int:
        """Numbers of parameters, padding left out, that rank ``rank`` of those that share it updates."""
        size = self.numel // self.ranks
        low, high = rank * size, (rank + 1) * size
        return sum(max(min(stop, high) - max(start, low), 0) for start, stop in self.spans)


def chunk_parameters(model: ModelConfig, layout: Layout, pp_rank: int, vpp_rank: int) -> tuple[Parameter, ...]:
    """Parameters of one chunk of one rank in the order of ``chunk.parameters()``."""
    is_first, is_last = pp_rank == vpp_rank == 0, (pp_rank, vpp_rank) == (layout.pp - 1, layout.vpp - 1)
    kinds = tuple(model.is_moe_layer(layer) for layer in layers_of_chunk(model, layout, pp_rank, vpp_rank))
    return _chunk_parameters(model, kinds, is_first, is_last, layout.tp, layout.ep, layout.etp)


@lru_cache(maxsize=4096)
def _chunk_parameters(
    model: ModelConfig, kinds: tuple[bool, ...], is_first: bool, is_last: bool, tp: int, ep: int, etp: int
) -> tuple[Parameter, ...]:
    """Parameters of a chunk whose blocks have experts or not as ``kinds`` says; a search asks for few of them often."""
    found = []
    for tensor in embedder_tensors(model, is_first=is_first):
        if tensor.stages == "all":
            found.append(_whole(tensor, has_own_bucket=True))
    for tensor in embedder_tensors(model, is_first=is_first):
        if tensor.stages == "first":
            found.append(_whole(tensor))
    for is_moe in kinds:
        found += _block_parameters(model, is_moe, tp, ep, etp)
    if is_last:
        found += [_whole(tensor) for tensor in head_tensors(model)]
    return tuple(found)


def _whole(tensor: Tensor, *, has_own_bucket: bool = False) -> Parameter:
    """A parameter outside of the blocks: one tensor that every tensor-parallel rank holds whole.

    Captions and images, unlike tokens, stand on every rank, so the gradient of their embedders is whole.
    """
    is_partial = not tensor.name.startswith(("text_embedder.", "image_embedder."))
    return Parameter(tensor.name, tensor.numel, _is_fp32(tensor.name), False, has_own_bucket, is_partial)


@lru_cache(maxsize=4096)
def _block_parameters(model: ModelConfig, is_moe: bool, tp: int, ep: int, etp: int) -> tuple[Parameter, ...]:
    """Parameters of one block; all blocks of a kind are alike."""
    layer = next(layer for layer in range(model.num_layers) if model.is_moe_layer(layer) == is_moe)
    prefix, sizes, whole = f"blocks.{layer}.", dict[str, int](), set[str]()
    cuts = {"": 1, "tp": tp, "etp": etp}
    for tensor in block_tensors(model, layer):
        name = tensor.name.removeprefix(prefix)
        if tensor.expert >= 0:
            if tensor.expert >= model.moe.num_experts // ep:
                continue  # the other experts stand on other ranks
            name = name.replace(f".{tensor.expert}.", ".")
        sizes[name] = sizes.get(name, 0) + tensor.numel // cuts[tensor.cut_over]
        if tensor.expert < 0 and not tensor.cut_over:
            whole.add(name)
    built = []
    for fused in _BLOCK:
        names = [name for name in fused if name in sizes]
        if names:
            name, numel = names[0], sum(sizes[name] for name in names)
            is_expert = name.startswith("moe.experts.")
            built.append(Parameter(name, numel, _is_fp32(name), is_expert, False, name in whole))
    return tuple(built)


def buckets_of_rank(config: RunConfig, layout: Layout, pp_rank: int) -> tuple[Bucket, ...]:
    """Every bucket of the chunks of a rank of this pipeline stage, chunk after chunk."""
    return _buckets_of_rank(*_key(config, layout, pp_rank))


def _key(config: RunConfig, layout: Layout, pp_rank: int) -> tuple[ModelConfig, Layout, int, bool, bool]:
    """All that buckets depend on: model, layout, stage, whether in bf16, whether reduced beside computation.

    How attention crosses ranks changes no bucket, so that layouts that differ in it alone share an entry.
    """
    is_bf16, overlaps = config.precision.dtype == "bf16", config.parallel.overlap_grad_reduce
    return config.model, replace(layout, context=None), pp_rank, is_bf16, overlaps


@dataclass(frozen=True, slots=True)
class Totals:
    """Numbers of a rank's buckets, padding included, and of the ranges in them that the rank updates.

    Attributes:
        narrow: numbers that a bf16 run keeps in bf16.
        wide: numbers that stay fp32.
        owned_narrow: narrow numbers that this rank updates, without padding.
        owned_wide: likewise, wide.
    """

    narrow: int
    wide: int
    owned_narrow: int
    owned_wide: int


def totals_of_rank(config: RunConfig, layout: Layout, pp_rank: int, dense_rank: int, expert_rank: int) -> Totals:
    """Sums over ``buckets_of_rank`` for the rank with these places among those that share its buckets."""
    return _totals_of_rank(*_key(config, layout, pp_rank), dense_rank, expert_rank)


@lru_cache(maxsize=16384)
def _totals_of_rank(
    model: ModelConfig,
    layout: Layout,
    pp_rank: int,
    is_bf16: bool,
    overlaps_reduction: bool,
    dense_rank: int,
    expert_rank: int,
) -> Totals:
    held, owned = [0, 0], [0, 0]
    for bucket in _buckets_of_rank(model, layout, pp_rank, is_bf16, overlaps_reduction):
        is_wide = bucket.is_fp32 or not is_bf16
        held[is_wide] += bucket.numel
        owned[is_wide] += bucket.owned(expert_rank if bucket.is_expert else dense_rank)
    return Totals(*held, *owned)


@lru_cache(maxsize=4096)
def _buckets_of_rank(
    model: ModelConfig, layout: Layout, pp_rank: int, is_bf16: bool, overlaps_reduction: bool
) -> tuple[Bucket, ...]:
    found: list[Bucket] = []
    for chunk in range(layout.vpp):
        parameters = chunk_parameters(model, layout, pp_rank, chunk)
        # Only the first chunk of the first stage is cut into buckets that can be reduced while others are computed.
        size = None
        if overlaps_reduction and pp_rank == 0 and chunk == 0:
            size = max(BUCKET_SIZE, BUCKET_SIZE_PER_RANK * layout.dp)
        for is_expert in (False, True):
            ranks = layout.edp if is_expert else layout.dp * layout.cp
            kept = [p for p in parameters if p.is_expert == is_expert]
            # A buffer for each dtype: two in bf16 runs, one where everything is fp32.
            for dtypes in ((False,), (True,)) if is_bf16 else ((False, True),):
                buffer = [p for p in kept if p.is_fp32 in dtypes]
                found += _buckets_of(buffer, ranks=ranks, size=size, is_expert=is_expert)
    return tuple(found)


def _buckets_of(parameters: Sequence[Parameter], *, ranks: int, size: int | None, is_expert: bool) -> Iterator[Bucket]:
    """Cut one buffer into buckets, its parameters in reverse order as their gradients come."""
    unit = math.lcm(ranks, BUCKET_UNIT)
    spans: list[tuple[int, int]] = []

    def close(stop: int) -> Bucket:
        bucket = Bucket(-(-stop // unit) * unit, tuple(spans), parameters[0].is_fp32, is_expert, ranks)
        spans.clear()
        return bucket

    at = 0  # in this bucket; buckets start at multiples of PARAMETER_UNIT
    for parameter in reversed(parameters):
        at = -(-at // PARAMETER_UNIT) * PARAMETER_UNIT
        if parameter.has_own_bucket and spans:
            yield close(at)
            at = 0
        spans.append((at, at + parameter.numel))
        at += parameter.numel
        if parameter.has_own_bucket or (size is not None and at >= size):
            yield close(at)
            at = 0
    if spans:
        yield close(at)


def _is_fp32(name: str) -> bool:
    return any(part in name for part in _FP32)
