"""How far every product in FP8 of a block of flagship width is from the same product in fp32: a table.

    python tools/bench_fp8_layers.py --out runs/fp8_layers                    # what is missing, then the table
    python tools/bench_fp8_layers.py --out runs/fp8_layers --only dense       # one of the two blocks

One block of width 5120 alone between its embedders and its head, built and trained by the engine on procedural clips:
``dense`` has wan_14b's feed-forward of 13,824, ``experts`` the experts of wan_moe_100b_a20b (3,456 wide), four instead
of 64 and two for each token instead of eight. A few AdamW steps in the recipe ``delayed``, the one with a past; in
the last of them the operands of each layer's three products are rounded by every recipe, and multiplied in it and in
fp32. The head of a fresh model is zero, so its first step moves the head only, and the block from the second step on.
What is not in FP8 is fp32. The embedders of captions and timesteps are not trained, so that all fits in 10 GiB.

Many minutes for each block on two cores; OMP_NUM_THREADS sets the threads.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavid.config.load import load_run
from megavid.config.schema import RunConfig
from megavid.data.build import build_source, build_text_encoder
from megavid.data.loader import Loader
from megavid.diffusion.objective import FlowObjective
from megavid.models.fp8 import FIGURES, Fp8Scaling, scalings_of
from megavid.models.moe.experts import GroupedExperts
from megavid.models.video_dit import build_chunks
from megavid.ops.fp8 import Quantized
from megavid.ops.fp8_linear import ROLES, Recipe, RecipeName, Role, fp8_grouped_linear
from megavid.parallel.engine import Engine
from megavid.parallel.mesh import Mesh
from megavid.parallel.placement import placement_of
from megavid.plan.layout import layout_of
from megavid.training.fp8_figures import rounding_of
from megavid.training.model_step import train_step

CPU = torch.device("cpu")
RECIPES: tuple[RecipeName, ...] = ("tensorwise", "delayed", "blockwise", "mxfp8")
BLOCKS = ("dense", "experts")
PRODUCTS = ("output", "input_gradient", "matrix_gradient")
"""A layer's three products, in the order of the table."""
TRAINED_IN = "delayed"
"""The recipe of the steps: its scales need earlier steps, the others' do not."""
LEARNING_RATE = 1e-4
SEED = 1234
SHAPES: dict[str, tuple[str, ...]] = {
    "dense": ("wan_14b",),
    "experts": (
        "wan_moe_100b_a20b", "--model.moe.num_experts", "4", "--model.moe.top_k", "2", "--parallel.expert", "1",
        "--parallel.context", "1", "--parallel.pipeline", "1", "--parallel.virtual_pipeline", "1",
        "--parallel.overlap_grad_reduce", "false", "--parallel.overlap_param_gather", "false",
    ),
}  # fmt: skip
"""Preset of each block, and what is cut off it."""


def config_of(block: str, tokens: int, width: int = 0) -> RunConfig:
    """The run: one block of the preset, all of it in FP8.

    Args:
        block: "dense" or "experts".
        tokens: of its packs, one in a step.
        width: narrower than the preset, feed-forwards too, for tests; 0 for the preset's.
    """
    preset, *flags = SHAPES[block]
    flags += ["--model.num_layers", "1", "--model.text_length", "64", "--parallel.tensor", "1"]
    flags += ["--parallel.recompute", "none", "--precision.dtype", "fp32", "--precision.fp8", TRAINED_IN]
    flags += ["--precision.fp8_skip_first", "0", "--precision.fp8_skip_last", "0", "--data.kind", "synthetic"]
    flags += ["--data.path", "", "--data.pack_tokens", str(tokens), "--train.global_batch_size", "1"]
    flags += ["--train.seed", str(SEED), "--optimizer.ema_decay", "0"]
    if width:
        flags += ["--model.hidden_size", str(width), "--model.ffn_size", str(2 * width), "--model.num_heads", "4"]
        flags += ["--model.moe.expert_ffn_size", str(width)] if block == "experts" else []
    return load_run(preset, flags)


