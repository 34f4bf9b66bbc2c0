"""Seconds of one optimizer step of our models in a layout, part by part, and the MFU that they mean.

Owns the step from a config to the critical path: shapes of every product on one rank, memory-bound bytes as counted
from our operators, and which computation hides which of the engine's collectives. Rates and rules are ``kernels`` and
``critical_path``; FLOPs that MFU counts are ``flops``. Only overlap that the engine performs is counted.
"""

import math
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, lru_cache
from importlib import resources

from megavid.config.schema import ModelConfig, RunConfig
from megavid.plan.buffers import buckets_of_rank
from megavid.plan.calibration import Calibration
from megavid.plan.critical_path import Schedule, Stage, StepTime, step_time_of
from megavid.plan.flops import expert_rows, model_flops
from megavid.plan.fp8 import (
    attention_rounding_bytes,
    attention_units_of,
    fp8_layers_of_stage,
    rounding_bytes,
    units_of,
)
from megavid.plan.hardware import Hardware
from megavid.plan.kernels import BYTES, Attention, Beside, Exchange, Machine, Product, Rounding
from megavid.plan.layout import Layout, microbatches_of_step
from megavid.plan.shapes import Shapes, layers_of_stage
from megavid.plan.traffic import Transfer, traffic_of
from megavid.plan.workload import Workload

__all__ = ["StepTime", "mfu", "peak_dtype", "stages_of", "step_time"]


def step_time(
    config: RunConfig, layout: Layout, workload: Workload, hardware: Hardware, calibration: Calibration
) -> StepTime:
    """Time of one optimizer step.

    Args:
        config: the run.
        layout: of its ranks.
        workload: what each pack holds; the number of microbatches is the config's.
        hardware: of every rank.
        calibration: what its kernels and links reach.

    Raises:
        ConfigError: the hardware has no peak for the run's number format.
    """
    stages = stages_of(config, layout, workload, hardware)
    has_load = config.model.family == "wan_moe" and config.model.moe.router != "expert_choice" and layout.ep > 1
    schedule = Schedule(
        microbatches=microbatches_of_step(config, layout),
        pp=layout.pp,
        vpp=layout.vpp,
        imbalance=calibration.routing_imbalance if has_load else 1.0,
    )
    machine = Machine(hardware, calibration, config.precision.dtype, is_crowded=layout.world_size > 1)
    return step_time_of(stages, schedule, machine)


def mfu(config: RunConfig, layout: Layout, workload: Workload, hardware: Hardware, seconds: float) -> float:
    """Model FLOPs of a step over what all ranks could do in ``seconds`` at the peak of ``peak_dtype``."""
    flops = model_flops(config.model, workload.clip_tokens).total * workload.packs_per_step
    return flops / (seconds * layout.world_size * hardware.peak_of(peak_dtype(config, hardware)))


def not_counted(config: RunConfig) -> tuple[str, ...]:
    """What of a run the predicted step time leaves out, in words."""
    notes = []
    if config.precision.linears != "native":
        notes.append(
            f"precision.linears = '{config.precision.linears}' is not counted: step time and memory are those of "
            "'native' (docs/fp8.md)"
        )
    if config.precision.fp8_experts != "same":
        notes.append(
            f"precision.fp8_experts = '{config.precision.fp8_experts}' is not counted: experts are planned as "
            f"precision.fp8 = '{config.precision.fp8}' says (docs/fp8.md)"
        )
    if config.train.ops == "compiled":
        notes.append(
            "train.ops = 'compiled' is not counted in the step time, which is that of plain torch but for rounding to "
            "FP8; memory counts it (docs/kernels.md)"
        )
    if config.train.capture != "off":
        notes.append(
            f"train.capture = '{config.train.capture}' is not counted: step time and memory are those of 'off' "
            "(docs/kernels.md)"
        )
    return tuple(notes)


def peak_dtype(config: RunConfig, hardware: Hardware) -> str:
    """Number format whose peak MFU is held against: bf16, FP8 runs too.

    Machines without a bf16 rate (a CPU's probe in fp32) are held against the peak of the run's own format.
    """
    return "bf16" if "bf16" in hardware.peak else config.precision.dtype


def stages_of(config: RunConfig, layout: Layout, workload: Workload, hardware: Hardware) -> tuple[Stage, ...]:
    """The first, the middle and the last pipeline stage: every other one is like the middle one, or lighter.

    All of them in FP8, which blocks at both ends stay out of.
    """
    is_fp8 = config.precision.fp8 != "off"
    ranks = range(layout.pp) if is_fp8 else dict.fromkeys((0, min(1, layout.pp - 1), layout.pp - 1))
    return tuple(_stage(config, layout, workload, hardware, pp_rank) for pp_rank in ranks)


