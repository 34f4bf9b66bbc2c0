"""Law 1, rung 2 of the parity ladder: the loss does not depend on the layout.

Loss and gradient norm of three steps, the gradient of every parameter after the first, and weights, moving averages and
router biases after three, in many layouts of 1 to 8 ranks, against one rank.
"""

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from megavid.config.schema import RunConfig
from megavid.ops.compiled import why_not_compiled
from megavid.parallel import mcore
from tests.support import tolerance
from tests.support.newest import newest_too
from tests.support.ranks import RankPool
from tests.support.tiny_world import LEARNING_RATE, assemble, tiny_config, train

Ops = Literal["reference", "compiled"]

DENSE = {
    "microbatch2": (1, {"micro": 2}),
    "dp2": (2, {"micro": 1}),
    "tp2": (2, {"tensor": 2}),
    "tp2 without sp": (2, {"tensor": 2, "sequence": False}),
    "pp2": (2, {"pipeline": 2}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "dp2 pp2 vpp2": (4, {"pipeline": 2, "virtual_pipeline": 2}),
    "pp4": (4, {"pipeline": 4}),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2, "recompute": "full"}),
    "full recompute": (1, {"recompute": "full", "micro": 1}),
    "selective recompute": (1, {"recompute": "selective"}),
    "overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "cp2": (2, {"context": 2}),
    "cp2 tp2 without sp": (4, {"context": 2, "tensor": 2, "sequence": False}),
    "cp2 pp2 vpp2": (4, {"context": 2, "pipeline": 2, "virtual_pipeline": 2}),
    "cp3 full recompute": (3, {"context": 3, "recompute": "full"}),
    "cp4 ring": (4, {"context": 4, "context_strategy": "ring"}),
    "cp4 hybrid selective": (4, {"context": 4, "context_strategy": "hybrid", "recompute": "selective"}),
    "cp4 allgather selective": (4, {"context": 4, "context_strategy": "allgather", "recompute": "selective"}),
    "cp8 overlap": (8, {"context": 8, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "cp2, one clip in a pack": (2, {"context": 2, "pack_tokens": 48}),
    "cp3 selective, one clip in a pack": (3, {"context": 3, "recompute": "selective", "pack_tokens": 48}),
}
MOE = {
    "microbatch2": (1, {"micro": 2}),
    "microbatch4": (1, {"micro": 4}),
    "dp2": (2, {"micro": 1}),
    "dp4": (4, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "dp2 pp2": (4, {"pipeline": 2}),
    "ep2": (2, {"expert": 2}),
    "ep4": (4, {"expert": 4}),
    "ep2 allgather": (2, {"expert": 2, "dispatcher": "allgather"}),
    "tp2 ep2": (4, {"tensor": 2, "expert": 2}),
    "tp2 ep2 folded": (2, {"tensor": 2, "expert": 2}),
    "tp2 etp2": (2, {"tensor": 2, "expert_tensor": 2}),
    "tp2 etp2 ep2": (4, {"tensor": 2, "expert_tensor": 2, "expert": 2}),
    "etp2": (2, {"expert_tensor": 2}),
    "ep2 recompute": (2, {"expert": 2, "recompute": "full"}),
    "tp2 ep2 selective": (2, {"tensor": 2, "expert": 2, "recompute": "selective"}),
    "tp2 pp2 ep2": (8, {"tensor": 2, "pipeline": 2, "expert": 2}),
    "tp2 pp2 vpp2 ep4": (8, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 4}),
    "cp2 microbatch2": (2, {"context": 2, "micro": 2}),
    "cp3": (3, {"context": 3}),
    "cp4 ep2 selective": (4, {"context": 4, "expert": 2, "recompute": "selective"}),
    "cp4, one clip in a pack": (4, {"context": 4, "pack_tokens": 48}),
    "cp2 tp2": (4, {"context": 2, "tensor": 2}),
    "cp2 pp2 ep2": (4, {"context": 2, "pipeline": 2, "expert": 2}),
    "cp2 pp2 vpp2 dp2 ep2": (8, {"context": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 2}),
    "cp2 tp2 dp2 ep4 etp2": (8, {"context": 2, "tensor": 2, "expert": 4, "expert_tensor": 2}),
}
ROUTERS = {
    "softmax": {"router": "softmax", "aux_loss_weight": 0.1, "z_loss_weight": 1e-2},
    "expert_choice": {"router": "expert_choice"},
    "swiglu groups": {"activation": "swiglu", "num_groups": 2, "top_groups": 1, "route_scale": 1.5},
}
ROUTER_LAYOUTS = {
    "dp2 pp2 microbatch2": (4, {"pipeline": 2, "micro": 2}),
    "cp2 ep2 microbatch2": (2, {"context": 2, "expert": 2, "micro": 2}),
    "cp2 tp2 ep2": (4, {"context": 2, "tensor": 2, "expert": 2}),
}
TASKS = {
    "i2v": {"task": "i2v", "image": (10, 5, 0)},
    "first-last frame": {"task": "i2v", "image": (10, 6, 6)},
    "i2v without image branch": {"task": "i2v"},
    "ti2v": {"task": "ti2v"},
}
TASK_LAYOUTS = [
    ("i2v", 2, {"pipeline": 2, "virtual_pipeline": 2}),
    ("i2v", 4, {"tensor": 2, "pipeline": 2, "recompute": "full"}),
    ("i2v", 4, {"context": 2, "tensor": 2, "sequence": False, "recompute": "selective"}),
    ("i2v", 2, {"overlap_grad_reduce": True, "overlap_param_gather": True, "pack_tokens": 48}),
    ("first-last frame", 4, {"pipeline": 2, "tensor": 2}),
    ("i2v without image branch", 2, {"context": 2}),
    ("ti2v", 4, {"tensor": 2, "pipeline": 2}),
    ("ti2v", 3, {"context": 3, "pack_tokens": 48}),
    ("ti2v", 2, {"micro": 2}),
]
REFERENCES: dict[str, Any] = {}


def reference(pool: RankPool, family: str, router: str, pack_tokens: int, task: str) -> Any:
    """One rank, one pack at a time; run once for each model and length of packs."""
    key = f"{family} {router} {pack_tokens} {task}"
    if key not in REFERENCES:
        config = tiny_config(family, moe=ROUTERS.get(router), pack_tokens=pack_tokens, **TASKS.get(task, {}))
        REFERENCES[key] = pool.run(1, train, config, 1)[0]
    return REFERENCES[key]


def check(
    pool: RankPool,
    family: str,
    world: int,
    options: dict[str, Any],
    router: str = "",
    task: str = "t2v",
    ops: Ops = "reference",
) -> None:
    config = tiny_config(family, moe=ROUTERS.get(router), **TASKS.get(task, {}), **in_few_microbatches(world, options))
    config = replace(config, train=replace(config.train, ops=ops))
    want = reference(pool, family, router, config.data.pack_tokens, task)
    got = pool.run(world, train, config, world)
    for rank, told in enumerate(got):
        assert told["loss"] == pytest.approx(want["loss"], rel=tolerance.LOSS_FP32), f"rank {rank}"
        assert told["norm"] == pytest.approx(want["norm"], rel=tolerance.GRAD_NORM_FP32), f"rank {rank}"
        assert_near(told["velocity"], want["velocity"], tolerance.WEIGHT_FP32, "velocity")
    for part in ("first", "final"):
        compare(assemble([told[part] for told in got]), assemble([want[part]]), ABSOLUTE if part == "final" else 1e-8)


def in_few_microbatches(world: int, options: dict[str, Any]) -> dict[str, Any]:
    """Two packs a microbatch where no pipeline lives on many: half the collectives, and the sum must not notice."""
    replicas = world // math.prod(options.get(axis, 1) for axis in ("tensor", "context", "pipeline"))
    return options if "pipeline" in options or replicas > 2 else {"micro": 2, **options}


def compare(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], absolute: float) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert_near(got[name], tensor, tolerance.WEIGHT_FP32, name, absolute)


