"""Block attention by torch's own kernels: the CPU's flash kernel; on CUDA flash, memory-efficient and cuDNN.

What torch registers in the place of its flash kernel (FA3, FA4 through ``activate_flash_attention_impl``) is used
without a change here. Source: aten/src/ATen/native/native_functions.yaml, schemas of torch 2.13.
"""

import torch
from torch import Tensor

from megavid.ops.block_attention import HALF, BlockGradients

aten = torch.ops.aten
# The memory-efficient kernel wants a row of the log-sum-exp to fill so many queries.
EFFICIENT_ROWS = 32


class CpuFlash:
    """The CPU's flash kernel: fp64, fp32, bf16, fp16; fewer key heads than query heads. Also shapes on "meta"."""

    def forward(self, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor) -> tuple[Tensor, Tensor]:
        """See ``BlockAttention``."""
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(q_BNTA, k_BNTA, v_BNTA)
        return out, lse

    def backward(
        self, grad_BNTA: Tensor, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor, out_BNTA: Tensor, lse_BNT: Tensor
    ) -> BlockGradients:
        """See ``BlockAttention``."""
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            grad_BNTA, q_BNTA, k_BNTA, v_BNTA, out_BNTA, lse_BNT.contiguous(), 0.0, False
        )
        return BlockGradients(*gradients)


class CudaFlash:
    """CUDA's flash kernel: bf16 and fp16."""

    def forward(self, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor) -> tuple[Tensor, Tensor]:
        """See ``BlockAttention``."""
        out, lse, *_ = aten._scaled_dot_product_flash_attention.default(q_BNTA, k_BNTA, v_BNTA)
        return out, lse

    def backward(
        self, grad_BNTA: Tensor, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor, out_BNTA: Tensor, lse_BNT: Tensor
    ) -> BlockGradients:
        """See ``BlockAttention``."""
        philox = torch.zeros(2, dtype=torch.uint64, device=q_BNTA.device)  # of dropout, which is not used
        # A tensor of sequence starts, even an empty one, would mean ragged batches: it must be None.
        gradients = aten._scaled_dot_product_flash_attention_backward.default(
            grad_BNTA, q_BNTA, k_BNTA, v_BNTA, out_BNTA, lse_BNT.contiguous(), None, None,
            q_BNTA.shape[2], k_BNTA.shape[2], 0.0, False, philox, philox.new_empty(0),
        )  # fmt: skip
        return BlockGradients(*gradients)


class CudaEfficient:
    """CUDA's memory-efficient kernel: fp32 too. It knows no grouped heads, so keys and values are repeated."""

    def forward(self, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor) -> tuple[Tensor, Tensor]:
        """See ``BlockAttention``; the padding of the log-sum-exp is cut off."""
        k, v = (_repeated(x, q_BNTA) for x in (k_BNTA, v_BNTA))
        out, lse, *_ = aten._scaled_dot_product_efficient_attention.default(q_BNTA, k, v, None, True)
        return out, lse[..., : q_BNTA.shape[2]]

    def backward(
        self, grad_BNTA: Tensor, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor, out_BNTA: Tensor, lse_BNT: Tensor
    ) -> BlockGradients:
        """See ``BlockAttention``."""
        k, v = (_repeated(x, q_BNTA) for x in (k_BNTA, v_BNTA))
        missing = -lse_BNT.shape[-1] % EFFICIENT_ROWS
        lse = torch.nn.functional.pad(lse_BNT, (0, missing), value=torch.inf).contiguous()
        seed, offset = (torch.zeros((), dtype=torch.int64, device=q_BNTA.device) for _ in range(2))
        grad_q, grad_k, grad_v, _ = aten._scaled_dot_product_efficient_attention_backward.default(
            grad_BNTA, q_BNTA, k, v, None, out_BNTA, lse, seed, offset, 0.0, [True, True, True, False]
        )
        heads = (k_BNTA.shape[1], -1)
        return BlockGradients(grad_q, *(x.unflatten(1, heads).sum(2) for x in (grad_k, grad_v)))


class CudaCudnn:
    """CuDNN's kernel: bf16 and fp16."""

    def forward(self, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor) -> tuple[Tensor, Tensor]:
        """See ``BlockAttention``."""
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention.default(q_BNTA, k_BNTA, v_BNTA, None, True)
        return out, lse.view(out.shape[:3])

    def backward(
        self, grad_BNTA: Tensor, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor, out_BNTA: Tensor, lse_BNT: Tensor
    ) -> BlockGradients:
        """See ``BlockAttention``."""
        seed, offset = (torch.zeros((), dtype=torch.int64, device=q_BNTA.device) for _ in range(2))
        gradients = aten._scaled_dot_product_cudnn_attention_backward.default(
            grad_BNTA, q_BNTA, k_BNTA, v_BNTA, out_BNTA, lse_BNT.contiguous().unsqueeze(-1), seed, offset, None,
            None, None, q_BNTA.shape[2], k_BNTA.shape[2], 0.0, False,
        )  # fmt: skip
        return BlockGradients(*gradients)


class CudaAten:
    """Flash where the dtype allows it, else memory-efficient."""

    def __init__(self) -> None:
        self.flash, self.efficient = CudaFlash(), CudaEfficient()

    def forward(self, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor) -> tuple[Tensor, Tensor]:
        """See ``BlockAttention``."""
        return self._kernel(q_BNTA).forward(q_BNTA, k_BNTA, v_BNTA)

    def backward(
        self, grad_BNTA: Tensor, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor, out_BNTA: Tensor, lse_BNT: Tensor
    ) -> BlockGradients:
        """See ``BlockAttention``."""
        return self._kernel(q_BNTA).backward(grad_BNTA, q_BNTA, k_BNTA, v_BNTA, out_BNTA, lse_BNT)

    def _kernel(self, q_BNTA: Tensor) -> CudaFlash | CudaEfficient:
        return self.flash if q_BNTA.dtype in HALF else self.efficient


def _repeated(x_BNTA: Tensor, q_BNTA: Tensor) -> Tensor:
    groups = q_BNTA.shape[1] // x_BNTA.shape[1]
    return x_BNTA if groups == 1 else x_BNTA.repeat_interleave(groups, dim=1)
