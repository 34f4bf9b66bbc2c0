"""FP8 in the plan: which products, on what units, what rounding moves, against arithmetic by hand and the operators."""

import itertools
import statistics
from dataclasses import replace

import pytest
import torch

from megavid.config.load import load_run
from megavid.config.schema import PrecisionConfig, RunConfig
from megavid.ops.block_attention import CAPABILITIES
from megavid.ops.compiled import why_not_compiled
from megavid.ops.fp8 import E4M3, amax_of, dequantize, quantize, quantize_tiles, scale_of
from megavid.ops.fp8_ops import COMPILED_FP8, REFERENCE_FP8
from megavid.plan.calibration import gpu_calibration
from megavid.plan.fp8 import (
    ATTENTION_HEADS,
    ATTENTION_UNITS,
    FUSED,
    READ_AMAX,
    SCALE_AND_CUT,
    TO_TILES,
    TURN_BACK_ONE,
    TURN_BACK_TILES,
    attention_rounding_bytes,
    attention_units_of,
    fp8_layers_of_stage,
    history_bytes,
    kept_bytes,
    rounding_bytes,
    turn_back_heads,
    units_of,
)
from megavid.plan.hardware import Hardware, hardware
from megavid.plan.kernels import Attention, Machine, Product
from megavid.plan.layout import Layout, layout_of
from megavid.plan.memory import memory_of
from megavid.plan.time import rounded_tokens, stages_of, step_time
from megavid.plan.traffic import traffic_of
from megavid.plan.workload import Workload, workload_of_clip
from tests.support.flagship import PLAIN
from tests.support.flash3 import stand_in
from tools.count_operators import OperatorCounter

COMPILED = pytest.mark.skipif(bool(why_not_compiled()), reason=f"compiled ops: {why_not_compiled()}")
H100, A100, CALIBRATION = hardware("h100-80gb"), hardware("a100-80gb"), gpu_calibration()


def planned(preset: str, world: int, recipe: str, *flags: str) -> tuple[RunConfig, Layout, Workload]:
    config = load_run(preset, ["--precision.fp8", recipe, *flags])
    workload = workload_of_clip(config, 81, 480, 832)
    config = replace(config, data=replace(config.data, pack_tokens=workload.pack_tokens))
    return config, layout_of(config, world), workload


def test_a_product_in_fp8_by_hand() -> None:
    """4,096 tokens x 5,120 x 5,120 in bf16 on an H100: FLOPs at the FP8 rate, operands a byte each, results two."""
    machine = Machine(H100, CALIBRATION)
    side, flops = 5120 * 5120, 2 * 4096 * 5120 * 5120
    arithmetic = flops / (1978.9e12 * CALIBRATION.matrix_efficiency * CALIBRATION.fp8_matrix_ratio)
    rate, rows = 3.35e12 * CALIBRATION.memory_efficiency, 4096 * 5120
    forward, backward = machine.product(Product("dense_ffn", 4096, 5120, 5120, units="fp8"))
    assert forward == pytest.approx(arithmetic + (rows + side + 2 * rows) / rate)
    # Gradient of the input alike; of the matrix: written, read, and added to an fp32 number.
    of_matrix = arithmetic + (2 * rows + side * (2 + 2 + 8)) / rate
    assert backward == pytest.approx(forward + of_matrix)
    wide = sum(machine.product(Product("dense_ffn", 4096, 5120, 5120)))
    assert forward + backward < 0.8 * wide
    assert sum(machine.product(Product("dense_ffn", 4096, 5120, 5120, units="turned back"))) > 8 * wide


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_units_are_those_that_the_products_run_on(recipe: str) -> None:
    precision = PrecisionConfig(fp8=recipe)
    cpu = Hardware(
        name="cpu", peak={"fp32": 1e11}, memory_bytes=2**33, memory_rate=1e10, nvlink_rate=1e9, nvlink_domain=8,
        network_rate=1e9,
    )  # fmt: skip
    assert units_of(precision, H100) == ("turned back" if recipe == "mxfp8" else "fp8")
    assert units_of(precision, hardware("gb200")) == ("turned back" if recipe == "blockwise" else "fp8")
    has_tiles = recipe in ("blockwise", "mxfp8")
    for machine in (H100, hardware("gb200")):  # torch has products with tiles of e4m3 alone
        found = units_of(PrecisionConfig(fp8=recipe, fp8_gradients="e5m2"), machine)
        assert found == ("turned back" if has_tiles else "fp8")
    assert units_of(precision, A100) == units_of(precision, cpu) == "turned back"
    assert units_of(PrecisionConfig(), H100) == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_moves_what_its_operators_move(dtype: torch.dtype) -> None:
    """Of a GPU: a CPU's way back from eight bits goes by a table, whose index is four bytes more."""
    x, size = torch.randn(512, 1024).to(dtype), dtype.itemsize
    with OperatorCounter() as largest:
        scale = scale_of(amax_of(x), E4M3)
    with OperatorCounter() as one:
        rounded = quantize(x, scale, E4M3)
    with OperatorCounter() as tiles:
        in_tiles = quantize_tiles(x, (1, 128), E4M3)
    assert largest.bytes / x.numel() == pytest.approx(READ_AMAX * size, rel=0.02)
    assert one.bytes / x.numel() == pytest.approx(SCALE_AND_CUT * size + 1, rel=0.02)
    expected = (READ_AMAX + SCALE_AND_CUT + TO_TILES) * size + 1
    assert tiles.bytes / x.numel() == pytest.approx(expected, rel=0.05)
    table = 1 + 4 + 4 + 4 - (1 + 4)  # index written and read, beside the cast
    for kept, back in ((rounded, TURN_BACK_ONE), (in_tiles, TURN_BACK_TILES)):
        with OperatorCounter() as widened:
            dequantize(kept)
        assert widened.bytes / x.numel() == pytest.approx(back + table, rel=0.05)


