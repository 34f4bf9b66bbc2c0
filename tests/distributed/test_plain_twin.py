"""Rungs 1 and 3 of the parity ladder: layers on several ranks against a plain twin in fp64, and stages alone.

Output, gradient of the input and gradient of every weight of the dense model, against the same model written out for
one device; and every pipeline chunk, built and run without its neighbours.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megavid.diffusion.objective import FlowObjective
from megavid.models.build import Build
from megavid.models.inputs import ModelInput
from megavid.models.transformer import transformer_config
from megavid.models.video_dit import VideoTransformer, build_chunks
from megavid.ops.packs import Span, clip_index
from megavid.ops.philox import key_of, normal
from megavid.parallel import mcore
from megavid.parallel.mesh import Mesh
from megavid.parallel.placement import Piece, is_owner, placement_of
from megavid.plan.layout import layout_of
from megavid.plan.parameters import tensors
from tests.support import plain_wan, tolerance
from tests.support.newest import newest_too
from tests.support.ranks import RankPool
from tests.support.tiny_world import packs_of, tiny_config


def whole(piece: Piece) -> Tensor:
    """A tensor of the model in fp64, a function of its name."""
    numel = torch.Size(piece.global_shape).numel()
    values = normal(key_of("twin", piece.name), 0, numel).double().view(piece.global_shape)
    return 1 + 0.1 * values if piece.name.endswith(("norm.weight", "norm_in.weight")) else 0.3 * values


def window(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(piece.offset, piece.shape))


def inputs_of(config: Any, span: Span) -> ModelInput:
    noised = FlowObjective(config.diffusion, 1).noise(packs_of(config, range(2)).part(span)).input
    image_GLI = None if noised.image_GLI is None else noised.image_GLI.double()
    patches_BTP, text_GLD = noised.patches_BTP.double(), noised.text_GLD.double()
    return replace(noised, patches_BTP=patches_BTP, text_GLD=text_GLD, image_GLI=image_GLI)


def run_sharded(config: Any, world: int) -> dict[str, Any]:
    """Job: velocity, and gradients of the patches and of every weight piece, of a chunk that is the whole model."""
    with Mesh.open(layout_of(config, world)) as mesh:
        transformer = replace(transformer_config(config, mesh.layout, mesh.device), params_dtype=torch.float64)
        build = Build(config.model, transformer, mesh, is_first_chunk=True)
        model = VideoTransformer(build, range(config.model.num_layers), config.parallel.recompute, None)
        for parameter in model.parameters():
            flat = parameter.detach().view(-1)
            for piece in placement_of(parameter).pieces:
                part = whole(piece)[window(piece)].reshape(-1)
                flat[piece.start : piece.start + part.numel()] = part
        tokens = config.data.pack_tokens
        span = mesh.token_span(tokens)
        inputs = inputs_of(config, span)
        inputs.patches_BTP.requires_grad_()
        velocity = model(inputs)
        velocity.backward(probe(velocity, tokens)[:, span.start : span.stop] * valid_of(inputs))
        patches_grad = inputs.patches_BTP.grad
        assert patches_grad is not None
        if mesh.is_sequence_parallel:  # each rank embeds its own tokens
            patches_grad = mesh.sum(patches_grad, over="tp")
        velocity, patches_grad = mesh.gather_tokens(velocity), mesh.gather_tokens(patches_grad)
        weights = {}
        for parameter in model.parameters():
            gradient = parameter.grad
            assert gradient is not None
            gradient = mesh.sum(gradient, over="dp_cp")
            if placement_of(parameter).is_partial_over_tp:
                gradient = mesh.sum(gradient, over="tp")
            for piece in placement_of(parameter).pieces:
                size = torch.Size(piece.shape).numel()
                part = gradient.reshape(-1)[piece.start : piece.start + size].view(piece.shape)
                weights[piece.name] = (piece, part, is_owner(parameter, mesh.coordinates))
    return {"velocity": velocity.detach(), "patches": patches_grad, "weights": weights}


def probe(velocity: Tensor, tokens: int) -> Tensor:
    """Fixed weights of a scalar loss, so that the gradient is not symmetric; of packs of so many tokens."""
    shape = (velocity.shape[0], tokens, velocity.shape[2])
    return normal(key_of("probe"), 0, torch.Size(shape).numel()).double().view(shape)


def valid_of(inputs: ModelInput) -> Tensor:
    """1 for tokens of clips, 0 in the padding; [B, T, 1]."""
    return (clip_index(inputs.packs, inputs.span) >= 0).double().unsqueeze(-1)


def close(got: Tensor, want: Tensor, name: str) -> None:
    gap, scale = (got - want).abs().max().item(), want.abs().max().item()
    assert gap <= tolerance.LAYER_FP64 * scale, f"{name}: off by {gap:.1e} of {scale:.1e}"


LAYOUTS = {
    "one rank": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2 without sp": (2, {"tensor": 2, "sequence": False}),
    "tp4": (4, {"tensor": 4}),
    "tp2 full recompute": (2, {"tensor": 2, "recompute": "full"}),
    "tp2 selective recompute": (2, {"tensor": 2, "recompute": "selective"}),
    "cp2": (2, {"context": 2}),
    "cp3 selective recompute": (3, {"context": 3, "recompute": "selective"}),
    "cp4": (4, {"context": 4}),
    "cp2 tp2 full recompute": (4, {"context": 2, "tensor": 2, "recompute": "full"}),
}


IMAGE = {"task": "i2v", "image": (10, 5, 0)}
MODELS = {"t2v": {}, "i2v": IMAGE, "first-last frame": {"task": "i2v", "image": (10, 6, 6)}, "ti2v": {"task": "ti2v"}}
MODEL_LAYOUTS = {
    **{("t2v", name): layout for name, layout in LAYOUTS.items()},
    **{("i2v", name): LAYOUTS[name] for name in ("tp2", "tp2 without sp", "cp3 selective recompute")},
    ("i2v", "cp2 tp2 full recompute"): LAYOUTS["cp2 tp2 full recompute"],
    ("first-last frame", "one rank"): LAYOUTS["one rank"],
    ("first-last frame", "tp4"): LAYOUTS["tp4"],
    ("ti2v", "tp2 selective recompute"): LAYOUTS["tp2 selective recompute"],
    ("ti2v", "cp4"): LAYOUTS["cp4"],
}
TWINS: dict[str, dict[str, Any]] = {}


def twin_of(kind: str) -> dict[str, Any]:
    """What the plain model gives; computed once."""
    if kind not in TWINS:
        TWINS[kind] = plain_twin(tiny_config("wan", **MODELS[kind]))
    return TWINS[kind]


def plain_twin(config: Any) -> dict[str, Any]:
    inputs = inputs_of(config, Span(0, config.data.pack_tokens))
    inputs.patches_BTP.requires_grad_()
    weights = {
        tensor.name: whole(Piece(tensor.name, tensor.shape, (), ())).requires_grad_()
        for tensor in tensors(config.model)
    }
    velocity = plain_wan.velocity(config.model, weights, inputs)
    valid = valid_of(inputs)
    velocity.backward(probe(velocity, config.data.pack_tokens) * valid)
    return {"velocity": velocity.detach(), "patches": inputs.patches_BTP.grad, "weights": weights, "valid": valid}


@pytest.mark.parametrize(
    ("kind", "name"),
    newest_too(MODEL_LAYOUTS, ("t2v", "one rank"), ("t2v", "cp2 tp2 full recompute"), ("first-last frame", "tp4")),
)
def test_sharded_model_equals_its_plain_twin(pool: RankPool, kind: str, name: str) -> None:
    world, options = MODEL_LAYOUTS[kind, name]
    twin = twin_of(kind)
    for told in pool.run(world, run_sharded, tiny_config("wan", **MODELS[kind], **options), world):
        close(told["velocity"] * twin["valid"], twin["velocity"], "velocity")
        close(told["patches"] * twin["valid"], twin["patches"], "gradient of the patches")
        for tensor, (piece, part, _) in told["weights"].items():
            close(part, twin["weights"][tensor].grad[window(piece)], f"gradient of {tensor}")
        assert len(told["weights"]) == len(twin["weights"])


def run_stage_alone(config: Any, world: int) -> list[tuple[tuple[int, ...], bool]]:
    """Job: give every chunk hidden states out of the air; tell the shapes that leave it and whether all are finite."""
    with Mesh.open(layout_of(config, world)) as mesh:
        inputs = FlowObjective(config.diffusion, 1).noise(packs_of(config, range(1))).input
        told = []
        for chunk in build_chunks(config, mesh):
            for parameter in chunk.parameters():
                parameter.detach().normal_(std=0.1)
            shape = (config.data.pack_tokens, 1, config.model.hidden_size)
            chunk.set_input_tensor(None if chunk.pre_process else torch.randn(shape))
            result = chunk(inputs)
            result.sum().backward()
            told.append((tuple(result.shape), bool(torch.isfinite(result).all())))
    return told


@pytest.mark.parametrize("family", ["wan", "wan_moe"])
@pytest.mark.parametrize(("world", "vpp"), newest_too([(4, 1), (2, 2)], (2, 2)))
def test_every_stage_builds_and_runs_alone(pool: RankPool, family: str, world: int, vpp: int) -> None:
    config = tiny_config(family, pipeline=world, virtual_pipeline=vpp)
    stages = pool.run(world, run_stage_alone, config, world)
    hidden, velocity = (96, 1, 48), (1, 96, 16)
    for stage, chunks in enumerate(stages):
        for chunk, (shape, is_finite) in enumerate(chunks):
            is_last = stage == world - 1 and chunk == vpp - 1
            assert is_finite
            assert shape == (velocity if is_last else hidden)


def test_norm_across_heads_without_its_backward_sum_would_show(pool: RankPool) -> None:
    """The first test can fail: q and k normalised with a sum that only the forward pass reduces."""
    twin = twin_of("t2v")
    for told in pool.run(2, run_without_backward_sum, tiny_config("wan", tensor=2)):
        piece, part, _ = told["weights"]["blocks.0.self_attention.q.weight"]
        want = twin["weights"]["blocks.0.self_attention.q.weight"].grad[window(piece)]
        assert (part - want).abs().max() > 1e-3 * want.abs().max()


def run_without_backward_sum(config: Any) -> dict[str, Any]:
    original = mcore.copy_to_tensor_model_parallel_region
    mcore.copy_to_tensor_model_parallel_region = lambda x, group: x
    try:
        return run_sharded(config, 2)
    finally:
        mcore.copy_to_tensor_model_parallel_region = original
