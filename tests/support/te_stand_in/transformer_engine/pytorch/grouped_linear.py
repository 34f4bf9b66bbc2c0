"""The grouped linear layer: a product for each matrix and its rows. In FP8 it refuses rows that are no multiples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transformer_engine.common.recipe import MXFP8BlockScaling
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, RoundGradient, RoundOperand


class GroupedLinear(nn.Module):
    """``x @ weight{i}.T`` of the rows of matrix ``i``; signature as Transformer Engine's."""

    def __init__(
        self,
        num_gemms: int,
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
        device: torch.device | str = "cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
    ) -> None:
        super().__init__()
        assert parallel_mode in ("column", "row", None)
        assert not fuse_wgrad_accumulation
        assert not bias, "megavid adds the biases of experts itself"
        size = tp_size if tp_group is None else tp_group.size()
        self.num_gemms = num_gemms
        self.out_features = out_features // (size if parallel_mode == "column" else 1)
        self.in_features = in_features // (size if parallel_mode == "row" else 1)
        for i in range(num_gemms):
            weight = torch.full((self.out_features, self.in_features), torch.nan, dtype=params_dtype, device=device)
            self.register_parameter(f"weight{i}", nn.Parameter(weight))
            if init_method is not None:
                init_method(weight)
        self.recipes: list[Any] = []

    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        """The outputs; notes the recipe of the region that it is called in."""
        assert is_first_microbatch is None, "eight bits of the matrices would be kept from before the optimizer's step"
        assert len(m_splits) == self.num_gemms, "Number of splits should match number of GEMMs."
        assert inp.shape[0], "not every version is known to take no rows at all"
        if inp.size(-1) != self.in_features:
            raise ValueError(f"Input tensor (shape={tuple(inp.size())}) is not compatible with the weight tensors")
        weights = list(self.parameters())
        assert inp.dtype == weights[0].dtype, (inp.dtype, weights[0].dtype)
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        self.recipes.append(recipe)
        multiple = 32 if isinstance(recipe, MXFP8BlockScaling) else 16
        if recipe is not None and any(rows % multiple for rows in m_splits):
            raise RuntimeError(f"rows of each matrix must be a multiple of {multiple} in FP8, got {m_splits}")
        # Sizes that do not sum to the rows are an error of split, as they are there.
        parts = [self._product(x, w, recipe) for x, w in zip(torch.split(inp, m_splits), weights, strict=True)]
        return torch.cat(parts)

    @staticmethod
    def _product(x: Tensor, weight: Tensor, recipe: Any) -> Tensor:
        if recipe is None or not x.shape[0]:
            return torch.nn.functional.linear(x, weight)
        out = torch.nn.functional.linear(RoundOperand.apply(x), RoundOperand.apply(weight))
        rounded: Tensor = RoundGradient.apply(out, recipe.fp8_format)
        return rounded
