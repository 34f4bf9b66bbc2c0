"""Runs with linears of Transformer Engine against runs with megavid's own, for the GPU and for the stand-in on CPU.

As a script it runs every case on CPU ranks with the stand-in, which must be on the path of this process from its start,
and saves what they told.

    PYTHONPATH=tests/support/te_stand_in:. python -m tests.support.te_world FILE
"""

import math
import sys
from dataclasses import dataclass, field, replace
from itertools import product
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from megavid.config.schema import PrecisionConfig, RunConfig
from megavid.models.runner import build_engine
from megavid.parallel import te
from megavid.parallel.mesh import Mesh
from megavid.parallel.placement import placement_of
from megavid.plan.layout import layout_of
from tests.support.ranks import RankPool
from tests.support.tiny_world import (
    drawn,
    initialize,
    load_and_train,
    take_step,
    tiny_config,
    train,
    train_and_save,
)

WIDTH = 256
"""Of the layers that are compared in every number format: whole tiles of every recipe."""
ROWS = (37, 0, 83, 8)
"""Rows of the experts that are compared: no multiples, and an expert without any."""


@dataclass(frozen=True)
class Case:
    """A short run: family, ranks, layout and the table ``precision``."""

    family: str = "wan"
    world: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    activation: str = "swiglu"
    width: int = 64

    def config(self, linears: str) -> RunConfig:
        """The run, with linears of either kind; the inner two of its four blocks are in FP8 where there is any."""
        experts = {"expert_ffn_size": self.width, "shared_ffn_size": self.width, "activation": self.activation}
        config = tiny_config(self.family, moe=experts, lora=self.lora, pack_tokens=128, **self.options)
        model = replace(config.model, hidden_size=self.width, ffn_size=2 * self.width)
        precision = PrecisionConfig(linears=linears, **self.precision)  # type: ignore[arg-type]
        return replace(config, model=model, precision=precision, train=replace(config.train, global_batch_size=2))


