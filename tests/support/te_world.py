"""Runs with linears of Transformer Engine against runs with megavid's own, for the GPU and for the stand-in on CPU.

As a script it runs every case on CPU ranks with the stand-in, which must be on the path of this process from its start,
and saves what they told.

    PYTHONPATH=tests/support/te_stand_in:. python -m tests.support.te_world FILE
"""

import sys
from dataclasses import dataclass, field, replace
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
from tests.support.tiny_world import drawn, initialize, take_step, tiny_config, train

WIDTH = 256
"""Of the layer that is compared in every number format: whole tiles of every recipe."""


@dataclass(frozen=True)
class Case:
    """A short run: family, ranks, layout and the table ``precision``."""

    family: str = "wan"
    world: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    width: int = 64

    def config(self, linears: str) -> RunConfig:
        """The run, with linears of either kind; the inner two of its four blocks are in FP8 where there is any."""
        experts = {"expert_ffn_size": self.width, "shared_ffn_size": self.width, "activation": "swiglu"}
        config = tiny_config(self.family, moe=experts, lora=self.lora, pack_tokens=128, **self.options)
        model = replace(config.model, hidden_size=self.width, ffn_size=2 * self.width)
        return replace(config, model=model, precision=PrecisionConfig(linears=linears, **self.precision))  # type: ignore[arg-type]


CASES = {
    "dense tp2": Case(world=2, options={"tensor": 2}),
    "dense tp2 cp2 without sp": Case(world=4, options={"tensor": 2, "context": 2, "sequence": False}),
    "dense pp2 vpp2 full": Case(world=2, options={"pipeline": 2, "virtual_pipeline": 2, "recompute": "full"}),
    "experts tp2 ep2 selective": Case("wan_moe", 2, {"tensor": 2, "expert": 2, "recompute": "selective"}),
    "adapters tp2": Case(world=2, options={"tensor": 2}, lora={"rank": 4}),
    "tensorwise": Case(precision={"fp8": "tensorwise"}),
    "experts tensorwise e4m3": Case("wan_moe", precision={"fp8": "tensorwise", "fp8_gradients": "e4m3"}),
    "blockwise": Case(precision={"fp8": "blockwise"}, width=128),
}


FORMATS = {"bf16": "off", "bf16, tensorwise": "tensorwise", "bf16, blockwise": "blockwise", "bf16, mxfp8": "mxfp8"}
"""Number formats in which the layers of one block are compared, and ``precision.fp8`` of each."""


def passes(linears: str, dtype: str, fp8: str, device: str) -> dict[str, Tensor]:
    """Job of one rank: the feed-forward of the second block, forward and backward, with the same weights and input."""
    config = Case(precision={"dtype": dtype, "fp8": fp8}, width=WIDTH).config(linears)
    with Mesh.open(layout_of(config, 1), device) as mesh:
        engine = build_engine(config, mesh, with_optimizer=False)
        initialize(engine)
        layer = engine.chunks[0].blocks[1].feed_forward
        x, gradient = (drawn(seed, 128, 1, WIDTH).to(device, engine.chunks[0].config.params_dtype) for seed in (1, 2))
        out = layer(x.requires_grad_())
        out.backward(gradient)
        assert x.grad is not None
        told = {"output": out.detach(), "gradient of the input": x.grad}
        told |= {placement_of(p).pieces[0].name: p.grad for p in layer.parameters()}
    return {name: tensor.float().cpu() for name, tensor in told.items()}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """How far each tensor is from the truth, norm of the gap relative to the norm."""
    assert found.keys() == truth.keys()
    return {name: float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth}


def assert_as_near(ours: dict[str, float], theirs: dict[str, float], fp8: str) -> None:
    """Errors of Transformer Engine's linears are at most twice those of megavid's, and are there in FP8."""
    for name, error in theirs.items():
        assert error <= 2 * ours[name], f"{name}: {error:.1e} with Transformer Engine, {ours[name]:.1e} without"
        assert fp8 == "off" or name.endswith("down.bias") or error > 0.01, f"{name}: {error:.1e} is not that of FP8"


def regions_of_step(config: RunConfig) -> dict[str, set[str]]:
    """Job of one rank: the recipes of the regions that each linear of the stand-in was called in, in one step."""
    with Mesh.open(layout_of(config, 1)) as mesh:
        engine = build_engine(config, mesh)
        initialize(engine)
        take_step(engine, 0)
        (chunk,) = engine.chunks
        return {
            name.removesuffix(".linear"): {_told(recipe) for recipe in module.recipes}
            for name, module in chunk.named_modules()
            if type(module).__name__ in ("TEColumnParallelLinear", "TERowParallelLinear")
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
                (found[name, "regions"],) = pool.run(1, regions_of_step, case.config("transformer_engine"))
        (found["passes"],) = pool.run(1, passes, "native", "fp32", "off", "cpu")
        for name in ("bf16", "bf16, tensorwise"):
            for linears in ("native", "transformer_engine"):
                (found[f"passes {name}", linears],) = pool.run(1, passes, linears, "bf16", FORMATS[name], "cpu")
    finally:
        pool.close()
    torch.save(found, file)


if __name__ == "__main__":
    main(sys.argv[1])
