"""Eight-bit floats: rounding, scales and products, against fp32 within the format's bound; a layer's three products."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from megavid.ops.fp8 import (
    ABSOLUTE_ERROR,
    E4M3,
    E5M2,
    E8M0,
    LARGEST,
    LARGEST_BYTE,
    RELATIVE_ERROR,
    Quantized,
    amax_of,
    dequantize,
    quantize,
    quantize_tiles,
    scale_of,
    scaled_matmul_reference,
)
from megavid.ops.fp8_linear import ROLES, Recipe, RecipeName, Role, fp8_grouped_linear, fp8_linear
from megavid.ops.grouped_experts import ExpertScalings, ExpertWeights, grouped_experts
from megavid.ops.scaled_matmul import scaled_matmul

RECIPES: tuple[RecipeName, ...] = ("tensorwise", "delayed", "blockwise", "mxfp8")
TILES = {"tensor": None, "1x128": (1, 128), "128x128": (128, 128), "1x32": (1, 32)}


class LoneScaling:
    """Scales of one layer on one rank: what ``megavid.models.fp8.Fp8Scaling`` is without ranks and history."""

    def __init__(self, name: RecipeName, gradients: Literal["auto", "e4m3", "e5m2"] = "auto") -> None:
        self.recipe = Recipe.of(name, gradients)
        self.is_watching = False
        self.watched: dict[Role, tuple[Tensor, Quantized]] = {}

    def scales(self, tensors: dict[Role, Tensor], *, is_training: bool) -> dict[Role, Tensor | None]:
        if self.recipe.has_tiles:
            return dict.fromkeys(tensors)
        return {role: scale_of(amax_of(x), self.recipe.dtype(role)) for role, x in tensors.items()}

    def watch(self, role: Role, x: Tensor, rounded: Quantized) -> None:
        self.watched[role] = (x.detach(), rounded)


def rough(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    """Numbers of many magnitudes, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator) * torch.exp(spread * torch.randn(*shape, generator=generator))
    return drawn * (torch.rand(*shape, generator=generator) > 0.05)


def rounded(x: Tensor, kind: str, dtype: torch.dtype = E4M3) -> Quantized:
    tile = TILES[kind]
    if tile is None:
        return quantize(x, scale_of(amax_of(x), dtype), dtype)
    return quantize_tiles(x, tile, dtype, scale_dtype=E8M0 if kind == "1x32" else torch.float32)


