"""Products that GPUs have and a CPU has not: what torch is handed, against twins that read scales where cuBLASLt does.

The twins check shapes and strides as torch does, and read each number's scale from the address that cuBLAS' pages give.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from megavid.ops import device_products
from megavid.ops.device_products import (
    ROW_32,
    ROW_128,
    SQUARE_128,
    TILED,
    Format,
    Tile,
    agrees,
    example,
    grouped_product,
    has_grouped_product,
    has_tiled_product,
    tiled_product,
)
from megavid.ops.fp8 import E4M3, E5M2, E8M0, Quantized, quantize, quantize_tiles, scaled_matmul_reference
from megavid.ops.scaled_matmul import scaled_grouped_matmul
from tests.unit.test_ops_fp8 import rough, rounded

CPU = torch.device("cpu")


def ceil(number: int, multiple: int) -> int:
    return -(-number // multiple)


def row_128(scale: Tensor, rows: int, width: int) -> Tensor:
    assert scale.shape == (rows, ceil(width, 128))
    assert scale.stride(0) == 1
    assert scale.stride(1) == rows or scale.shape[1] == 1
    flat = scale.t().reshape(-1)
    return flat[torch.arange(width) // 128 * rows + torch.arange(rows).unsqueeze(1)]


def square_128(scale: Tensor, rows: int, width: int) -> Tensor:
    padded = ceil(ceil(width, 128), 4) * 4
    assert scale.shape == (padded, ceil(rows, 128))
    assert scale.stride() == (1, padded)
    flat = scale.t().reshape(-1)
    return flat[torch.arange(width) // 128 + torch.arange(rows).unsqueeze(1) // 128 * padded]


def row_32(scale: Tensor, rows: int, width: int) -> Tensor:
    across = ceil(ceil(width, 32), 4)
    assert scale.dtype == E8M0
    assert scale.is_contiguous()
    assert scale.numel() == ceil(rows, 128) * 128 * across * 4
    tile = torch.arange(width) // 32
    row = torch.arange(rows).unsqueeze(1)
    block = row // 128 * across + tile // 4
    return scale.float()[block * 512 + row % 32 * 16 + row % 128 // 32 * 4 + tile % 4]


KINDS: dict[Tile, tuple[Any, Any, Callable[[Tensor, int, int], Tensor]]] = {
    ROW_128: (ScalingType.BlockWise1x128, SwizzleType.NO_SWIZZLE, row_128),
    SQUARE_128: (ScalingType.BlockWise128x128, SwizzleType.NO_SWIZZLE, square_128),
    ROW_32: (ScalingType.BlockWise1x32, SwizzleType.SWIZZLE_32_4_4, row_32),
}


def scaled_mm_twin(
    a: Tensor, b: Tensor, scale_a: Tensor, recipe_a: Any, scale_b: Tensor, recipe_b: Any,
    *, swizzle_a: Any, swizzle_b: Any, output_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What ``torch.nn.functional.scaled_mm`` gives on a GPU."""
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    wide = []
    for matrix, scale, recipe, swizzle in ((a, scale_a, recipe_a, swizzle_a), (b.t(), scale_b, recipe_b, swizzle_b)):
        ((wanted_swizzle, read),) = [(kind[1], kind[2]) for kind in KINDS.values() if kind[0] == recipe]
        assert swizzle == wanted_swizzle
        assert matrix.shape[0] % 16 == matrix.shape[1] % 16 == 0
        scales = read(scale, *matrix.shape)
        wide.append(torch.where(matrix.float() == 0, 0.0, matrix.float() * scales))
    return (wide[0] @ wide[1].t()).to(output_dtype)


