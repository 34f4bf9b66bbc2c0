"""The ring and the all-gather of keys and values, forward and backward, on one rank.

Owns the buffers: two for keys and values that travel, whatever the number of ranks, and for their gradients one that
leaves, one that arrives and one for this rank's part. While a hop is computed the next one's keys are under way, and
the gradients of the one before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megavid.ops.block_attention import BlockAttention, wide_dtype
from megavid.parallel.context.attn_plan import AttnPlan
from megavid.parallel.context.blockwise import Given, RunningOutput, RunningSum, add_gradients
from megavid.parallel.context.exchange import Exchange, Hop
from megavid.parallel.context.schedule import Block, Schedule, schedule_of
from megavid.plan.context import Kind

# What travels at the same time must be told apart: gloo goes by these tags. NCCL knows none and goes by order, which is
# the same on every rank: the keys of a hop are sent after the gradient of the hop before.
KV, GRADIENT = 0, 1


@dataclass(eq=False)
class Task:
    """One microbatch's attention on one rank.

    Attributes:
        number: its name for the operators.
        plans: one for each pack.
        kind: how keys and values cross the ring group.
        exchange: layout, groups and log.
        backend: the kernel.
        kv_grad_dtype: of travelling gradients where activations are narrower.
        device: of its tensors.
        dtype: of its tensors.
    """

    number: int
    plans: tuple[AttnPlan, ...]
    kind: Kind
    exchange: Exchange
    backend: BlockAttention
    kv_grad_dtype: torch.dtype
    device: torch.device
    dtype: torch.dtype
    schedule: Schedule = field(init=False)

    def __post_init__(self) -> None:
        self.schedule = schedule_of(self.exchange.layout, self.plans, self.kind)

    def fits(self, x: Tensor) -> bool:
        """Whether tensors like ``x`` are this task's."""
        return x.device == self.device and x.dtype == self.dtype

    @property
    def ring(self) -> int:
        """Ranks of the ring group."""
        return self.exchange.layout.groups.plan.ring

    @property
    def travels(self) -> bool:
        """Whether keys and values are passed round, and so are one tensor."""
        return self.ring > 1 and self.kind == "ring"

    def forward(self, q_TBNA: Tensor, kv: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Output [T, B, N, A] in the input's dtype and log-sum-exp [B, N, T] of these queries over all ring shards.

        Args:
            q_TBNA: queries of this ring shard.
            kv: keys and values [T, B, n, A]; in a ring, where they travel, one tensor [2, T, B, n, A] of both.
        """
        running = RunningOutput(q_TBNA, is_merged=not self.schedule.queries_once)
        if self.ring == 1:
            running.add(kv[0], kv[1], self.schedule.hops[0], self.backend)
        elif self.kind == "allgather":
            k, v = self.exchange.gather(kv[0], kv[1]).unbind(1)
            running.add(k, v, self.schedule.hops[0], self.backend)
        else:
            travel = _Travel(self.exchange, kv[0])
            for blocks in self.schedule.hops:
                k, v = travel.start_next()
                running.add(k, v, blocks, self.backend)
                travel.finish_next()
        return running.result()

    def backward(self, given: Given, kv: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the queries and of each tensor of ``kv``, in their shapes and dtypes."""
        grad_q = RunningSum(given.q_TBNA, is_merged=not self.schedule.queries_once)
        if self.ring == 1:
            sums = self._sums(kv[0], kv[1])
            add_gradients(given, grad_q, (kv[0], kv[1]), sums, self.schedule.hops[0], self.backend)
            grads = [each.result() for each in sums]
        elif self.kind == "allgather":
            grads = self._backward_gathered(given, grad_q, kv[0], kv[1])
        else:
            grads = [self._backward_ring(given, grad_q, kv[0])]
        return [grad.to(x.dtype) for grad, x in zip([grad_q.result(), *grads], [given.q_TBNA, *kv])]

    def _backward_gathered(self, given: Given, grad_q: RunningSum, k_TBNA: Tensor, v_TBNA: Tensor) -> list[Tensor]:
        whole = self.exchange.gather(k_TBNA, v_TBNA)
        k, v = whole.unbind(1)
        sums = self._sums(k, v)
        add_gradients(given, grad_q, (k, v), sums, self.schedule.hops[0], self.backend)
        grad = whole.new_empty(whole.shape, dtype=self._travel_dtype(whole.dtype))
        for part, total in zip(grad.unbind(1), sums):
            part.copy_(total.result())
        return [
            part.clone(memory_format=torch.contiguous_format) for part in self.exchange.reduce_scatter(grad).unbind(1)
        ]

    def _backward_ring(self, given: Given, grad_q: RunningSum, kv_xTBNA: Tensor) -> Tensor:
        """Gradients travel with their keys, each rank adding its part, and after the last hop one more home."""
        travel = _Travel(self.exchange, kv_xTBNA)
        lengths, mine = self.exchange.layout.ring_lengths, self.exchange.layout.groups.ring_rank
        dtype = self._travel_dtype(kv_xTBNA.dtype)
        arriving: Tensor | None = None
        pending: Hop | None = None
        for hop, blocks in enumerate(self.schedule.hops):
            own = self._gradients_of_hop(given, grad_q, travel, blocks)
            if pending is None:
                leaving = torch.stack([part.to(dtype) for part in own])
            else:
                assert arriving is not None
                pending.wait()
                leaving = arriving
                for total, part in zip(leaving.unbind(), own):
                    total.add_(part)
            del own
            # What comes next is the gradient of the shard that this rank holds at the next hop; at the end its own.
            arriving = leaving.new_empty(2, lengths[(mine - hop - 1) % self.ring], *leaving.shape[2:])
            pending = self.exchange.hop(leaving, arriving, GRADIENT)
        assert arriving is not None
        assert pending is not None
        pending.wait()
        return arriving

    def _gradients_of_hop(
        self, given: Given, grad_q: RunningSum, travel: "_Travel", blocks: Sequence[Block]
    ) -> list[Tensor]:
        """This rank's part of the gradients of the keys and values at hand, which are let go for the next ones."""
        k, v = travel.start_next()
        sums = self._sums(k, v)
        add_gradients(given, grad_q, (k, v), sums, blocks, self.backend)
        parts = [total.result() for total in sums]
        del k, v, sums
        travel.finish_next()
        return parts

    def _sums(self, k_TBNA: Tensor, v_TBNA: Tensor) -> tuple[RunningSum, RunningSum]:
        is_merged = not self.schedule.keys_once
        return RunningSum(k_TBNA, is_merged=is_merged), RunningSum(v_TBNA, is_merged=is_merged)

    def _travel_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.kv_grad_dtype if dtype.itemsize < wide_dtype(dtype).itemsize else dtype


class _Travel:
    """Keys and values on their way round the ring: the shard at hand, and the one that arrives meanwhile."""

    def __init__(self, exchange: Exchange, kv_xTBNA: Tensor) -> None:
        self.exchange, self.held, self.hops = exchange, kv_xTBNA, 0
        self.arriving: tuple[Tensor, Hop] | None = None

    def start_next(self) -> tuple[Tensor, Tensor]:
        """The keys and values at hand; they are sent on from now, unless this is the last hop."""
        layout = self.exchange.layout
        ring, mine = layout.groups.plan.ring, layout.groups.ring_rank
        self.hops += 1
        if self.hops < ring:
            tokens = layout.ring_lengths[(mine - self.hops) % ring]
            arriving = self.held.new_empty(2, tokens, *self.held.shape[2:])
            self.arriving = (arriving, self.exchange.hop(self.held, arriving, KV))
        return self.held[0], self.held[1]

    def finish_next(self) -> None:
        """Wait for the next shard and hold it; the one at hand is let go."""
        if self.arriving is not None:
            self.held, hop = self.arriving
            hop.wait()
            self.arriving = None
