"""What an expert layer computes between its matrix products, in plain torch or as compiled ops: chosen with BlockOps.

Owns the record of functions that routers, dispatchers and experts are given. The plain ones are
``megavid.ops.moe_math``, torch's activations and megatron-core's permutation; the compiled ones are one op each. Both
choose the same experts and compute the same numbers but for rounding: compiled sums over a token's rows are fp32,
megatron-core's are in the rows' dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megavid.ops.expert_activation import expert_activation_op
from megavid.ops.expert_activation_fp8 import expert_activation_fp8_op
from megavid.ops.fp8 import Quantized
from megavid.ops.moe_permute import Rows, moe_permute_op, moe_unpermute_op
from megavid.ops.router_topk import Choice, router_topk_op, router_topk_reference

Activate = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor], Tensor]
"""See ``megavid.ops.expert_activation.expert_activation_reference``."""


class ActivateFp8(Protocol):
    """See ``megavid.ops.expert_activation_fp8.expert_activation_fp8_op``."""

    def __call__(
        self,
        up_SM: Tensor,
        gate_SM: Tensor | None,
        up_bias_eM: Tensor | None,
        gate_bias_eM: Tensor | None,
        expert_S: Tensor,
        probability_S: Tensor,
        tile: int,
        scale_dtype: torch.dtype,
    ) -> Quantized:
        """The activation in eight bits."""
        ...


class RouterTopk(Protocol):
    """See ``megavid.ops.router_topk.router_topk_reference``."""

    def __call__(
        self,
        scores_TE: Tensor,
        bias_E: Tensor | None,
        bucket_T: Tensor,
        *,
        num_buckets: int,
        top_k: int,
        num_groups: int,
        top_groups: int,
        scale: float,
    ) -> Choice:
        """What the scores choose."""
        ...


@dataclass(frozen=True)
class Permutation:
    """Tokens to rows sorted by expert, and back.

    Attributes:
        forth: (x_TD, probability_TE, map_TE, num_rows) to ``Rows``.
        back: (x_SD, rows) to the sum of each token's rows, [T, D].
    """

    forth: Callable[[Tensor, Tensor, Tensor, int], Rows]
    back: Callable[[Tensor, Rows], Tensor]


@dataclass(frozen=True)
class MoEOps:
    """What an expert layer computes between its matrix products.

    Attributes:
        router_topk: experts, gates and counts of each token.
        activate: activation of the experts' rows; None: ``grouped_experts``' own, bias by bias.
        permutation: rows and tokens; None: megatron-core's own.
        activate_fp8: the activation in eight bits, of the numbers that ``activate`` gives; None: in two steps.
    """

    router_topk: RouterTopk
    activate: Activate | None = None
    permutation: Permutation | None = None
    activate_fp8: ActivateFp8 | None = None


REFERENCE_MOE = MoEOps(router_topk_reference)


def _back(x_SD: Tensor, rows: Rows) -> Tensor:
    return moe_unpermute_op(x_SD, None, rows.token_S, rows.first_T1, rows.row_S)


COMPILED_MOE = MoEOps(
    router_topk_op, expert_activation_op, Permutation(moe_permute_op, _back), expert_activation_fp8_op
)
