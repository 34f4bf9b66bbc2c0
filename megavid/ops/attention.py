"""Attention within packs on one rank: each clip attends to itself, and to its own caption.

The segment table is host data, so the loop over clips costs no synchronisation. Tokens of the padding get zeros.
Context parallelism will bring its own attention; this one needs all tokens of a pack.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megavid.ops.packs import Pack


def self_attention(q_TBNA: Tensor, k_TBNA: Tensor, v_TBNA: Tensor, packs: tuple[Pack, ...]) -> Tensor:
    """Bidirectional attention of every clip to itself; [T, B, N, A]."""

    def keys_of(row: int, number: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return k_TBNA[start:stop, row], v_TBNA[start:stop, row]

    return _by_clip(q_TBNA, packs, keys_of)


def cross_attention(q_TBNA: Tensor, k_LGNA: Tensor, v_LGNA: Tensor, packs: tuple[Pack, ...]) -> Tensor:
    """Attention of every clip to all L tokens of its caption (clip number G of the microbatch); [T, B, N, A]."""

    def keys_of(row: int, number: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return k_LGNA[:, number], v_LGNA[:, number]

    return _by_clip(q_TBNA, packs, keys_of)


def dense_attention(q_nNA: Tensor, k_mNA: Tensor, v_mNA: Tensor) -> Tensor:
    """Softmax attention written out: the slow twin of what ``_by_clip`` calls; [n, N, A]."""
    scores = torch.einsum("qna,kna->nqk", q_nNA, k_mNA) / q_nNA.shape[-1] ** 0.5
    return torch.einsum("nqk,kna->qna", scores.softmax(dim=-1), v_mNA)


def _by_clip(
    q_TBNA: Tensor, packs: tuple[Pack, ...], keys_of: Callable[[int, int, int, int], tuple[Tensor, Tensor]]
) -> Tensor:
    columns, number = [], 0
    for row, pack in enumerate(packs):
        parts, end = [], 0
        for clip in pack.clips:
            stop = clip.start + clip.tokens
            keys, values = keys_of(row, number, clip.start, stop)
            query = q_TBNA[clip.start : stop, row]
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, keys, values))
            parts.append(scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1))
            number, end = number + 1, stop
        parts.append(q_TBNA.new_zeros(pack.tokens - end, *q_TBNA.shape[2:]))
        columns.append(torch.cat(parts))
    return torch.stack(columns, dim=1)
