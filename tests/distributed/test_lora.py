"""Adapters against a model whose matrices are ``W + scale * B A``, in every layout, and over a resume.

The base is frozen: its weights stay bitwise, and a fresh adapter changes nothing.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megavid import checkpoint
from megavid.checkpoint.convert.adapter import ADAPTER, saved_adapter
from megavid.config.load import dump_toml
from megavid.config.schema import RunConfig
from megavid.diffusion.objective import FlowObjective
from megavid.models.lora import is_adapter, lora_reference
from megavid.models.runner import build_engine, velocity_of
from megavid.ops.compiled import why_not_compiled
from megavid.ops.packs import clip_index
from megavid.ops.philox import key_of, normal_box
from megavid.parallel.engine import Engine
from megavid.parallel.mesh import Mesh
from megavid.plan.adapters import A, B
from megavid.plan.layout import layout_of
from tests.distributed.test_diffusers_twin import batch_of, fill
from tests.distributed.test_layouts import compare
from tests.support import diffusers_wan, tolerance
from tests.support.newest import newest_too
from tests.support.ranks import RankPool
from tests.support.tiny_world import LEARNING_RATE, SEED, assemble, held, initialize, packs_of, take_step, tiny_config

LORA: dict[str, Any] = {"rank": 4, "alpha": 6.0}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dp2 overlap": ("wan", 2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "tp2": ("wan", 2, {"tensor": 2}),
    "tp2 without sp": ("wan", 2, {"tensor": 2, "sequence": False}),
    "pp2 vpp2 full recompute": ("wan", 2, {"pipeline": 2, "virtual_pipeline": 2, "recompute": "full"}),
    "cp2 selective recompute": ("wan", 2, {"context": 2, "recompute": "selective"}),
    "tp2 pp2 ep2": ("wan_moe", 8, {"tensor": 2, "pipeline": 2, "expert": 2}),
    "tp2 etp2 cp2": ("wan_moe", 4, {"tensor": 2, "expert_tensor": 2, "context": 2}),
}
TASKS: dict[str, dict[str, Any]] = {"t2v": {}, "i2v": {"task": "i2v", "image": (10, 5, 0)}}
WANTED: dict[tuple[str, str], dict[str, Any]] = {}


def config_of(family: str, task: str = "t2v", lora: dict[str, Any] | None = None, **options: Any) -> RunConfig:
    config = tiny_config(family, lora=LORA if lora is None else lora, **TASKS[task], **options)
    return replace(config, optimizer=replace(config.optimizer, clip_norm=0.0))  # so that gradients can be compared


def fill_adapters(engine: Engine[Any]) -> None:
    """Random numbers for every B: a fresh one is zero and lets no gradient pass to A."""
    for fragment in engine.weight_fragments("model", "trained"):
        at = 0
        for box in fragment.boxes if fragment.name.endswith(B) else ():
            drawn = normal_box(key_of(SEED, fragment.name), fragment.global_shape, box.offset, box.shape).reshape(-1)
            fragment.data[at : at + box.numel] = 0.1 * drawn
            at += box.numel
    engine.load_finished()


def train(config: RunConfig, world: int, steps: int = 3) -> dict[str, Any]:
    """Job: train adapters; losses, norms, first moments after a step, weights before and after, a velocity."""
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        initialize(engine)
        fill_adapters(engine)
        before = held(engine.weight_fragments("model"))
        velocity = velocity_in(engine)
        taken, first = [], []
        for step in range(steps):
            taken.append(take_step(engine, step))
            if step == 0:
                first = held([f for f in engine.fragments() if f.name.startswith("exp_avg/")])
        final = held(engine.weight_fragments("model", "trained"))
        after = held([*engine.weight_fragments("model"), *engine.buffer_fragments()])
        saved = sorted({f.name for f in engine.fragments()})
    return {
        "loss": [m.loss for m in taken], "norm": [m.grad_norm for m in taken], "velocity": velocity,
        "before": before, "first": first, "final": final, "after": after, "saved": saved,
    }  # fmt: skip


def velocity_in(engine: Engine[Any]) -> Tensor:
    config, mesh = engine.config, engine.mesh
    batch = packs_of(config, range(99, 100)).part(mesh.token_span(config.data.pack_tokens))
    return mesh.gather_tokens(velocity_of(engine, FlowObjective(config.diffusion, SEED).noise(batch).input))


def wanted(pool: RankPool, family: str, task: str = "t2v") -> dict[str, Any]:
    """One rank; run once for each model."""
    if (family, task) not in WANTED:
        WANTED[family, task] = pool.run(1, train, config_of(family, task), 1)[0]
    return WANTED[family, task]


def train_merged(config: RunConfig, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Job: one step of the whole model with these weights; its first moments are a tenth of the gradients."""
    with Mesh.open(layout_of(config, 1)) as mesh:
        engine = build_engine(config, mesh)
        engine.initialize(SEED)
        for fragment in engine.weight_fragments("model"):
            assert len(fragment.boxes) == 1
            fragment.data.copy_(weights[fragment.name].reshape(-1))
        engine.load_finished()
        velocity = velocity_in(engine)
        loss = take_step(engine, 0).loss
        first = held([f for f in engine.fragments() if f.name.startswith("exp_avg/")])
    return {"loss": loss, "first": first, "velocity": velocity}


