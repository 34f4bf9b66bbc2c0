"""The mesh of ranks: who stands where, and the few collectives that the rest of megavid needs by the name of an axis.

Owns process groups for as long as it is open. Model code receives it and asks for sizes, coordinates and groups; it
never looks a group up in a module.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megavid.ops.packs import Span
from megavid.parallel import cpu, mcore
from megavid.parallel.context.groups import ContextGroups, open_context_groups
from megavid.parallel.context.layout import CPLayout
from megavid.plan.layout import Layout

Axis = Literal["tp", "cp", "dp", "pp", "ep", "etp", "edp", "dp_cp", "tp_cp", "tp_dp_cp", "tp_ep", "world"]


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run on the axes of its layout; open it with ``Mesh.open``."""

    layout: Layout
    rank: int
    device: torch.device
    groups: Any  # megatron-core's ProcessGroupCollection, which has no type stubs
    coordinates: dict[str, int] = field(default_factory=dict)
    context: ContextGroups = field(default_factory=ContextGroups)

    @classmethod
    @contextmanager
    def open(
        cls, layout: Layout, device: str = "cpu", seed: int = 0, timeout_s: float = mcore.COLLECTIVE_S
    ) -> "Iterator[Mesh]":
        """Create every process group of ``layout`` on the ranks of the running world, and close them at the end.

        Args:
            layout: its world size must be that of ``torch.distributed``.
            device: "cpu" (gloo) or "cuda" (nccl).
            seed: of megatron-core's own random streams; megavid's numbers come from ``megavid.ops.philox``.
            timeout_s: limit of every collective of its groups.
        """
        assert dist.get_world_size() == layout.world_size, (dist.get_world_size(), layout.world_size)
        if device == "cpu":
            cpu.install()
        rank = dist.get_rank()
        target = torch.device("cpu") if device == "cpu" else torch.device("cuda", torch.cuda.current_device())
        groups = mcore.open_groups(layout, seed=seed, timeout_s=timeout_s)
        try:
            context = open_context_groups(layout, rank, groups.cp, timeout_s)
            try:
                yield cls(layout, rank, target, groups, layout.coordinates(rank), context)
            finally:
                context.close()
        finally:
            mcore.close_groups()

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.layout.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes logs."""
        return self.rank == 0

    @property
    def is_sequence_parallel(self) -> bool:
        """Whether activations between tensor-parallel blocks are sharded over tokens."""
        return self.layout.sequence

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank stands on the first pipeline stage."""
        return self.coordinate("pp") == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank stands on the last pipeline stage."""
        return self.coordinate("pp") == self.size("pp") - 1

    def size(self, axis: str) -> int:
        """Ranks on ``axis``."""
        return self.layout.size(axis)

    def coordinate(self, axis: str) -> int:
        """Where this rank stands on ``axis``."""
        return self.coordinates[axis]

    def group(self, axis: Axis) -> dist.ProcessGroup:
        """The process group of this rank along ``axis``."""
        if axis == "world":
            world = dist.group.WORLD
            assert world is not None
            return world
        names = {"etp": "expt_tp", "edp": "expt_dp"}
        group: dist.ProcessGroup = self.groups.__dict__[names.get(axis, axis)]
        return group

    def sum(self, tensor: Tensor, over: Axis) -> Tensor:
        """Sum over the ranks of an axis, the same on each of them; a new tensor without gradient."""
        return self._reduce(tensor, over, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor, over: Axis) -> Tensor:
        """Maximum over the ranks of an axis; a new tensor without gradient."""
        return self._reduce(tensor, over, dist.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, over: Axis, how: Any) -> Tensor:
        result = tensor.detach().clone()
        dist.all_reduce(result, op=how, group=self.group(over))
        return result

    def broadcast(self, tensor: Tensor, over: Axis, source: int) -> None:
        """Overwrite ``tensor`` with that of the rank at coordinate ``source`` of ``axis``."""
        group = self.group(over)
        dist.broadcast(tensor, src=dist.get_global_rank(group, source), group=group)

    def all_gather_object(self, value: Any) -> list[Any]:
        """``value`` of every rank, by rank. For small host data at the start of a run or at a checkpoint."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """``value`` of rank ``source``."""
        box = [value]
        dist.broadcast_object_list(box, src=source)
        return box[0]

    def cp_layout(self, pack_tokens: int) -> CPLayout:
        """Which tokens of a pack stand on which context-parallel rank: equal runs, in order.

        Sequence parallelism, inside the model, cuts a rank's tokens once more between tensor-parallel blocks.
        """
        return CPLayout.contiguous(pack_tokens, self.context)

    def token_span(self, pack_tokens: int) -> Span:
        """This rank's tokens of every pack."""
        return self.cp_layout(pack_tokens).span

    def gather_tokens(self, x_BTx: Tensor) -> Tensor:
        """All tokens of every pack, [B, T, ...], from those of each context-parallel rank's span; without gradient."""
        if self.size("cp") == 1:
            return x_BTx
        mine = x_BTx.detach().to(self.device).transpose(0, 1).contiguous()
        whole = mine.new_empty(self.size("cp") * mine.shape[0], *mine.shape[1:])
        dist.all_gather_into_tensor(whole, mine, group=self.group("cp"))
        return whole.transpose(0, 1).to(x_BTx.device)

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()