def assert_near(got: torch.Tensor, want: torch.Tensor, rel: float, name: str, absolute: float = 0.0) -> None:
    gap, scale = (got - want).norm().item(), want.norm().item()
    assert gap <= rel * scale + absolute * want.numel() ** 0.5, f"{name}: off by {gap:.1e} of {scale:.1e}"


# Adam divides by the root of a second moment: a gradient that is zero but for rounding moves its weight by some part of
# the learning rate in any direction. Weights are compared above that; gradients and losses are the sharp test.
ABSOLUTE = 1e-3 * LEARNING_RATE


@pytest.mark.parametrize(
    "name",
    newest_too(DENSE, "tp2 without sp", "dp2 pp2 vpp2", "tp2 pp2", "overlap", "cp4 hybrid selective"),
)
def test_dense_loss_and_weights_do_not_depend_on_the_layout(pool: RankPool, name: str) -> None:
    check(pool, "wan", *DENSE[name])


@pytest.mark.parametrize(
    "name",
    newest_too(MOE, "ep2 allgather", "tp2 etp2 ep2", "tp2 pp2 vpp2 ep4", "cp2 pp2 vpp2 dp2 ep2", "microbatch4"),
)
def test_moe_loss_and_weights_do_not_depend_on_the_layout(pool: RankPool, name: str) -> None:
    check(pool, "wan_moe", *MOE[name])


