"""One-pass rounding to eight bits: bit for bit what plain torch gives, of every kind of number and in every layout."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from megavid.ops.compiled import why_not_compiled
from megavid.ops.fp8 import E4M3, E5M2, E8M0, LARGEST, Quantized, amax_of, dequantize, quantize, quantize_tiles
from megavid.ops.fp8_linear import Recipe, RecipeName, fp8_grouped_linear
from megavid.ops.fp8_ops import COMPILED_FP8
from tests.unit.test_ops_fp8 import RECIPES, LoneScaling, rough

WIDES = (torch.float32, torch.bfloat16)
FORMATS = (E4M3, E5M2)
TILES = [(1, 128), (128, 128), (1, 32), (32, 1), (128, 1), (1, 1), (16, 8)]
SHAPES = [(1, 1), (130, 200), (3, 40, 128), (0, 64), (64, 0), (0, 4, 64), (2, 3, 9, 50), (257, 129)]

pytestmark = pytest.mark.skipif(bool(why_not_compiled()), reason=f"compiled ops: {why_not_compiled()}")


def assert_same(found: Quantized, wanted: Quantized) -> None:
    """Bytes and scales are equal; of NaN only that it is NaN."""
    assert found.tile == wanted.tile
    for mine, theirs in ((found.data, wanted.data), (found.scale, wanted.scale)):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        nan = theirs.float().isnan()
        assert torch.equal(mine.float().isnan(), nan)
        kind = torch.int32 if theirs.dtype == torch.float32 else torch.uint8
        assert torch.equal(mine.contiguous().view(kind)[~nan], theirs.contiguous().view(kind)[~nan])


def every_kind(wide: torch.dtype) -> Tensor:
    """Numbers of all exponents and signs, subnormal ones, zeros, infinities and NaN: in bf16 all there are."""
    if wide == torch.bfloat16:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(wide)
    return torch.arange(-(2**31), 2**31, 16411).to(torch.int32).view(wide)


def halves(dtype: torch.dtype) -> Tensor:
    """All numbers of a format, what is halfway between two of them, and the neighbours of that in fp32."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = numbers[numbers.isfinite()].sort().values
    between = (finite[1:] + finite[:-1]) / 2
    there = [torch.nextafter(between, torch.full_like(between, end)) for end in (-torch.inf, torch.inf)]
    return torch.cat([finite, between, *there])


