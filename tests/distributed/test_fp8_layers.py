"""tools/bench_fp8_layers.py on narrow blocks: products in FP8 are off by what their operands' rounding gives."""

from typing import Any

import pytest

from tests.support.ranks import RankPool
from tools.bench_fp8_layers import BLOCKS, PRODUCTS, RECIPES, config_of, layers_of


def narrow_layers(block: str, steps: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Job: the report of a block of width 128."""
    return layers_of(config_of(block, 192, width=128), steps)


@pytest.mark.parametrize("block", BLOCKS)
def test_products_are_off_by_the_rounding_of_their_operands(pool: RankPool, block: str) -> None:
    recipes = pool.run(1, narrow_layers, block, 3)[0]
    assert recipes.keys() == set(RECIPES)
    feed_forward = {"dense": "ffn", "experts": "moe.experts"}[block]
    names = ("self_attention.q", "self_attention.out", "cross_attention.q", "cross_attention.out")
    operands = {"output": ("input", "weight"), "input_gradient": ("gradient", "weight")}
    operands["matrix_gradient"] = ("gradient", "input")
    for recipe, layers in recipes.items():
        expected = {f"blocks.0.{name}" for name in (*names, f"{feed_forward}.up", f"{feed_forward}.down")}
        assert layers.keys() == expected
        for name, layer in layers.items():
            for product in PRODUCTS:
                # Errors of two operands are independent, so their squares add up. Where rows or columns are alike the
                # sum grows faster than its error: matrix gradients of few clips are such.
                size = sum(layer[role]["error"] ** 2 for role in operands[product]) ** 0.5
                low = 0.1 if product == "matrix_gradient" else 0.5
                assert low < layer["products"][product] / size < 2, (recipe, name, product, layer)
            assert layer["gradient"]["error"] > 0.05 or recipe not in ("tensorwise", "delayed"), "e5m2"
            assert layer["input"]["error"] < 0.05 or recipe == "delayed"
            assert not any(layer[role]["overflow"] for role in ("input", "weight", "gradient")) or recipe == "delayed"
