"""Weight gradients that go straight into the fp32 buffers: the same sums, and no gradient of a matrix on its own."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megavid.config.schema import RunConfig
from megavid.models.moe.experts import GroupedExperts
from megavid.models.runner import build_engine
from megavid.parallel import engine as engine_module
from megavid.parallel import mcore
from megavid.parallel.gradients import gradient_of
from megavid.parallel.mesh import Mesh
from megavid.parallel.placement import placement_of
from megavid.plan.layout import layout_of
from tests.support.newest import newest_too
from tests.support.ranks import RankPool
from tests.support.tiny_world import initialize, take_step, tiny_config

PRODUCTS = ("mm", "addmm", "bmm", "_grouped_mm", "grouped_mm")


class Results(TorchDispatchMode):
    """Counts results by shape: of products that are added to a sum, of other products, and of all new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.added: Counter[tuple[int, ...]] = Counter()
        self.products: Counter[tuple[int, ...]] = Counter()
        self.new: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, returns = func._schema.name.split("::")[-1], func._schema.returns
        if name in PRODUCTS:
            (self.added if "out" in (kwargs or {}) else self.products)[tuple(out.shape)] += 1
        if len(returns) == 1 and returns[0].alias_info is None and isinstance(out, Tensor):
            self.new[tuple(out.shape)] += 1
        return out


def gradients(mesh: Mesh, config: RunConfig, add_in_place: Callable[[Any], None]) -> dict[str, Any]:
    """Sums of a step's gradients on this rank, and how many results had the shapes of matrices."""
    original, vars(engine_module)["add_in_place"] = engine_module.add_in_place, add_in_place
    try:
        engine = build_engine(config, mesh)
    finally:
        vars(engine_module)["add_in_place"] = original
    initialize(engine)
    with Results() as results:
        take_step(engine, 0)
    modules = [module for chunk in engine.chunks for module in chunk.modules()]
    linears = [module.weight for module in modules if is_linear(module)]
    experts = [matrix for module in modules if isinstance(module, GroupedExperts) for matrix in module.matrices()]
    times = 4 // config.train.micro_batch_size // mesh.size("dp")
    shapes, stacks = ({tuple(matrix.shape) for matrix in matrices} for matrices in (linears, experts))
    each = shapes | {stack[1:] for stack in stacks}
    return {
        "sums": {placement_of(p).pieces[0].name: gradient_of(p).clone() for p in engine.parameters()},
        "matrices": times * len(linears + experts),
        "products": sum(results.products[shape] for shape in shapes | stacks),
        "wanted": times * (len(linears) + sum(len(matrix) for matrix in experts)),
        "added": sum(results.added[shape] for shape in each),
        "of experts": sum(results.new[stack] for stack in stacks),
    }


def both(world: int, config: RunConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Job: the gradients of a step that were added in place, and those that were not."""
    with Mesh.open(layout_of(config, world)) as mesh:
        return gradients(mesh, config, engine_module.add_in_place), gradients(mesh, config, lambda chunk: None)


def is_linear(module: Any) -> bool:
    """Whether it is one of megatron-core's."""
    return isinstance(module, (mcore.ColumnParallelLinear, mcore.RowParallelLinear))


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one microbatch": (1, {"micro": 4}),
    "two microbatches, recomputed": (1, {"micro": 2, "recompute": "full"}),
    "tp2": (2, {"micro": 2, "tensor": 2}),
    "tp2 without sp": (2, {"family": "wan", "micro": 2, "tensor": 2, "sequence": False}),
    "dp2 overlap": (2, {"overlap_grad_reduce": True}),
    "dp2 overlap, full": (2, {"overlap_grad_reduce": True, "recompute": "full"}),
    "dp2 overlap, selective": (2, {"overlap_grad_reduce": True, "recompute": "selective"}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
}


@pytest.mark.parametrize("name", newest_too(CASES, "tp2", "dp2 overlap, selective"))
def test_sums_are_those_of_gradients_that_were_added(pool: RankPool, name: str) -> None:
    world, options = CASES[name]
    for fast, slow in pool.run(world, both, world, tiny_config(**options)):
        assert fast["sums"].keys() == slow["sums"].keys()
        for tensor, sums in slow["sums"].items():
            gap, scale = float((fast["sums"][tensor] - sums).abs().max()), float(sums.abs().max())
            assert gap <= 2e-6 * scale + 1e-9, f"{tensor}: off by {gap:.1e} of {scale:.1e}"
        assert slow["added"] == 0
        assert fast["added"] == fast["wanted"] > 0
        # Embedders, which are no linears of megatron-core, have matrices of the same shapes.
        assert slow["products"] - fast["products"] == slow["matrices"]
        # A linear gives autograd an empty tensor; experts need not even that.
        assert fast["of experts"] == 0