@COMPILED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_rounding_moves_what_its_ops_move(dtype: torch.dtype) -> None:
    x, size = torch.randn(512, 1024).to(dtype), dtype.itemsize
    with OperatorCounter() as largest:
        amax = COMPILED_FP8.amax(x)
    with OperatorCounter() as one:
        COMPILED_FP8.quantize(x, scale_of(amax, E4M3), E4M3)
    with OperatorCounter() as tiles:
        COMPILED_FP8.quantize_tiles(x, (1, 128), E4M3)
    assert largest.bytes / x.numel() == pytest.approx(FUSED * size, rel=0.02)
    assert one.bytes / x.numel() == pytest.approx(FUSED * size + 1, rel=0.02)
    assert tiles.bytes / x.numel() == pytest.approx(FUSED * size + 1, rel=0.05)
    # What is kept has no more than these bytes either, of rows that end within a tile too.
    kept = COMPILED_FP8.quantize_tiles(x[:200].t(), (1, 128), E4M3)
    found = sum(tensor.untyped_storage().nbytes() for tensor in (kept.data, kept.scale))
    assert found == kept_bytes(PrecisionConfig(fp8="blockwise"), 200, 1024, is_fused=True)


def test_three_products_round_their_operands_this_often() -> None:
    operands, size = (1000.0, 100.0, 10.0), 2
    one, tile = 8 * size + 1, 10 * size + 1
    forward, backward = rounding_bytes(PrecisionConfig(fp8="tensorwise"), "fp8", operands, size)
    assert forward == 1100 * one
    assert backward == 10 * one + 100 * (5 * size + 1) + 2 * 1110  # the matrix's scale is kept; all three in order
    forward, backward = rounding_bytes(PrecisionConfig(fp8="mxfp8"), "turned back", operands, size)
    assert forward == 2100 * tile + 1100 * 21
    assert backward == (20 + 100) * tile + (2 * 10 + 100 + 1000) * 21
    forward, backward = rounding_bytes(PrecisionConfig(fp8="blockwise"), "fp8", operands, size)
    assert forward == 2100 * tile
    assert backward == (20 + 100) * tile + 2 * 1010  # tokens that do not fill a tile
    forward, backward = rounding_bytes(PrecisionConfig(fp8="tensorwise"), "fp8", operands, size, is_fused=True)
    assert forward == 1100 * (2 * size + 1)
    assert backward == 10 * (2 * size + 1) + 100 * (size + 1) + 2 * 1110
    forward, backward = rounding_bytes(PrecisionConfig(fp8="mxfp8"), "turned back", operands, size, is_fused=True)
    assert forward == 2100 * (size + 1) + 1100 * 21
    assert backward == (20 + 100) * (size + 1) + (2 * 10 + 100 + 1000) * 21


