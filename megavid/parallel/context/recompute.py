"""Selective recomputation that keeps the attention: its output and log-sum-exp are saved, all around it computed again.

Owns the policy only. Recomputing the attention itself would repeat 2/9 of its FLOPs and every hop of the ring; keeping
(out, lse) costs one activation of the model's width. The all-to-alls around it are repeated, because their results
(q, k, v in head layout) are three times as large as what is kept.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

from megavid.parallel.context import attention  # noqa: F401  # registers the operators named below


def keep_attention() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What ``torch.utils.checkpoint.checkpoint`` takes as ``context_fn`` (with ``use_reentrant=False``)."""
    create: Any = create_selective_checkpoint_contexts
    contexts: tuple[AbstractContextManager[None], AbstractContextManager[None]] = create(_policy)
    return contexts


def _policy(context: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator == torch.ops.megavid.context_attention.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
