"""Table ``deepspeed``: how much DeepSpeed shards, and what it keeps in host memory.

Owns names, defaults and what the backend cannot do. The engine is ``megavid.parallel.zero``'s. Imports no torch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megavid.config.checks import require

if TYPE_CHECKING:
    from megavid.config.schema import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedConfig:
    """ZeRO of DeepSpeed; read with train.backend = "deepspeed" only."""

    zero_stage: Literal[1, 2, 3] = 1
    """What data-parallel ranks share: 1 the optimizer's state, 2 gradients too, 3 weights too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What host memory keeps: nothing, the optimizer's state and its update (slow: in plain torch), or with zero_stage
    = 3 the weights too."""

    def __post_init__(self) -> None:
        require(
            self.offload != "all" or self.zero_stage == 3,
            f"deepspeed.offload = 'all' needs deepspeed.zero_stage = 3, got {self.zero_stage}; set 'optimizer', or 3",
        )


def check_backend(config: "RunConfig") -> None:
    """Refuse what the backend of a run cannot do.

    Raises:
        ConfigError: DeepSpeed with a parallel axis or a precision that it does not have here.
    """
    if config.train.backend == "megatron":
        return
    parallel = config.parallel
    degrees = {
        "tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context,
        "expert": parallel.expert, "expert_tensor": parallel.expert_tensor,
    }  # fmt: skip
    for name, degree in degrees.items():
        require(
            degree == 1,
            f"parallel.{name} = {degree} needs train.backend = 'megatron'; 'deepspeed' is data parallel only, set 1",
        )
    for name, is_on in (("grad_reduce", parallel.overlap_grad_reduce), ("param_gather", parallel.overlap_param_gather)):
        require(
            not is_on,
            f"parallel.overlap_{name} = true needs train.backend = 'megatron'; leave it false with 'deepspeed'",
        )
    require(
        config.lora.rank == 0,
        f"lora.rank = {config.lora.rank} needs train.backend = 'megatron'; adapters are not built for 'deepspeed'",
    )
    require(
        config.precision.dtype == "fp32",
        f"precision.dtype = '{config.precision.dtype}' needs train.backend = 'megatron': DeepSpeed would cast Wan's "
        "fp32 list and the router too; set 'fp32'",
    )
    require(
        config.precision.fp8 == "off",
        f"precision.fp8 = '{config.precision.fp8}' needs train.backend = 'megatron'; set 'off'",
    )
    require(
        config.precision.linears == "native",
        f"precision.linears = '{config.precision.linears}' needs train.backend = 'megatron'; set 'native'",
    )