def error_bound(x: Tensor, q: Quantized) -> Tensor:
    """The most that each number of ``x`` may be from what it was rounded to."""
    ones = Quantized(torch.ones_like(q.data.float()).to(q.data.dtype), q.scale, q.tile)
    scale = dequantize(ones, torch.float64)
    return torch.maximum(x.double().abs() * RELATIVE_ERROR[q.data.dtype], scale * ABSOLUTE_ERROR[q.data.dtype])


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("kind", TILES)
@pytest.mark.parametrize("shape", [(130, 200), (3, 128, 128), (1, 1), (0, 64), (64, 0)], ids=str)
def test_rounding_stays_within_the_bound_of_the_format(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for wide in (torch.float32, torch.bfloat16):
        x = rough(*shape).to(wide)
        q = rounded(x, kind, dtype)
        assert q.data.shape == x.shape
        assert q.data.dtype == dtype
        assert ((dequantize(q).double() - x.double()).abs() <= error_bound(x, q)).all()
        # bf16 holds every rounded number: turning back is exact.
        assert torch.equal(dequantize(q, torch.bfloat16).float(), dequantize(q))


def test_scales_are_powers_of_two_just_above_what_is_needed() -> None:
    amax = torch.tensor([1e-30, 0.3, 447.0, 448.1, 1e30])
    for dtype, largest in LARGEST.items():
        scale = scale_of(amax, dtype)
        assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
        assert (amax / scale <= largest).all()
        assert (amax / scale >= largest / 2).all()
    assert torch.equal(scale_of(torch.tensor([0.0]), E4M3), torch.ones(1))
    assert scale_of(torch.tensor([torch.inf, torch.nan]), E4M3).isnan().all()


def test_the_byte_of_the_largest_number_is_its_own() -> None:
    for dtype, largest in LARGEST.items():
        assert torch.tensor([LARGEST_BYTE[dtype]], dtype=torch.uint8).view(dtype).float().item() == largest


def test_another_scale_rounds_normal_numbers_to_the_same_values() -> None:
    """What law 1 rests on: ranks or microbatches with other scales differ in tiny numbers only."""
    x = rough(200, 100, spread=1.0)
    here, there = (dequantize(quantize(x, torch.tensor(scale), E4M3)) for scale in (2.0**0, 2.0**4))
    assert x.abs().max() < LARGEST[E4M3]
    is_normal = x.abs() >= 2.0**4 * 2.0**-6
    assert is_normal.float().mean() > 0.5
    assert torch.equal(here[is_normal], there[is_normal])
    assert not torch.equal(here, there)


@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
@pytest.mark.parametrize("kind", TILES)
def test_a_number_that_is_not_finite_is_not_lost(kind: str, broken: float) -> None:
    x = rough(4, 256)
    x[1, 7] = broken
    out = scaled_matmul(rounded(x, kind), rounded(rough(8, 256, seed=1), "tensor"), torch.float32)
    assert out[1].isnan().all()


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("a_kind", "b_kind"), [("tensor", "tensor"), ("1x128", "128x128"), ("1x128", "1x128"), ("1x32", "1x32")]
)
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_products_stay_within_the_bound_against_fp32(
    a_kind: str, b_kind: str, dtype: torch.dtype, wide: torch.dtype
) -> None:
    for rows, width, columns in ((37, 300, 70), (128, 128, 256), (1, 16, 16)):
        a, b = rough(rows, width), rough(columns, width, seed=1)
        qa, qb = rounded(a, a_kind, dtype), rounded(b, b_kind)
        out = scaled_matmul(qa, qb, wide)
        assert out.dtype == wide
        a_error, b_error = error_bound(a, qa), error_bound(b, qb)
        a, b = a.double().abs(), b.double().abs()
        bound = a_error @ b.t() + a @ b_error.t() + a_error @ b_error.t()
        exact = rough(rows, width).double() @ rough(columns, width, seed=1).double().t()
        slack = (a @ b.t()) * (2.0**-8 if wide == torch.bfloat16 else 1e-6)  # of the sum itself
        assert ((out.double() - exact).abs() <= bound + slack).all()


@pytest.mark.parametrize(("rows", "width", "columns"), [(37, 300, 70), (5, 24, 10), (1, 1, 1)])
def test_the_product_of_the_device_is_that_of_the_reference(rows: int, width: int, columns: int) -> None:
    a, b = rounded(rough(rows, width), "tensor", E5M2), rounded(rough(columns, width, seed=1), "tensor")
    torch.testing.assert_close(
        scaled_matmul(a, b, torch.float32), scaled_matmul_reference(a, b, torch.float32), rtol=1e-5, atol=1e-5
    )
    a, b = rounded(rough(width, rows), "tensor").t, rounded(rough(width, columns, seed=1), "tensor").t
    torch.testing.assert_close(
        scaled_matmul(a, b, torch.float32), scaled_matmul_reference(a, b, torch.float32), rtol=1e-5, atol=1e-5
    )


def test_products_refuse_what_no_device_can_multiply() -> None:
    a, b = rounded(rough(4, 32), "tensor", E5M2), rounded(rough(4, 32), "tensor", E5M2)
    with pytest.raises(ValueError, match="must not both be e5m2"):
        scaled_matmul(a, b, torch.float32)
    with pytest.raises(ValueError, match="one width, got 32 and 16"):
        scaled_matmul(a, rounded(rough(4, 16), "tensor"), torch.float32)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_one_scale_or_has_tiles(name: RecipeName) -> None:
    recipe, x, one = Recipe.of(name, "auto"), torch.ones(4, 64), torch.ones(())
    for role in ROLES:
        assert recipe.quantize(x, role, None if recipe.has_tiles else one).tile == recipe.tile(role)
        with pytest.raises(AssertionError):
            recipe.quantize(x, role, one if recipe.has_tiles else None)


