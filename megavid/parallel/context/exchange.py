"""What context-parallel ranks send each other: tokens for heads, hops of a ring, all-gather and reduce-scatter.

Owns every collective of context parallelism. Sizes follow from the layout alone, never from data, so every rank makes
the same calls in the same order; an empty shard is sent like any other. No rank sends to itself: with one rank on an
axis there is no group and no call.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megavid.parallel.context.layout import CPLayout


@dataclass(frozen=True)
class Exchange:
    """The collectives of one layout, which says who holds what and has the groups."""

    layout: CPLayout

    def to_heads(self, tensors: Sequence[Tensor]) -> Tensor:
        """Give tokens, get heads: all tokens of the Ulysses group, this rank's share of the heads.

        Args:
            tensors: each [t, B, heads, A] of this rank's tokens; U divides the heads of each.

        Returns:
            [sum of t over the group, B, sum of heads / U, A]: the tensors' shares side by side.
        """
        size = self.layout.groups.plan.ulysses
        shares = [torch.unflatten(x, 2, (size, -1)) for x in tensors]
        tokens, batch, _, _, width = shares[0].shape
        heads = sum(share.shape[3] for share in shares)
        packed = tensors[0].new_empty(size, tokens, batch, heads, width)
        for share, part in zip(shares, torch.split(packed, [share.shape[3] for share in shares], dim=3)):
            part.copy_(share.permute(2, 0, 1, 3, 4))
        lengths = list(self.layout.ulysses_lengths)
        received = packed.new_empty(sum(lengths), batch, heads, width)
        dist.all_to_all_single(received, packed.flatten(0, 1), lengths, [tokens] * size, group=self._ulysses_group)
        return received

    def to_tokens(self, x_tBNA: Tensor, heads: Sequence[int]) -> list[Tensor]:
        """The inverse of ``to_heads``: tensors [t, B, heads, A] of all their heads and this rank's tokens."""
        size, lengths = self.layout.groups.plan.ulysses, list(self.layout.ulysses_lengths)
        tokens = lengths[self.layout.groups.ulysses_rank]
        sent = x_tBNA.contiguous()
        received = sent.new_empty(size, tokens, *sent.shape[1:])
        dist.all_to_all_single(received.flatten(0, 1), sent, [tokens] * size, lengths, group=self._ulysses_group)
        results = []
        for count, share in zip(heads, torch.split(received, [each // size for each in heads], dim=3)):
            result = sent.new_empty(tokens, sent.shape[1], count, sent.shape[3])
            torch.unflatten(result, 2, (size, -1)).copy_(share.permute(1, 2, 0, 3, 4))
            results.append(result)
        return results

    def hop(self, sent: Tensor, received: Tensor, tag: int) -> "Hop":
        """Send to the next rank of the ring and receive from the one before; ``wait`` before using either.

        ``tag`` tells apart what travels at the same time.
        """
        group, ring, mine = self._ring_group, self.layout.groups.plan.ring, self.layout.groups.ring_rank
        after, before = (dist.get_global_rank(group, (mine + step) % ring) for step in (1, -1))
        if sent.is_cuda:  # NCCL wants both in one group of calls; torch knows no such thing of meta tensors
            pair = [
                dist.P2POp(dist.isend, sent, after, group, tag),
                dist.P2POp(dist.irecv, received, before, group, tag),
            ]
            return Hop(dist.batch_isend_irecv(pair), (sent, received))
        works = [dist.isend(sent, after, group, tag), dist.irecv(received, before, group, tag)]
        return Hop([work for work in works if work is not None], (sent, received))

    def gather(self, k_tBNA: Tensor, v_tBNA: Tensor) -> Tensor:
        """Keys (0) and values (1) of every ring shard, each shard padded to the longest, [R * longest, 2, B, N, A]."""
        longest, ring = max(self.layout.ring_lengths), self.layout.groups.plan.ring
        mine = k_tBNA.new_zeros(longest, 2, *k_tBNA.shape[1:])
        for part, own in zip(mine.unbind(1), (k_tBNA, v_tBNA)):
            part[: own.shape[0]] = own
        whole = mine.new_empty(ring * longest, *mine.shape[1:])
        dist.all_gather_into_tensor(whole, mine, group=self._ring_group)
        return whole

    def reduce_scatter(self, grad_TxBNA: Tensor) -> Tensor:
        """The sum over the ring of [R * longest, 2, B, N, A], of it this rank's [t, 2, B, N, A]."""
        lengths = self.layout.ring_lengths
        mine = grad_TxBNA.new_empty(max(lengths), *grad_TxBNA.shape[1:])
        dist.reduce_scatter_tensor(mine, grad_TxBNA, group=self._ring_group)
        return mine[: lengths[self.layout.groups.ring_rank]]

    @property
    def _ulysses_group(self) -> dist.ProcessGroup:
        group = self.layout.groups.ulysses_group
        assert group is not None
        return group

    @property
    def _ring_group(self) -> dist.ProcessGroup:
        group = self.layout.groups.ring_group
        assert group is not None
        return group


@dataclass(frozen=True)
class Hop:
    """A send and a receive under way; it keeps their tensors alive."""

    works: list[dist.Work]
    tensors: tuple[Tensor, Tensor]

    def wait(self) -> None:
        """Wait until both are done (on CUDA: let the current stream wait)."""
        for work in self.works:
            work.wait()