class Comparison:
    """One layer's products in one recipe, and its scales for them.

    Attributes:
        recipe: how operands are scaled.
        figures: of each operand, see ``megavid.training.fp8_figures.Rounding``.
        errors: norm of the difference to fp32 over the norm in fp32, by product.
    """

    def __init__(self, name: RecipeName, layer: Fp8Scaling) -> None:
        self.recipe = Recipe.of(name, "auto")
        self._layer = layer
        # The layer's own scales where they need a past.
        self._own = layer if name == TRAINED_IN else Fp8Scaling(self.recipe, layer.name, layer.group, 1, CPU)
        self._watched = Fp8Scaling(self.recipe, layer.name, layer.group, 1, CPU)
        self._watched.seen = torch.zeros(len(ROLES), len(FIGURES), dtype=torch.float64)
        self.errors: dict[str, float] = {}

    def scales(self, tensors: dict[Role, Tensor], *, is_training: bool) -> dict[Role, Tensor | None]:
        """Those of the layer: a magnitude that is told twice changes no maximum."""
        return self._own.scales(tensors, is_training=is_training)

    def watch(self, role: Role, x: Tensor, rounded: Quantized) -> None:
        """Add up the operand's figures."""
        self._watched.watch(role, x, rounded)

    @property
    def is_watching(self) -> bool:
        """Always."""
        return True

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        """Underflow, overflow and error of each operand."""
        assert self._watched.seen is not None
        return {role: rounding_of(row)._asdict() for role, row in zip(ROLES, self._watched.seen.tolist())}


@dataclass
class Compared:
    """Sees the operands of one layer's products; once it has all three, multiplies them in every recipe and in fp32.

    Attributes:
        scaling: of the layer.
        sizes: rows of each expert; None for a dense layer.
        found: by recipe.
    """

    scaling: Fp8Scaling
    sizes: Callable[[], list[int]] | None
    found: dict[str, Comparison] = field(default_factory=dict)
    operands: dict[Role, Tensor] = field(default_factory=dict)

    def watch(self, role: Role, x: Tensor, rounded: Quantized) -> None:
        """Take the place of ``Fp8Scaling.watch``."""
        self.operands[role] = x.detach()
        if role != "gradient":
            return
        wide = self._products(None)
        for name in RECIPES:
            self.found[name] = Comparison(name, self.scaling)
            for product, mine, exact in zip(PRODUCTS, self._products(self.found[name]), wide, strict=True):
                self.found[name].errors[product] = float((mine - exact).norm() / exact.norm().clamp(min=1e-30))
        self.operands.clear()

    def _products(self, scaling: Comparison | None) -> tuple[Tensor, Tensor, Tensor]:
        """Output, input gradient and matrix gradient, in FP8 where there are scales."""
        x_SI, weight_eOI, grad_SO = (self.operands[role] for role in ROLES)
        sizes = [x_SI.shape[0]] if self.sizes is None else self.sizes()
        x_SI, weight_eOI = x_SI.requires_grad_(), weight_eOI.requires_grad_()
        with torch.enable_grad():
            if scaling is not None:
                out_SO = fp8_grouped_linear(x_SI, weight_eOI, sizes, scaling)
            else:
                parts = zip(torch.split(x_SI, sizes), weight_eOI.unbind(), strict=True)
                out_SO = torch.cat([part @ matrix.t() for part, matrix in parts])
            grad_x_SI, grad_weight_eOI = torch.autograd.grad(out_SO, (x_SI, weight_eOI), grad_SO)
        return out_SO.detach(), grad_x_SI, grad_weight_eOI


def build(config: RunConfig, mesh: Mesh) -> "Engine[Any]":
    """The engine with fresh weights; the embedders of captions and timesteps are frozen."""
    chunks = build_chunks(config, mesh)
    for embedder in (chunks[0].text_embedder, chunks[0].timestep_embedder):
        embedder.requires_grad_(False)
    engine: Engine[Any] = Engine(config, mesh, chunks).with_optimizer()
    generator = torch.Generator().manual_seed(SEED)  # several times quicker than the engine's own
    with torch.no_grad():
        for parameter in engine.parameters():
            init = placement_of(parameter).init
            parameter.normal_(std=init.std, generator=generator).add_(init.mean)
    return engine