@pytest.mark.parametrize("gradients", ["auto", "e4m3", "e5m2"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_layer_computes_all_three_products_in_eight_bits(
    name: RecipeName, gradients: Literal["auto", "e4m3", "e5m2"]
) -> None:
    """Forward, input gradient and matrix gradient are near those in fp32, and not equal to them."""
    x, weight, grad = rough(5, 40, 128, spread=0.3), rough(256, 128, seed=1, spread=0.3), rough(5, 40, 256, seed=2)
    outcomes = []
    scaling = LoneScaling(name, gradients)
    for is_fp8 in (True, False):
        x_, weight_ = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = fp8_linear(x_, weight_, scaling) if is_fp8 else x_ @ weight_.t()
        out.backward(grad)
        outcomes.append((out.detach(), x_.grad, weight_.grad))
    for narrow, wide in zip(*outcomes):
        assert narrow is not None
        assert wide is not None
        error = float((narrow - wide).norm() / wide.norm())
        assert 1e-3 < error < 0.08, error
    assert scaling.watched["input"][1].data.dtype == scaling.watched["weight"][1].data.dtype == E4M3
    assert scaling.watched["gradient"][1].data.dtype == Recipe.of(name, gradients).gradient_dtype


@pytest.mark.parametrize("name", RECIPES)
def test_a_layer_without_rounding_has_the_exact_gradients(name: RecipeName) -> None:
    """Numbers that e4m3 holds: every transposition and every tile of the three products must be the right one."""
    generator = torch.Generator().manual_seed(3)
    x, weight, grad = (
        torch.randint(-3, 4, shape, generator=generator).float() for shape in ((150, 160), (320, 160), (150, 320))
    )
    x.requires_grad_(), weight.requires_grad_()
    fp8_linear(x, weight, LoneScaling(name)).backward(grad)
    assert torch.equal(x.grad, grad @ weight.detach())
    assert torch.equal(weight.grad, grad.t() @ x.detach())
    assert torch.equal(fp8_linear(x, weight, LoneScaling(name)).detach(), x.detach() @ weight.detach().t())


@pytest.mark.parametrize("name", RECIPES)
def test_experts_are_layers_of_their_own_rows(name: RecipeName) -> None:
    sizes = [40, 0, 24, 1]
    x, weight, grad = rough(65, 128), rough(4, 256, 128, seed=1), rough(65, 256, seed=2)
    # The same largest number in every expert, so that all have the scale of the whole.
    x[[0, 40, 64], 0], weight[:, 0, 0], grad[[0, 40, 64], 0] = 1e6, 1e6, 1e6
    x.requires_grad_(), weight.requires_grad_()
    out = fp8_grouped_linear(x, weight, sizes, LoneScaling(name))
    out.backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    start = 0
    for expert, size in enumerate(sizes):
        rows = slice(start, start + size)
        x_, weight_ = x.detach()[rows].requires_grad_(), weight.detach()[expert].requires_grad_()
        expected = fp8_linear(x_, weight_, LoneScaling(name))
        expected.backward(grad[rows])
        assert x_.grad is not None
        assert weight_.grad is not None
        torch.testing.assert_close(out[rows], expected)
        torch.testing.assert_close(x.grad[rows], x_.grad)
        torch.testing.assert_close(weight.grad[expert], weight_.grad)
        start += size


@pytest.mark.parametrize("name", RECIPES)
def test_grouped_experts_take_scales(name: RecipeName) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([30, 0, 34])
    x, probability = torch.randn(64, 128, generator=generator), torch.rand(64, generator=generator)
    matrices = (torch.randn(3, *shape, generator=generator) / 11 for shape in ((256, 128), (128, 256), (256, 128)))
    weights = ExpertWeights(*matrices)
    scalings = ExpertScalings(*(LoneScaling(name) for _ in range(3)))
    wide = grouped_experts(x, sizes, weights, probability)
    narrow = grouped_experts(x, sizes, weights, probability, scalings=scalings)
    assert 1e-3 < float((wide - narrow).norm() / wide.norm()) < 0.1