def test_skipped_blocks_stay_wide() -> None:
    flags = ("--parallel.pipeline", "4", "--precision.fp8_skip_first", "12", "--precision.fp8_skip_last", "1")
    config, layout, workload = planned("wan_14b", 64, "tensorwise", "--parallel.tensor", "2", *flags)
    assert [fp8_layers_of_stage(config, layout, stage) for stage in range(4)] == [(0, 0), (8, 0), (10, 0), (9, 0)]
    for stage, count in zip(stages_of(config, layout, workload, H100), (0, 8, 10, 9), strict=True):
        calls = {"": 0.0, "fp8": 0.0}
        for work in stage.products:
            if work.part == "dense_ffn":
                calls[work.units] += work.calls
        assert calls == pytest.approx({"": 2 * (10 - count), "fp8": 2 * count})
        # Keys and values of captions are never in FP8.
        assert all(work.units == "" for work in stage.products if work.is_of_prompt)


@pytest.mark.parametrize("preset", ["wan_14b", "wan_moe_100b_a20b"])
def test_products_are_faster_on_units_for_eight_bits_and_slower_turned_back(preset: str) -> None:
    flags: tuple[str, ...] = (*PLAIN, "--train.global_batch_size", "1024") if "moe" in preset else ()
    world = 1024 if "moe" in preset else 64
    times = {}
    for recipe in ("off", "tensorwise", "delayed", "blockwise", "mxfp8"):
        plan = planned(preset, world, recipe, "--parallel.tensor", "4", *flags)
        times[recipe] = step_time(*plan, H100, CALIBRATION)
        assert ("rounding" in times[recipe].parts) == (recipe != "off")
        slow = step_time(*plan, H100, CALIBRATION.with_numbers(fp8_matrix_ratio=0.4))
        assert (slow.total > times[recipe].total) == (recipe in ("tensorwise", "delayed", "blockwise"))
    for part in ("projections", "experts" if "moe" in preset else "dense_ffn"):
        off, one, tiles = (times[recipe].parts[part] for recipe in ("off", "tensorwise", "mxfp8"))
        assert 0.6 * off < one < 0.75 * off
        assert tiles > 8 * off
        # Tiles of 128 have a product on this GPU, those of 32 have not.
        assert times["blockwise"].parts[part] == one
    assert times["tensorwise"].parts["self_attention"] == times["off"].parts["self_attention"]
    # Delayed scales are known before the tensor is there: no rank waits for another's.
    assert times["delayed"].total < times["tensorwise"].total < times["mxfp8"].total
    # Tiles are rounded along both sides; turning back comes on top.
    assert (
        times["tensorwise"].parts["rounding"] < times["blockwise"].parts["rounding"] < times["mxfp8"].parts["rounding"]
    )


def test_kept_inputs_are_a_byte_a_number_and_whole_tiles() -> None:
    assert kept_bytes(PrecisionConfig(fp8="delayed"), 100, 64) == 6400
    assert kept_bytes(PrecisionConfig(fp8="blockwise"), 100, 64) == 128 * 64 * 33 / 32
    assert kept_bytes(PrecisionConfig(fp8="mxfp8"), 100, 64) == 128 * 64 * 33 / 32
    assert kept_bytes(PrecisionConfig(fp8="mxfp8"), 100, 64, experts=4) == (100 + 4 * 16) * 64 * 33 / 32
    assert kept_bytes(PrecisionConfig(fp8="mxfp8"), 100, 64, is_fused=True) == (100 + 4) * 64


def test_kept_inputs_take_less_memory_than_wide_ones_without_sequence_parallelism() -> None:
    kept = {}
    for recipe in ("off", "tensorwise"):
        for tensor in ("1", "8"):
            flags = ("--parallel.tensor", tensor, "--parallel.recompute", "none")
            config, layout, workload = planned("wan_14b", 64, recipe, *flags)
            kept[recipe, tensor] = memory_of(config, layout, 0, workload).parts["activations"]
    assert kept["tensorwise", "1"] < kept["off", "1"]
    # Eight ranks' gathered tokens in eight bits are more than one rank's in bf16.
    assert kept["tensorwise", "8"] > kept["off", "8"]


