"""Block attention by the package FlashAttention-3 (``flash_attn_interface``), on Hopper GPUs: bf16 and fp16, and FP8.

Wanted is a version whose calls are torch operators, which take everything but queries, keys and values by keyword. Of
FP8 it has the forward pass alone: bytes of e4m3 with a scale for each pack and key head (the queries of a key head
share one), heads a multiple of 16 wide, output in bf16. It transposes values itself, so that they lie like keys, and it
rounds the weights of the values to e4m3 too; their sum, and so the log-sum-exp, is of the numbers before.

Source: hopper/flash_attn_interface.py and flash_api.cpp of Dao-AILab/flash-attention, commit 0251105a.
"""

import torch
from flash_attn_interface import _flash_attn_backward, _flash_attn_forward
from torch import Tensor

from megavid.errors import ConfigError
from megavid.ops.block_attention import BlockGradients
from megavid.ops.fp8 import Quantized

PASSED: dict[str, tuple[str, ...]] = {
    "_flash_attn_forward": ("q", "k", "v", "q_descale", "k_descale", "v_descale", "softmax_scale", "causal"),
    "_flash_attn_backward": (
        *("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"),
        *("softmax_scale", "is_causal", "deterministic"),
    ),
}
"""What is passed to each of the package's operators; the rest must have defaults."""


def check_interface() -> None:
    """Refuse a version that cannot be called as here, before anything is computed.

    Raises:
        ConfigError: its calls are no operators, lack an argument, or want one more.
    """
    for name, passed in PASSED.items():
        operator = getattr(torch.ops.flash_attn_3, name, None)
        if operator is None:
            found = f"has no operator flash_attn_3::{name}"
        else:
            arguments = operator.default._schema.arguments
            lacks = [each for each in passed if each not in {argument.name for argument in arguments}]
            wants = [each.name for each in arguments if not each.has_default_value() and each.name not in passed]
            if not lacks and not wants:
                continue
            kinds = {"has no argument": lacks, "wants": wants}
            words = [f"{kind} {', '.join(names)}" for kind, names in kinds.items() if names]
            found = f"has an operator {name} that {' and '.join(words)}"
        raise ConfigError(
            f"attention backend 'flash_attn_3': the FlashAttention-3 that is installed {found}; install 3.0.0, or set "
            "parallel.attention_backend = 'aten'"
        )


class FlashAttn3:
    """The package's kernels; they take tokens before heads."""

    fp8_head_multiple = 16

    def forward(self, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor) -> tuple[Tensor, Tensor]:
        """See ``BlockAttention``."""
        q, k, v = (x.transpose(1, 2) for x in (q_BNTA, k_BNTA, v_BNTA))
        out, lse, *_ = _flash_attn_forward(q, k, v, softmax_scale=q.shape[-1] ** -0.5, causal=False)
        return out.transpose(1, 2), lse

    def forward_fp8(
        self, q_BNTA: Quantized, k_BNTA: Quantized, v_BNTA: Quantized, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """See ``megavid.ops.block_attention_fp8.Fp8Kernel``."""
        kv_heads = k_BNTA.data.shape[1]
        q, k, v = (x.data.transpose(1, 2) for x in (q_BNTA, k_BNTA, v_BNTA))
        q_scale, k_scale, v_scale = (_scale_of_key_heads(x, kv_heads) for x in (q_BNTA, k_BNTA, v_BNTA))
        out, lse, *_ = _flash_attn_forward(
            q, k, v, q_descale=q_scale, k_descale=k_scale, v_descale=v_scale, softmax_scale=q.shape[-1] ** -0.5,
            causal=False,
        )  # fmt: skip
        return out.transpose(1, 2).to(dtype), lse

    def backward(
        self, grad_BNTA: Tensor, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor, out_BNTA: Tensor, lse_BNT: Tensor
    ) -> BlockGradients:
        """See ``BlockAttention``."""
        grad, q, k, v, out = (x.transpose(1, 2) for x in (grad_BNTA, q_BNTA, k_BNTA, v_BNTA, out_BNTA))
        grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        _flash_attn_backward(
            grad, q, k, v, out, lse_BNT.contiguous(), dq=grad_q, dk=grad_k, dv=grad_v,
            softmax_scale=q.shape[-1] ** -0.5, is_causal=False,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return BlockGradients(*(x.transpose(1, 2) for x in (grad_q, grad_k, grad_v)))


def _scale_of_key_heads(x_BNTA: Quantized, kv_heads: int) -> Tensor:
    """Scales [B, n] of heads that share a key head and so a scale."""
    scale_BN = x_BNTA.scale[:, :, 0, 0]
    return scale_BN[:, :: scale_BN.shape[1] // kv_heads].contiguous()
