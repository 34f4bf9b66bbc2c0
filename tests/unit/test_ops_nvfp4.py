"""NVFP4: every number against a slow twin, bounds, rounding at random, and an expert layer's products."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from megavid.ops.fp8 import E4M3, dequantize
from megavid.ops.fp8_linear import Recipe, Role, fp8_grouped_linear
from megavid.ops.nvfp4 import NUMBERS, ROW, SQUARE, quantize_nvfp4, round_to_e2m1
from tests.unit.test_ops_fp8 import LoneScaling, rough


def nearest(value: float) -> float:
    """The number of e2m1 nearest to a magnitude; of two as near the one whose last bit is 0, every other one."""
    return min(NUMBERS, key=lambda number: (abs(number - value), NUMBERS.index(number) % 2))


def test_numbers_are_rounded_to_the_nearest_and_ties_to_even() -> None:
    between = [(a + b) / 2 for a, b in itertools.pairwise(NUMBERS)]
    magnitudes = [*NUMBERS, *between, *(step / 64 for step in range(64 * 8)), 100.0]
    x = torch.tensor([sign * magnitude for magnitude in magnitudes for sign in (1.0, -1.0)])
    wanted = [sign * nearest(magnitude) for magnitude in magnitudes for sign in (1.0, -1.0)]
    assert round_to_e2m1(x).tolist() == wanted
    assert round_to_e2m1(torch.tensor([torch.nan])).isnan().all()


def test_every_number_stays_what_it_is() -> None:
    x = torch.tensor([*NUMBERS, *(-number for number in NUMBERS)])
    for draws in (torch.zeros(16), torch.full((16,), 0.999)):
        assert torch.equal(round_to_e2m1(x, draws), x)


def test_a_tile_is_what_the_slow_twin_makes_of_it() -> None:
    """Scale of each tile: its largest magnitude over 6 in e4m3, of which the tensor's power of two is a part."""
    x = rough(5, 40)
    found = quantize_nvfp4(x, ROW)
    whole = 2.0 ** torch.log2(x.abs().max() / 6 / 448).ceil()
    for row in range(5):
        for start in range(0, 40, 16):
            part = x[row, start : start + 16]
            scale = float((part.abs().max() / 6 / whole).to(E4M3).float() * whole)
            assert found.scale[row, start // 16] == scale
            wanted = [0.0 if scale == 0 else nearest(abs(float(v)) / scale) * (1 if v >= 0 else -1) for v in part]
            torch.testing.assert_close(found.data[row, start : start + 16].float(), torch.tensor(wanted))


@pytest.mark.parametrize("tile", [ROW, SQUARE], ids=str)
@pytest.mark.parametrize("shape", [(33, 50), (2, 32, 48), (1, 1), (0, 16), (16, 0)], ids=str)
@pytest.mark.parametrize("is_random", [False, True])
def test_rounding_stays_within_the_bound_of_the_format(
    tile: tuple[int, int], shape: tuple[int, ...], is_random: bool
) -> None:
    x = rough(*shape, spread=1.0)
    found = quantize_nvfp4(x, tile, is_random=is_random)
    back = dequantize(found)
    assert back.shape == x.shape
    assert torch.equal(dequantize(found, torch.bfloat16).float(), back)  # exact in bf16
    assert set(found.data.float().abs().unique().tolist()) <= set(NUMBERS)
    scale = dequantize(found._replace(data=torch.ones_like(x).to(E4M3)))
    # Half a step of the grid, a whole one at random; and what e4m3 cuts of the largest number where it rounds down.
    step = torch.where(back.abs() < 2 * scale, 0.5, torch.where(back.abs() < 4 * scale, 1.0, 2.0)) * scale
    bound = (1.0 if is_random else 0.5) * step + 6 * scale * 2.0**-4
    assert ((back - x).abs() <= bound).all()


def test_a_square_is_the_same_along_both_sides() -> None:
    x = rough(64, 32)
    assert torch.equal(dequantize(quantize_nvfp4(x.t(), SQUARE)), dequantize(quantize_nvfp4(x, SQUARE)).t())


@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
def test_a_number_that_is_not_finite_is_not_lost(broken: float) -> None:
    x = rough(4, 32)
    x[1, 3] = broken
    assert dequantize(quantize_nvfp4(x, ROW)).isnan().any()


def test_rounding_at_random_is_right_on_average_and_follows_from_the_tensor() -> None:
    """The mean over 4,000 tensors that differ in one number of a tile of its own."""
    x = torch.tensor([[1.7, 0.2, -2.3, 5.1, 6.0, *([0.1] * 11), *([0.0] * 16)]])
    total = torch.zeros_like(x)
    for number in range(4000):
        x[0, 16] = 1.0 + number
        total += dequantize(quantize_nvfp4(x, ROW, is_random=True))
    error = (total / 4000 - x)[0, :16].abs()
    assert error.max() < 4 * 0.5 * 2 / 4000**0.5  # four standard deviations of a mean of steps of 2
    assert (dequantize(quantize_nvfp4(x, ROW)) - x)[0, :16].abs().max() > 0.3  # the nearest is far off for some
    first, again = (quantize_nvfp4(x, ROW, is_random=True).data.float() for _ in range(2))
    assert torch.equal(first, again)


def test_experts_compute_all_three_products_in_four_bits() -> None:
    """Against the same layer in fp32: as far off as rounding operands to a step of 2 in 6 makes it, and no further."""
    scaling = LoneScaling("nvfp4")
    sizes = [24, 0, 40]
    given: dict[Role, Tensor] = {"input": rough(64, 48, spread=0.5), "weight": rough(3, 32, 48, seed=1, spread=0.5)}
    towards = rough(64, 32, seed=2, spread=0.5)

    def products(layer: Any) -> list[Tensor]:
        x, weight = (given[role].clone().requires_grad_() for role in ("input", "weight"))
        out = layer(x, weight)
        out.backward(towards)
        assert x.grad is not None
        assert weight.grad is not None
        return [out.detach(), x.grad, weight.grad]

    def wide(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([part @ matrix.t() for part, matrix in zip(torch.split(x, sizes), weight)])

    found = products(lambda x, weight: fp8_grouped_linear(x, weight, sizes, scaling))
    for mine, exact in zip(found, products(wide), strict=True):
        error = float((mine - exact).norm() / exact.norm())
        assert 0.02 < error < 0.3
    assert (found[2][1] == 0).all()  # an expert without rows
    assert {role: kept.tile for role, (_, kept) in scaling.watched.items()} == {
        "input": ROW,
        "weight": SQUARE,
        "gradient": ROW,
    }


def test_the_recipe_knows_its_tiles() -> None:
    recipe = Recipe.of("nvfp4", "e4m3")
    assert recipe.has_tiles
    assert recipe.dtype("gradient") == E4M3