def _stage(config: RunConfig, layout: Layout, workload: Workload, hardware: Hardware, pp_rank: int) -> Stage:
    dense, moe = layers_of_stage(config.model, layout, pp_rank)
    shapes = Shapes.of(config, layout, workload)
    counts = operator_counts()[config.precision.dtype]
    again = _recomputed(config.parallel.recompute)
    is_dropless = config.model.moe.router != "expert_choice"
    buckets = buckets_of_rank(config, layout, pp_rank)
    updated = sum(bucket.numel / bucket.ranks for bucket in buckets)
    exchanges = traffic_of(config, layout, pp_rank, workload, hardware.nvlink_domain)
    layers = dense + moe
    repeated = 1 + (1 / 3 if again else 0.0)  # a third of the operators belongs to the forward pass
    products = _products(config, layout, workload, shapes, pp_rank, (dense, moe))
    products, roundings = _in_fp8(config, layout, hardware, products, pp_rank, (dense, moe))
    attention, rounding = _attention_in_fp8(
        config,
        layout,
        hardware,
        _attention(config, layout, workload, layers),
        rounded_tokens(layout, workload, shapes.span),
        pp_rank,
        layers,
    )
    return Stage(
        products=products,
        roundings=(*roundings, *rounding),
        attention=attention,
        glue_bytes=_glue_bytes(config.model, shapes, counts, dense, moe),
        recompute=again,
        operators=(dense * counts["dense_operators"] + moe * counts["moe_operators"]) * repeated
        + layout.vpp * counts["microbatch_operators"],
        stalls=moe * (3 if again else 2) if is_dropless else 0.0,
        exchanges=tuple(_exchange(transfer, layout, hardware) for transfer in exchanges),
        optimizer_bytes=updated * counts["optimizer_bytes"],
        optimizer_operators=counts["step_operators"] + layers * counts["layer_step_operators"],
    )


def _recomputed(recompute: str) -> Mapping[str, float]:
    """Forward passes done again, by part, as in ``flops.recompute_flops``."""
    if recompute == "none":
        return {}
    parts = ("cross_attention", "projections", "dense_ffn", "experts", "shared_expert", "router", "glue")
    return dict.fromkeys((*parts, "self_attention") if recompute == "full" else parts, 1.0)


# Shapes on one rank


def _products(
    config: RunConfig, layout: Layout, workload: Workload, shapes: Shapes, pp_rank: int, layers: tuple[int, int]
) -> tuple[Product, ...]:
    """Products of a stage's forward pass; their FLOPs are ``flops.stage_flops`` over tp x cp."""
    model, (dense, moe) = config.model, layers
    clips = workload.clip_tokens * config.train.micro_batch_size
    found = [_times(product, dense + moe) for product in _projections(model, shapes)]
    width, span, tp = model.hidden_size, float(shapes.span), shapes.tp
    if dense:
        found += [_times(product, dense) for product in _pair("dense_ffn", span, width, model.ffn_size / tp, 1)]
    if moe:
        found += [_times(product, moe) for product in _experts(model, layout, shapes, clips)]
    # What every stage does once for each chunk: the MLPs of the timestep, the text and the images.
    text, image = (float(shapes.clips * tokens) for tokens in (model.text_length, model.image_tokens))
    rows = shapes.clips * model.timesteps_of_clip
    found += [
        Product("modulation", rows, model.frequency_size, width, layout.vpp),
        Product("modulation", rows, width, width, 7 * layout.vpp),
        Product("embedders", text, model.text_size, width, layout.vpp),
        Product("embedders", text, width, width, layout.vpp),
    ]
    if image:
        found += [
            Product("embedders", image, model.image_size, model.image_size, layout.vpp),
            Product("embedders", image, model.image_size, width, layout.vpp),
        ]
    if pp_rank == 0:
        found.append(Product("embedders", shapes.own, model.in_channels * model.patch_volume, width))
    if pp_rank == layout.pp - 1:
        found.append(Product("head", shapes.own, width, model.out_channels * model.patch_volume))
    return tuple(found)


FP8_PARTS = ("projections", "dense_ffn", "experts", "shared_expert")
"""Parts whose products are in FP8; of the projections not those of captions and images."""


