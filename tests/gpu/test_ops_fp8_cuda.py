"""FP8 on a GPU: rounding gives the bytes and scales of the CPU's plain torch, bit for bit; products are their twins."""

from itertools import product

import pytest
import torch
from torch.torch_version import TorchVersion

from megavid.ops.device_products import (
    FIRST_TILED,
    ROW_32,
    TILED,
    Format,
    Tile,
    has_grouped_product,
    has_tiled_product,
)
from megavid.ops.expert_activation_fp8 import expert_activation_fp8_op
from megavid.ops.fp8 import (
    E4M3,
    E8M0,
    Quantized,
    amax_of,
    dequantize,
    quantize,
    quantize_tiles,
    scaled_matmul_reference,
)
from megavid.ops.fp8_ops import COMPILED_FP8
from megavid.ops.scaled_matmul import has_scaled_mm, scaled_grouped_matmul, scaled_matmul
from tests.gpu.test_ops_cuda import on_gpu
from tests.unit.test_ops_expert_activation_fp8 import OPS
from tests.unit.test_ops_fp8 import rough, rounded
from tests.unit.test_ops_moe import SIZES, make
from tests.unit.test_ops_quantize_fp8 import FORMATS, SHAPES, TILES, WIDES, assert_same, every_kind, halves

pytestmark = pytest.mark.usefixtures("cuda_kernels")


def back(found: Quantized) -> Quantized:
    """The same on the CPU."""
    return found._replace(data=found.data.cpu(), scale=found.scale.cpu())


@pytest.mark.parametrize("dtype", FORMATS, ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("wide", WIDES)
def test_one_scale_rounds_every_kind_of_number_as_the_cpu(wide: torch.dtype, dtype: torch.dtype) -> None:
    for exponent in (-126, -20, 0, 7, 126):
        scale = torch.tensor(2.0**exponent)
        for x in (every_kind(wide), (halves(dtype) * scale).to(wide)):
            assert_same(back(COMPILED_FP8.quantize(x.cuda(), scale.cuda(), dtype)), quantize(x, scale, dtype))


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("wide", WIDES)
def test_tiles_are_those_of_the_cpu(wide: torch.dtype, tile: tuple[int, int]) -> None:
    for shape, dtype, scale_dtype in product([*SHAPES, (700, 1536)], FORMATS, (torch.float32, E8M0)):
        x = rough(*shape, spread=5.0).to(wide)
        for given in (x, x.transpose(-1, -2), x[..., 1:], x[..., ::2]):
            found = COMPILED_FP8.quantize_tiles(given.cuda(), tile, dtype, scale_dtype=scale_dtype)
            turned = COMPILED_FP8.quantize_tiles(
                given.transpose(-1, -2).cuda().transpose(-1, -2), tile, dtype, scale_dtype=scale_dtype
            )
            wanted = quantize_tiles(given, tile, dtype, scale_dtype=scale_dtype)
            assert_same(back(found), wanted)
            assert_same(back(turned), wanted)
    column = every_kind(wide).unsqueeze(1)
    assert_same(back(COMPILED_FP8.quantize_tiles(column.cuda(), (1, 1), E4M3)), quantize_tiles(column, (1, 1), E4M3))


@pytest.mark.parametrize("wide", WIDES)
def test_the_largest_magnitude_is_that_of_the_cpu(wide: torch.dtype) -> None:
    for x in (rough(0, 4), rough(1), rough(300, 500), every_kind(wide)):
        found = COMPILED_FP8.amax(x.to(wide).cuda()).cpu()
        torch.testing.assert_close(found, amax_of(x.to(wide)), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_activation_in_fp8_is_the_activation_rounded(op: str, dtype: torch.dtype) -> None:
    for tokens, experts, width in (*SIZES, (500, 8, 1536)):
        _, activation, given = make(op, tokens, experts, width, dtype)
        wide = activation(*on_gpu(given)).cpu()
        for tile, scale_dtype in ((128, torch.float32), (32, E8M0)):
            found = expert_activation_fp8_op(*on_gpu(given), tile, scale_dtype)
            assert_same(back(found), quantize_tiles(wide, (1, tile), E4M3, scale_dtype=scale_dtype))


def matrix(rows: int, tile: Tile, seed: int) -> Quantized:
    x = rough(rows, 640, seed=seed).cuda()
    return quantize_tiles(x, tile, E4M3, scale_dtype=E8M0 if tile == ROW_32 else torch.float32)


@pytest.mark.parametrize("wide", WIDES)
@pytest.mark.parametrize("pair", sorted(TILED, key=str), ids=str)
def test_products_with_tiles_are_their_twins(pair: tuple[Tile, Tile], wide: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if not has_tiled_product(device, Format(E4M3, pair[0]), Format(E4M3, pair[1]), wide):
        pytest.skip("this GPU has no such product: the twin is what runs")
    for rows, columns in ((1, 128), (141, 256), (1024, 1536)):
        a, b = matrix(rows, pair[0], 1), matrix(columns, pair[1], 2)
        magnitudes = dequantize(a).abs() @ dequantize(b).abs().t()
        gap = (scaled_matmul(a, b, wide).float() - scaled_matmul_reference(a, b, torch.float32)).abs()
        assert (gap <= 0.005 * magnitudes).all()


@pytest.mark.parametrize("sizes", [(30, 0, 34), (64, 0, 0), (1, 2, 61)])
def test_products_of_experts_are_their_twins(sizes: tuple[int, ...]) -> None:
    a, b = rounded(rough(64, 96).cuda(), "tensor"), rounded(rough(3, 48, 96, seed=1).cuda(), "tensor")
    found = scaled_grouped_matmul(a, b, sizes, torch.bfloat16).float()
    parts = [scaled_matmul_reference(rows, b.matrix(e), torch.float32) for e, rows in enumerate(cut(a, sizes))]
    torch.testing.assert_close(found, torch.cat(parts), rtol=2.0**-7, atol=0.005 * float(found.abs().max()))


def cut(x: Quantized, sizes: tuple[int, ...]) -> list[Quantized]:
    return [x._replace(data=part) for part in torch.split(x.data, sizes)]


def test_this_gpu_has_the_products_of_its_generation() -> None:
    """A product that fails its trial is not taken, and nothing says so but this and ``megavid doctor``."""
    device, capability = torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_capability()
    assert has_scaled_mm(device) is (capability >= (8, 9))
    if TorchVersion(torch.__version__) < FIRST_TILED:
        pytest.skip(f"products with tiles begin with torch {FIRST_TILED}")
    for a, b in TILED:
        is_offered = capability[0] == 9 if a != ROW_32 else capability[0] >= 10
        for dtype in (torch.bfloat16, torch.float32):
            assert has_tiled_product(device, Format(E4M3, a), Format(E4M3, b), dtype) is is_offered, (a, b, dtype)
    form = Format(E4M3, None)
    assert has_grouped_product(device, form, form, torch.bfloat16) is (capability[0] == 9)
