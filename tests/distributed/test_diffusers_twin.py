"""Every variant of Wan against diffusers' own class on the same weights, in layouts: one model, two writers.

Text-to-video, image-to-video with and without the image branch, first-last frame, and known frames in the latents.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from megavid.config.load import load_run
from megavid.config.schema import RunConfig
from megavid.diffusion.objective import FlowObjective
from megavid.models.runner import build_engine, velocity_of
from megavid.ops.packs import LatentBatch, Pack, clip_index
from megavid.parallel.engine import Engine, Weights
from megavid.parallel.mesh import Mesh
from megavid.parallel.placement import placement_of
from megavid.plan.layout import layout_of
from megavid.plan.parameters import tensors
from tests.support import diffusers_wan, tolerance
from tests.support.ranks import RankPool
from tests.support.tiny_world import packs_of, tiny_config

TEXT = {"text": (8, 512)}  # diffusers finds the image tokens by counting 512 text tokens from the end
VARIANTS: dict[str, dict[str, Any]] = {
    "t2v": {},
    "i2v with image branch": {"task": "i2v", "image": (10, 5, 0), **TEXT},
    "first-last frame": {"task": "i2v", "image": (10, 6, 6), **TEXT},
    "i2v": {"task": "i2v"},
    "ti2v": {"task": "ti2v"},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2}),
    "cp2 pp2 vpp2": (4, {"context": 2, "pipeline": 2, "virtual_pipeline": 2}),
}
WANTED: dict[str, tuple[Tensor, Tensor]] = {}


def config_of(variant: str, **options: Any) -> RunConfig:
    config = tiny_config("wan", **VARIANTS[variant], **options)
    return replace(config, model=replace(config.model, absolute_positions=False))  # which Wan has not


def batch_of(config: RunConfig) -> LatentBatch:
    """A still image and a clip, both at Wan's own frame rate."""
    batch = packs_of(config, range(1, 2))
    clips = tuple(replace(clip, frame_rate=config.model.latent_frame_rate) for clip in batch.clips)
    return replace(batch, packs=(Pack(clips, config.data.pack_tokens),))


def fill(engine: Engine[Any], weights: dict[str, Tensor], which: Weights = "all") -> None:
    """Copy weights in model space into what this rank holds of them."""
    for fragment in engine.weight_fragments("model", which):
        whole, at = weights[fragment.name.removeprefix("model/")], 0
        for box in fragment.boxes:
            window = tuple(slice(o, o + s) for o, s in zip(box.offset, box.shape))
            fragment.data[at : at + box.numel] = whole[window].reshape(-1)
            at += box.numel
    engine.load_finished()


def run(config: RunConfig, world: int) -> Tensor:
    """Job: velocity of the engine with diffusers' weights."""
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        fill(engine, diffusers_wan.in_model_space(diffusers_wan.tiny_diffusers(config.model), config.model))
        part = batch_of(config).part(mesh.token_span(config.data.pack_tokens))
        return mesh.gather_tokens(velocity_of(engine, FlowObjective(config.diffusion, 1).noise(part).input))


def wanted(variant: str) -> tuple[Tensor, Tensor]:
    """diffusers' velocity, and which tokens are a clip's; computed once."""
    if variant not in WANTED:
        config = config_of(variant)
        inputs = FlowObjective(config.diffusion, 1).noise(batch_of(config)).input
        velocity = diffusers_wan.velocity(diffusers_wan.tiny_diffusers(config.model), config.model, inputs)
        WANTED[variant] = velocity, clip_index(inputs.packs) >= 0
    return WANTED[variant]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_velocity_is_what_diffusers_says(pool: RankPool, variant: str, layout: str) -> None:
    velocity_BTP, valid_BT = wanted(variant)
    world, options = LAYOUTS[layout]
    for told in pool.run(world, run, config_of(variant, **options), world):
        gap = (told - velocity_BTP)[valid_BT].abs().max()
        assert gap <= tolerance.LAYER_FP32 * velocity_BTP.abs().max(), float(gap)


def dtypes(config: RunConfig) -> dict[str, torch.dtype]:
    """Job: dtype of every tensor of a bf16 model, by its name in model space."""
    with Mesh.open(layout_of(config, 1)) as mesh:
        engine = build_engine(config, mesh, with_optimizer=False)
        return {
            piece.name: parameter.dtype for parameter in engine.parameters() for piece in placement_of(parameter).pieces
        }


def test_bf16_models_keep_in_fp32_what_diffusers_keeps(pool: RankPool) -> None:
    config = config_of("first-last frame", dtype="bf16")
    (found,) = pool.run(1, dtypes, config)
    twin = diffusers_wan.tiny_diffusers(config.model)
    kept = {
        diffusers_wan.name_in_model_space(name)
        for name, _ in twin.named_parameters()
        if set(name.split(".")) & set(twin._keep_in_fp32_modules)
    }
    ours = {name for name, dtype in found.items() if dtype == torch.float32}
    assert kept <= ours
    # Beside them the norms across heads and the timestep's projection, whose sums cost nothing in fp32.
    assert {name for name in ours - kept if not name.endswith("_norm.weight")} == {
        "time_embedder.projection.weight", "time_embedder.projection.bias",
    }  # fmt: skip


PUBLISHED: dict[str, dict[str, Any]] = {  # config.json of the published models' transformers, where not the default
    "wan_14b": {},
    "wan21_i2v_14b": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "wan22_t2v_a14b_high": {},
    "wan22_i2v_a14b_low": {"in_channels": 36},
    "wan22_ti2v_5b": {
        "in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336,
    },
}  # fmt: skip


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_every_number_of_the_published_models(preset: str) -> None:
    model = load_run(preset, []).model
    with torch.device("meta"):
        twin = WanTransformer3DModel(**{"text_dim": 4096, **PUBLISHED[preset]})
    theirs = {diffusers_wan.name_in_model_space(name): p.numel() for name, p in twin.named_parameters()}
    assert theirs == {tensor.name: tensor.numel for tensor in tensors(model)}
