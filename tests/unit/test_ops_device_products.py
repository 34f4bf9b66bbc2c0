"""Products that GPUs have and a CPU has not: what torch is handed, against twins that read scales where cuBLASLt does.

The twins check shapes and strides as torch does, and read each number's scale from the address that cuBLAS' pages give.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from megavid.ops import device_products, scaled_matmul
from megavid.ops.device_products import (
    FIRST_TILED,
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
    is_grouped_product_right,
    tiled_product,
)
from megavid.ops.fp8 import E4M3, E5M2, E8M0, Quantized, quantize_tiles, scaled_matmul_reference
from megavid.ops.scaled_matmul import scaled_grouped_matmul
from tests.unit.test_ops_fp8 import rough, rounded

if TorchVersion(torch.__version__) < FIRST_TILED:
    pytest.skip(f"torch {FIRST_TILED} has the products that these tests stand in for", allow_module_level=True)
ScalingType, SwizzleType = torch.nn.functional.ScalingType, torch.nn.functional.SwizzleType
CPU = torch.device("cpu")
SMALL = ((30, 0, 34), 48, 128)


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
    if not a.dtype == b.dtype == E4M3:
        raise ValueError("Invalid scaling configuration")  # what torch says
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


def operand(rows: int, width: int, tile: Tile, seed: int) -> Quantized:
    x = rough(rows, width, seed=seed, spread=4.0)
    return quantize_tiles(x, tile, E4M3, scale_dtype=E8M0 if tile == ROW_32 else torch.float32)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("pair", sorted(TILED, key=str), ids=str)
@pytest.mark.parametrize("shape", [(37, 200, 128), (128, 640, 256), (1, 96, 384), (16, 1664, 128), (150, 128, 128)])
def test_tiles_are_read_where_they_were_laid(pair: tuple[Tile, Tile], shape: tuple[int, int, int]) -> None:
    rows, width, columns = shape
    a, b = operand(rows, width, pair[0], 1), operand(columns, width, pair[1], 2)
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


def test_groups_of_odd_widths_are_multiplied_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled_matmul, "has_grouped_product", lambda *given: True)
    a, b = rounded(rough(64, 96), "tensor"), rounded(rough(3, 40, 96, seed=1), "tensor")
    assert scaled_grouped_matmul(a, b, (30, 0, 34), torch.bfloat16).shape == (64, 40)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("pair", sorted(TILED, key=str), ids=str)
def test_a_trial_takes_what_is_right_and_nothing_else(
    pair: tuple[Tile, Tile], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x, y = example(141, 640, Format(E4M3, pair[0]), CPU), example(256, 640, Format(E4M3, pair[1]), CPU, seed=1)

    def trial() -> bool:
        return agrees(lambda: tiled_product(x, y, torch.bfloat16), [(x, y)])

    assert trial()
    assert not caplog.messages
    straight = device_products.laid_out
    for side in pair:  # scales of one kind are read as if they lay otherwise
        monkeypatch.setattr(
            device_products,
            "laid_out",
            lambda given, side=side: straight(given) if given.tile != side else straight(given).t().roll(1, -1).t(),
        )
        assert not trial(), side
    monkeypatch.setattr(device_products, "laid_out", straight)

    def refuse(*given: Any, **options: Any) -> Tensor:
        raise NotImplementedError("only on\nHopper")

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", refuse)
    assert not trial()
    assert caplog.messages[-1] == "a product in FP8 is left out: only on Hopper"

    def overflow(*given: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", overflow)
    with pytest.raises(torch.OutOfMemoryError):  # another time there may be room: nothing is decided
        trial()


@pytest.mark.usefixtures("on_a_gpu")
def test_a_trial_of_groups_takes_what_is_right_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_grouped_product_right(*SMALL, CPU)

    def first_matrix_for_all(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        return scaled_grouped_mm_twin(
            a, b.transpose(-1, -2)[:1].expand(3, -1, -1).contiguous().transpose(-1, -2), **options
        )

    monkeypatch.setattr(torch, "_scaled_grouped_mm", first_matrix_for_all)
    assert not is_grouped_product_right(*SMALL, CPU)


@pytest.mark.parametrize(
    ("generation", "offered"), [((8, 9), ()), ((9, 0), (128,)), ((10, 0), (32,)), ((12, 0), (32,))]
)
def test_only_a_gpu_of_the_right_generation_is_tried(
    generation: tuple[int, int], offered: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that was built for another one traps, and takes the process with it."""
    tried: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: generation)
    monkeypatch.setattr(device_products, "example", lambda rows, width, form, device, seed=0: form)
    monkeypatch.setattr(device_products, "agrees", lambda product, pairs: tried.extend(pairs) or True)
    monkeypatch.setattr(device_products, "is_grouped_product_right", lambda *given: tried.append("groups") or True)
    cuda = torch.device("cuda", 0)
    for a, b in TILED:
        has = has_tiled_product.__wrapped__(cuda, Format(E4M3, a), Format(E4M3, b), torch.bfloat16)
        assert has is (a[1] in offered)
        assert not has_tiled_product.__wrapped__(cuda, Format(E5M2, a), Format(E4M3, b), torch.bfloat16)
    form = Format(E4M3, None)
    assert has_grouped_product.__wrapped__(cuda, form, form, torch.bfloat16) is (generation[0] == 9)
    assert not has_grouped_product.__wrapped__(cuda, form, form, torch.float32)
    assert ("groups" in tried) is (generation[0] == 9)
    assert len(tried) == {8: 0, 9: 2 + 3, 10: 1, 12: 1}[generation[0]]


def test_a_cpu_has_none() -> None:
    for a, b in TILED:
        assert not has_tiled_product(CPU, Format(E4M3, a), Format(E4M3, b), torch.bfloat16)
    assert not has_grouped_product(CPU, Format(E4M3, None), Format(E4M3, None), torch.bfloat16)
