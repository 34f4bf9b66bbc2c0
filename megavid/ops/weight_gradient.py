"""The gradient of a matrix, added to a sum in fp32 by the product that computes it.

Owns the product, where torch has it, and how a backward pass is told of the sum. Else a gradient is a new tensor as
large as the matrix, written once and read again to be added: two ways through memory more, and in bf16 one rounding.
bf16 on a CPU has no such product: the gradient is that tensor, and what is saved is torch's copy of it in fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

FIRST_MIXED = TorchVersion("2.10")
"""torch from which on a product of narrow numbers on a GPU adds to a sum in fp32; before, all three must be alike."""
PIECE = 2**17
"""Narrow numbers that are added to a sum on a CPU at a time: torch widens them first, into half a MiB that stays in
caches instead of new pages as large as the sum."""


def can_add_product(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``add_product_`` takes operands of ``dtype`` on ``device``."""
    if dtype == torch.bfloat16 and device.type == "cuda":
        return TorchVersion(torch.__version__) >= FIRST_MIXED
    return dtype in (torch.float32, torch.bfloat16)


def add_product_(total_OI: Tensor, grad_SO: Tensor, x_SI: Tensor) -> None:
    """Add ``grad.T @ x``, the gradient of the matrix in ``x @ weight.T``, to ``total``.

    Args:
        total_OI: the sum so far, fp32, contiguous; changed in place.
        grad_SO: gradient of the output, of a dtype that ``can_add_product`` takes.
        x_SI: the input, in the same dtype.
    """
    if x_SI.dtype == total_OI.dtype:
        torch.addmm(total_OI, grad_SO.t(), x_SI, out=total_OI)
    elif x_SI.device.type == "cuda":
        torch.addmm(total_OI, grad_SO.t(), x_SI, out_dtype=total_OI.dtype, out=total_OI)
    else:
        _add_narrow_(total_OI, grad_SO.t() @ x_SI)


def _add_narrow_(total: Tensor, product: Tensor) -> None:
    for wide, narrow in zip(torch.split(total.view(-1), PIECE), torch.split(product.view(-1), PIECE), strict=True):
        wide += narrow


def add_product_reference_(total_OI: Tensor, grad_SO: Tensor, x_SI: Tensor) -> None:
    """The slow, obvious twin of ``add_product_``."""
    total_OI += grad_SO.t() @ x_SI


@dataclass(frozen=True)
class GradientSum:
    """Where a backward pass adds a parameter's gradient, instead of handing one to autograd.

    Attributes:
        total: the sum so far, fp32, contiguous, in the parameter's shape.
        tell: to be called when something was added.
    """

    total: Tensor
    tell: Callable[[], None]

    def stand_in(self, dtype: torch.dtype) -> Tensor:
        """What autograd is given for a gradient: the parameter's shape, memory of the sum, numbers without meaning.

        Args:
            dtype: the parameter's, no wider than fp32.
        """
        return self.total.view(-1).view(dtype)[: self.total.numel()].view(self.total.shape)
