"""The engine: one training step, or one forward pass, of a pipelined, sharded model on megatron-core.

Owns the model's chunks, their DistributedDataParallel wrappers, the optimizer and the schedule. Knows no loss and no
file: what to compute is a function of a chunk and a microbatch. A step's loss has one denominator, known before it
begins, so gradients are plain sums and do not depend on the layout.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from megavid.config.schema import RunConfig
from megavid.ops.philox import key_of, normal_box
from megavid.ops.regions import in_region
from megavid.parallel import mcore
from megavid.parallel.fragment import HISTORY, Box, Fragment
from megavid.parallel.gradients import GradientFinisher
from megavid.parallel.mesh import Mesh
from megavid.parallel.optimizer import ShardedAdamW, Updates, fragments_of
from megavid.parallel.placement import Placement, is_owner, placement_of
from megavid.parallel.weight_gradients import add_in_place

Microbatch = TypeVar("Microbatch")

Forward = Callable[[Any, Microbatch], Tensor]
"""A chunk and a microbatch to hidden states, or on the last chunk to what the loss is computed from."""
Loss = Callable[[Microbatch, Tensor], tuple[Tensor, Any]]
"""On the last chunk: a microbatch and the forward's result to (its part of the loss, anything to keep)."""
Weights = Literal["all", "trained", "frozen"]
"""All parameters, those that the optimizer updates, or those that it does not: the base of adapters."""


