"""FP8 in the plan: which products of a stage are in eight bits and on what units, and the bytes that rounding moves.

Owns what ``precision.fp8`` changes of a rank, in closed form; the layers are ``megavid.models.fp8``'s, the rounding is
``megavid.ops.fp8``'s, operator by operator in plain torch, or ``megavid.ops.quantize_fp8``'s in one pass (fused:
``train.ops = "compiled"``). Time and memory that follow are ``kernels``' and ``activations``'.
"""

from typing import Literal

from megavid.config.schema import PrecisionConfig, RunConfig
from megavid.plan.calibration import Calibration
from megavid.plan.hardware import Hardware
from megavid.plan.layout import Layout, layers_of_chunk

Units = Literal["", "fp8", "turned back"]
"""What multiplies: "" as without FP8; "fp8" units for eight bits; wide ones, of numbers that were turned back."""
TILED = {"blockwise": 128, "mxfp8": 32}
"""Recipes whose scales belong to tiles: numbers along the sum that share one."""
TILED_UNITS = {"blockwise": "hopper", "mxfp8": "blackwell"}
"""Architectures whose products with these tiles of e4m3 torch has (``megavid.ops.device_products``)."""
ATTENTION_UNITS = {"flash_attn_3": "hopper"}
"""Backends of attention that multiply in eight bits forward, and the architecture on which they do."""
ATTENTION_HEADS = 16
"""What a head's width must be a multiple of for that (``megavid.ops.block_attention_flash3``)."""
TILE_SHARE = 1 / 32
"""Bytes of scales for each number that is kept: four for 128 (blockwise), one for 32 (mxfp8)."""
WIDE = 4
FIGURES = 3
"""Operands of a layer, each with a history and a latest magnitude, fp32."""

READ_AMAX = 3
"""Bytes that finding the largest magnitude moves, in units of the number's: abs reads and writes, amax reads."""
SCALE_AND_CUT = 5
"""And scaling, cutting to the largest number and casting: two times reading and writing, reading; then one byte."""
TO_TILES = 2
"""And copying to whole tiles."""
FUSED = 1
"""The same of the compiled ops: finding the largest magnitude reads, and so does rounding, with tiles too, which writes
one byte."""
IN_ORDER = 2
"""Bytes for each number in eight bits that is copied to lie as GPUs' products want it: rows one after the other, or
with zeros behind tokens that do not fill a tile."""
SCALE = 2
"""And scaling alone: the compiled op is given attention's heads scaled, as it takes one scale."""
TURN_BACK_ONE, TURN_BACK_TILES = 13, 21
"""Bytes that turning a number back to fp32 moves: cast (5) and product with one scale (8); with tiles' scales each
number's scale is written (4) and read (4) besides."""


def fp8_layers_of_stage(config: RunConfig, layout: Layout, pp_rank: int) -> tuple[int, int]:
    """Dense and expert layers of a stage, all its chunks, that are in FP8: those that the ends do not skip."""
    model = config.model
    layers = [i for chunk in range(layout.vpp) for i in layers_of_chunk(model, layout, pp_rank, chunk)]
    inside = [layer for layer in layers if config.precision.is_fp8_layer(layer, model.num_layers)]
    moe = sum(model.is_moe_layer(layer) for layer in inside)
    return len(inside) - moe, moe


def scaled_layers(config: RunConfig, dense: int, moe: int) -> tuple[int, int]:
    """Layers with scales of their own in so many dense and expert blocks: linears, and experts' stacks of matrices."""
    sizes = config.model.moe
    shared = 2 if sizes.shared_ffn_size else 0
    # Of attention q, k and v as one, out, q to the prompts, out; up and down of a dense feed-forward.
    return 6 * dense + (4 + shared) * moe, (3 if sizes.activation == "swiglu" else 2) * moe


def history_bytes(config: RunConfig, layout: Layout, pp_rank: int) -> int:
    """Bytes of histories and of what was largest in the step at hand."""
    steps = config.precision.fp8_history if config.precision.fp8 == "delayed" else 0
    return sum(scaled_layers(config, *fp8_layers_of_stage(config, layout, pp_rank))) * FIGURES * (steps + 1) * WIDE