def scaled_grouped_mm_twin(
    a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, offs: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """What ``torch._scaled_grouped_mm`` gives on a GPU."""
    assert a.is_contiguous()
    assert b.transpose(-1, -2).is_contiguous()
    assert scale_a.is_contiguous()
    assert scale_b.is_contiguous()
    assert (scale_a.shape, scale_b.shape) == (a.shape[:1], (b.shape[0], b.shape[2]))
    assert offs.dtype == torch.int32
    left, right = a.float() * scale_a.unsqueeze(1), b.float() * scale_b.unsqueeze(1)
    groups = enumerate(pairwise([0, *offs.tolist()]))
    return torch.cat([left[start:end] @ right[group] for group, (start, end) in groups]).to(out_dtype)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's products are those of a GPU."""
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm_twin)
    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm_twin)


def operand(rows: int, width: int, tile: Tile, dtype: torch.dtype, seed: int) -> Quantized:
    x = rough(rows, width, seed=seed, spread=4.0)
    return quantize_tiles(x, tile, dtype, scale_dtype=E8M0 if tile == ROW_32 else torch.float32)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("pair", sorted(TILED, key=str), ids=str)
@pytest.mark.parametrize("shape", [(37, 200, 128), (128, 640, 256), (1, 96, 384), (16, 1664, 128), (150, 128, 128)])
def test_tiles_are_read_where_they_were_laid(pair: tuple[Tile, Tile], shape: tuple[int, int, int]) -> None:
    rows, width, columns = shape
    for dtype in (E4M3, E5M2):
        a, b = operand(rows, width, pair[0], dtype, 1), operand(columns, width, pair[1], E4M3, 2)
        for wide, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2.0**-7), (torch.float64, 1e-5)):
            found, wanted = tiled_product(a, b, wide), scaled_matmul_reference(a, b, wide)
            assert found.dtype == wide
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("sizes", [(30, 0, 34), (0, 64, 0), (16, 16, 32)])
def test_groups_are_those_of_one_after_the_other(sizes: tuple[int, ...]) -> None:
    a = rounded(rough(64, 96), "tensor")
    b = rounded(rough(3, 48, 96, seed=1), "tensor")
    wanted = scaled_grouped_matmul(a, b, sizes, torch.bfloat16)
    torch.testing.assert_close(grouped_product(a, b, sizes, torch.bfloat16), wanted, rtol=2.0**-7, atol=1e-3)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("pair", sorted(TILED, key=str), ids=str)
def test_a_trial_takes_what_is_right_and_nothing_else(pair: tuple[Tile, Tile], monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = example(141, Format(E5M2, pair[0]), CPU), example(256, Format(E4M3, pair[1]), CPU, seed=1)

    def trial() -> bool:
        return agrees(lambda a, b: tiled_product(a, b, torch.bfloat16), x, y)

    assert trial()
    straight = device_products.laid_out
    for side in pair:  # scales of one kind are read as if they lay otherwise
        monkeypatch.setattr(
            device_products,
            "laid_out",
            lambda given, side=side: straight(given) if given.tile != side else straight(given).t().roll(1, -1).t(),
        )
        assert not trial(), side
    monkeypatch.setattr(device_products, "laid_out", straight)

    def none(*given: Any, **options: Any) -> Tensor:
        raise NotImplementedError("only on Hopper")

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", none)
    assert not trial()


@pytest.mark.usefixtures("on_a_gpu")
def test_a_trial_of_groups_takes_what_is_right_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = example(141, Format(E4M3, None), CPU), example(96, Format(E4M3, None), CPU, seed=1)
    assert agrees(device_products._grouped_trial, x, y)
    ignored = quantize(rough(141, 640), torch.tensor(2.0), E4M3)
    monkeypatch.setattr(
        torch,
        "_scaled_grouped_mm",
        lambda *given, **options: scaled_grouped_mm_twin(ignored.data, *given[1:], **options),
    )
    assert not agrees(device_products._grouped_trial, x, y)


def test_a_cpu_has_none() -> None:
    for a, b in TILED:
        assert not has_tiled_product(CPU, Format(E4M3, a), Format(E4M3, b), torch.bfloat16)
    assert not has_grouped_product(CPU, Format(E4M3, None), Format(E4M3, None), torch.bfloat16)
