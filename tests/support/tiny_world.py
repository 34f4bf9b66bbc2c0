"""A model small enough to train in milliseconds, packs with every awkward shape, and jobs that ranks of the pool run.

Owns nothing of the engine: what a user's run calls is called here in the same order.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavid import checkpoint
from megavid.config.schema import (
    DataConfig,
    DiffusionConfig,
    LoraConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from megavid.diffusion.objective import FlowObjective
from megavid.models.runner import build_engine, velocity_of
from megavid.ops.packs import Clip, LatentBatch, Pack
from megavid.ops.philox import key_of, normal_box
from megavid.parallel.engine import Engine
from megavid.parallel.fragment import Fragment
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layout_of
from megavid.training.model_step import StepMetrics, train_step

SEED, LEARNING_RATE = 7, 1e-2


def tiny_config(
    family: str = "wan_moe",
    *,
    moe: dict[str, Any] | None = None,
    micro: int = 1,
    dtype: str = "fp32",
    channels: int = 4,
    text: tuple[int, int] = (8, 6),
    pack_tokens: int = 96,
    task: str = "t2v",
    image: tuple[int, int, int] = (0, 257, 0),
    lora: dict[str, Any] | None = None,
    **parallel: Any,
) -> RunConfig:
    """Four layers of width 48; of ``wan_moe`` the middle two have four experts, a shared one and biases.

    ``image`` is the width of image features, their tokens, and learned positions.
    """
    experts = {"num_experts": 4, "top_k": 2, "expert_ffn_size": 32, "shared_ffn_size": 32, "bias_update_rate": 1e-2}
    return RunConfig(
        model=ModelConfig(
            family=family,
            num_layers=4,
            hidden_size=48,
            num_heads=4,
            ffn_size=96,
            in_channels=2 * channels + 4 if task == "i2v" else channels,
            out_channels=channels,
            task=task,
            image_size=image[0],
            image_length=image[1],
            image_positions=image[2],
            text_size=text[0],
            text_length=text[1],
            frequency_size=16,
            absolute_positions=True,
            moe=MoEConfig(**{**experts, **(moe or {})}),
        ),
        parallel=ParallelConfig(**parallel),
        # In plain torch: tests that take the compiled ops say so, and compare with this.
        train=TrainConfig(global_batch_size=4, micro_batch_size=micro, seed=SEED, ops="reference"),
        precision=PrecisionConfig(dtype=dtype),
        lora=LoraConfig(**(lora or {})),
        diffusion=DiffusionConfig(),
        data=DataConfig(pack_tokens=pack_tokens),
    )


def packs_of(config: RunConfig, numbers: range) -> LatentBatch:
    """Packs as functions of their number: clips of several sizes, a still image, and a padded tail.

    Halves, thirds and quarters of a pack begin within clips. Clips that no longer fit are left out: packs of 48 tokens
    hold one clip, and a third or a quarter of such a pack may hold none.
    """
    packs, texts, clean = [], [], []
    model = config.model
    latent, given = (channels * model.patch_volume for channels in (model.out_channels, model.in_channels))
    for number in numbers:
        # A seed with which no routing decision of three steps is near a tie, see test_routing_flips.
        generator = torch.Generator().manual_seed(1000 + number)
        grids = [(1, 6, 6), (3, 4, 4)] if number % 2 else [(1, 4, 4), (2, 4, 6), (1, 2, 2)]
        rows, clips, start = torch.zeros(config.data.pack_tokens, latent), [], 0
        for place, grid in enumerate(grids):
            if start + math.prod(grid) > config.data.pack_tokens:
                break
            known = (0,) if model.task == "ti2v" and grid[0] > 1 else ()
            clip = Clip(10 * number + place, number, start, grid, frame_rate=4.0 / 2**place, known=known)
            rows[start : start + clip.tokens] = torch.randn(clip.tokens, rows.shape[1], generator=generator)
            texts.append(torch.randn(model.text_length, model.text_size, generator=generator))
            clips.append(clip)
            start += clip.tokens
        packs.append(Pack(tuple(clips), config.data.pack_tokens))
        clean.append(rows)
    batch = LatentBatch(tuple(packs), torch.stack(clean), torch.stack(texts))
    # From other streams, so that what all tasks share is the same in all. Still images are clips without an image.
    if model.task == "i2v":
        shape = (config.data.pack_tokens, given - latent)
        batch = replace(batch, condition_BTP=torch.stack([drawn(2000 + number, *shape) for number in numbers]))
    if model.image_size:
        shape = (model.image_length, model.image_size)
        image_GLI = torch.stack([drawn(3000 + clip.draw, *shape) * (clip.grid[0] > 1) for clip in batch.clips])
        has_image_G = torch.tensor([clip.grid[0] > 1 for clip in batch.clips])
        batch = replace(batch, image_GLI=image_GLI, has_image_G=has_image_G)
    return batch


def drawn(seed: int, *shape: int) -> Tensor:
    """Normal numbers of a stream of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def microbatches(config: RunConfig, mesh: Mesh, step: int) -> list[LatentBatch]:
    """This rank's packs of global batch ``step`` (from 0)."""
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    share = batch // mesh.size("dp")
    first = step * batch + mesh.coordinate("dp") * share
    return [packs_of(config, range(at, at + micro)) for at in range(first, first + share, micro)]


