"""Attention of one shard of queries, block by block: the running merge forward, the running sums backward.

Owns the numerics: outputs and gradients that are sums of several blocks are summed in fp32 (fp64 for fp64), and the
log-sum-exp always is. A query in no block keeps output 0 and log-sum-exp -inf. A block of all queries (a clip that
fills its pack) is taken as the kernel gives it, without a copy. Knows no rank.

Source: the merge of partial softmaxes of FlashAttention (arXiv:2205.14135) and ring attention (arXiv:2310.01889).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megavid.ops.block_attention import BlockAttention, wide_dtype
from megavid.parallel.context.schedule import Block


class _Where(NamedTuple):
    """Some tokens and packs of a tensor [T, B, ...]."""

    tokens: slice
    rows: slice

    @classmethod
    def queries(cls, block: Block) -> "_Where":
        return cls(slice(block.q_start, block.q_stop), slice(block.row_start, block.row_stop))

    @classmethod
    def keys(cls, block: Block) -> "_Where":
        return cls(slice(block.k_start, block.k_stop), slice(block.row_start, block.row_stop))

    def of(self, x_TBNA: Tensor) -> Tensor:
        """A view of them, [B, N, T, A]: the order of dims that kernels take."""
        return x_TBNA[self].permute(1, 2, 0, 3)

    def is_all_of(self, x_TBNA: Tensor) -> bool:
        """Whether these are all tokens and packs."""
        tokens, batch = x_TBNA.shape[:2]
        return (self.tokens, self.rows) == (slice(0, tokens), slice(0, batch))


class RunningOutput:
    """Output and log-sum-exp of queries over the keys seen so far.

    Args:
        q_TBNA: the queries.
        is_merged: some query is in two blocks, so that the output must be wide.
    """

    def __init__(self, q_TBNA: Tensor, *, is_merged: bool) -> None:
        self.q_TBNA, self.wide = q_TBNA, wide_dtype(q_TBNA.dtype)
        self.dtype = self.wide if is_merged else q_TBNA.dtype
        self.state: tuple[Tensor, Tensor] | None = None

    def add(self, k_TBNA: Tensor, v_TBNA: Tensor, blocks: Sequence[Block], how: BlockAttention) -> None:
        """Merge what the blocks' queries gather from these keys."""
        for block in blocks:
            query, key = _Where.queries(block), _Where.keys(block)
            out_BNTA, lse_BNT = how.forward(query.of(self.q_TBNA), key.of(k_TBNA), key.of(v_TBNA))
            if self.state is None and query.is_all_of(self.q_TBNA):
                self.state = _tokens_first(out_BNTA, self.dtype), lse_BNT.contiguous()
                continue
            out_TBNA, all_lse_BNT = self._state()
            total_BNTA, seen_BNT = query.of(out_TBNA), all_lse_BNT[query.rows, :, query.tokens]
            if block.is_first:
                total_BNTA.copy_(out_BNTA)
                seen_BNT.copy_(lse_BNT)
                continue
            # Every block has keys, so lse is finite and a query not seen before (-inf) takes the block's output whole.
            weight_BNT = torch.sigmoid(lse_BNT - seen_BNT)
            total_BNTA.lerp_(out_BNTA.to(self.dtype), weight_BNT.unsqueeze(-1))
            seen_BNT.copy_(torch.logaddexp(seen_BNT, lse_BNT))

    def result(self) -> tuple[Tensor, Tensor]:
        """Output [T, B, N, A] in the queries' dtype, and log-sum-exp [B, N, T]."""
        out_TBNA, lse_BNT = self._state()
        return out_TBNA.to(self.q_TBNA.dtype), lse_BNT

    def _state(self) -> tuple[Tensor, Tensor]:
        if self.state is None:
            tokens, batch, heads, _ = self.q_TBNA.shape
            self.state = (
                _zeros_like(self.q_TBNA, self.dtype),
                self.q_TBNA.new_full((batch, heads, tokens), -torch.inf, dtype=self.wide),
            )
        return self.state


class RunningSum:
    """A gradient, shaped like a tensor [T, B, N, A], as the sum of blocks' parts.

    Args:
        like_TBNA: the tensor.
        is_merged: some of it is in two blocks, so that the sum must be wide.
    """

    def __init__(self, like_TBNA: Tensor, *, is_merged: bool) -> None:
        self.like = like_TBNA
        self.dtype = wide_dtype(like_TBNA.dtype) if is_merged else like_TBNA.dtype
        self.value: Tensor | None = None

    def add(self, part_BNTA: Tensor, where: _Where) -> None:
        """Add the part of some tokens and packs."""
        if self.value is None and where.is_all_of(self.like):
            self.value = _tokens_first(part_BNTA, self.dtype)
        else:
            where.of(self.result()).add_(part_BNTA)

    def result(self) -> Tensor:
        """The sum so far."""
        if self.value is None:
            self.value = _zeros_like(self.like, self.dtype)
        return self.value


@dataclass(frozen=True)
class Given:
    """What the backward pass of a shard of queries starts from: all of it is over ALL their keys.

    Attributes:
        grad_TBNA: gradient of the output.
        q_TBNA: the queries.
        out_TBNA: the output.
        lse_BNT: the log-sum-exp.
    """

    grad_TBNA: Tensor
    q_TBNA: Tensor
    out_TBNA: Tensor
    lse_BNT: Tensor


def add_gradients(
    given: Given,
    grad_q: RunningSum,
    kv: tuple[Tensor, Tensor],
    grad_kv: tuple[RunningSum, RunningSum],
    blocks: Sequence[Block],
    how: BlockAttention,
) -> None:
    """Add the blocks' part to the gradients of queries and of these keys and values."""
    for block in blocks:
        query, key = _Where.queries(block), _Where.keys(block)
        grad, q, out = (query.of(x) for x in (given.grad_TBNA, given.q_TBNA, given.out_TBNA))
        k, v = (key.of(x) for x in kv)
        own_q, own_k, own_v = how.backward(grad, q, k, v, out, given.lse_BNT[query.rows, :, query.tokens])
        grad_q.add(own_q, query)
        grad_kv[0].add(own_k, key)
        grad_kv[1].add(own_v, key)
        del own_q, own_k, own_v


def _tokens_first(x_BNTA: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, B, N, A], contiguous; no copy of a single pack."""
    return x_BNTA.permute(2, 0, 1, 3).to(dtype).contiguous()


def _zeros_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)