class Engine(Generic[Microbatch]):
    """The model of a run on the ranks of a mesh.

    ``chunks`` are the bare chunks of this rank; build them with ``megavid.models``, then hand them over.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, chunks: Sequence[nn.Module]) -> None:
        self.config, self.mesh = config, mesh
        self.chunks: list[Any] = list(chunks)
        self.is_bf16 = config.precision.dtype == "bf16"
        self._running: list[Any] = self.chunks
        self.optimizer: Updates | None = None
        self._transformer: Any = self.chunks[0].config

    def with_optimizer(self) -> "Engine[Microbatch]":
        """Wrap the chunks for data parallelism and build the optimizer; without it the engine only runs forward."""
        parallel = self.config.parallel
        options = mcore.DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
        )
        self._running = [
            mcore.DistributedDataParallel(self._transformer, options, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(self.chunks)
        ]
        for chunk in self.chunks:
            add_in_place(chunk)
        self.optimizer = ShardedAdamW(
            self.config.optimizer,
            self._running,
            self.mesh,
            is_bf16=self.is_bf16,
            overlap_param_gather=parallel.overlap_param_gather,
        )
        running, single = self._running, len(self._running) == 1
        self._transformer.finalize_model_grads_func = GradientFinisher(running, self.mesh).finish
        self._transformer.grad_scale_func = None
        if parallel.overlap_grad_reduce or not single:
            self._transformer.no_sync_func = running[0].no_sync if single else [chunk.no_sync for chunk in running]
        if parallel.overlap_grad_reduce:
            starts = [chunk.start_grad_sync for chunk in running]
            self._transformer.grad_sync_func = starts[0] if single else starts
        if parallel.overlap_param_gather:
            gathers = [chunk.start_param_sync for chunk in running]
            self._transformer.param_sync_func = gathers[0] if single else gathers
        return self

    @property
    def loss_scale(self) -> float:
        """What the backward pass must multiply every loss by, so that gradients come out as sums over the batch."""
        return 1.0

    @property
    def updates(self) -> Updates:
        """The optimizer; an error of the caller where the engine was built without one."""
        assert self.optimizer is not None, "this engine was built for inference"
        return self.optimizer

    def initialize(self, seed: int, which: Weights = "all") -> None:
        """Draw fresh weights: each element a function of (seed, its tensor's name in model space, its place there)."""
        inits = {piece.name: placement.init for placement in self.placements() for piece in placement.pieces}
        for fragment in self.weight_fragments("model", which):
            name = fragment.name.split("/", 1)[1]
            init = inits[name]
            _draw_(fragment, key_of(seed, "init", name), init.std, init.mean)
        if self.optimizer is not None:
            for shard in self.optimizer.shards:
                if shard.ema is not None:
                    shard.ema.copy_(shard.master.detach())
            self.optimizer.publish()

    def placements(self) -> Iterator[Placement]:
        """Placement of every parameter on this rank."""
        return (placement_of(parameter) for parameter in self.parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter on this rank."""
        return (parameter for chunk in self.chunks for parameter in chunk.parameters())

    # Steps ----------------------------------------------------------------------------------------------------------

    def forward_backward(
        self, forward: Forward[Microbatch], loss: Loss[Microbatch], microbatches: Sequence[Microbatch]
    ) -> list[Any]:
        """Run every microbatch forward and backward and reduce the gradients.

        Returns:
            What ``loss`` kept of each microbatch, on the last pipeline stage; elsewhere an empty list.
        """
        self.updates.zero_grad()
        shape = (self.config.data.pack_tokens, self.config.train.micro_batch_size)
        return self._schedule(forward, loss, microbatches, shape, forward_only=False)

    @torch.no_grad()
    def forward(
        self,
        forward: Forward[Microbatch],
        loss: Loss[Microbatch],
        microbatches: Sequence[Microbatch],
        pack_shape: tuple[int, int],
    ) -> list[Any]:
        """Run every microbatch, of ``pack_shape`` (tokens, packs), forward only; returns as ``forward_backward``."""
        return self._schedule(forward, loss, microbatches, pack_shape, forward_only=True)

    @in_region("schedule")
    def _schedule(
        self,
        forward: Forward[Microbatch],
        loss: Loss[Microbatch],
        microbatches: Sequence[Microbatch],
        pack_shape: tuple[int, int],
        forward_only: bool,
    ) -> list[Any]:
        def step(batches: Iterator[Microbatch], chunk: Any) -> tuple[Tensor, Any]:
            batch = next(batches)
            result = forward(chunk, batch)

            def reduce(output: Tensor) -> tuple[Tensor, Tensor, Any]:
                part, kept = loss(batch, output)
                # The middle number is megatron-core's token count; our loss is divided already.
                return part, torch.ones((), dtype=torch.int, device=output.device), kept

            return result, reduce

        run = mcore.get_forward_backward_func()
        kept: list[Any] = run(
            forward_step_func=step,
            data_iterator=[iter(microbatches) for _ in self._running],
            model=self._running if len(self._running) > 1 else self._running[0],
            num_microbatches=len(microbatches),
            seq_length=pack_shape[0],
            micro_batch_size=pack_shape[1],
            forward_only=forward_only,
        )
        return kept

    @contextmanager
    def timed_by(self, timers: Any) -> Iterator[None]:
        """While entered, megatron-core's schedules tell ``timers`` what they do.

        Args:
            timers: called with a name (and ``log_level``), such as "backward-compute" or "forward-recv", to something
                with ``start`` and ``stop``.
        """
        before, self._transformer.timers = self._transformer.timers, timers
        try:
            yield
        finally:
            self._transformer.timers = before

    # Weights --------------------------------------------------------------------------------------------------------

    @property
    def has_frozen(self) -> bool:
        """Whether this is a frozen model with adapters."""
        return self.config.lora.rank > 0

    def fragments(self) -> list[Fragment]:
        """All that a checkpoint holds of this rank: masters, moments, average, the routers' bias and FP8 histories.

        A frozen base, its routers' bias too, is in no checkpoint.
        """
        buffers = [] if self.has_frozen else self.buffer_fragments()
        return self.updates.fragments() + buffers + self.history_fragments()

    def weight_fragments(self, kind: str, which: Weights = "all") -> list[Fragment]:
        """Weights only, to be filled from what is saved under ``kind/`` ("model" or "ema").

        They go into the masters where an optimizer updates them, else into the parameters themselves. Call
        ``load_finished`` after filling them.
        """
        result: list[Fragment] = []
        if self.optimizer is not None and which != "frozen":
            found = (f for f in self.optimizer.fragments() if f.name.startswith("model/"))
            result = [replace(f, name=f.name.replace("model/", f"{kind}/", 1)) for f in found]
        for parameter in self.parameters():
            is_wanted = which == "all" or parameter.requires_grad == (which == "trained")
            if not is_wanted or (self.optimizer is not None and parameter.requires_grad):
                continue
            owner = is_owner(parameter, self.mesh.coordinates)
            result += fragments_of(kind, placement_of(parameter), parameter.detach().view(-1), 0, owner)
        return result

    def buffer_fragments(self) -> list[Fragment]:
        """Buffers that training updates without a gradient, the expert bias; equal on all ranks that hold them."""
        return self._replicated("buffer/", (named for chunk in self.chunks for named in chunk.training_buffers()))

    def history_fragments(self) -> list[Fragment]:
        """Histories of delayed scaling in FP8, likewise."""
        return self._replicated(HISTORY, (named for chunk in self.chunks for named in chunk.fp8_histories()))

    def _replicated(self, prefix: str, named: Iterable[tuple[str, Tensor]]) -> list[Fragment]:
        is_owner = all(self.mesh.coordinate(axis) == 0 for axis in ("tp", "cp", "dp"))
        shapes = ((prefix + name, tuple(buffer.shape), buffer.view(-1)) for name, buffer in named)
        return [Fragment(name, shape, (Box((0,) * len(shape), shape),), data, is_owner) for name, shape, data in shapes]

    def load_finished(self, updates: int = 0) -> None:
        """Say that fragments were filled: masters go to the model, and Adam has seen ``updates`` updates."""
        if self.optimizer is not None:
            self.optimizer.set_updates(updates)
            self.optimizer.publish()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model's weights are their moving average."""
        optimizer = self.updates
        kept = [shard.master.detach().clone() for shard in optimizer.shards]
        try:
            for shard in optimizer.shards:
                if shard.ema is not None:
                    shard.master.detach().copy_(shard.ema)
            optimizer.publish()
            yield
        finally:
            for shard, values in zip(optimizer.shards, kept):
                shard.master.detach().copy_(values)
            optimizer.publish()


def _draw_(fragment: Fragment, key: tuple[int, int], std: float, mean: float) -> None:
    """Fill a fragment with normal numbers; std 0 draws nothing."""
    if std == 0.0:
        fragment.data.fill_(mean)
        return
    at = 0
    for box in fragment.boxes:
        drawn = normal_box(key, fragment.global_shape, box.offset, box.shape, fragment.data.device)
        fragment.data[at : at + box.numel] = drawn.reshape(-1) * std + mean
        at += box.numel
