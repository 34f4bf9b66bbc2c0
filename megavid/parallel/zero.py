"""The engine on DeepSpeed: the same model and the same steps under ZeRO, for people without model parallelism.

Owns everything that knows DeepSpeed, which is imported here, when it is chosen, and nowhere else. Above, nothing
changes: the loop, the objective and checkpoints see an ``Engine`` with ``Updates``. What a rank owns of a parameter is
a flat range here as there, so checkpoints are megavid's own, and a run may change its backend when it is resumed.

Private names of DeepSpeed (0.18 and 0.19) that are read: the fp32 partitions and the places of parameters in them.
"""

import collections
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from megavid.config.deepspeed import DeepSpeedConfig
from megavid.config.schema import RunConfig
from megavid.errors import ConfigError
from megavid.ops.regions import in_region, region
from megavid.parallel.engine import Engine, Forward, Loss
from megavid.parallel.mesh import Mesh
from megavid.parallel.optimizer import MOMENTS, Shard, Updates
from megavid.parallel.placement import placement_of

Microbatch = TypeVar("Microbatch")


def check_installed() -> None:
    """Raise ``ConfigError`` where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "train.backend = 'deepspeed' needs the package deepspeed, which is not installed; pip install "
            "'megavid[deepspeed]', or set train.backend = 'megatron'"
        )


class ZeroEngine(Engine[Microbatch]):
    """An engine whose gradients and optimizer are DeepSpeed's; data parallel only."""

    def with_optimizer(self) -> "ZeroEngine[Microbatch]":
        """Hand the model to DeepSpeed; without it this is an engine like another."""
        check_installed()
        self.zero = ZeroUpdates(self.config, self.chunks[0], self.mesh)
        self.optimizer, self._running = self.zero, [self.zero.engine]
        return self

    @property
    def loss_scale(self) -> float:
        """Ranks: its gradients are means over them; a loss has the whole batch's denominator already."""
        return float(self.mesh.size("dp"))

    @in_region("schedule")
    def _schedule(
        self,
        forward: Forward[Microbatch],
        loss: Loss[Microbatch],
        microbatches: Sequence[Microbatch],
        pack_shape: tuple[int, int],
        forward_only: bool,
    ) -> list[Any]:
        if self.optimizer is None:
            return super()._schedule(forward, loss, microbatches, pack_shape, forward_only)
        engine, kept = self.zero.engine, []
        for number, batch in enumerate(microbatches):
            if not forward_only:
                engine.set_gradient_accumulation_boundary(number == len(microbatches) - 1)
            part, keep = loss(batch, forward(engine, batch))
            kept.append(keep)
            if not forward_only:
                engine.backward(part * self.loss_scale, scale_wrt_gas=False)
        return kept