def kept_bytes(
    precision: PrecisionConfig, rows: float, width: float, experts: int = 0, *, is_fused: bool = False
) -> float:
    """Bytes of an input of ``rows`` x ``width`` that is kept in eight bits along its rows, with its scales.

    Args:
        precision: of the run.
        rows: tokens.
        width: numbers of each.
        experts: that share the rows, each with half a tile of padding in the mean; 0 for a dense layer.
        is_fused: compiled ops round: the last tile's scales are kept, but not what fills it up.
    """
    tile = TILED.get(precision.fp8)
    if tile is None:
        return rows * width
    padded = rows + experts * tile / 2 if experts else -(-rows // tile) * tile
    return ((rows if is_fused else padded) + padded * TILE_SHARE) * width


def units_of(precision: PrecisionConfig, hardware: Hardware) -> Units:
    """What the products of layers in FP8 run on.

    Tiles are turned back to wide numbers on other architectures than theirs and where gradients are e5m2, and so are
    all recipes on GPUs without units for eight bits. A machine that was probed has no rate of eight bits; its products
    are taken for as fast as wide ones.
    """
    if precision.fp8 == "off":
        return ""
    is_taken = precision.fp8 not in TILED or (
        TILED_UNITS[precision.fp8] == hardware.generation and precision.fp8_gradients != "e5m2"
    )
    return "fp8" if is_taken and "fp8" in hardware.peak else "turned back"


def rounding_bytes(
    precision: PrecisionConfig, units: Units, operands: tuple[float, float, float], size: int, *, is_fused: bool = False
) -> tuple[float, float]:
    """Bytes that rounding and turning back move for a layer's three products, forward and backward.

    Args:
        precision: of the run.
        units: that they run on, not "".
        operands: numbers of the input, of the matrix and of the output's gradient.
        size: bytes of one as it comes.
        is_fused: compiled ops round.
    """
    inputs, weights, gradients = operands
    largest, rounding = (FUSED if is_fused else READ_AMAX) * size, (FUSED if is_fused else SCALE_AND_CUT) * size + 1
    if precision.fp8 in TILED:
        rounding += 0 if is_fused else largest + TO_TILES * size
        # The input and the gradient are rounded along both sides, the matrix once in each pass.
        forward = 2 * inputs * rounding + weights * rounding
        backward = 2 * gradients * rounding + weights * rounding
        back, moved = float(TURN_BACK_TILES), inputs + gradients
    else:
        forward = (inputs + weights) * (largest + rounding)
        backward = gradients * (largest + rounding) + weights * rounding
        back, moved = float(TURN_BACK_ONE), inputs + weights + gradients
    if units == "fp8":
        return forward, backward + IN_ORDER * moved
    return forward + back * (inputs + weights), backward + back * (2 * gradients + weights + inputs)


def attention_units_of(config: RunConfig, hardware: Hardware) -> Units:
    """What the forward pass of self-attention in FP8 runs on; the backward pass is always wide."""
    if config.precision.fp8 == "off" or not config.precision.fp8_attention:
        return ""
    is_taken = ATTENTION_UNITS.get(config.parallel.attention_backend) == hardware.generation
    # Other backends take fp32 too: the run refuses this one there, and it is not timed as if it ran.
    is_taken = is_taken and config.model.head_size % ATTENTION_HEADS == 0 and config.precision.dtype == "bf16"
    return "fp8" if is_taken and "fp8" in hardware.peak else "turned back"


def attention_rounding_bytes(units: Units, numbers: float, size: int, *, is_fused: bool = False) -> tuple[float, float]:
    """Bytes that rounding queries, keys and values moves, forward and backward; the latter always turns them back.

    Args:
        units: of the forward pass, not "".
        numbers: of all three, each as often as it is in a rectangle.
        size: bytes of one as it comes, and as it is turned back to.
        is_fused: compiled ops cut and cast.
    """
    rounding = READ_AMAX * size + ((SCALE + FUSED) * size if is_fused else SCALE_AND_CUT * size) + 1
    back = turn_back_heads(size)
    return numbers * (rounding + (0 if units == "fp8" else back)), numbers * (rounding + back)


def turn_back_heads(size: int) -> int:
    """Bytes that turning one number back to one of ``size`` bytes moves: the cast goes by fp32."""
    cast = TURN_BACK_ONE - 2 * WIDE
    return cast + (0 if size == WIDE else WIDE + size) + 2 * size


def fp8_notes(config: RunConfig, hardware: Hardware, calibration: Calibration) -> tuple[str, ...]:
    """What the predicted step of a run in FP8 leans on, in words; nothing was measured on a GPU yet."""
    name, units = config.precision.fp8, units_of(config.precision, hardware)
    if units == "":
        return ()
    return (*_product_notes(name, units, hardware, calibration), *_attention_notes(config, hardware, calibration))


def _attention_notes(config: RunConfig, hardware: Hardware, calibration: Calibration) -> tuple[str, ...]:
    backend, units = config.parallel.attention_backend, attention_units_of(config, hardware)
    if units == "":
        return ()
    if units == "fp8":
        ratio, share = calibration.fp8_matrix_ratio, calibration.attention_efficiency * calibration.fp8_matrix_ratio
        return (
            f"precision.fp8_attention: the forward pass of '{backend}' is timed at {share:.0%} of the FP8 peak of "
            f"{hardware.name}, {ratio:.2f} times the share that wide attention reaches of its own, an assumption: "
            "attention in FP8 was not measured on a GPU yet (docs/fp8.md)",
        )
    return (
        f"precision.fp8_attention: '{backend}' on {hardware.name} does not multiply in eight bits: queries, keys and "
        "values are rounded and turned back to wide numbers, and planned so: slower than without it (docs/fp8.md)",
    )


def _product_notes(name: str, units: Units, hardware: Hardware, calibration: Calibration) -> tuple[str, ...]:
    if units == "fp8":
        share = calibration.matrix_efficiency * calibration.fp8_matrix_ratio
        return (
            f"precision.fp8 = '{name}': products are timed at {share:.0%} of the FP8 peak of {hardware.name}, "
            f"{calibration.fp8_matrix_ratio:.2f} times the share that bf16 reaches of its own, an assumption: products "
            "in FP8 were not measured on a GPU yet (docs/fp8.md)",
        )
    tiles = f" with tiles of {TILED[name]}" if name in TILED else ""
    return (
        f"precision.fp8 = '{name}': products{tiles} on {hardware.name} are turned back to wide numbers, and planned "
        "so: slower than without FP8 (docs/fp8.md)",
    )
