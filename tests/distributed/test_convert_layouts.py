"""Open weights in, through any layout, and out again: outputs and gradients as diffusers', files bitwise the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megavid import checkpoint
from megavid.checkpoint.convert import LazyTensor, open_model, write_model
from megavid.checkpoint.convert.source import MOMENTS
from megavid.checkpoint.convert.tables import DIFFUSERS, to_model_space
from megavid.checkpoint.convert.verify import Call, clips_of, probe_call
from megavid.config.load import dump_toml
from megavid.config.schema import DataConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from megavid.models.inputs import ModelInput
from megavid.models.runner import build_engine, velocity_of
from megavid.ops.packs import Span
from megavid.ops.patches import patchify
from megavid.ops.philox import key_of, normal
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layout_of
from megavid.training.resume import load_weights
from tests.support import tolerance
from tests.support.ranks import RankPool
from tests.support.tiny_world import assemble, held, initialize, load_and_train, take_step, tiny_config
from tests.support.wan_folders import VARIANTS, assert_same_files, save_wan, tiny_wan

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2}),
    "cp2": (2, {"context": 2}),
}
FP32_GRADIENT = 1e-4
"""Gradient of a tensor against diffusers', fp32, relative to its largest number."""


def part_of(inputs: ModelInput, span: Span) -> ModelInput:
    """The tokens of one context-parallel rank."""
    cut = slice(span.start, span.stop)
    return replace(
        inputs, patches_BTP=inputs.patches_BTP[:, cut], row_BT=inputs.row_BT[:, cut].contiguous(), start=span.start
    )


def probe(call: Call, model: Any) -> Tensor:
    """Weights of a scalar loss on the velocity, [B, T, P]."""
    clips = call.latents_BCFHW[:, : model.out_channels]
    shape = patchify(clips[0], model.patch_size).shape
    return normal(key_of("probe"), 0, 2 * shape.numel()).view(2, *shape)


def run_converted(config: RunConfig, world: int, folder: str, saved: str) -> dict[str, Any]:
    """Job: velocity and gradients with weights of a converted folder; then save the run from this layout."""
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        load_weights(engine, checkpoint.Checkpoint(checkpoint.resolve(Path(folder))), kind="model")
        call = probe_call(config.model)
        inputs = call.to_engine(config.model)
        span = mesh.token_span(config.data.pack_tokens)
        weights = probe(call, config.model)[:, span.start : span.stop]
        velocity_BTP = mesh.gather_tokens(velocity_of(engine, part_of(inputs, span)))
        velocity = clips_of(velocity_BTP, inputs, config.model)
        engine.forward_backward(
            lambda chunk, batch: chunk(batch), lambda _, v: ((v * weights).sum(), None), [part_of(inputs, span)]
        )
        engine.updates.step(0.0, engine.updates.gradient_norm())  # the moment becomes 0.1 of the gradient
        gradients = held([f for f in engine.fragments() if f.name.startswith("exp_avg/")])
        checkpoint.save(Path(saved), 1, engine.fragments(), {}, mesh, run_toml=dump_toml(config))
    return {"velocity": velocity, "gradients": gradients}


