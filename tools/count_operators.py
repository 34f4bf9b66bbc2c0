"""Count the memory-bound bytes and the operators of our blocks: ``python tools/count_operators.py --write``.

Runs forward and backward of tiny models on this process, looks at every operator that torch dispatches, and solves for
bytes per token and width. ``megavid/plan/operators.toml`` holds the result; the planner reads it without torch.
"""

import argparse
import itertools
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megavid.config.schema import DataConfig, ModelConfig, MoEConfig, PrecisionConfig, RunConfig, TrainConfig
from megavid.diffusion.objective import FlowObjective
from megavid.models.runner import build_engine
from megavid.ops import weight_gradient
from megavid.ops.packs import Clip, LatentBatch, Pack
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layout_of
from megavid.plan.parameters import count as parameters_of
from megavid.training.model_step import train_step

TARGET = Path(__file__).resolve().parents[1] / "megavid" / "plan" / "operators.toml"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "grouped_mm", "linear", "matmul", "convolution")
ATTENTION = ("scaled_dot_product", "attention")


class OperatorCounter(TorchDispatchMode):
    """Adds up operators that launch work, and the bytes of those that are neither products nor attention."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.bytes = 0, 0
        self.by_name: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        if _is_view(func) or func._schema.name.startswith("c10d"):
            return out
        self.operators += 1
        if name in PRODUCTS or any(word in name for word in ATTENTION) or name.startswith("empty"):
            return out
        moved = sum(_bytes(tensor) for tensor in _tensors((*args, *kwargs.values(), out)))
        if out is None:  # what a fused operator writes in place is no output
            moved += sum(_bytes(tensor) for tensor in _tensors(_written(func, args)))
        self.bytes += moved
        self.by_name[name] = self.by_name.get(name, 0) + moved
        return out


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _written(func: Any, args: Sequence[Any]) -> Iterable[Any]:
    arguments = zip(func._schema.arguments, args, strict=False)
    return [value for argument, value in arguments if argument.alias_info is not None and argument.alias_info.is_write]


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _bytes(tensor: Tensor) -> int:
    """Bytes that are there: broadcast dims count once."""
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        numel *= size if stride else 1
    return numel * tensor.element_size()


def config_of(*, layers: int, width: int, hidden: int, tokens: int, dtype: str, top_k: int = 0) -> RunConfig:
    """A model of ``layers`` blocks, all dense or (``top_k`` > 0) with experts in all but the first and the last."""
    experts = MoEConfig(num_experts=8, top_k=max(top_k, 1), expert_ffn_size=hidden, dense_first=1, dense_last=1)
    return RunConfig(
        model=ModelConfig(
            family="wan_moe" if top_k else "wan", num_layers=layers, hidden_size=width, num_heads=width // 32,
            ffn_size=64 if top_k else hidden, in_channels=4, out_channels=4, text_size=16, text_length=8,
            frequency_size=16, moe=experts,
        ),
        train=TrainConfig(global_batch_size=1, ops="reference"),  # what the plan counts
        precision=PrecisionConfig(dtype=dtype),  # type: ignore[arg-type]
        data=DataConfig(pack_tokens=tokens),
    )  # fmt: skip


def microbatch_of(config: RunConfig) -> LatentBatch:
    """One pack, filled by one clip."""
    tokens, model = config.data.pack_tokens, config.model
    clip = Clip(draw=0, sample=0, start=0, grid=(tokens // 16, 4, 4), frame_rate=4.0)
    clean = torch.randn(1, tokens, model.in_channels * model.patch_volume, generator=torch.Generator().manual_seed(1))
    return LatentBatch((Pack((clip,), tokens),), clean, torch.randn(1, model.text_length, model.text_size))


def count(config: RunConfig) -> tuple[float, float, float, float]:
    """Bytes and operators of one microbatch, operators and bytes of the rest of the step."""
    with Mesh.open(layout_of(config, 1)) as mesh:
        engine = build_engine(config, mesh)
        engine.initialize(1)
        engine.load_finished()
        if config.precision.dtype == "bf16":
            _update_as_on_gpus(engine)
        objective = FlowObjective(config.diffusion, 1)
        inner, forward_backward = OperatorCounter(), engine.forward_backward

        def counted(*args: Any, **kwargs: Any) -> Any:
            with inner:
                return forward_backward(*args, **kwargs)

        engine.forward_backward = counted  # type: ignore[method-assign]
        # In bf16 a CPU adds a matrix' gradient after the product, GPUs within it.
        with patch.object(weight_gradient, "_add_narrow_"), OperatorCounter() as outer:
            train_step(engine, [microbatch_of(config)], objective, learning_rate=1e-3)
    rest = outer.operators - inner.operators
    return float(inner.bytes), float(inner.operators), float(rest), float(outer.bytes - inner.bytes)


def _update_as_on_gpus(engine: Any) -> None:
    """Undo what CPU ranks alone do: bf16 is the GPUs' table, fp32 the CPUs'."""
    for part in engine.updates._chained.chained_optimizers:
        for group in part.optimizer.param_groups:
            group["fused"] = False


def per_layer(sizes: dict[str, Any]) -> tuple[float, float]:
    """Bytes per token of one layer, and its operators: differences of depths and of lengths."""
    found = {
        (layers, tokens): count(config_of(layers=layers, tokens=tokens, **sizes))
        for layers, tokens in itertools.product((3, 5), (384, 768))
    }
    long, short = found[5, 768][0] - found[3, 768][0], found[5, 384][0] - found[3, 384][0]
    return (long - short) / 2 / 384, (found[5, 768][1] - found[3, 768][1]) / 2


def coefficients(dtype: str) -> dict[str, float]:
    """What the planner multiplies with a layer's sizes."""
    dense = {"width": 64, "hidden": 128, "dtype": dtype}
    base, operators = per_layer(dense)
    width = (per_layer({**dense, "width": 128})[0] - base) / 64
    hidden = (per_layer({**dense, "hidden": 256})[0] - base) / 128
    moe = {**dense, "top_k": 2}
    base_moe, operators_moe = per_layer(moe)
    with_k = per_layer({**moe, "top_k": 4})[0] - base_moe
    row_hidden = (per_layer({**moe, "hidden": 256})[0] - base_moe) / 128 / 2
    row_width = (with_k / 2 - 128 * row_hidden) / 64
    moe_width = (per_layer({**moe, "width": 128})[0] - base_moe) / 64 - 2 * row_width
    short = [config_of(layers=layers, tokens=384, **dense) for layers in (3, 5)]
    shallow, deep = (count(config) for config in short)
    parameters = [parameters_of(config.model).total for config in short]
    update = (deep[3] - shallow[3]) / (parameters[1] - parameters[0])
    return {
        "dense_width": width, "dense_hidden": hidden, "moe_width": moe_width, "row_width": row_width,
        "row_hidden": row_hidden, "dense_operators": operators, "moe_operators": operators_moe,
        "microbatch_operators": shallow[1] - 3 * operators, "layer_step_operators": (deep[2] - shallow[2]) / 2,
        "optimizer_bytes": update, "step_operators": shallow[2] - 3 * (deep[2] - shallow[2]) / 2,
    }  # fmt: skip


def main() -> None:
    """Count, print, and write the table if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace {TARGET.name}")
    write = parser.parse_args().write
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        tables = {dtype: coefficients(dtype) for dtype in ("bf16", "fp32")}
        dist.destroy_process_group()
    lines = [
        "# Memory-bound bytes and operators of our blocks, forward and backward, without recomputation; written by",
        "# `python tools/count_operators.py --write`. *_width and *_hidden: bytes per token (row_*: per token and",
        "# expert) and unit of width. *_operators: per layer, microbatch, step, or layer and step. optimizer_bytes:",
        "# per number that a rank updates, moving average included.",
    ]
    for dtype, table in tables.items():
        lines += ["", f"[{dtype}]", *(f"{name} = {value:.6g}" for name, value in table.items())]
    text = "\n".join(lines) + "\n"
    print(text)
    if write:
        TARGET.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
