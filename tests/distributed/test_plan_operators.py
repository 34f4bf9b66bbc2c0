"""The planner's counts of memory-bound bytes and operators are those of the blocks as they are built."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from megavid.plan.parameters import count
from megavid.plan.time import operator_counts
from tests.support.ranks import RankPool

TOOL = Path(__file__).resolve().parents[2] / "tools" / "count_operators.py"
SIZES = {"width": 64, "hidden": 128}


def _tool() -> Any:
    spec = importlib.util.spec_from_file_location("count_operators", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def counted(sizes: dict[str, Any]) -> tuple[float, float]:
    """Job: bytes per token and operators of one layer, by the tool that wrote the table."""
    found: tuple[float, float] = _tool().per_layer(sizes)
    return found


def updated(dtype: str) -> tuple[float, float]:
    """Job: bytes per number and operators per layer of the update, by the tool that wrote the table."""
    tool = _tool()
    configs = [tool.config_of(layers=layers, tokens=48, dtype=dtype, **SIZES) for layers in (3, 5)]
    shallow, deep = (tool.count(config) for config in configs)
    numbers = [count(config.model).total for config in configs]
    return (deep[3] - shallow[3]) / (numbers[1] - numbers[0]), (deep[2] - shallow[2]) / 2


@pytest.mark.parametrize("top_k", [0, 2], ids=["dense", "moe"])
def test_table_counts_the_built_blocks(pool: RankPool, top_k: int) -> None:
    table = operator_counts()["bf16"]
    [(size, operators)] = pool.run(1, counted, {**SIZES, "dtype": "bf16", "top_k": top_k})
    if top_k:
        rows = top_k * (table["row_width"] * 64 + table["row_hidden"] * 128)
        assert size == pytest.approx(table["moe_width"] * 64 + rows, rel=0.05)
    else:
        assert size == pytest.approx(table["dense_width"] * 64 + table["dense_hidden"] * 128, rel=0.05)
    assert operators == pytest.approx(table["moe_operators" if top_k else "dense_operators"], rel=0.05)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_table_counts_the_update_as_it_runs(pool: RankPool, dtype: str) -> None:
    table = operator_counts()[dtype]
    [(size, operators)] = pool.run(1, updated, dtype)
    assert size == pytest.approx(table["optimizer_bytes"], rel=0.05)
    assert operators == pytest.approx(table["layer_step_operators"], rel=0.05)