def test_histories_are_counted() -> None:
    config, layout, workload = planned("wan_14b", 64, "delayed")
    # 38 blocks of six layers, three operands, sixteen steps and the one at hand.
    assert history_bytes(config, layout, 0) == 38 * 6 * 3 * 17 * 4
    assert memory_of(config, layout, 0, workload).parts["fp8"] == history_bytes(config, layout, 0)


def test_amaxes_travel_under_tensorwise_in_each_pass_and_under_delayed_once() -> None:
    found = {}
    for recipe in ("off", "tensorwise", "delayed", "mxfp8"):
        config, layout, workload = planned("wan_14b", 64, recipe)
        transfers = traffic_of(config, layout, 0, workload, 8)
        found[recipe] = {(t.axis, t.group_size): t.calls for t in transfers if t.operation == "all_reduce"}
    # Forward, forward again under full recomputation, and backward, of 38 x 6 layers and 8 microbatches.
    assert found["tensorwise"] == {**found["off"], ("amax", 8): 38 * 6 * 8 * 3}
    assert found["delayed"] == {**found["off"], ("scalars", 64): found["off"]["scalars", 64] + 1}
    assert found["mxfp8"] == found["off"]


ATTENTION = ("--precision.fp8_attention", "true")


def test_attention_in_fp8_by_hand() -> None:
    """On an H100: the forward pass at the FP8 rate, exponentials and the backward pass as they were."""
    machine, wide = Machine(H100, CALIBRATION), Attention("self_attention", 1e15, 75_600, 128)
    (forward, backward), (narrow, same) = machine.attention(wide), machine.attention(replace(wide, units="fp8"))
    filled = 75_600 / (75_600 + CALIBRATION.attention_half_keys)
    rate = 1978.9e12 * CALIBRATION.attention_efficiency * CALIBRATION.fp8_matrix_ratio
    assert narrow == pytest.approx((1e15 / rate + 1e15 / (4 * 128) / 4.5e12) / filled)
    assert same == backward
    assert machine.attention(replace(wide, units="turned back")) == (forward, backward)


