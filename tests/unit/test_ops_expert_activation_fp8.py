"""The experts' activation in FP8: bit for bit the two steps that it stands for, and where experts take it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megavid.ops.compiled import why_not_compiled
from megavid.ops.expert_activation_fp8 import expert_activation_fp8_op, expert_activation_fp8_reference
from megavid.ops.fp8 import E4M3, E8M0, dequantize, quantize_tiles
from megavid.ops.fp8_linear import RecipeName
from megavid.ops.grouped_experts import ExpertScalings, ExpertWeights, grouped_experts
from megavid.ops.moe_ops import COMPILED_MOE
from tests.unit.test_ops_compiled import widened
from tests.unit.test_ops_fp8 import LoneScaling
from tests.unit.test_ops_moe import SIZES, make
from tests.unit.test_ops_quantize_fp8 import assert_same

OPS = ["gelu", "gelu, bias", "swiglu", "swiglu, biases"]
SHAPES = [*SIZES, (9, 2, 300)]

pytestmark = pytest.mark.skipif(bool(why_not_compiled()), reason=f"compiled ops: {why_not_compiled()}")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_activation_rounded(op: str, dtype: torch.dtype) -> None:
    for tokens, experts, width in SHAPES:
        reference, activation, given = make(op, tokens, experts, width, dtype)
        for tile, scale_dtype in ((128, torch.float32), (32, E8M0), (64, E8M0)):
            found = expert_activation_fp8_op(*given, tile, scale_dtype)
            wide = activation(*given)
            assert_same(found, quantize_tiles(wide, (1, tile), E4M3, scale_dtype=scale_dtype))
            data, scale = expert_activation_fp8_reference(*given, tile, scale_dtype)
            exact = reference(*widened(given))
            near, got = (dequantize(q, torch.float64) for q in (found._replace(data=data, scale=scale), found))
            assert (got - exact).norm() <= 2 * (near - exact).norm()


def test_rows_that_do_not_stand_together_are_read_as_they_are() -> None:
    _, _, (up, gate, up_bias, gate_bias, expert, probability) = make("swiglu, biases", 40, 4, 64, torch.float32)
    wide = torch.cat([up, gate], dim=1)
    parts = (wide[:, :64], wide[:, 64:], up_bias.t().contiguous().t(), gate_bias, expert)
    doubled = torch.stack([probability, -probability], dim=1)[:, 0]
    found = expert_activation_fp8_op(*parts, doubled, 32, E8M0)
    assert_same(found, expert_activation_fp8_op(up, gate, up_bias, gate_bias, expert, probability, 32, E8M0))


def test_what_is_not_finite_stays_so() -> None:
    _, _, given = make("gelu", 6, 1, 64, torch.float32)
    given[0][2, 40] = torch.nan
    data, scale, _ = expert_activation_fp8_op(*given, 32, E8M0)
    assert scale.float().isnan().nonzero().tolist() == [[2, 1]]
    assert data.float().isnan().sum() == 32


@pytest.mark.parametrize("op", ["gelu, bias", "swiglu"])
def test_it_is_registered_as_torch_wants_it(op: str) -> None:
    _, _, given = make(op, 9, 8, 40, torch.float32)
    torch.library.opcheck(torch.ops.megavid.expert_activation_fp8.default, (*given, 32, E8M0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.ones(9)}, ValueError, r"up must be \[S, M\], got \[9\]"),
        ({0: torch.ones(9, 40).half()}, TypeError, "up must be float32 or bfloat16"),
        ({4: torch.ones(9)}, TypeError, "expert must be"),
        ({4: torch.full((9,), 8)}, ValueError, r"expert must be in \[0, 8\), got 8"),
        ({5: torch.ones(8)}, ValueError, r"probability must be \[9\], got \[8\]"),
        ({6: 16}, ValueError, "tile must be 32, 64 or 128, got 16"),
        ({7: torch.bfloat16}, TypeError, "scale_dtype must be float32 or float8_e8m0fnu"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[int, Any], error: type[Exception], message: str) -> None:
    _, _, given = make("gelu, bias", 9, 8, 40, torch.float32)
    args = [change.get(number, value) for number, value in enumerate((*given, 32, E8M0))]
    with pytest.raises(error, match=f"expert_activation_fp8: {message}"):
        torch.ops.megavid.expert_activation_fp8(*args)


@pytest.mark.parametrize("name", ["tensorwise", "blockwise", "mxfp8", "nvfp4"])
def test_experts_take_it_where_tiles_are_eight_bits_and_nothing_is_learnt(name: RecipeName) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([30, 0, 34])
    x, probability = torch.randn(64, 128, generator=generator), torch.rand(64, generator=generator)
    matrices = [torch.randn(3, *shape, generator=generator) / 11 for shape in ((256, 128), (128, 256), (256, 128))]
    calls = []

    def counted(*given: Any, **options: Any) -> Any:
        calls.append(options["tile"])
        return expert_activation_fp8_op(*given, **options)

    def run(activate_fp8: Any, *, is_watching: bool = False) -> Tensor:
        scalings = [LoneScaling(name) for _ in range(3)]
        scalings[1].is_watching = is_watching
        return grouped_experts(
            x, sizes, ExpertWeights(*matrices), probability,
            activate=COMPILED_MOE.activate, activate_fp8=activate_fp8, scalings=ExpertScalings(*scalings),
        )  # fmt: skip

    wanted = run(None)
    assert torch.equal(run(counted), wanted)
    assert not calls  # gradients are on
    with torch.no_grad():
        assert torch.equal(run(counted, is_watching=True), wanted)
        assert not calls
        assert torch.equal(run(counted), wanted)
    assert calls == {"blockwise": [128], "mxfp8": [32]}.get(name, [])
