"""Which matrices' gradients go straight into DistributedDataParallel's fp32 buffers (``megavid.ops.weight_gradient``).

A gradient that autograd hands over is a tensor of its own, which a hook adds to the parameter's ``main_grad``. Linears
of megatron-core whose matrix is trained add theirs in the backward pass instead, and say so to the hook. Those in FP8
and of Transformer Engine are their own affair, adapters are too narrow to gain.
"""

from torch import nn

from megavid.ops.weight_gradient import add_product_, can_add_product
from megavid.parallel import mcore


def add_in_place(chunk: nn.Module) -> None:
    """Let every matrix of ``chunk`` that can add its gradient in place; call it once the chunk is wrapped.

    All products with such a matrix must then be its layer's: a gradient that comes by another way would be dropped.
    """
    for module in chunk.modules():
        if isinstance(module, (mcore.ColumnParallelLinear, mcore.RowParallelLinear)):
            weight = module.weight
            if weight.requires_grad and can_add_product(weight.dtype, weight.device):
                mcore.fuse_weight_gradient(module, add_product_)
