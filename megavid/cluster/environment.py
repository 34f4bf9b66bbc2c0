"""Environment variables that a job's ranks need, each with its reason: one table, by the layout.

Owns what follows from the config. What belongs to a site (interfaces, modules, containers) is ``files/env.sh``'s.
`megavid launch slurm` writes these into its script, `megavid doctor` compares a job with them.
"""

from dataclasses import dataclass

from megavid.config.schema import RunConfig
from megavid.plan.layout import Layout


@dataclass(frozen=True, slots=True)
class Setting:
    """One variable.

    Attributes:
        name: of the variable.
        value: that it should have.
        reason: why.
    """

    name: str
    value: str
    reason: str


USUAL = (
    Setting("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1", "a collective that fails ends its rank instead of hanging it"),
    Setting("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "packs differ in clips: fewer fragments of memory"),
)
"""What every GPU run wants."""
ORDERED = "kernels start in the order of issue, by which megatron-core overlaps communication with computation"


def environment_of(config: RunConfig, layout: Layout) -> tuple[Setting, ...]:
    """What the ranks of this run on GPUs need."""
    found = list(USUAL)
    axes = [name for name in ("tp", "cp", "ep") if layout.size(name) > 1]
    overlaps = config.parallel.overlap_grad_reduce or config.parallel.overlap_param_gather
    why = axes + (["overlap of data parallelism"] if overlaps else [])
    if why:
        found.append(Setting("CUDA_DEVICE_MAX_CONNECTIONS", "1", f"{', '.join(why)}: {ORDERED}"))
    if config.train.deterministic:
        found.append(Setting("CUBLAS_WORKSPACE_CONFIG", ":4096:8", "train.deterministic: cuBLAS picks no other sums"))
        found.append(Setting("NCCL_ALGO", "Ring", "train.deterministic: one order of sums whatever NCCL would choose"))
    return tuple(found)