CASES = {
    "dense tp2 cp2 without sp": Case(world=4, options={"tensor": 2, "context": 2, "sequence": False}),
    "dense pp2 vpp2 full": Case(world=2, options={"pipeline": 2, "virtual_pipeline": 2, "recompute": "full"}),
    "experts": Case("wan_moe", activation="gelu"),
    "experts tp2 ep2 selective": Case("wan_moe", 2, {"tensor": 2, "expert": 2, "recompute": "selective"}),
    "experts tp2 ep2 etp2": Case("wan_moe", 4, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
    "adapters beside experts tp2": Case("wan_moe", 2, {"tensor": 2}, lora={"rank": 4}),
    "tensorwise": Case(precision={"fp8": "tensorwise"}),
    "tensorwise, attention": Case(precision={"fp8": "tensorwise", "fp8_attention": True}),
    "experts tensorwise e4m3": Case(
        "wan_moe", 2, {"tensor": 2, "expert": 2}, {"fp8": "tensorwise", "fp8_gradients": "e4m3"}
    ),
    "experts blockwise": Case("wan_moe", precision={"fp8": "blockwise"}, width=128),
    "experts in four bits": Case("wan_moe", precision={"fp8": "tensorwise", "fp8_experts": "nvfp4"}),
}


FORMATS = {"bf16": "off", "bf16, tensorwise": "tensorwise", "bf16, blockwise": "blockwise", "bf16, mxfp8": "mxfp8"}
"""Number formats in which the layers of one block are compared, and ``precision.fp8`` of each."""


def passes(linears: str, dtype: str, fp8: str, device: str, family: str = "wan") -> dict[str, Tensor]:
    """Job of one rank: the feed-forward of the second block, forward and backward, with the same weights and input.

    Of ``wan_moe`` the routed experts alone, ``ROWS`` each.
    """
    config = Case(family, precision={"dtype": dtype, "fp8": fp8}, width=WIDTH).config(linears)
    with Mesh.open(layout_of(config, 1), device) as mesh:
        engine = build_engine(config, mesh, with_optimizer=False)
        initialize(engine)
        layer = engine.chunks[0].blocks[1].feed_forward
        x, gradient = (drawn(seed, 128, 1, WIDTH).to(device, engine.chunks[0].config.params_dtype) for seed in (1, 2))
        probability = drawn(3, 128).sigmoid().to(device).requires_grad_()
        if family == "wan_moe":
            layer = layer.experts
            if linears == "transformer_engine":
                _check_without_rows(layer, x)
            out, _ = layer(x.requires_grad_().squeeze(1), torch.tensor(ROWS), probability)
        else:
            out = layer(x.requires_grad_())
        out.backward(gradient.view_as(out))
        assert x.grad is not None
        told = {"output": out.detach(), "gradient of the input": x.grad}
        if probability.grad is not None:
            told["gradient of the gate"] = probability.grad
        for parameter in layer.parameters():
            for piece in placement_of(parameter).pieces:
                flat = parameter.grad.reshape(-1)[piece.start :]
                told[piece.name] = flat[: math.prod(piece.shape)]
    return {name: tensor.float().cpu() for name, tensor in told.items()}


def _check_without_rows(experts: Any, x: Tensor) -> None:
    """A rank whose experts got nothing gives nothing, and every matrix a gradient of zeros."""
    out, _ = experts(x[:0, 0], torch.zeros(len(ROWS), dtype=torch.int64), x.new_zeros(0, dtype=torch.float32))
    assert out.shape == (0, WIDTH)
    out.sum().backward()
    assert not any(parameter.grad.any() for parameter in experts.parameters())


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """How far each tensor is from the truth, norm of the gap relative to the norm; zeros must be zeros."""
    assert found.keys() == truth.keys()
    zeros = {name for name, tensor in truth.items() if not tensor.any()}
    assert not any(found[name].any() for name in zeros)
    return {name: float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth.keys() - zeros}


def assert_as_near(ours: dict[str, float], theirs: dict[str, float], fp8: str) -> None:
    """Errors of Transformer Engine's linears are at most twice those of megavid's, and are there in FP8."""
    for name, error in theirs.items():
        assert error <= 2 * ours[name], f"{name}: {error:.1e} with Transformer Engine, {ours[name]:.1e} without"
        assert fp8 == "off" or name.endswith("down.bias") or error > 0.01, f"{name}: {error:.1e} is not that of FP8"


def regions_of_step(config: RunConfig, world: int) -> dict[str, set[str]]:
    """Job: the recipes of the regions that each linear of the stand-in was called in, in one step."""
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        initialize(engine)
        take_step(engine, 0)
        (chunk,) = engine.chunks
        return {
            name.removesuffix(".linear"): {_told(recipe) for recipe in module.recipes}
            for name, module in chunk.named_modules()
            if type(module).__name__.startswith(("TEColumnParallel", "TERowParallel"))
        }


def _told(recipe: Any) -> str:
    return "none" if recipe is None else f"{type(recipe).__name__} {recipe.fp8_format.name}"


def main(file: str) -> None:
    """Run all cases, and save what they told by name and by whose linears they had."""
    te.DEVICES = frozenset({"cpu"})  # the stand-in's
    pool, found = RankPool(), {}
    try:
        for name, case in CASES.items():
            for linears in ("native", "transformer_engine"):
                found[name, linears] = pool.run(case.world, train, case.config(linears), case.world, 2)
            if "fp8" in case.precision:
                told = pool.run(case.world, regions_of_step, case.config("transformer_engine"), case.world)
                found[name, "regions"] = told[0]
        for family in ("wan", "wan_moe"):
            (found[family, "passes"],) = pool.run(1, passes, "native", "fp32", "off", "cpu", family)
            for name, linears in product(("bf16", "bf16, tensorwise"), ("native", "transformer_engine")):
                told = pool.run(1, passes, linears, "bf16", FORMATS[name], "cpu", family)
                found[family, name, linears] = told[0]
        with TemporaryDirectory() as folder:
            for key, name, job, linears in (
                ("saved", "experts tp2 ep2 selective", train_and_save, "transformer_engine"),
                ("loaded", "experts tp2 ep2 etp2", load_and_train, "native"),
            ):
                world = CASES[name].world
                found[key] = pool.run(world, job, CASES[name].config(linears), world, folder, 1, 1)
    finally:
        pool.close()
    torch.save(found, file)


if __name__ == "__main__":
    main(sys.argv[1])