@pytest.mark.parametrize("name", newest_too(ROUTER_LAYOUTS, "cp2 ep2 microbatch2"))
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_keeps_law_1(pool: RankPool, router: str, name: str) -> None:
    check(pool, "wan_moe", *ROUTER_LAYOUTS[name], router)


@pytest.mark.parametrize(("task", "world", "options"), TASK_LAYOUTS)
def test_conditioning_on_images_keeps_law_1(pool: RankPool, task: str, world: int, options: dict[str, Any]) -> None:
    check(pool, "wan", world, options, task=task)


def test_experts_conditioned_by_frames_keep_law_1(pool: RankPool) -> None:
    check(pool, "wan_moe", 4, {"context": 2, "expert": 2, "micro": 2}, task="ti2v")
    check(pool, "wan_moe", 2, {"tensor": 2, "expert": 2}, task="i2v")


@pytest.mark.skipif(bool(why_not_compiled()), reason=f"compiled ops: {why_not_compiled()}")
@pytest.mark.parametrize(
    ("family", "world", "options"),
    [
        ("wan", 1, {"recompute": "selective"}),
        ("wan", 4, {"tensor": 2, "pipeline": 2, "recompute": "full"}),
        ("wan", 4, {"context": 2, "tensor": 2, "sequence": False}),
        ("wan_moe", 1, {"recompute": "selective"}),
        ("wan_moe", 2, {"tensor": 2, "expert": 2}),
        ("wan_moe", 2, {"expert": 2, "dispatcher": "allgather"}),
        ("wan_moe", 4, {"context": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 2}),
    ],
)
def test_compiled_ops_give_the_curve_of_plain_torch(
    pool: RankPool, family: str, world: int, options: dict[str, Any]
) -> None:
    check(pool, family, world, options, ops="compiled")
    check(pool, family, world, options, ops="compiled", task="ti2v")


@pytest.mark.skipif(bool(why_not_compiled()), reason=f"compiled ops: {why_not_compiled()}")
@pytest.mark.parametrize("router", ROUTERS)
def test_compiled_ops_choose_and_weigh_as_every_router(pool: RankPool, router: str) -> None:
    check(pool, "wan_moe", *ROUTER_LAYOUTS["cp2 ep2 microbatch2"], router, ops="compiled")


@pytest.mark.parametrize("name", newest_too(["tp2", "tp2 pp2 ep2", "cp2 tp2"], "tp2"))
def test_bf16_layouts_differ_no_more_than_orders_of_summation(pool: RankPool, name: str) -> None:
    orders = [bf16_losses(pool, 1, {}, parts) for parts in (1, 2, 3, 4)]
    spread = max(abs(a - b) / a for row in zip(*orders) for a in row for b in row)
    gap = max(abs(a - b) / b for a, b in zip(bf16_losses(pool, *MOE[name]), orders[0]))
    assert gap <= tolerance.BF16_FACTOR * spread, f"{gap:.1e} against {spread:.1e} between orders on one rank"


def bf16_losses(pool: RankPool, world: int, options: dict[str, Any], parts: int = 1) -> list[float]:
    key = f"bf16 {world} {options} {parts}"
    if key not in REFERENCES:
        config = tiny_config("wan_moe", dtype="bf16", **options)
        REFERENCES[key] = pool.run(world, train_in_parts, config, world, parts)[0]["loss"]
    losses: list[float] = REFERENCES[key]
    return losses


def train_in_parts(config: RunConfig, world: int, parts: int) -> dict[str, Any]:
    """Job: ``train``, the products that narrow summed in so many parts, as tensor-parallel ranks would sum them."""

    def in_parts(self: Any, input: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        pairs = zip(input.tensor_split(parts, -1), weight.tensor_split(parts, -1))
        first, *others = (torch.nn.functional.linear(x, w) for x, w in pairs)
        for other in others:
            first = first + other
        return first

    original = mcore.RowParallelLinear._forward_impl
    if parts > 1:
        mcore.RowParallelLinear._forward_impl = in_parts
    try:
        return train(config, world)
    finally:
        mcore.RowParallelLinear._forward_impl = original
