"""An upcycled model in the engine: the dense function at step 0 in every layout, and training that tells experts apart.

In fp64 the whole model against the dense twin written out; in fp32 through the engine's own forward pass, with weights
that went into the optimizer's masters; then some steps.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megavid.checkpoint.upcycle import Upcycling, upcycled
from megavid.config.schema import RunConfig
from megavid.diffusion.objective import FlowObjective
from megavid.models.build import Build
from megavid.models.moe.stats import collapse_alarms
from megavid.models.runner import build_engine, velocity_of
from megavid.models.transformer import transformer_config
from megavid.models.video_dit import VideoTransformer
from megavid.ops.packs import Span
from megavid.parallel.mesh import Mesh
from megavid.parallel.placement import placement_of
from megavid.plan.layout import layout_of
from tests.distributed.test_plain_twin import inputs_of, valid_of, window
from tests.support import plain_wan
from tests.support.lazy import fill_engine, memory_model
from tests.support.ranks import RankPool
from tests.support.tiny_world import SEED, assemble, held, packs_of, take_step, tiny_config

EXPERTS = 8
LEGAL = [(g, k) for g in (1, 2, 4) for k in range(g, EXPERTS + 1, g) if k > 1]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, {"expert": 2}),
    "tp2 ep2": (4, {"tensor": 2, "expert": 2}),
    "tp2 etp2": (2, {"tensor": 2, "expert_tensor": 2}),
    "cp2 ep2": (2, {"context": 2, "expert": 2}),
}


def upcycling(granularity: int, top_k: int, **keys: Any) -> Upcycling:
    return Upcycling(num_experts=EXPERTS, granularity=granularity, top_k=top_k, **keys)


def upcycled_run(how: Upcycling, **options: Any) -> tuple[RunConfig, dict[str, Tensor]]:
    """A run of the upcycled tiny model, and its tensors in fp64."""
    dense = tiny_config("wan", **options)
    found = upcycled(memory_model(dense.model).source, how)
    return replace(dense, model=found.config), {name: tensor.read() for name, tensor in found.tensors.items()}


def velocities_fp64(hows: list[Upcycling], world: int, options: dict[str, Any]) -> list[Tensor]:
    """Job: velocity of each upcycled model in fp64, by a chunk that is the whole model."""
    found = []
    for how in hows:
        config, values = upcycled_run(how, **options)
        with Mesh.open(layout_of(config, world)) as mesh, torch.no_grad():
            transformer = replace(transformer_config(config, mesh.layout, mesh.device), params_dtype=torch.float64)
            build = Build(config.model, transformer, mesh, is_first_chunk=True)
            model = VideoTransformer(build, range(config.model.num_layers), config.parallel.recompute, None)
            for parameter in model.parameters():
                flat = parameter.detach().view(-1)
                for piece in placement_of(parameter).pieces:
                    part = values[piece.name][window(piece)].reshape(-1)
                    flat[piece.start : piece.start + part.numel()] = part
            for name, buffer in model.training_buffers():
                # One balancing bias for all experts of a copy changes which copies are taken, and not the function.
                bias_E = (torch.arange(how.copies) % 3 * 0.1).repeat_interleave(how.granularity)
                buffer.copy_(values[name] + bias_E)
            span = mesh.token_span(config.data.pack_tokens)
            found.append(mesh.gather_tokens(model(inputs_of(config, span))))
    return found


@pytest.fixture(scope="module")
def dense() -> tuple[Tensor, Tensor]:
    """Velocity of the dense model by its plain twin in fp64, and where there are tokens."""
    config = tiny_config("wan")
    weights = dict(memory_model(config.model).values)
    inputs = inputs_of(config, Span(0, config.data.pack_tokens))
    with torch.no_grad():
        return plain_wan.velocity(config.model, weights, inputs), valid_of(inputs)


def check_fp64(got: list[list[Tensor]], dense: tuple[Tensor, Tensor]) -> None:
    want, valid = dense
    for rank in got:
        for velocity in rank:
            assert (velocity * valid - want).abs().max() < 1e-12 * want.abs().max()


def test_every_granularity_and_top_k_is_the_dense_model_in_fp64(pool: RankPool, dense: tuple[Tensor, Tensor]) -> None:
    hows = [upcycling(g, k) for g, k in LEGAL]
    check_fp64(pool.run(1, velocities_fp64, hows, 1, {}), dense)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_the_dense_model_in_fp64(pool: RankPool, dense: tuple[Tensor, Tensor], name: str) -> None:
    world, options = LAYOUTS[name]
    hows = [upcycling(2, 4), upcycling(4, 4, dense_first=1, dense_last=2)]
    check_fp64(pool.run(world, velocities_fp64, hows, world, options), dense)


def test_another_route_scale_is_not_the_dense_model(pool: RankPool, dense: tuple[Tensor, Tensor]) -> None:
    """The tests above can fail: the same tensors, gates summing to 1."""
    with pytest.raises(AssertionError):
        check_fp64(pool.run(1, velocities_unscaled, upcycling(2, 4)), dense)


def velocities_unscaled(how: Upcycling) -> list[Tensor]:
    original = Upcycling.model_of

    def unscaled(self: Upcycling, model: Any) -> Any:
        found = original(self, model)
        return replace(found, moe=replace(found.moe, route_scale=1.0))

    Upcycling.model_of = unscaled  # type: ignore[method-assign]
    try:
        return velocities_fp64([how], 1, {})
    finally:
        Upcycling.model_of = original  # type: ignore[method-assign]


def start_and_train(how: Upcycling | None, world: int, options: dict[str, Any], steps: int) -> dict[str, Any]:
    """Job: velocity of the model at step 0, losses of some steps on one batch, final weights and alarms."""
    if how is None:
        config = tiny_config("wan", **options)
        values = dict(memory_model(config.model).values)
    else:
        config, values = upcycled_run(how, **options)
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        fill_engine(engine, values)
        batch = packs_of(config, range(99, 100)).part(mesh.token_span(config.data.pack_tokens))
        inputs = FlowObjective(config.diffusion, SEED).noise(batch).input
        # Padding goes to no expert, but through a dense feed-forward.
        velocity = mesh.gather_tokens(velocity_of(engine, inputs) * valid_of(inputs).float())
        metrics = [take_step(engine, 0) for _ in range(steps)]
        alarms = [alarm for step in metrics for n, stats in step.routing.items() for alarm in collapse_alarms(n, stats)]
        weights = held([f for f in engine.fragments() if f.name.startswith(("model/", "buffer/"))])
    return {"velocity": velocity, "loss": [step.loss for step in metrics], "weights": weights, "alarms": alarms}


@pytest.mark.parametrize(
    ("granularity", "top_k", "router", "options"),
    [(1, 2, "sigmoid", {"pipeline": 2}), (2, 4, "softmax", {"expert": 2}), (4, 4, "sigmoid", {"expert": 2})],
)
def test_the_engine_gives_the_dense_velocity_in_fp32(
    pool: RankPool, granularity: int, top_k: int, router: str, options: dict[str, Any]
) -> None:
    want = pool.run(1, start_and_train, None, 1, {}, 0)[0]["velocity"]
    for told in pool.run(2, start_and_train, upcycling(granularity, top_k, router=router), 2, options, 0):
        assert (told["velocity"] - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.mcore
def test_an_upcycled_model_trains_and_its_experts_part(pool: RankPool) -> None:
    how = upcycling(2, 4)
    ranks = pool.run(2, start_and_train, how, 2, {"expert": 2}, 12)
    losses = ranks[0]["loss"]
    dense_loss = pool.run(1, start_and_train, None, 1, {}, 1)[0]["loss"][0]
    assert losses[0] == pytest.approx(dense_loss, rel=1e-5)  # the first step's loss is still the dense model's
    assert losses[-1] < 0.9 * losses[0]
    weights = assemble([told["weights"] for told in ranks])
    for layer in range(4):
        one, other = (weights[f"model/blocks.{layer}.moe.experts.{expert}.up.weight"] for expert in (0, 2))
        assert (one - other).norm() > 1e-3 * one.norm()  # the same part of two copies, equal at the start
        rows = weights[f"model/blocks.{layer}.moe.router.weight"]
        assert (rows[0] - rows[1]).norm() > 1e-3 * rows[0].norm()  # and the rows of one copy
        assert weights[f"buffer/blocks.{layer}.moe.router.expert_bias"].abs().max() > 0


def test_copies_that_all_tie_are_alarming(pool: RankPool) -> None:
    """With rows that are nearly equal, tokens all go the same way, and the alarm says so."""
    told = pool.run(1, start_and_train, upcycling(2, 2, noise=1e-30), 1, {}, 1)[0]
    assert any("gets 100% of the tokens" in alarm for alarm in told["alarms"])
