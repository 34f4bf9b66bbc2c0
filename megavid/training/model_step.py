"""One optimizer step of a model under an objective: noise, forward, backward, reduce, decide, update.

Owns the arithmetic that makes a step independent of the layout: the loss has one denominator, the elements of the
whole global batch, fixed before anything runs; whether the step is taken is decided from reduced figures, alike on
every rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from megavid.diffusion.objective import ClipLosses, Noised
from megavid.models.fp8 import scalings_of, update_histories
from megavid.models.moe.stats import RoutingStats, update_expert_bias_
from megavid.ops.packs import LatentBatch
from megavid.ops.regions import in_region, region
from megavid.parallel.engine import Engine


class Objective(Protocol):
    """What is learnt: how a batch is noised, and how far the model's answer is from the target."""

    def noise(self, batch: LatentBatch) -> Noised:
        """Noised inputs and the target of a batch."""

    def loss(self, velocity_BTP: Tensor, noised: Noised) -> ClipLosses:
        """Sums of squared errors over the tokens of the batch's span, by clip."""


@dataclass(frozen=True)
class StepMetrics:
    """Figures of one step, equal on every rank.

    Attributes:
        loss: mean squared error over the elements of the global batch.
        grad_norm: norm of the whole gradient before clipping.
        finite: False where the step was skipped.
        routing: statistics of each expert layer over the global batch.
        culprit: where a step was skipped, what was not finite, as far as one can tell, or that it was a spike; else "".
    """

    loss: float
    grad_norm: float
    finite: bool
    routing: dict[int, RoutingStats]
    culprit: str


def train_step(
    engine: "Engine[Any]",
    microbatches: Sequence[LatentBatch],
    objective: Objective,
    *,
    learning_rate: float,
    loss_limit: float = math.inf,
) -> StepMetrics:
    """Take one optimizer step on this rank's ``microbatches`` of the global batch.

    The update is left out, on all ranks alike, where the loss or the gradient's norm is not finite, or where the loss
    is above ``loss_limit``.

    Ranks: collective; every rank of one model replica has the same microbatches, of which it moves only its own span
    of the tokens to the device.
    """
    mesh, device = engine.mesh, engine.mesh.device
    model = engine.config.model
    width = model.out_channels * model.patch_volume
    with region("statistics"):
        local = torch.tensor(
            [sum(b.num_unknown_tokens for b in microbatches) * width, sum(len(b.clips) for b in microbatches)],
            dtype=torch.float64,
            device=device,
        )
        elements, clips = mesh.sum(local, over="dp").tolist()

    def forward(chunk: Any, noised: Noised) -> Tensor:
        result: Tensor = chunk(noised.input, aux_scale=1.0 / clips, loss_scale=engine.loss_scale)
        return result

    def loss_of(noised: Noised, velocity_BTP: Tensor) -> tuple[Tensor, Tensor]:
        with region("loss"):
            part = objective.loss(velocity_BTP, noised).sum_G.sum() / elements
        return part, part.detach().clone()  # the schedule divides the first in place

    span = mesh.token_span(engine.config.data.pack_tokens)
    noised_batches = []
    for batch in microbatches:
        with region("batch"):
            moved = batch.part(span).to(device)
        with region("noise"):
            noised_batches.append(objective.noise(moved))
    losses = engine.forward_backward(forward, loss_of, noised_batches)
    loss = _global_loss(engine, losses)
    norm = engine.updates.gradient_norm()
    finite = math.isfinite(loss) and math.isfinite(norm)
    is_taken = finite and loss <= loss_limit
    routing = _global_routing(engine)
    with region("statistics"):
        update_histories(scalings_of(engine.chunks), partial(mesh.max, over="tp_dp_cp"))
    culprit = ""
    if is_taken:
        engine.updates.step(learning_rate, norm)
        _update_router_bias(engine, routing)
    elif finite:
        culprit = f"a spike of the loss, above {loss_limit:.5g}"
    else:
        culprit = _find_culprit(engine)
    return StepMetrics(loss, norm, is_taken, routing, culprit)


@in_region("statistics")
def _global_loss(engine: "Engine[Any]", parts: list[Tensor]) -> float:
    total = torch.zeros((), dtype=torch.float64, device=engine.mesh.device)
    for part in parts:
        total = total + part.double()
    for axis in ("dp_cp", "pp"):  # only the last stage has parts; its tensor-parallel ranks all have the same
        total = engine.mesh.sum(total, over=axis)
    return float(total)


@in_region("statistics")
def _global_routing(engine: "Engine[Any]") -> dict[int, RoutingStats]:
    """Statistics of this rank's layers, summed over the ranks that hold other tokens."""
    summed = {}
    for chunk in engine.chunks:
        for layer, stats in chunk.take_routing().items():
            flat = torch.cat([value.reshape(-1).double() for value in stats])
            flat = engine.mesh.sum(flat, over="dp_cp")
            if engine.mesh.is_sequence_parallel:
                flat = engine.mesh.sum(flat, over="tp")
            values, at = [], 0
            for value in stats:
                values.append(flat[at : at + value.numel()].view(value.shape))
                at += value.numel()
            summed[layer] = RoutingStats(*values)
    return summed


@in_region("optimizer")
def _update_router_bias(engine: "Engine[Any]", routing: dict[int, RoutingStats]) -> None:
    if engine.has_frozen:  # the router is frozen, and its bias with it
        return
    rate = engine.config.model.moe.bias_update_rate
    for chunk in engine.chunks:
        for block in chunk.blocks:
            if block.layer in routing and block.feed_forward.router.expert_bias is not None:
                update_expert_bias_(block.feed_forward.router, routing[block.layer].counts_QE.sum(0), rate)


def _find_culprit(engine: "Engine[Any]") -> str:
    """Name of the first parameter, in model order, whose gradient is not finite on any rank."""
    bad = engine.updates.bad_gradients()
    found = sorted({name for names in engine.mesh.all_gather_object(bad[:4]) for name in names})
    return f"gradient of {found[0]}" if found else "the loss itself; every gradient is finite"
