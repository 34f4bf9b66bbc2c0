"""What context parallelism must not change beside the loss of a step: clips on their own, samples, reports.

Loss of a clip in a pack and alone; latents of a sampler; the clip losses of a step and the validation loss, which are
sums of what context-parallel ranks hold parts of.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from megavid.config.schema import RunConfig
from megavid.data.build import build_source, build_text_encoder
from megavid.diffusion.objective import FlowObjective
from megavid.models.runner import build_engine, velocity_of
from megavid.ops.packs import Clip, LatentBatch, Pack, clip_parts
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layout_of
from megavid.profiling.collectives import CollectiveRecorder
from megavid.training.kit import ClipSize, SamplingKit
from megavid.training.sampling import Prompt, SamplerSettings, sample_latents
from megavid.training.state import TrainState
from megavid.training.step import TrainStep
from megavid.training.validation import validation_loss
from tests.support import tolerance
from tests.support.newest import newest_too
from tests.support.ranks import RankPool
from tests.support.tiny_world import SEED, initialize, microbatches, packs_of, take_step, tiny_config

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "cp2": (2, {"context": 2}),
    "cp4": (4, {"context": 4}),
    "cp2 tp2 pp2": (8, {"context": 2, "tensor": 2, "pipeline": 2, "expert": 2}),
}
KEPT: dict[str, Any] = {}


def alone(batch: LatentBatch) -> list[LatentBatch]:
    """Every clip of a batch in a pack of its own."""
    batches = []
    for number, row, clip, *_ in clip_parts(batch.packs, batch.span):
        moved = Clip(clip.draw, clip.sample, 0, clip.grid, clip.frame_rate)
        clean_BTP = torch.zeros_like(batch.clean_BTP[:1])
        clean_BTP[0, : clip.tokens] = batch.clean_BTP[row, clip.start : clip.start + clip.tokens]
        pack = Pack((moved,), batch.packs[0].tokens)
        batches.append(LatentBatch((pack,), clean_BTP, batch.text_GLD[number : number + 1]))
    return batches


def losses_of_clips(config: RunConfig, world: int) -> tuple[list[float], list[float]]:
    """Job: mean loss of each clip, in packs with others and alone."""
    objective = FlowObjective(config.diffusion, SEED)
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        initialize(engine)
        span = mesh.token_span(config.data.pack_tokens)

        def losses(batch: LatentBatch) -> list[float]:
            noised = objective.noise(batch.part(span))
            found = objective.loss(velocity_of(engine, noised.input), noised)
            means: list[float] = (mesh.sum(found.sum_G, over="cp") / found.elements_G).tolist()
            return means

        together = packs_of(config, range(2))
        return losses(together), [loss for batch in alone(together) for loss in losses(batch)]


@pytest.mark.parametrize("router", ["sigmoid", "expert_choice"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_of_a_clip_in_a_pack_is_its_loss_alone(pool: RankPool, name: str, router: str) -> None:
    world, options = LAYOUTS[name]
    moe = {"router": router}
    if router not in KEPT:
        KEPT[router] = pool.run(1, losses_of_clips, tiny_config(moe=moe), 1)[0][1]
    packed, lone = pool.run(world, losses_of_clips, tiny_config(moe=moe, **options), world)[0]
    assert len(packed) == 5
    assert packed == pytest.approx(KEPT[router], rel=tolerance.CLIP_FP32)
    assert lone == pytest.approx(KEPT[router], rel=tolerance.CLIP_FP32)


def exchanged(config: RunConfig, world: int) -> dict[str, int]:
    """Job: calls of each collective of context parallelism that this rank makes in one step."""
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        initialize(engine)
        groups = (mesh.context.ulysses_group, mesh.context.ring_group)
        names = {group.group_name: "context" for group in groups if group is not None}
        with CollectiveRecorder(names) as recorder:
            take_step(engine, 0)
    return dict(Counter(call.operation for call in recorder.calls if call.group == "context"))


# Of one layer and pack on four ranks: what crosses the ring forward and backward, and the all-to-alls of each pass.
RING = {
    "ring": (Counter(send=3, recv=3), Counter(send=7, recv=7), Counter()),
    "allgather": (Counter(all_gather=1), Counter(all_gather=1, reduce_scatter=1), Counter()),
    "hybrid": (Counter(send=1, recv=1), Counter(send=3, recv=3), Counter(all_to_all=2)),
    "ulysses": (Counter(), Counter(), Counter(all_to_all=2)),
}


@pytest.mark.parametrize("strategy", newest_too(RING, "hybrid"))
def test_selective_recomputation_never_repeats_the_ring_of_a_whole_model(pool: RankPool, strategy: str) -> None:
    forward, backward, swaps = RING[strategy]
    once = forward + swaps + backward + swaps
    for recompute, want in {"none": once, "selective": once + swaps, "full": once + swaps + forward}.items():
        config = tiny_config("wan", context=4, context_strategy=strategy, recompute=recompute)
        layers_and_packs = config.model.num_layers * config.train.global_batch_size
        for told in pool.run(4, exchanged, config, 4):
            assert told == {name: calls * layers_and_packs for name, calls in want.items()}, recompute


def bytes_kept(config: RunConfig, world: int) -> int:
    """Job: bytes of the tensors that one forward pass keeps for the backward pass on this rank, weights left out."""
    generator = torch.Generator().manual_seed(0)
    tokens, model = config.data.pack_tokens, config.model
    clip = Clip(0, 0, 0, (tokens // 48, 6, 8), 4.0)
    clean_BTP = torch.randn(1, tokens, model.in_channels * model.patch_volume, generator=generator)
    batch = LatentBatch((Pack((clip,), tokens),), clean_BTP, torch.zeros(1, model.text_length, model.text_size))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh, with_optimizer=False)
        engine.initialize(SEED)
        inputs = FlowObjective(config.diffusion, SEED).noise(batch.part(mesh.token_span(tokens))).input
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            velocity_BTP = engine.chunks[0](inputs)
        weights = {parameter.untyped_storage().data_ptr() for parameter in engine.parameters()}
        del velocity_BTP
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def test_what_a_rank_keeps_of_the_forward_pass_falls_with_the_number_of_ranks(pool: RankPool) -> None:
    kept = {cp: pool.run(cp, bytes_kept, tiny_config(pack_tokens=768, context=cp), cp)[0] for cp in (1, 2, 4)}
    print({f"cp{cp}": f"{size / 2**20:.2f} MiB" for cp, size in kept.items()})
    for cp, size in kept.items():
        assert size * cp == pytest.approx(kept[1], rel=0.15)


def sampled(config: RunConfig, world: int, guidance: float) -> list[Tensor]:
    """Job: latents of two prompts of different sizes."""
    kit = SamplingKit.of(config, build_source(config), build_text_encoder(config))
    prompts = [Prompt("a red circle", ClipSize(9, 64, 96, 16.0)), Prompt("a blue square", ClipSize(5, 48, 64, 16.0))]
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        initialize(engine)
        return sample_latents(engine, kit, prompts, SamplerSettings(steps=4, guidance=guidance))


def sampling_config(**parallel: Any) -> RunConfig:
    return tiny_config(channels=32, text=(64, 32), **parallel)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one rank"])
def test_sampler_gives_the_same_latents_on_any_number_of_ranks(pool: RankPool, name: str, guidance: float) -> None:
    world, options = LAYOUTS[name]
    key = f"latents {guidance}"
    if key not in KEPT:
        KEPT[key] = pool.run(1, sampled, sampling_config(), 1, guidance)[0]
    for told in pool.run(world, sampled, sampling_config(**options), world, guidance):
        assert [tuple(latents.shape) for latents in told] == [(32, 3, 8, 12), (32, 2, 6, 8)]
        for got, want in zip(told, KEPT[key], strict=True):
            gap = (got - want).abs().max() / want.abs().max()
            assert gap <= tolerance.LATENTS_FP32, f"off by {gap:.1e}"


def reported(config: RunConfig, world: int) -> dict[str, Any]:
    """Job: what a step and a validation say."""
    with Mesh.open(layout_of(config, world)) as mesh:
        engine = build_engine(config, mesh)
        initialize(engine)
        held_out = [packs_of(config, range(at, at + 1)) for at in (50, 51, 52)]
        before = validation_loss(engine, held_out)
        step = TrainStep(config, engine, FlowObjective(config.diffusion, SEED))
        report = step(TrainState(), microbatches(config, mesh, 0), 0.0)
    return {"validation": before, "report": report}


@pytest.mark.parametrize("name", newest_too(["cp2", "cp4", "cp2 tp2 pp2", "cp2 dp2"], "cp2 tp2 pp2"))
def test_reports_of_a_step_and_validation_count_every_clip_whole(pool: RankPool, name: str) -> None:
    world, options = (4, {"context": 2, "expert": 4}) if name == "cp2 dp2" else LAYOUTS[name]
    if "report" not in KEPT:
        KEPT["report"] = pool.run(1, reported, tiny_config(), 1)[0]
    want = KEPT["report"]
    got = pool.run(world, reported, tiny_config(**options), world)
    clips = {clip.draw: clip for clip in want["report"].clip_losses}
    assert len(clips) == 10
    seen = set()
    for told in got:
        report = told["report"]
        assert (report.tokens, report.clips) == (want["report"].tokens, want["report"].clips)
        assert report.routing.keys() == want["report"].routing.keys()
        for layer, stats in report.routing.items():
            assert torch.equal(stats.counts_QE, want["report"].routing[layer].counts_QE)
        assert told["validation"].loss == pytest.approx(want["validation"].loss, rel=tolerance.LOSS_FP32)
        assert told["validation"].by_noise == pytest.approx(want["validation"].by_noise, rel=tolerance.LOSS_FP32)
        for clip in report.clip_losses:
            seen.add(clip.draw)
            assert clip.loss == pytest.approx(clips[clip.draw].loss, rel=tolerance.LOSS_FP32)
            assert clip.sigma == clips[clip.draw].sigma
    assert seen == clips.keys()
