"""Which matrices' gradients go straight into DistributedDataParallel's fp32 buffers (``megavid.ops.weight_gradient``).

A gradient that autograd hands over is a tensor of its own, which a hook adds to the parameter's ``main_grad``. Linears
of megatron-core whose matrix is trained add theirs in the backward pass instead, and say so to the hook; so do experts.
Those in FP8 and of Transformer Engine are their own affair, adapters are too narrow to gain.
"""

import abc

from torch import nn

from megavid.ops.weight_gradient import GradientSum, add_product_, can_add_product
from megavid.parallel import mcore
from megavid.parallel.gradients import gradient_of


class AddsInPlace(nn.Module, abc.ABC):
    """A layer that adds its matrices' gradients to ``sum_of(matrix)`` where it is told to.

    Attributes:
        is_in_place: whether it is.
    """

    is_in_place = False

    @abc.abstractmethod
    def matrices(self) -> list[nn.Parameter]:
        """Parameters whose gradients it would add."""


def sum_of(parameter: nn.Parameter) -> GradientSum:
    """Where the gradient of a parameter of a wrapped chunk is added."""

    def tell() -> None:
        parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # what megatron-core's hook looks at

    return GradientSum(gradient_of(parameter), tell)


def add_in_place(chunk: nn.Module) -> None:
    """Let every matrix of ``chunk`` that can add its gradient in place; call it once the chunk is wrapped.

    All products with such a matrix must then be its layer's: a gradient that comes by another way would be dropped.
    """
    for module in chunk.modules():
        if isinstance(module, AddsInPlace):
            matrices = module.matrices()
            module.is_in_place = bool(matrices) and all(_can_add(matrix) for matrix in matrices)
        elif isinstance(module, (mcore.ColumnParallelLinear, mcore.RowParallelLinear)) and _can_add(module.weight):
            mcore.fuse_weight_gradient(module, add_product_, sum_of(module.weight))


def _can_add(matrix: nn.Parameter) -> bool:
    return matrix.requires_grad and can_add_product(matrix.dtype, matrix.device)