def matrices(weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every adapted matrix, by its name."""
    names = [name.removesuffix(A) for name in weights if name.endswith(A)]
    return {f"{name}weight": (weights[name + A], weights[name + B]) for name in names}


@pytest.mark.parametrize(("family", "task"), [("wan_moe", "t2v"), ("wan", "i2v")])
def test_adapters_compute_and_learn_like_the_merged_matrices(pool: RankPool, family: str, task: str) -> None:
    told = wanted(pool, family, task)
    weights, scale = assemble([told["before"]]), LORA["alpha"] / LORA["rank"]
    pairs = matrices(weights)
    assert len(pairs) == {"wan_moe": 4 * 8 + 2 * 2, "wan": 4 * (8 + 2 + 2)}[family]
    merged = {name: weight for name, weight in weights.items() if not is_adapter(name)}
    for name, (a, b) in pairs.items():
        # The twin's product with the unit matrix is the merged matrix.
        merged[name] = lora_reference(torch.eye(a.shape[1]), weights[name], a, b, scale).T
    config = config_of(family, task, lora={})
    (want,) = pool.run(1, train_merged, config, merged)
    gap = (told["velocity"] - want["velocity"]).abs().max()
    assert gap <= tolerance.LAYER_FP32 * want["velocity"].abs().max()
    assert told["loss"][0] == pytest.approx(want["loss"], rel=tolerance.LOSS_FP32)
    of_merged, gradients = assemble([want["first"]]), {}
    for name, (a, b) in pairs.items():
        gradient = of_merged[name.replace("model/", "exp_avg/")]
        stem = name.replace("model/", "exp_avg/").removesuffix("weight")
        gradients |= {stem + A: scale * b.T @ gradient, stem + B: scale * gradient @ a.T}
    compare(assemble([told["first"]]), gradients, 1e-8)


@pytest.mark.parametrize("name", newest_too(LAYOUTS, "tp2 without sp", "tp2 pp2 ep2"))
def test_the_loss_does_not_depend_on_the_layout(pool: RankPool, name: str) -> None:
    family, world, options = LAYOUTS[name]
    check(wanted(pool, family), pool.run(world, train, config_of(family, **options), world))


@pytest.mark.skipif(bool(why_not_compiled()), reason=f"compiled ops: {why_not_compiled()}")
def test_compiled_ops_train_adapters_like_plain_torch(pool: RankPool) -> None:
    config = config_of("wan_moe", tensor=2, expert=2)
    config = replace(config, train=replace(config.train, ops="compiled"))
    check(wanted(pool, "wan_moe"), pool.run(2, train, config, 2))


def check(want: dict[str, Any], got: list[dict[str, Any]]) -> None:
    """The same losses, norms, gradients and adapters."""
    for told in got:
        assert told["loss"] == pytest.approx(want["loss"], rel=tolerance.LOSS_FP32)
        assert told["norm"] == pytest.approx(want["norm"], rel=tolerance.GRAD_NORM_FP32)
    compare(assemble([told["first"] for told in got]), assemble([want["first"]]), 1e-8)
    compare(assemble([told["final"] for told in got]), assemble([want["final"]]), 1e-3 * LEARNING_RATE)


@pytest.mark.parametrize("family", ["wan", "wan_moe"])
def test_only_adapters_move_and_only_they_are_saved(pool: RankPool, family: str) -> None:
    told = wanted(pool, family)
    before, after = assemble([told["before"]]), assemble([told["after"]])
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) != is_adapter(name), name
    for name in after.keys() - before.keys():  # routers' bias
        assert not after[name].any()
    assert all(is_adapter(name) for name in told["saved"])


def step_zero(config: RunConfig) -> tuple[Tensor, float]:
    """Job: velocity and loss of fresh weights; a fresh adapter is zero."""
    with Mesh.open(layout_of(config, 1)) as mesh:
        engine = build_engine(config, mesh)
        initialize(engine)
        return velocity_in(engine), take_step(engine, 0).loss


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_step_zero_is_the_base_model_bitwise(pool: RankPool, dtype: str) -> None:
    ((velocity, loss),) = pool.run(1, step_zero, config_of("wan_moe", dtype=dtype))
    ((want_velocity, want_loss),) = pool.run(1, step_zero, config_of("wan_moe", lora={}, dtype=dtype))
    assert torch.equal(velocity, want_velocity)
    assert loss == want_loss


def go_on(config: RunConfig, world: int, folder: str, loads: bool) -> dict[str, Any]:
    """Job: three steps, saved, and two more; or load the three and take the two."""
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        initialize(engine)
        if loads:
            found = checkpoint.load(checkpoint.resolve(Path(folder)), engine.fragments(), mesh)
            engine.load_finished(found.state["updates"])
        else:
            fill_adapters(engine)
            for step in range(3):
                take_step(engine, step)
            state = {"updates": engine.updates.updates}
            checkpoint.save(Path(folder), 3, engine.fragments(), state, mesh, run_toml="", layout="")
        saved = held(engine.fragments())
        return {"loss": [take_step(engine, 3 + step).loss for step in range(2)], "saved": saved}


def test_a_resumed_run_is_the_same_run(pool: RankPool, tmp_path: Path) -> None:
    config = config_of("wan_moe", tensor=2, pipeline=2, dtype="bf16")
    want = pool.run(4, go_on, config, 4, str(tmp_path), False)
    got = pool.run(4, go_on, config, 4, str(tmp_path), True)
    assert got[0]["loss"] == want[0]["loss"]
    other = pool.run(2, go_on, config_of("wan_moe", context=2, dtype="bf16"), 2, str(tmp_path), True)
    state = assemble([told["saved"] for told in want])
    for ranks in (got, other):
        loaded = assemble([told["saved"] for told in ranks])
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], values) for name, values in state.items())


def save_over_diffusers(config: RunConfig, world: int, folder: str) -> Tensor:
    """Job: random adapters over diffusers' weights, saved; the velocity with them."""
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        engine.initialize(SEED)
        fill(engine, diffusers_wan.in_model_space(diffusers_wan.tiny_diffusers(config.model), config.model), "frozen")
        fill_adapters(engine)
        checkpoint.save(Path(folder), 1, engine.fragments(), {}, mesh, run_toml=dump_toml(config), layout="")
        part = batch_of(config).part(mesh.token_span(config.data.pack_tokens))
        return mesh.gather_tokens(velocity_of(engine, FlowObjective(config.diffusion, 1).noise(part).input))


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_diffusers_loads_the_saved_adapter_and_says_the_same(pool: RankPool, tmp_path: Path, task: str) -> None:
    config = config_of("wan", task, text=(8, 512), tensor=2)
    config = replace(config, model=replace(config.model, absolute_positions=False))
    velocity_BTP = pool.run(2, save_over_diffusers, config, 2, str(tmp_path))[0]
    twin = diffusers_wan.tiny_diffusers(config.model)
    inputs = FlowObjective(config.diffusion, 1).noise(batch_of(config)).input
    valid_BT, bare = clip_index(inputs.packs) >= 0, diffusers_wan.velocity(twin, config.model, inputs)
    saved_adapter(checkpoint.Checkpoint(checkpoint.resolve(tmp_path)), "model").write(tmp_path)
    twin.load_lora_adapter(str(tmp_path), weight_name=ADAPTER)
    want = diffusers_wan.velocity(twin, config.model, inputs)
    assert (velocity_BTP - want)[valid_BT].abs().max() <= tolerance.LAYER_FP32 * want.abs().max()
    assert (velocity_BTP - bare)[valid_BT].abs().max() > 0.01 * want.abs().max()  # an adapter that does something