def initialize(engine: Engine[Any]) -> None:
    """Fresh weights, but for the head: a fresh one is zero and lets no gradient pass in the first step."""
    engine.initialize(SEED)
    for fragment in engine.weight_fragments("model"):
        if not fragment.name.startswith("model/head.projection"):
            continue
        at = 0
        for box in fragment.boxes:
            key, device = key_of(SEED, fragment.name), fragment.data.device
            drawn = normal_box(key, fragment.global_shape, box.offset, box.shape, device).reshape(-1)
            fragment.data[at : at + box.numel] += 0.1 * drawn
            at += box.numel
    engine.load_finished()


def take_step(engine: Engine[Any], step: int) -> StepMetrics:
    """Optimizer step ``step`` (from 0) on its global batch."""
    objective = FlowObjective(engine.config.diffusion, SEED)
    return train_step(engine, microbatches(engine.config, engine.mesh, step), objective, learning_rate=LEARNING_RATE)


def held(fragments: list[Fragment]) -> list[tuple[str, tuple[int, ...], Any, Tensor]]:
    """What this rank owns of ``fragments``, to be put together by ``assemble``."""
    return [(f.name, f.global_shape, f.boxes, f.data.detach().clone()) for f in fragments if f.is_owner]


def assemble(ranks: list[list[tuple[str, tuple[int, ...], Any, Tensor]]]) -> dict[str, Tensor]:
    """Whole tensors in model space from what every rank held; each element must have come exactly once."""
    whole: dict[str, Tensor] = {}
    count: dict[str, Tensor] = {}
    for pieces in ranks:
        for name, shape, boxes, data in pieces:
            target = whole.setdefault(name, torch.full(shape, float("nan")))
            times = count.setdefault(name, torch.zeros(shape))
            at = 0
            for box in boxes:
                window = tuple(slice(o, o + s) for o, s in zip(box.offset, box.shape))
                target[window] = data[at : at + box.numel].view(box.shape).float()
                times[window] += 1
                at += box.numel
    for name, times in count.items():
        assert (times == 1).all(), f"{name}: elements owned {times.min()} to {times.max()} times"
    return whole


def train(config: RunConfig, world: int, steps: int = 3) -> dict[str, Any]:
    """Job: train and tell losses, norms, gradients of the first step (Adam's first moment) and the final weights."""
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        initialize(engine)
        losses, norms, routed, first = [], [], [], []
        for step in range(steps):
            metrics = take_step(engine, step)
            losses.append(metrics.loss)
            norms.append(metrics.grad_norm)
            routed.append({layer: stats.counts_QE for layer, stats in metrics.routing.items()})
            if step == 0:
                first = held([f for f in engine.fragments() if f.name.startswith("exp_avg/")])
        final = held([f for f in engine.fragments() if f.name.split("/")[0] in ("model", "ema", "buffer")])
        batch = packs_of(config, range(99, 100)).part(mesh.token_span(config.data.pack_tokens))
        velocity = mesh.gather_tokens(velocity_of(engine, FlowObjective(config.diffusion, SEED).noise(batch).input))
    return {"loss": losses, "norm": norms, "routed": routed, "first": first, "final": final, "velocity": velocity}


def train_and_save(config: RunConfig, world: int, folder: str, before: int, after: int) -> dict[str, Any]:
    """Job: train ``before`` steps, save, train ``after`` more; what was saved is told too."""
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        initialize(engine)
        for step in range(before):
            take_step(engine, step)
        state = {"updates": engine.updates.updates}
        checkpoint.save(Path(folder), before, engine.fragments(), state, mesh, run_toml="", layout="")
        saved = held(engine.fragments())
        later = [take_step(engine, before + step) for step in range(after)]
    return {"loss": [m.loss for m in later], "norm": [m.grad_norm for m in later], "saved": saved}


def load_and_train(config: RunConfig, world: int, folder: str, before: int, after: int) -> dict[str, Any]:
    """Job: load what ``train_and_save`` saved, tell it, and train on."""
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        found = checkpoint.load(checkpoint.resolve(Path(folder)), engine.fragments(), mesh)
        engine.load_finished(found.state["updates"])
        loaded = held(engine.fragments())
        later = [take_step(engine, before + step) for step in range(after)]
    return {"loss": [m.loss for m in later], "norm": [m.grad_norm for m in later], "saved": loaded}


def with_parallel(config: RunConfig, **parallel: Any) -> RunConfig:
    """``config`` in another layout."""
    return replace(config, parallel=ParallelConfig(**parallel))