class ZeroUpdates(Updates):
    """ZeRO's optimizer: torch's AdamW on this rank's flat ranges of the fp32 weights."""

    def __init__(self, config: RunConfig, model: nn.Module, mesh: Mesh) -> None:
        super().__init__(config.optimizer, mesh)
        self.stage = config.deepspeed.zero_stage
        self.engine: Any = _initialize(config, model, mesh)
        self._zero: Any = self.engine.optimizer
        self._adam: torch.optim.Optimizer = self._zero.optimizer
        self._has_gradients = False
        self.shards = list(self._owned(model))

    def _owned(self, model: nn.Module) -> Iterator[Shard]:
        """This rank's range of each parameter, with Adam's state made before its first step: checkpoints fill it."""
        for parameter in model.parameters():
            if self.stage == 3:
                group, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
                partition, start = self._zero.fp32_partitioned_groups_flat[group], self.mesh.coordinate("dp") * size
                size = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]  # the rest is padding
            else:
                mapping = parameter._hp_mapping  # type: ignore[attr-defined]
                if mapping is None:  # another rank's
                    continue
                partition, start = self._zero.single_partition_of_fp32_groups[mapping.param_group_index], 0
                offset, start = mapping.hp_fragment_address.start, mapping.lp_fragment_address.start
                size = mapping.hp_fragment_address.numel
            if size <= 0:
                continue
            whole = self._adam.state[partition]
            if not whole:
                whole["step"] = torch.zeros((), dtype=torch.float32)
                whole.update({name: torch.zeros_like(partition.detach()) for name in MOMENTS})
            state = {name: whole[name].narrow(0, offset, size) for name in MOMENTS}
            master = partition.detach().narrow(0, offset, size)
            ema = torch.zeros_like(master) if self.config.ema_decay > 0 else None
            yield Shard(parameter, start, master, {**state, "step": whole["step"]}, ema)

    @in_region("optimizer")
    def gradient_norm(self) -> float:
        """See ``Updates``."""
        self._has_gradients = True
        if self.stage < 3:
            return float(self._zero.scaled_global_norm())
        utils = importlib.import_module("deepspeed.runtime.utils")
        return float(utils.combine_grad_norm_groups(self._zero._get_norm_groups()))

    @in_region("optimizer")
    def step(self, learning_rate: float, gradient_norm: float) -> None:
        """See ``Updates``; DeepSpeed takes the norm to clip by once more itself."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.config.weight_decay * group["wd_mult"]
        self.engine.step()
        assert not self._zero.overflow, "DeepSpeed skipped a step whose gradient norm is finite"
        self._has_gradients = False
        self.updates += 1
        with region("average"):
            self._move_average()

    @in_region("zero_gradients")
    def zero_grad(self) -> None:
        """Forget the gradients of a step that was not taken, the way DeepSpeed itself leaves a step out."""
        if not self._has_gradients:
            return
        infinite = torch.full((), float("inf"))
        name, answer = ("_get_norm_groups", [infinite]) if self.stage == 3 else ("scaled_global_norm", infinite)
        self._zero.__dict__[name] = lambda *args, **named: answer
        try:
            self.engine.step()
        finally:
            del self._zero.__dict__[name]
        assert self._zero.overflow
        self._has_gradients = False

    def publish(self) -> None:
        """See ``Updates``."""
        with torch.no_grad():
            if self.stage < 3:
                self._zero.update_lp_params()
                return
            for group in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)

    def bad_gradients(self) -> list[str]:
        """See ``Updates``; every rank finds the same."""
        utils = importlib.import_module("deepspeed.utils")
        found = []
        for parameter in self.engine.module.parameters():
            gradient: Tensor | None = utils.safe_get_full_grad(parameter)
            if gradient is not None and not torch.isfinite(gradient).all():
                found += [piece.name for piece in placement_of(parameter).pieces]
        return found


def _initialize(config: RunConfig, model: nn.Module, mesh: Mesh) -> Any:
    """DeepSpeed's engine around ``model``."""
    os.environ.setdefault("LOCAL_RANK", "0")  # it insists
    if mesh.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if mesh.device.type == "cpu":
        # Else it compiles an all-reduce over shared memory at once, on every rank, wherever there is a compiler.
        deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
    groups = []
    for has_decay in (True, False):
        parameters = [p for p in model.parameters() if placement_of(p).has_decay is has_decay]
        groups.append({"params": parameters, "wd_mult": float(has_decay)})
    for parameter in model.parameters():
        parameter.allreduce = True  # type: ignore[attr-defined]  # every rank has every expert: reduced like the rest
    optimizer = config.optimizer
    adam = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optimizer.learning_rate, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.eps,
    )  # fmt: skip
    options = options_of(config.deepspeed, config, mesh.size("dp"))
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=options, dist_init_required=False)
    return engine


def options_of(zero: DeepSpeedConfig, config: RunConfig, dp: int) -> dict[str, Any]:
    """DeepSpeed's own configuration of a run."""
    train = config.train
    sharding: dict[str, Any] = {"stage": zero.zero_stage, "round_robin_gradients": False}
    if zero.zero_stage == 3:
        sharding["stage3_param_persistence_threshold"] = 0  # every weight is sharded, in one way
    if zero.offload != "none":
        sharding["offload_optimizer"] = {"device": "cpu"}
    if zero.offload == "all":
        sharding["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (train.micro_batch_size * dp),
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,
        # DeepSpeedCPUAdam is compiled when it is first used; torch's needs no compiler.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }
