"""Process groups of context parallelism: the Ulysses group and the ring group of a rank, made once per mesh.

Owns the two groups and this rank's place in them. What travels in them is ``exchange``'s business.
"""

from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from megavid.plan.context import ContextPlan
from megavid.plan.layout import Layout


@dataclass(frozen=True)
class ContextGroups:
    """This rank's place among the context-parallel ranks; ``cp_rank = ring_rank * ulysses + ulysses_rank``.

    Attributes:
        plan: the degrees and the kind of the ring.
        rank: place among all context-parallel ranks.
        ulysses_group: ranks that exchange tokens for heads; None where there is one.
        ring_group: ranks that pass keys and values; None where there is one.
        owned: groups to destroy at the end; the others belong to the mesh.
    """

    plan: ContextPlan = field(default_factory=ContextPlan)
    rank: int = 0
    ulysses_group: dist.ProcessGroup | None = None
    ring_group: dist.ProcessGroup | None = None
    owned: tuple[dist.ProcessGroup, ...] = ()

    @property
    def ulysses_rank(self) -> int:
        """Place in the Ulysses group."""
        return self.rank % self.plan.ulysses

    @property
    def ring_rank(self) -> int:
        """Place in the ring group."""
        return self.rank // self.plan.ulysses

    def close(self) -> None:
        """Destroy the groups that ``open_context_groups`` made."""
        for group in self.owned:
            dist.destroy_process_group(group)


def open_context_groups(
    layout: Layout, rank: int, cp_group: dist.ProcessGroup | None, timeout_s: float
) -> ContextGroups:
    """The groups of ``layout.context`` on this rank; close them with ``ContextGroups.close``.

    Pure Ulysses and a pure ring take the mesh's own context-parallel group; a hybrid makes two groups for every rank.

    Args:
        layout: whose ``context_plan`` tells the degrees.
        rank: of the world.
        cp_group: this rank's group of all its context-parallel ranks; None where it stands alone.
        timeout_s: limit of every collective of groups that are made here.

    Ranks:
        Collective over the world: every rank makes every group, in the same order.
    """
    plan, cp_rank = layout.context_plan, layout.coordinates(rank)["cp"]
    assert plan.cp == layout.cp, (plan, layout.cp)
    if plan.cp == 1:
        return ContextGroups(plan)
    if plan.ring == 1:
        return ContextGroups(plan, cp_rank, ulysses_group=cp_group)
    if plan.ulysses == 1:
        return ContextGroups(plan, cp_rank, ring_group=cp_group)
    by_ulysses, by_ring = context_ranks(layout)
    ulysses_group = _new_group(by_ulysses, rank, "cp_ulysses", timeout_s)
    ring_group = _new_group(by_ring, rank, "cp_ring", timeout_s)
    return ContextGroups(plan, cp_rank, ulysses_group, ring_group, owned=(ulysses_group, ring_group))


def context_ranks(layout: Layout) -> tuple[list[list[int]], list[list[int]]]:
    """World ranks of every Ulysses group and of every ring group, each in the order of its members."""
    ulysses, ring = layout.context_plan.ulysses, layout.context_plan.ring
    families: dict[tuple[int, int, int], list[int]] = {}
    for rank in range(layout.world_size):
        place = layout.coordinates(rank)
        families.setdefault((place["tp"], place["dp"], place["pp"]), []).append(rank)
    by_ulysses = [ranks[j * ulysses : (j + 1) * ulysses] for ranks in families.values() for j in range(ring)]
    by_ring = [ranks[u::ulysses] for ranks in families.values() for u in range(ulysses)]
    return by_ulysses, by_ring


def _new_group(members: list[list[int]], rank: int, name: str, timeout_s: float) -> dist.ProcessGroup:
    """Make every group, and give back the one that ``rank`` is in."""
    timeout = timedelta(seconds=timeout_s)
    groups: list[dist.ProcessGroup] = [dist.new_group(ranks, timeout, group_desc=name) for ranks in members]
    (mine,) = (group for ranks, group in zip(members, groups) if rank in ranks)
    return mine
