"""Block attention by the package flash-attn (2.7 and later), where it is installed.

Source: flash_attn/flash_attn_interface.py of Dao-AILab/flash-attention; torch's own flash kernel ("aten") is the same
algorithm, so this one is for a newer build of it.
"""

import torch
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward
from torch import Tensor

from megavid.ops.block_attention import BlockGradients


class FlashAttn:
    """The package's kernels, bf16 and fp16; they take tokens before heads."""

    def forward(self, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor) -> tuple[Tensor, Tensor]:
        """See ``BlockAttention``."""
        q, k, v = (x.transpose(1, 2) for x in (q_BNTA, k_BNTA, v_BNTA))
        out, lse, *_ = _flash_attn_forward(
            q, k, v, dropout_p=0.0, softmax_scale=q.shape[-1] ** -0.5, causal=False, window_size_left=-1,
            window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        )  # fmt: skip
        return out.transpose(1, 2), lse

    def backward(
        self, grad_BNTA: Tensor, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor, out_BNTA: Tensor, lse_BNT: Tensor
    ) -> BlockGradients:
        """See ``BlockAttention``."""
        grad, q, k, v, out = (x.transpose(1, 2) for x in (grad_BNTA, q_BNTA, k_BNTA, v_BNTA, out_BNTA))
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        _flash_attn_backward(
            grad, q, k, v, out, lse_BNT.contiguous(), *grads, dropout_p=0.0, softmax_scale=q.shape[-1] ** -0.5,
            causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return BlockGradients(*(x.transpose(1, 2) for x in grads))
