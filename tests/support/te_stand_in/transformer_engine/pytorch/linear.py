"""The linear layer, tensor-parallel as Transformer Engine's: what each mode gathers and sums, written out."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, RoundGradient, RoundOperand


def gathered(x: Tensor, group: Any) -> Tensor:
    """All ranks' rows, one after the other."""
    whole = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def scattered(x: Tensor, group: Any) -> Tensor:
    """This rank's rows of the sum over ranks."""
    return summed(x, group).chunk(group.size())[group.rank()].contiguous()


def summed(x: Tensor, group: Any) -> Tensor:
    """The sum over ranks."""
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total


def unchanged(x: Tensor, group: Any) -> Tensor:
    """As it is."""
    return x.clone()


ENTER = {True: (gathered, scattered), False: (unchanged, summed)}
"""By sequence parallelism: what a column-parallel layer does to its input, and to that input's gradient."""
LEAVE = {True: (scattered, gathered), False: (summed, unchanged)}
"""What a row-parallel layer does to its output, likewise."""


class Travel(torch.autograd.Function):
    """One collective forward, another backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, there: Any, back: Any) -> Tensor:
        ctx.group, ctx.back = group, back
        result: Tensor = there(x, group)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(gradient, ctx.group), None, None, None


class Linear(nn.Module):
    """``x @ weight.T + bias``; signature as Transformer Engine's."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert parallel_mode in ("column", "row", None)
        assert not fuse_wgrad_accumulation
        self.tp_group, self.tp_size = tp_group, tp_group.size() if tp_group is not None else tp_size
        self.parallel_mode, self.use_bias, self.return_bias = parallel_mode, bias, return_bias
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        weight = torch.full((self.out_features, self.in_features), torch.nan, dtype=params_dtype, device=device)
        self.weight = nn.Parameter(weight)
        if init_method is not None:
            init_method(self.weight)
        self.bias: Any = torch.empty(0, dtype=params_dtype, device=device)
        if bias:
            del self.bias
            self.bias = nn.Parameter(torch.zeros(self.out_features, dtype=params_dtype, device=device))
        self.recipes: list[Any] = []

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> Tensor | tuple[Tensor, Any]:
        """The outputs, with the bias or beside it; notes the recipe of the region that it is called in."""
        assert is_first_microbatch is None, "eight bits of the matrix would be kept from before the optimizer's step"
        assert inp.dtype == self.weight.dtype, (inp.dtype, self.weight.dtype)
        recipe, weight = FP8GlobalStateManager.get_fp8_recipe(), self.weight
        self.recipes.append(recipe)
        if self.parallel_mode == "column" and self.tp_size > 1:
            inp = Travel.apply(inp, self.tp_group, *ENTER[self.sequence_parallel])
        if recipe is not None:
            inp, weight = RoundOperand.apply(inp), RoundOperand.apply(weight)
        out = torch.nn.functional.linear(inp, weight)
        if recipe is not None:
            out = RoundGradient.apply(out, recipe.fp8_format)
        if self.parallel_mode == "row" and self.tp_size > 1:
            out = Travel.apply(out, self.tp_group, *LEAVE[self.sequence_parallel])
        if self.return_bias:
            return out, self.bias
        return out + self.bias if self.use_bias else out
