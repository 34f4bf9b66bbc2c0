"""AdamW whose state is sharded over data-parallel ranks: megatron-core's DistributedOptimizer behind a typed seam.

Owns the one place that reads the optimizer's private range maps: which flat range of which parameter this rank has, and
the fp32 master, moments and moving average of it. Everything else sees ``Shard`` and ``Fragment``.
"""

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megavid.config.schema import OptimizerConfig
from megavid.ops.regions import in_region, region
from megavid.parallel import mcore
from megavid.parallel.fragment import Fragment, boxes_of_range
from megavid.parallel.gradients import gradient_of
from megavid.parallel.mesh import Mesh
from megavid.parallel.placement import Placement, is_owner, placement_of

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shard:
    """The flat range ``[start, start + master.numel())`` of one local parameter that this rank updates.

    Attributes:
        parameter: the whole local parameter.
        start: first element of the range.
        master: fp32 values, 1-D; a view of the parameter where that is fp32 itself.
        state: Adam's state of the range: ``exp_avg``, ``exp_avg_sq`` and ``step``.
        ema: moving average of the values, or None where the run keeps none.
    """

    parameter: torch.nn.Parameter
    start: int
    master: Tensor
    state: dict[str, Tensor]
    ema: Tensor | None


class Updates(abc.ABC):
    """What a step, the moving average and a checkpoint need of an optimizer, whoever's it is.

    Attributes:
        updates: that it made; Adam's step counts them, and skipped steps are none.
        shards: everything that this rank updates.
    """

    def __init__(self, config: OptimizerConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.updates = 0
        self.shards: list[Shard] = []

    @abc.abstractmethod
    def gradient_norm(self) -> float:
        """Norm of the whole model's gradient, the same on every rank; nothing is clipped yet."""

    @abc.abstractmethod
    def step(self, learning_rate: float, gradient_norm: float) -> None:
        """Clip by ``gradient_norm``, update the masters and moments, gather the parameters, move the average."""

    @abc.abstractmethod
    def zero_grad(self) -> None:
        """Forget all gradients."""

    @abc.abstractmethod
    def publish(self) -> None:
        """Copy the masters to the model's parameters and gather them: after loading or initialising the masters."""

    @abc.abstractmethod
    def bad_gradients(self) -> list[str]:
        """Names of this rank's parameters, in model order, whose gradient is not finite.

        Ranks: collective.
        """

    def _move_average(self) -> None:
        for shard in self.shards:
            if shard.ema is not None:
                shard.ema.lerp_(shard.master.detach(), 1.0 - self._ema_decay())

    def _ema_decay(self) -> float:
        """Decay of the moving average, smaller in the first steps so that it forgets the initial weights.

        Source: the warm-up of TensorFlow's ExponentialMovingAverage(num_updates), (1 + n) / (10 + n).
        """
        return min(self.config.ema_decay, (1 + self.updates) / (10 + self.updates))

    def set_updates(self, updates: int) -> None:
        """Say how many updates the loaded moments have seen."""
        self.updates = updates
        for shard in self.shards:
            shard.state["step"].fill_(updates)

    def fragments(self) -> list[Fragment]:
        """Masters (as ``model/``), moments and average of this rank's ranges, in model space."""
        found: list[Fragment] = []
        for shard in self.shards:
            tensors = {"model": shard.master.detach(), **{name: shard.state[name] for name in MOMENTS}}
            if shard.ema is not None:
                tensors["ema"] = shard.ema
            owner = is_owner(shard.parameter, self.mesh.coordinates)
            for kind, tensor in tensors.items():
                found += fragments_of(kind, placement_of(shard.parameter), tensor, shard.start, owner)
        return found


class ShardedAdamW(Updates):
    """The optimizer of all chunks of this rank, dense and expert parameters alike."""

    def __init__(
        self, config: OptimizerConfig, chunks: list[Any], mesh: Mesh, *, is_bf16: bool, overlap_param_gather: bool
    ) -> None:
        super().__init__(config, mesh)
        self._chained = mcore.get_megatron_optimizer(
            mcore.OptimizerConfig(
                optimizer="adam",
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                adam_eps=config.eps,
                clip_grad=config.clip_norm,
                bf16=is_bf16,
                use_distributed_optimizer=True,
                overlap_param_gather=overlap_param_gather,
            ),
            chunks,
            config_overrides=mcore.without_weight_decay(lambda parameter: not placement_of(parameter).has_decay),
            use_gloo_process_groups=False,
        )
        self._chunks = chunks
        # Each part would gather the parameters of all chunks after its update, dense and expert ones alike (0.16.1 and
        # 0.19.2): twice the traffic where a model has experts. Once, after the last part's update, is enough.
        for part in self._chained.chained_optimizers[:-1]:
            part.model_chunks = []
        self._take_torchs()
        self.shards = [self._with_state(*found) for found in self._owned()]

    @property
    def _parts(self) -> list[Any]:
        parts: list[Any] = self._chained.chained_optimizers
        return [part for part in parts if not part.is_stub_optimizer]

    def _take_torchs(self) -> None:
        """Put torch's fused AdamW in the place of megatron-core's choice: one call and one pass for all tensors.

        That choice depends on what is installed: torch's, tensor by tensor, or FusedAdam of Transformer Engine or Apex,
        which keep one count of steps for a group and do not see the one of ``set_updates`` (0.16.1 and 0.19.2).
        """
        config = self.config
        for part in self._parts:
            groups = part.optimizer.param_groups
            part.optimizer = torch.optim.AdamW(
                [{"params": [], "wd_mult": group["wd_mult"]} for group in groups],
                lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True,
            )  # fmt: skip
            for mine, group in zip(part.optimizer.param_groups, groups, strict=True):
                mine["params"] = group["params"]  # not at once: views of fp32 parameters, which it would refuse

    def _owned(self) -> Iterator[tuple[Any, torch.nn.Parameter, int, Tensor]]:
        """(optimizer, parameter, start, master) of everything that this rank updates."""
        for part in self._parts:
            masters = _masters_of(part)
            for buffer in part.gbuf_ranges:
                for buckets in buffer.values():
                    for bucket in buckets:
                        for parameter, ranges in bucket["param_map"].items():
                            yield part, parameter, ranges["param"].start, masters[parameter]

    def _with_state(self, part: Any, parameter: torch.nn.Parameter, start: int, master: Tensor) -> Shard:
        # Adam makes its state at the first step; a checkpoint needs somewhere to load into before that. Each parameter
        # has a step of its own: one that is shared would be counted up once for every parameter.
        state = part.optimizer.state[master]
        for name in MOMENTS:
            state[name] = torch.zeros_like(master)
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        ema = torch.zeros_like(master.detach()) if self.config.ema_decay > 0 else None
        return Shard(parameter, start, master, state, ema)

    @in_region("optimizer")
    def gradient_norm(self) -> float:
        """See ``Updates``."""
        self._chained.prepare_grads()
        return float(self._chained.get_grad_norm())

    @in_region("optimizer")
    def step(self, learning_rate: float, gradient_norm: float) -> None:
        """See ``Updates``."""
        for part in self._parts:
            for group in part.optimizer.param_groups:
                group["lr"] = learning_rate
                group["weight_decay"] = self.config.weight_decay * group["wd_mult"]
            # What the fused kernel divides gradients by, in the pass that reads them for the update.
            part.optimizer.grad_scale = self._divisor(gradient_norm)
        self._chained.step_with_ready_grads()
        self.updates += 1
        with region("average"):
            self._move_average()

    def _divisor(self, gradient_norm: float) -> Tensor | None:
        """By what the gradient is too long; None where it is not, or is not clipped."""
        limit = self.config.clip_norm
        if limit <= 0 or gradient_norm + 1e-6 <= limit:
            return None
        return torch.tensor((gradient_norm + 1e-6) / limit, dtype=torch.float32, device=self.mesh.device)

    @in_region("zero_gradients")
    def zero_grad(self) -> None:
        """See ``Updates``."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._chained.zero_grad()

    def publish(self) -> None:
        """See ``Updates``."""
        for part in self._parts:
            part._copy_main_params_to_model_params()
        for chunk in self._chunks:
            chunk.start_param_sync(force_sync=True)

    def bad_gradients(self) -> list[str]:
        """See ``Updates``."""
        found = []
        for parameter in (parameter for chunk in self._chunks for parameter in chunk.parameters()):
            if parameter.requires_grad and not torch.isfinite(gradient_of(parameter)).all():
                found += [piece.name for piece in placement_of(parameter).pieces]
        return found


def _masters_of(part: Any) -> dict[torch.nn.Parameter, Tensor]:
    """Master of every parameter that one DistributedOptimizer updates on this rank.

    Not through its ``model_param_group_index_map``: that counts parameters in the order of their buffers, while the
    optimizer's groups hold all fp32 ones first, so it names a wrong master where several chunks have both fp32 and bf16
    parameters (0.16.1 and 0.19.2).
    """
    pairs = (
        (part.model_fp32_groups, part.shard_fp32_groups),
        (part.model_float16_groups, part.shard_fp32_from_float16_groups),
    )
    return {
        parameter: master
        for models, shards in pairs
        for model_group, shard_group in zip(models, shards, strict=True)
        for parameter, master in zip(model_group, shard_group, strict=True)
    }


def fragments_of(kind: str, placement: Placement, flat: Tensor, start: int, owner: bool) -> list[Fragment]:
    """Cut ``flat``, elements from ``start`` on of a local parameter, into fragments of the tensors it is made of."""
    stop = start + flat.numel()
    found = []
    for piece in placement.pieces:
        size = torch.Size(piece.shape).numel()
        low, high = max(start, piece.start), min(stop, piece.start + size)
        if low >= high:
            continue
        inner = boxes_of_range(piece.shape, low - piece.start, high - piece.start)
        boxes = tuple(box.moved_by(piece.offset) for box in inner)
        found.append(
            Fragment(f"{kind}/{piece.name}", piece.global_shape, boxes, flat[low - start : high - start], owner)
        )
    return found
