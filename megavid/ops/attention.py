"""Attention to the captions, on one rank; and attention written out, the slow twin of every fast one.

The segment table is host data, so the loop over clips costs no synchronisation. Tokens of the padding get zeros.
Attention of clips to themselves crosses context-parallel ranks: ``megavid.parallel.context``.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megavid.ops.packs import Pack, Span, clip_parts


def cross_attention(q_TBNA: Tensor, k_LGNA: Tensor, v_LGNA: Tensor, packs: tuple[Pack, ...], span: Span) -> Tensor:
    """Attention of every clip to all L tokens of its caption, [T, B, N, A].

    Args:
        q_TBNA: queries of the tokens of ``span``.
        k_LGNA: keys of the captions of all G clips of the microbatch.
        v_LGNA: values, likewise.
        packs: the segment tables.
        span: the tokens of every pack that the queries stand for; a clip's tokens attend alike in any of them.
    """
    columns: list[list[Tensor]] = [[] for _ in packs]
    ends = [0] * len(packs)
    for part in clip_parts(packs, span):
        if part.tokens == 0:
            continue
        query = q_TBNA[part.start : part.stop, part.row]
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, k_LGNA[:, part.number], v_LGNA[:, part.number]))
        attended = scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1)
        columns[part.row] += [_zeros(q_TBNA, part.start - ends[part.row]), attended]
        ends[part.row] = part.stop
    for column, end in zip(columns, ends, strict=True):
        column.append(_zeros(q_TBNA, span.tokens - end))
    out_TBNA = torch.stack([torch.cat(column) for column in columns], dim=1)
    if not any(ends):
        # A span of nothing but padding still takes part in the backward pass: its weights must tell the other ranks
        # that their gradients are complete.
        out_TBNA = out_TBNA + 0.0 * (q_TBNA.sum() + k_LGNA.sum() + v_LGNA.sum())
    return out_TBNA


def dense_attention(q_nNA: Tensor, k_mNA: Tensor, v_mNA: Tensor) -> Tensor:
    """Softmax attention written out: the slow twin of every fast one; [n, N, A]."""
    scores = torch.einsum("qna,kna->nqk", q_nNA, k_mNA) / q_nNA.shape[-1] ** 0.5
    return torch.einsum("nqk,kna->qna", scores.softmax(dim=-1), v_mNA)


def _zeros(like_TBNA: Tensor, tokens: int) -> Tensor:
    return like_TBNA.new_zeros(tokens, *like_TBNA.shape[2:])