def by_diffusers(variant: str, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Velocity of diffusers' model, and its gradients under the names of model space."""
    module = tiny_wan(variant)
    call = probe_call(model)
    velocity = module(**call.to_reference(model))[0]
    patches = torch.stack([patchify(clip, model.patch_size) for clip in velocity])
    (patches * probe(call, model)).sum().backward()
    lazy = {}
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        flat = gradient.contiguous().view(-1)
        lazy[name] = LazyTensor(tuple(gradient.shape), gradient.dtype, lambda a, b, flat=flat: flat[a:b], name)
    return velocity.detach(), {k: v.read() for k, v in to_model_space(model, DIFFUSERS, lazy, "gradients").items()}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_converted_model_in_any_layout_is_diffusers_model(
    pool: RankPool, tmp_path: Path, variant: str, name: str
) -> None:
    save_wan(tmp_path / "src", variant)
    write_model(open_model(tmp_path / "src"), tmp_path / "in", to="megavid")
    model = open_model(tmp_path / "in").config
    world, options = LAYOUTS[name]
    config = RunConfig(
        model=model,
        parallel=ParallelConfig(**options),
        data=DataConfig(pack_tokens=72),
        train=TrainConfig(micro_batch_size=2, global_batch_size=2),
        optimizer=OptimizerConfig(clip_norm=0.0, weight_decay=0.0, ema_decay=0.0),
    )
    told = pool.run(world, run_converted, config, world, str(tmp_path / "in"), str(tmp_path / "saved"))
    velocity, gradients = by_diffusers(variant, model)
    for rank in told:
        gap = (rank["velocity"] - velocity).abs().max()
        assert gap <= tolerance.LAYER_FP32 * velocity.abs().max()
    moments = assemble([rank["gradients"] for rank in told])
    assert {key.removeprefix("exp_avg/") for key in moments} == gradients.keys()
    for key, want in gradients.items():
        gap = (moments[f"exp_avg/{key}"] / 0.1 - want).abs().max()
        assert gap <= FP32_GRADIENT * want.abs().max(), f"{key}: {gap:.1e} of {want.abs().max():.1e}"

    write_model(open_model(tmp_path / "saved"), tmp_path / "out", to="diffusers")
    assert_same_files(tmp_path / "out", tmp_path / "src")


# Experts, moving average, optimizer state


def train_and_keep(config: RunConfig, world: int, folder: str) -> list[Any]:
    """Job: two steps, saved; tells what was saved."""
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        initialize(engine)
        for step in range(2):
            take_step(engine, step)
        state = {"updates": engine.updates.updates, "loader": {}}
        checkpoint.save(Path(folder), 2, engine.fragments(), state, mesh, run_toml=dump_toml(config))
        return held(engine.fragments())


SOURCES: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2 pp2 ep2": (8, {"tensor": 2, "pipeline": 2, "expert": 2}),
    "ep4": (4, {"expert": 4}),
    "tp2 etp2": (2, {"tensor": 2, "expert_tensor": 2}),
}
MOE = {"activation": "swiglu"}


@pytest.mark.parametrize("name", SOURCES)
def test_average_moments_and_router_bias_survive(pool: RankPool, tmp_path: Path, name: str) -> None:
    world, options = SOURCES[name]
    config = tiny_config("wan_moe", moe=MOE, **options)
    saved = assemble(pool.run(world, train_and_keep, config, world, str(tmp_path / "run")))
    assert any(tensor.startswith("buffer/") and values.abs().sum() > 0 for tensor, values in saved.items())

    # Written anew as one file, with everything; a run goes on from it in another layout as from the first.
    write_model(open_model(tmp_path / "run"), tmp_path / "again", to="megavid", keep=("ema/", *MOMENTS))
    later = tiny_config("wan_moe", moe=MOE, expert=2)
    one = pool.run(2, load_and_train, later, 2, str(tmp_path / "run"), 2, 2)
    other = pool.run(2, load_and_train, later, 2, str(tmp_path / "again"), 2, 2)
    loaded = assemble([rank["saved"] for rank in other])
    assert loaded.keys() == saved.keys()
    for tensor, values in saved.items():
        assert torch.equal(loaded[tensor], values), tensor
    assert [rank["loss"] for rank in other] == [rank["loss"] for rank in one]

    # Out to the inference folder and back: weights and bias bitwise, of the model and of its average.
    for weights in ("model", "ema"):
        write_model(open_model(tmp_path / "run", weights=weights), tmp_path / f"{weights}_out", to="diffusers")
        back = open_model(tmp_path / f"{weights}_out")
        assert back.config == config.model
        assert len(back.tensors) == len({key.partition("/")[2] for key in saved})
        for key, lazy in back.tensors.items():
            kind = "buffer" if key.endswith("expert_bias") else weights
            assert torch.equal(lazy.read(), saved[f"{kind}/{key}"]), key
