"""Whether a converted model computes what its source computes: both run on seeded inputs, block by block.

Owns the inputs, the run on megavid's engine (one rank) and the bound. The other model is a torch module of whoever
serves it (diffusers, megavid.inference), which the caller loads. Both hold the whole model in fp32.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megavid.checkpoint.convert.lazy import LazyTensor
from megavid.config.schema import DataConfig, ModelConfig, RunConfig
from megavid.errors import CheckpointError
from megavid.models.inputs import ModelInput
from megavid.models.runner import build_engine, velocity_of
from megavid.ops.packs import Clip, Pack
from megavid.ops.patches import Triple, patchify, token_grid, unpatchify
from megavid.ops.philox import key_of, normal
from megavid.parallel.engine import Engine
from megavid.parallel.launch import RankEnv, init_distributed
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layout_of

BOUND = 1e-5
"""Largest difference of a block's output, relative to the largest number in it, that is rounding.

Both models compute in fp32 with bitwise the same weights (a narrower number format rounds both sides alike before they
run), so they differ only in the order of sums: 6e-8 for each operation, growing like the square root of their number,
which leaves a decade below the bound at 40 blocks. A tensor in the wrong place, a norm's epsilon or a permuted head is
off by 1e-2 and more.
"""
GRID: Triple = (3, 4, 6)
"""Tokens of the clips, along time, height and width."""
CLIPS = 2


@dataclass(frozen=True)
class Call:
    """What both models are called with: two clips of one size.

    Attributes:
        latents_BCFHW: all input channels.
        timestep_BT: of every token; the first frame's are 0 where the model is given it clean.
        text_BLD: text features.
        image_BLI: image features; None for a model without an image branch.
    """

    latents_BCFHW: Tensor
    timestep_BT: Tensor
    text_BLD: Tensor
    image_BLI: Tensor | None

    def to_reference(self, model: ModelConfig) -> dict[str, Tensor | bool]:
        """Arguments of diffusers' transformer."""
        per_clip = model.task != "ti2v"
        arguments: dict[str, Tensor | bool] = {
            "hidden_states": self.latents_BCFHW,
            "timestep": self.timestep_BT[:, 0] if per_clip else self.timestep_BT,
            "encoder_hidden_states": self.text_BLD,
            "return_dict": False,
        }
        if self.image_BLI is not None:
            # With positions, diffusers wants the pictures of a clip apart and joins them itself.
            pictures = 2 if model.image_positions else 1
            tokens, width = self.image_BLI.shape[1:]
            arguments["encoder_hidden_states_image"] = self.image_BLI.reshape(-1, tokens // pictures, width)
        return arguments

    def to_engine(self, model: ModelConfig) -> ModelInput:
        """The same for megavid's engine: each clip in a pack of its own."""
        batch, _, *size = self.latents_BCFHW.shape
        grid = token_grid(size[0], size[1], size[2], model.patch_size)
        tokens, frame_rate = math.prod(grid), model.latent_frame_rate
        packs = tuple(Pack((Clip(n, n, 0, grid, frame_rate),), tokens) for n in range(batch))
        per_frame = tokens // grid[0]
        timestep_R = self.timestep_BT[:, ::per_frame].flatten()
        row_BT = torch.arange(batch)[:, None] * grid[0] + torch.arange(tokens)[None] // per_frame
        has_image = self.image_BLI is not None
        return ModelInput(
            packs=packs,
            patches_BTP=torch.stack([patchify(clip, model.patch_size) for clip in self.latents_BCFHW]),
            timestep_R=timestep_R,
            row_BT=row_BT,
            text_GLD=self.text_BLD,
            image_GLI=self.image_BLI,
            has_image_G=torch.ones(batch, dtype=torch.bool) if has_image else None,
        )


def probe_call(model: ModelConfig, seed: int = 0, grid: Triple = GRID) -> Call:
    """Seeded inputs for a model."""
    frames, rows, columns = (extent * patch for extent, patch in zip(grid, model.patch_size, strict=True))

    def drawn(name: str, *shape: int) -> Tensor:
        return normal(key_of(seed, "verify", name), 0, math.prod(shape)).view(shape)

    timestep_BT = torch.tensor([937.0, 250.0])[:CLIPS, None].repeat(1, math.prod(grid))
    if model.task == "ti2v":
        timestep_BT[:, : grid[1] * grid[2]] = 0.0
    image = drawn("image", CLIPS, model.image_length, model.image_size) if model.image_size else None
    latents = drawn("latents", CLIPS, model.in_channels, frames, rows, columns)
    return Call(latents, timestep_BT, drawn("text", CLIPS, model.text_length, model.text_size), image)


@dataclass(frozen=True, slots=True)
class Gap:
    """How far two models are apart at one place.

    Attributes:
        place: a block, or the velocity.
        largest: largest absolute difference.
        rms: root of the mean squared difference.
        scale: largest absolute number of the reference.
    """

    place: str
    largest: float
    rms: float
    scale: float

    @property
    def is_rounding(self) -> bool:
        """Whether it is within ``BOUND``; False for numbers that are not finite."""
        return self.largest <= BOUND * self.scale


def compare(model: ModelConfig, tensors: Mapping[str, LazyTensor], reference: nn.Module) -> list[Gap]:
    """Run both models and compare every block's output, and the velocity.

    Args:
        model: their shape.
        tensors: of the model in model space; the engine runs them.
        reference: a transformer with diffusers' arguments and ``blocks``; its weights are already those of ``tensors``,
            rounding to a number format included.
    """
    call = probe_call(model)
    theirs = _run_reference(reference, call, model)
    with one_rank():
        ours = _run_engine(model, tensors, call)
    return [_gap(place, ours[place], value) for place, value in theirs.items()]


def check_gaps(gaps: list[Gap]) -> None:
    """Raise ``CheckpointError`` where a gap is more than rounding."""
    bad = [gap for gap in gaps if not gap.is_rounding]
    if bad:
        raise CheckpointError(
            f"--verify: the models differ from {bad[0].place} on: {bad[0].largest:.3g} of {bad[0].scale:.3g}, bound "
            f"{BOUND:g} of it (both run in fp32 with the same weights, so only the order of sums may differ); "
            f"{len(bad)} of {len(gaps)} places differ"
        )


def gap_lines(gaps: list[Gap]) -> Iterator[str]:
    """A table of the gaps."""
    yield f"{'place':<12} {'max':>10} {'rms':>10} {'max / largest':>14}"
    for gap in gaps:
        yield f"{gap.place:<12} {gap.largest:>10.2e} {gap.rms:>10.2e} {gap.largest / (gap.scale or 1):>14.2e}"


def fill(engine: "Engine[Any]", tensors: Mapping[str, LazyTensor]) -> None:
    """Give an engine, of any layout, its weights and routers' bias from tensors in model space."""
    for fragment in [*engine.weight_fragments("model"), *engine.buffer_fragments()]:
        whole, at = tensors[fragment.name.partition("/")[2]].read(), 0
        for box in fragment.boxes:
            part = whole[tuple(slice(low, low + extent) for low, extent in zip(box.offset, box.shape))]
            fragment.data[at : at + box.numel].copy_(part.reshape(-1))
            at += box.numel
    engine.load_finished()


@contextmanager
def one_rank() -> Iterator[None]:
    """A world of one rank, on the CPU."""
    init_distributed(RankEnv(), "cpu")
    try:
        yield
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def _run_reference(reference: nn.Module, call: Call, model: ModelConfig) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    handles = []
    for number, block in enumerate(reference.get_submodule("blocks").children()):

        def keep(module: nn.Module, args: Any, output: Tensor, place: str = f"block {number}") -> None:
            outputs[place] = output

        handles.append(block.register_forward_hook(keep))
    outputs["velocity"] = reference(**call.to_reference(model))[0]
    for handle in handles:
        handle.remove()
    return outputs


@torch.no_grad()
def _run_engine(model: ModelConfig, tensors: Mapping[str, LazyTensor], call: Call) -> dict[str, Tensor]:
    inputs = call.to_engine(model)
    config = RunConfig(model=model, data=DataConfig(pack_tokens=inputs.packs[0].tokens))
    outputs: dict[str, Tensor] = {}
    with Mesh.open(layout_of(config, 1)) as mesh:
        engine = build_engine(config, mesh, with_optimizer=False)
        fill(engine, tensors)
        for block in engine.chunks[0].blocks:

            def keep(module: Any, args: Any, output: Any) -> None:
                outputs[f"block {module.layer}"] = output[0].transpose(0, 1)

            block.register_forward_hook(keep)
        velocity_BTP = velocity_of(engine, inputs)
    outputs["velocity"] = clips_of(velocity_BTP, inputs, model)
    return outputs


def clips_of(velocity_BTP: Tensor, inputs: ModelInput, model: ModelConfig) -> Tensor:
    """Velocity of packs that hold one clip each, as latents [B, C, F, H, W]."""
    grid = inputs.packs[0].clips[0].grid
    return torch.stack([unpatchify(clip, grid, model.patch_size) for clip in velocity_BTP])


def _gap(place: str, ours: Tensor, theirs: Tensor) -> Gap:
    difference = (ours.double() - theirs.double()).abs()
    rms = difference.square().mean().sqrt().item()
    return Gap(place, difference.max().item(), rms, theirs.abs().max().item())
