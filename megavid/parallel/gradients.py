"""What happens to gradients between the last backward pass and the optimizer.

megatron-core calls ``finish`` at the end of its schedules. The sum over data-parallel and context-parallel ranks, one
group to it, is its own (expert gradients: over the ranks that hold the same shard). The two sums over ranks that share
a parameter are made here from placements, because megatron-core's own way of keeping embedders on every pipeline stage
counts the copies in the norm and, with a sharded optimizer, sums too late (0.16.1 and 0.19.2).
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavid.ops.regions import in_region
from megavid.parallel.mesh import Mesh
from megavid.parallel.placement import placement_of


class GradientFinisher:
    """Reduces gradients over data- and context-parallel ranks, then over those that hold parts of one gradient."""

    def __init__(self, chunks: list[Any], mesh: Mesh) -> None:
        self.chunks, self.mesh = chunks, mesh
        # What is frozen has no gradient.
        parameters = [[p for p in chunk.parameters() if p.requires_grad] for chunk in chunks]
        self.partial = [p for chunk in parameters for p in chunk if placement_of(p).is_partial_over_tp]
        # Chunk after chunk, in the order of their modules, which is the same on every stage.
        self.replicated = [[p for p in chunk if placement_of(p).is_on_every_stage] for chunk in parameters]

    @in_region("gradients")
    def finish(self, *_: Any, **__: Any) -> None:
        """Signature of megatron-core's ``finalize_model_grads_func``; its arguments are not needed here.

        With a sharded optimizer a rank's gradient is whole only in its own range after the first line; the sums below
        run over ranks with the same range, because replicated parameters have a bucket of their own on every stage.
        """
        for chunk in self.chunks:
            chunk.finish_grad_sync()
        if self.mesh.size("pp") > 1 and self.replicated[0]:  # a copy on every chunk, or on none
            self._sum_over_stages()
        if self.mesh.size("tp") > 1 and self.partial:
            _sum_together([gradient_of(p) for p in self.partial], self.mesh.group("tp"))

    def _sum_over_stages(self) -> None:
        first, *others = ([gradient_of(p) for p in chunk] for chunk in self.replicated)
        for other in others:
            torch._foreach_add_(first, other)
        _sum_together(first, self.mesh.group("pp"))
        for other in others:
            torch._foreach_copy_(other, first)


def gradient_of(parameter: torch.nn.Parameter) -> Tensor:
    """The fp32 gradient that DistributedDataParallel accumulates for this parameter."""
    gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient


def _sum_together(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """All-reduce many small tensors as one."""
    tensors = list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, total in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors])):
        tensor.copy_(total.view_as(tensor))
