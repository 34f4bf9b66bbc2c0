"""Rounding to FP8 on a GPU: the bytes and scales of the CPU's plain torch, bit for bit."""

from itertools import product

import pytest
import torch

from megavid.ops.expert_activation_fp8 import expert_activation_fp8_op
from megavid.ops.fp8 import E4M3, E8M0, Quantized, amax_of, quantize, quantize_tiles
from megavid.ops.fp8_ops import COMPILED_FP8
from tests.gpu.test_ops_cuda import on_gpu
from tests.unit.test_ops_expert_activation_fp8 import OPS
from tests.unit.test_ops_fp8 import rough
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
