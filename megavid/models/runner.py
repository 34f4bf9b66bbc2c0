"""Building the engine of a run's model, and calling the model for its velocity in any layout.

Owns the two calls that training, validation and sampling share, so that none of them knows how the model is cut.
"""

from typing import Any

import torch
from torch import Tensor

from megavid.config.schema import RunConfig
from megavid.models.inputs import ModelInput
from megavid.models.video_dit import build_chunks
from megavid.parallel.engine import Engine
from megavid.parallel.mesh import Mesh
from megavid.parallel.zero import ZeroEngine


def build_engine(config: RunConfig, mesh: Mesh, *, with_optimizer: bool = True) -> "Engine[Any]":
    """The engine of ``config`` on ``mesh``, its weights not yet filled: initialise or load them.

    Args:
        config: the run.
        mesh: open, in the layout of the config.
        with_optimizer: False for a model that only runs forward.
    """
    kind = ZeroEngine if config.train.backend == "deepspeed" else Engine
    engine: Engine[Any] = kind(config, mesh, build_chunks(config, mesh))
    return engine.with_optimizer() if with_optimizer else engine


def velocity_of(engine: "Engine[Any]", inputs: ModelInput) -> Tensor:
    """The model's velocity at the tokens of ``inputs``, [B, T, P] fp32, on the patches' device; no gradient.

    Ranks: every rank of one model replica calls it with the same inputs, cut to its own span of the tokens
    (``Mesh.token_span``), and gets the velocity of that span; data-parallel replicas may differ.
    """
    layout, mesh = engine.mesh.layout, engine.mesh
    # The interleaved schedule takes its microbatches in rounds of the number of stages.
    rounds = layout.pp if layout.vpp > 1 else 1

    def forward(chunk: Any, batch: ModelInput) -> Tensor:
        result: Tensor = chunk(batch)
        return result

    def keep(batch: ModelInput, velocity_BTP: Tensor) -> tuple[Tensor, Tensor]:
        return velocity_BTP.new_zeros(()), velocity_BTP

    home, inputs = inputs.patches_BTP.device, inputs.to(mesh.device)
    shape = (inputs.packs[0].tokens, len(inputs.packs))
    kept = engine.forward(forward, keep, [inputs] * rounds, pack_shape=shape)
    for chunk in engine.chunks:
        chunk.take_routing()
    if mesh.size("pp") == 1:
        first: Tensor = kept[0]
        return first.to(home)
    model = engine.config.model
    width = model.out_channels * model.patch_volume
    velocity = kept[0] if kept else torch.empty(shape[1], inputs.span.tokens, width, device=mesh.device)
    velocity = velocity.contiguous()
    mesh.broadcast(velocity, "pp", mesh.size("pp") - 1)
    return velocity.to(home)