@pytest.mark.parametrize(
    ("backend", "machine", "width", "dtype", "units"),
    [
        ("flash_attn_3", "h100-80gb", 128, "bf16", "fp8"),
        ("flash_attn_3", "h100-80gb", 128, "fp32", "turned back"),  # which the run refuses
        ("flash_attn_3", "h100-80gb", 40, "bf16", "turned back"),  # no multiple of 16
        ("flash_attn_3", "gb200", 128, "bf16", "turned back"),
        ("aten", "h100-80gb", 128, "bf16", "turned back"),
    ],
)
def test_attention_multiplies_in_eight_bits_where_its_backend_does(
    backend: str, machine: str, width: int, dtype: str, units: str
) -> None:
    flags = ("--parallel.attention_backend", backend, "--precision.dtype", dtype)
    config = load_run("wan_14b", ["--precision.fp8", "tensorwise", *ATTENTION, *flags])
    config = replace(config, model=replace(config.model, num_heads=5120 // width))
    assert attention_units_of(config, hardware(machine)) == units
    assert attention_units_of(replace(config, precision=PrecisionConfig(fp8="tensorwise")), H100) == ""


def test_the_plan_knows_which_heads_and_gpus_the_kernel_takes() -> None:
    with stand_in() as (kernel, _):
        assert kernel.fp8_head_multiple == ATTENTION_HEADS
    generations = {"hopper": (9, 0)}
    for backend, generation in ATTENTION_UNITS.items():
        assert CAPABILITIES[backend, "cuda"].compute_capability == generations[generation]


def test_attention_of_blocks_in_fp8_is_faster_there_and_slower_turned_back() -> None:
    flags = ("--parallel.tensor", "4", "--precision.fp8_skip_first", "10")
    plain, back, narrow = (
        planned("wan_14b", 64, "tensorwise", *flags, *more)
        for more in ((), ATTENTION, (*ATTENTION, "--parallel.attention_backend", "flash_attn_3"))
    )
    times = [step_time(*plan, H100, CALIBRATION) for plan in (plain, back, narrow)]
    parts = [time.parts["self_attention"] for time in times]
    assert parts[1] == pytest.approx(parts[0])
    assert 0.93 * parts[0] < parts[2] < 0.97 * parts[0]  # products of the forward pass alone, of 29 blocks of 40
    roundings = [time.parts["rounding"] for time in times]
    assert roundings[0] < roundings[2] < roundings[1]
    assert times[1].total > times[0].total > times[2].total
    # Of 40 blocks 29 are in FP8: the backward pass and cross-attention are not.
    work = stages_of(*narrow, H100)[0].attention
    shares = {(each.part, each.units): each.flops for each in work}
    assert shares.keys() == {("self_attention", "fp8"), ("self_attention", ""), ("cross_attention", "")}
    assert shares["self_attention", "fp8"] / shares["self_attention", ""] == pytest.approx(29 / 11)


@pytest.mark.parametrize(
    ("strategy", "clips", "queries", "keys"),
    [
        ("ring", (1024,), 4.0, 4.0),
        ("allgather", (1024,), 1.0, 4.0),
        ("ulysses", (1024,), 1.0, 1.0),
        ("ring", (256,) * 4, 1.75, 1.75),  # one of three cuts for three clips of four
        ("allgather", (512, 256, 256), 1.0, 2.125),
    ],
)
def test_tokens_of_attention_are_rounded_once_for_each_rectangle(
    strategy: str, clips: tuple[int, ...], queries: float, keys: float
) -> None:
    flags = ["--parallel.tensor", "2", "--parallel.context", "4", "--parallel.context_strategy", strategy]
    config = load_run("wan_14b", flags)
    found = rounded_tokens(layout_of(config, 8), Workload(clips, 1024, 1, "test"), 256)
    assert found == 256 * (queries + 2 * keys)


@pytest.mark.parametrize("strategy", ["ring", "allgather"])
@pytest.mark.parametrize("clips", [(96,), (13, 30, 5, 41, 7)])
def test_rounded_tokens_are_those_of_the_rectangles(strategy: str, clips: tuple[int, ...]) -> None:
    """Of a pack that is full; where clips begin is anywhere to the plan, hence the mean of all turns of their order."""
    config = load_run("wan_14b", ["--parallel.context", "4", "--parallel.context_strategy", strategy])
    planned = rounded_tokens(layout_of(config, 32), Workload(clips, 96, 1, "test"), 24)
    shards = [(24 * i, 24 * i + 24) for i in range(4)]
    counts = []
    for turn in range(len(clips)):
        ends = list(itertools.accumulate(clips[turn:] + clips[:turn]))
        total = 0
        for start, stop in zip([0, *ends], ends):
            inside = [n for low, high in shards if (n := min(stop, high) - max(start, low)) > 0]
            in_ring = sum(inside) * len(inside)
            total += (in_ring if strategy == "ring" else sum(inside)) + 2 * in_ring
        counts.append(total / 4)
    assert planned == pytest.approx(statistics.mean(counts), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_fused", [False, pytest.param(True, marks=COMPILED)])
def test_rounding_of_attention_moves_what_its_operators_move(dtype: torch.dtype, is_fused: bool) -> None:
    """Forward and backward, where it is turned back; of a GPU, as above."""
    x, size = torch.randn(1, 4, 512, 64).to(dtype), dtype.itemsize
    ops = COMPILED_FP8 if is_fused else REFERENCE_FP8
    with OperatorCounter() as counted:
        dequantize(ops.quantize_heads(x, 4, E4M3), dtype)
    table = 1 + 4 + 4 + 4 - (1 + 4)
    forward, backward = attention_rounding_bytes("turned back", x.numel(), size, is_fused=is_fused)
    assert counted.bytes == pytest.approx(forward + table * x.numel(), rel=0.02)
    assert backward == forward
    narrow, _ = attention_rounding_bytes("fp8", x.numel(), size, is_fused=is_fused)
    assert forward - narrow == turn_back_heads(size) * x.numel()