def _in_fp8(
    config: RunConfig,
    layout: Layout,
    hardware: Hardware,
    products: tuple[Product, ...],
    pp_rank: int,
    layers: tuple[int, int],
) -> tuple[tuple[Product, ...], tuple[Rounding, ...]]:
    """The same products with those of the stage's layers in FP8 apart, and the rounding of their operands."""
    units = units_of(config.precision, hardware)
    if not units:
        return products, ()
    dense, moe = fp8_layers_of_stage(config, layout, pp_rank)
    shares = dict.fromkeys(FP8_PARTS, moe / max(1, layers[1]))
    shares |= {"dense_ffn": dense / max(1, layers[0]), "projections": (dense + moe) / sum(layers)}
    found, roundings = [], []
    for work in products:
        share = shares.get(work.part, 0.0) * (not work.is_of_prompt)
        if share == 0.0:
            found.append(work)
            continue
        narrow = replace(work, calls=work.calls * share, units=units)
        found += [narrow, *([replace(work, calls=work.calls * (1 - share))] if share < 1 else [])]
        sizes = (work.rows * work.inner, work.inner * work.columns, work.rows * work.columns)
        is_fused = config.train.ops == "compiled"
        moved = rounding_bytes(config.precision, units, sizes, BYTES[config.precision.dtype], is_fused=is_fused)
        roundings.append(Rounding(work.part, narrow.calls * moved[0], narrow.calls * moved[1]))
    return tuple(found), tuple(roundings)


def _attention_in_fp8(
    config: RunConfig,
    layout: Layout,
    hardware: Hardware,
    attention: tuple[Attention, ...],
    rounded: float,
    pp_rank: int,
    layers: int,
) -> tuple[tuple[Attention, ...], tuple[Rounding, ...]]:
    """The same attention with that of the stage's layers in FP8 apart, and the rounding of ``rounded`` tokens."""
    units, narrow = attention_units_of(config, hardware), sum(fp8_layers_of_stage(config, layout, pp_rank))
    if not units or not narrow:
        return attention, ()
    found: list[Attention] = []
    for work in attention:
        share = narrow / layers if work.part == "self_attention" else 0.0
        parts = ((share, units), (1.0 - share, work.units))
        found += [replace(work, flops=work.flops * part, units=each) for part, each in parts if part > 0.0]
    numbers = rounded * config.model.hidden_size / layout.tp
    size, is_fused = BYTES[config.precision.dtype], config.train.ops == "compiled"
    forward, backward = attention_rounding_bytes(units, numbers, size, is_fused=is_fused)
    return tuple(found), (Rounding("self_attention", narrow * forward, narrow * backward),)


def rounded_tokens(layout: Layout, workload: Workload, span: int) -> float:
    """Tokens that attention in FP8 rounds on a rank of ``span``, of queries, keys and values, once for each rectangle.

    A clip's keys and values are rounded for each shard of its queries, and in a ring its queries for each shard of its
    keys; all-gather has those in one rectangle. Each place where the ring cuts packs is inside of a clip as likely as
    the clip is long.
    """
    plan = layout.context_plan
    cuts = [(plan.ring - 1) * clip / workload.pack_tokens for clip in workload.clip_tokens]
    mean = 1 + sum(clip * each for clip, each in zip(workload.clip_tokens, cuts)) / workload.tokens
    return span * ((1.0 if plan.kind == "allgather" else mean) + 2 * mean)


def _projections(model: ModelConfig, shapes: Shapes) -> tuple[Product, ...]:
    """The matrices of both attentions of one block: q, k and v are one product, k and v of the text another, k and v of
    images a third."""
    width, span, tp = model.hidden_size, float(shapes.span), shapes.tp
    found = (
        Product("projections", span, width, 3 * width / tp),
        Product("projections", span, width / tp, width, 2),
        Product("projections", span, width, width / tp),
    )
    prompts = (float(shapes.clips * tokens) for tokens in (model.text_length, model.image_tokens) if tokens)
    return (*found, *(Product("projections", tokens, width, 2 * width / tp, is_of_prompt=True) for tokens in prompts))


def _experts(model: ModelConfig, layout: Layout, shapes: Shapes, clips: tuple[int, ...]) -> tuple[Product, ...]:
    """Router, shared expert and one product for each local expert; rows are even over all experts."""
    moe = model.moe
    widths = 2 if moe.activation == "swiglu" else 1
    found = [Product("router", shapes.own, model.hidden_size, moe.num_experts)]
    if moe.shared_ffn_size:
        found += _pair("shared_expert", shapes.span, model.hidden_size, moe.shared_ffn_size / shapes.tp, widths)
    # Rows of the ranks that share these tokens, gathered over the ranks that share the experts' matrices.
    rows = expert_rows(model, clips) / (layout.tp * layout.cp) * layout.etp * layout.ep / moe.num_experts
    local = moe.num_experts / layout.ep
    pair = _pair("experts", rows, model.hidden_size, moe.expert_ffn_size / layout.etp, widths)
    return (*found, *(_times(product, local) for product in pair))