def say(what: str, began: float) -> None:
    """Progress, for runs of minutes."""
    print(f"  {what}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def compare(engine: "Engine[Any]") -> list[Compared]:
    """Have every layer in FP8 compare its products in the steps that follow."""
    found = []
    for module in engine.chunks[0].modules():
        if isinstance(module, GroupedExperts):
            rows: list[list[int]] = []
            module.register_forward_pre_hook(lambda _, given, rows=rows: rows.append(given[1].tolist()))
            found += [Compared(scaling, lambda rows=rows: rows[-1]) for scaling in module.scalings.values()]
    known = {id(compared.scaling) for compared in found}
    found += [Compared(scaling, None) for scaling in scalings_of(engine.chunks) if id(scaling) not in known]
    for compared in found:
        compared.scaling.watch = compared.watch  # type: ignore[method-assign]
    return found


def layers_of(config: RunConfig, steps: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Train ``steps`` steps; of the last one, by recipe and layer, how operands are rounded and products' errors."""
    began = time.perf_counter()
    with Mesh.open(layout_of(config, 1)) as mesh:
        engine = build(config, mesh)
        say("fresh weights", began)
        objective = FlowObjective(config.diffusion, SEED)
        encoder = build_text_encoder(config)
        with Loader(config, build_source(config), encoder, dp_rank=0, dp_size=1) as loader:
            for step in range(1, steps):
                train_step(engine, next(loader), objective, learning_rate=LEARNING_RATE)
                say(f"step {step}", began)
            compared = compare(engine)
            metrics = train_step(engine, next(loader), objective, learning_rate=LEARNING_RATE)
        assert metrics.finite, metrics.culprit
    return {
        recipe: {
            layer.scaling.name: {**layer.found[recipe].figures, "products": layer.found[recipe].errors}
            for layer in compared
        }
        for recipe in RECIPES
    }


def run(block: str, file: Path, tokens: int, steps: int) -> None:
    """Take one run, and write what it found."""
    began = time.perf_counter()
    recipes = layers_of(config_of(block, tokens), steps)
    file.write_text(json.dumps({"tokens": tokens, "steps": steps, "recipes": recipes}, indent=1) + "\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{file.stem}: {time.perf_counter() - began:.0f} s, {peak:.1f} GiB", file=sys.stderr, flush=True)


def table_of(out: Path) -> list[str]:
    """A row for each layer and recipe of every run that is there; of the block with experts only these."""
    lines = [
        "| layer | recipe | underflow | overflow | rounding | output | input gradient | matrix gradient |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for block in BLOCKS:
        if not (file := out / f"{block}.json").exists():
            continue
        recipes = json.loads(file.read_text())["recipes"]
        for name in recipes[TRAINED_IN]:
            if block == "experts" and ".experts." not in name:
                continue
            for recipe in RECIPES:
                layer = recipes[recipe][name]
                cells = [" / ".join(f"{layer[role][key]:.2g}" for role in ROLES) for key in ("underflow", "overflow")]
                cells += [" / ".join(f"{layer[role]['error']:.3f}" for role in ROLES)]
                cells += [f"{layer['products'][product]:.3f}" for product in PRODUCTS]
                lines.append(f"| {name.removeprefix('blocks.0.')} | {recipe} | {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of what was found")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps; the last one is reported, the third on")
    parser.add_argument("--tokens", type=int, default=192, help="tokens of a pack, one in a step")
    parser.add_argument("--only", nargs="+", choices=BLOCKS, default=BLOCKS, help="take these blocks alone")
    options = parser.parse_args(arguments)
    if options.steps < 3:
        parser.error(f"--steps {options.steps} must be at least 3: the first moves the head only, the second the block")
    options.out.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for block in options.only:
            if not (file := options.out / f"{block}.json").exists():
                run(block, file, options.tokens, options.steps)
    finally:
        dist.destroy_process_group()
    print("\n".join(table_of(options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