@pytest.mark.parametrize("dtype", FORMATS, ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("wide", WIDES)
def test_one_scale_rounds_every_kind_of_number_as_plain_torch(wide: torch.dtype, dtype: torch.dtype) -> None:
    for exponent in (-126, -20, -1, 0, 1, 7, 126):
        scale = torch.tensor(2.0**exponent)
        for x in (every_kind(wide), (halves(dtype) * scale).to(wide)):
            assert_same(COMPILED_FP8.quantize(x, scale, dtype), quantize(x, scale, dtype))
    nan = torch.tensor(torch.nan)
    assert COMPILED_FP8.quantize(torch.zeros(5, dtype=wide), nan, dtype).data.float().isnan().all()


@pytest.mark.parametrize("dtype", FORMATS, ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("wide", WIDES)
def test_every_kind_of_number_as_the_largest_of_a_tile(wide: torch.dtype, dtype: torch.dtype) -> None:
    """Scales at each power of two's edge, of subnormal numbers, of zeros, and NaN for what is not finite."""
    edges = (
        LARGEST[dtype] * torch.tensor([1 - 2**-24, 1.0, 1 + 2**-23]) * 2.0 ** torch.arange(-140, 100).unsqueeze(1)
    ).view(-1)
    tiny = torch.arange(3000, dtype=torch.int32).view(torch.float32)
    for x in (every_kind(wide), edges.to(wide), tiny.to(wide)):
        column = x.unsqueeze(1).expand(-1, 3) * torch.tensor([0.25, 1.0, -0.3], dtype=wide)
        for scale_dtype in (torch.float32, E8M0):
            found = COMPILED_FP8.quantize_tiles(column, (1, 4), dtype, scale_dtype=scale_dtype)
            assert_same(found, quantize_tiles(column, (1, 4), dtype, scale_dtype=scale_dtype))


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("wide", WIDES)
def test_tiles_are_those_of_plain_torch(wide: torch.dtype, tile: tuple[int, int]) -> None:
    """Rows as they stand, transposed ones, matrices of a stack, some of the columns, and edges that cut tiles."""
    for shape, dtype, scale_dtype in product(SHAPES, FORMATS, (torch.float32, E8M0)):
        x = rough(*shape, spread=5.0).to(wide)
        for given in (x, x.transpose(-1, -2), x[..., 1:], x[..., ::2], x.transpose(-1, -2)[..., 1:, :]):
            found = COMPILED_FP8.quantize_tiles(given, tile, dtype, scale_dtype=scale_dtype)
            assert found.data.is_contiguous()
            assert_same(found, quantize_tiles(given, tile, dtype, scale_dtype=scale_dtype))


@pytest.mark.parametrize("wide", WIDES)
def test_the_largest_magnitude_is_that_of_plain_torch(wide: torch.dtype) -> None:
    for x in (rough(0, 4), rough(1), rough(300, 500), rough(300, 500).t()[5:], torch.tensor(-3.0), rough(40000) - 9.0):
        assert torch.equal(COMPILED_FP8.amax(x.to(wide)), amax_of(x.to(wide)))
    for broken in (torch.inf, -torch.inf, torch.nan):
        x = rough(200, 200).to(wide)
        x[150, 7] = broken
        torch.testing.assert_close(COMPILED_FP8.amax(x), amax_of(x), equal_nan=True)


def test_one_scale_keeps_the_order_in_memory() -> None:
    x = rough(30, 50)
    for given in (x.t(), x[:, 3:], rough(2, 3, 4).permute(2, 0, 1)):
        found = COMPILED_FP8.quantize(given, torch.tensor(0.5), E4M3)
        assert_same(found, quantize(given, torch.tensor(0.5), E4M3))
    assert COMPILED_FP8.quantize(x.t(), torch.tensor(0.5), E4M3).data.stride() == x.t().stride()


@pytest.mark.parametrize("wide", WIDES)
@pytest.mark.parametrize("name", RECIPES)
def test_a_layer_computes_the_same_bits_with_either(name: RecipeName, wide: torch.dtype) -> None:
    """Output and gradients of experts, one of which has no rows: so no loss moves."""
    outcomes = []
    for ops in (None, COMPILED_FP8):
        scaling = LoneScaling(name)
        if ops is not None:
            scaling.recipe = Recipe.of(name, "auto", ops)
        x, weight = rough(150, 192).to(wide).requires_grad_(), rough(3, 160, 192, seed=1).to(wide).requires_grad_()
        out = fp8_grouped_linear(x, weight, [20, 0, 130], scaling)
        out.backward(rough(150, 160, seed=2).to(wide))
        assert x.grad is not None
        assert weight.grad is not None
        outcomes.append((out.detach(), x.grad, weight.grad))
    for plain, fast in zip(*outcomes):
        assert plain.isfinite().all()
        assert torch.equal(plain, fast)


def test_threads_change_nothing() -> None:
    x, threads = rough(700, 900), torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            turned = COMPILED_FP8.quantize_tiles(x.t(), (1, 128), E4M3)
            found.append((dequantize(turned), dequantize(COMPILED_FP8.quantize(x, torch.tensor(1.0), E5M2))))
            found[-1] += (COMPILED_FP8.amax(x),)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("fp8_amax", ()),
        ("quantize_fp8", (torch.tensor(0.5), E5M2)),
        ("quantize_fp8_tiles", (1, 32, E4M3, E8M0)),
        ("quantize_fp8_tiles", (16, 8, E5M2, torch.float32)),
    ],
)
def test_operators_are_registered_as_torch_wants_them(name: str, extra: tuple[Any, ...]) -> None:
    operator = getattr(torch.ops.megavid, name).default
    for x in (rough(20, 70), rough(20, 70).t()):
        torch.library.opcheck(operator, (x, *extra))


def test_what_does_not_fit_is_named() -> None:
    x, scale = torch.ones(4, 8), torch.tensor(1.0)
    ops = torch.ops.megavid
    refused = (
        (ops.fp8_amax, (x.half(),), TypeError, "fp8_amax: x must be float32 or bfloat16"),
        (ops.quantize_fp8, (x.double(), scale, E4M3), TypeError, "quantize_fp8: x must be"),
        (ops.quantize_fp8, (x, scale, torch.int8), TypeError, "quantize_fp8: dtype must be"),
        (ops.quantize_fp8, (x, scale.double(), E4M3), TypeError, "quantize_fp8: scale must be float32"),
        (ops.quantize_fp8, (x, x, E4M3), ValueError, r"quantize_fp8: scale must be one number, got \[4, 8\]"),
        (ops.quantize_fp8_tiles, (x.half(), 1, 32, E4M3, E8M0), TypeError, "quantize_fp8_tiles: x must be"),
        (ops.quantize_fp8_tiles, (x[0], 1, 32, E4M3, E8M0), ValueError, r"x must be \[..., rows, columns\], got \[8\]"),
        (ops.quantize_fp8_tiles, (x, 1, 32, E8M0, E8M0), TypeError, "quantize_fp8_tiles: dtype must be"),
        (ops.quantize_fp8_tiles, (x, 1, 32, E4M3, torch.bfloat16), TypeError, "scale_dtype must be"),
        (ops.quantize_fp8_tiles, (x, 3, 32, E4M3, E8M0), ValueError, "tile_rows must be a power of two from 1 to 128"),
        (ops.quantize_fp8_tiles, (x, 1, 256, E4M3, E8M0), ValueError, "tile_columns must be .* 128, got 256"),
    )
    for operator, given, error, message in refused:
        with pytest.raises(error, match=message):
            operator(*given)