def _pair(part: str, rows: float, width: float, hidden: float, widening: int) -> tuple[Product, Product]:
    return Product(part, rows, width, hidden * widening), Product(part, rows, hidden, width)


def _times(work: Product, count: float) -> Product:
    return replace(work, calls=work.calls * count)


def _attention(config: RunConfig, layout: Layout, workload: Workload, layers: int) -> tuple[Attention, ...]:
    model, packs = config.model, config.train.micro_batch_size
    share = packs * layers / (layout.tp * layout.cp)
    pairs = sum(clip * clip for clip in workload.clip_tokens)
    keys = pairs / workload.tokens
    is_ring = layout.cp > 1 and layout.context_plan.ring > 1
    flops = 4.0 * model.hidden_size * share
    prompts = (float(tokens) for tokens in (model.text_length, model.image_tokens) if tokens)
    return (
        Attention("self_attention", flops * pairs, keys, model.head_size, is_ring),
        *(
            Attention("cross_attention", flops * workload.tokens * tokens, tokens, model.head_size)
            for tokens in prompts
        ),
    )


# Memory-bound work and the host


@cache
def operator_counts() -> Mapping[str, Mapping[str, float]]:
    """Bytes and operators of our blocks by number format, as counted by ``tools/count_operators.py``."""
    return tomllib.loads(resources.files("megavid.plan").joinpath("operators.toml").read_text(encoding="utf-8"))


def _glue_bytes(model: ModelConfig, shapes: Shapes, counts: Mapping[str, float], dense: int, moe: int) -> float:
    """Bytes of one microbatch's memory-bound operators, both passes.

    Between tensor-parallel products a rank has its own tokens at full width; inside them all tokens at a share of the
    width: with sequence parallelism both are tokens x width / tp.
    """
    width, own, hidden = model.hidden_size, float(shapes.own), shapes.span / shapes.tp
    total = dense * (counts["dense_width"] * own * width + counts["dense_hidden"] * hidden * model.ffn_size)
    if moe:
        sizes = model.moe
        rows = own * shapes.valid * sizes.top_k * shapes.etp
        total += moe * (
            counts["moe_width"] * own * width
            + counts["row_width"] * rows * width
            + counts["row_hidden"] * rows * sizes.expert_ffn_size / shapes.etp
            + counts["dense_hidden"] * hidden * sizes.shared_ffn_size
        )
    return total


# Communication


_HIDDEN_BY: Mapping[tuple[str, str], Beside] = {
    ("dp", "reduce_scatter"): "last_backward", ("edp", "reduce_scatter"): "last_backward",
    ("dp", "all_gather"): "first_forward", ("edp", "all_gather"): "first_forward",
}  # fmt: skip
_HIDDEN_BY_AXIS: Mapping[str, Beside] = {
    "tp": "products", "cp": "attention", "ep": "shared_expert", "etp": "shared_expert", "pp": "step",
}  # fmt: skip


def _exchange(transfer: Transfer, layout: Layout, hardware: Hardware) -> Exchange:
    beside: Beside = ""
    if transfer.is_overlapped:
        beside = _HIDDEN_BY.get((transfer.axis, transfer.operation)) or _HIDDEN_BY_AXIS.get(transfer.axis, "")
    near = transfer.group_size
    if transfer.fabric == "network":
        near = _fewest_near(transfer.group_size, _stride(transfer, layout), hardware.nvlink_domain)
    return Exchange(
        transfer.axis, transfer.operation, transfer.calls, transfer.bytes, transfer.group_size, near, beside
    )


@lru_cache(maxsize=1024)
def _fewest_near(group_size: int, stride: int, domain: int) -> int:
    """Ranks of a group in the domain of the rank that has fewest there, itself included: it sets the pace.

    Groups begin at multiples of their span, so where it does not fit the domain some of them straddle two.
    """
    span, fewest = group_size * stride, group_size
    for first in range(0, math.lcm(span, domain), span):
        members = Counter((first + number * stride) // domain for number in range(group_size))
        fewest = min(fewest, *members.values())
    return fewest


@lru_cache(maxsize=1024)
def _stride(transfer: Transfer, layout: Layout) -> int:
    """How many ranks apart the members of a transfer's group stand."""
    plan = layout.context_plan
    if transfer.axis == "cp":
        return layout.tp * (1 if transfer.operation == "all_to_all" else plan.ulysses)
    if transfer.axis == "ep":
        return layout.etp if transfer.operation == "all_to_all" else 1
    between_stages = layout.world_size // layout.pp
    strides = {"pp": between_stages, "embedders": between_stages, "dp": layout.tp, "edp": layout.etp * layout.ep}
    return strides.get(transfer.axis, 1)
