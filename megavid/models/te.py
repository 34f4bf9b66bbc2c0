"""Linears of Transformer Engine, by megatron-core's wrappers, in the place of megavid's own: one matrix, or experts'.

Owns what they are told: the recipe of ``precision.fp8`` as megatron-core's, layer by layer, and that nothing of a
matrix is kept between calls. Names, placements and values are ``megavid.models.build``'s and, of experts,
``megavid.models.moe.experts``'s, the same for both.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from megavid.config.schema import PrecisionConfig
from megavid.errors import ConfigError
from megavid.models.fp8 import Fp8Build
from megavid.ops.fp8 import E5M2
from megavid.parallel import mcore, te

OLDEST = "2.3.0"
"""Version of Transformer Engine from which megatron-core takes every recipe."""


def check_installed(precision: PrecisionConfig, device: str) -> None:
    """Refuse ``precision.linears = "transformer_engine"`` where the package cannot be had; starts no CUDA.

    Args:
        precision: of the run.
        device: where the model lives, "cpu" or "cuda".

    Raises:
        ConfigError: Transformer Engine does not import or is too old, or it does not run on the device.
    """
    if precision.linears == "native":
        return
    if not te.HAS_TE:
        _refuse("needs the package transformer-engine, which does not import here (megavid doctor says why)")
    if device not in te.DEVICES:
        _refuse(f"runs on {', '.join(sorted(te.DEVICES))}, this run is on {device}")
    if not mcore.is_te_min_version(OLDEST):
        _refuse(f"needs Transformer Engine {OLDEST} or later, {mcore.get_te_version()} is installed")


def check_usable(precision: PrecisionConfig, device: str) -> None:
    """``check_installed``, and refuse a recipe that this rank's device cannot take.

    Raises:
        ConfigError: as there, or the device lacks the recipe.
    """
    check_installed(precision, device)
    if precision.linears == "native":
        return
    if reason := te.why_no_fp8(precision.fp8):
        _refuse(f"cannot take precision.fp8 = '{precision.fp8}' here: {reason}")


def _refuse(reason: str) -> NoReturn:
    raise ConfigError(f"precision.linears = 'transformer_engine' {reason}; set precision.linears = 'native'")


def te_column(fp8: Fp8Build | None) -> Callable[..., Any]:
    """What builds a column-parallel linear of Transformer Engine, called like megatron-core's own."""
    return lambda *sizes, config, **given: mcore.TEColumnParallelLinear(
        *sizes, config=_config(config, fp8), is_expert=False, **given
    )


def te_row(fp8: Fp8Build | None) -> Callable[..., Any]:
    """What builds a row-parallel linear of Transformer Engine, likewise."""
    return lambda *sizes, config, **given: mcore.TERowParallelLinear(
        *sizes, config=_config(config, fp8), is_expert=False, **given
    )


def te_grouped(fp8: Fp8Build | None, *, is_row: bool) -> Callable[..., Any]:
    """What builds a grouped linear without biases: one matrix for each of a rank's experts, ``weight0`` and so on.

    Args:
        fp8: of the block; None where its products are in ``precision.dtype``.
        is_row: expert-tensor ranks share columns of the matrices, not rows. What they share nobody sums here.
    """
    build = mcore.TERowParallelGroupedLinear if is_row else mcore.TEColumnParallelGroupedLinear
    return lambda *sizes, config, **given: build(
        *sizes, config=_config(config, fp8), bias=False, skip_bias_add=False, is_expert=True, **given
    )


def row_multiple(fp8: Fp8Build | None) -> int:
    """What the rows of each expert must be a multiple of while its products are in FP8."""
    return 1 if fp8 is None else int(mcore.get_fp8_align_size(fp8.recipe.name))


class InFp8(nn.Module):
    """A linear of Transformer Engine whose products are in FP8 while gradients are wanted, called like the linear.

    Each call is a region of its own: the recipes here keep nothing from one call to the next, and what is not in FP8
    (keys and values of the text, outer blocks) is in no region. Passes without gradients (validation, samples) have any
    number of tokens, of which products in FP8 take multiples only: they are in ``precision.dtype``.
    """

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, *given: Any) -> tuple[Tensor, Tensor | None]:
        """What the linear gives: the output, and the bias that is still to be added, if any."""
        region = mcore.get_fp8_context(self.linear.config) if torch.is_grad_enabled() else nullcontext()
        with region:
            out: tuple[Tensor, Tensor | None] = self.linear(*given)
        return out


def _config(transformer: Any, fp8: Fp8Build | None) -> Any:
    """megatron-core's config for one linear."""
    # Otherwise eight bits of a matrix are kept until somebody says that an optimizer step begins, and nobody does.
    told: dict[str, Any] = {"disable_parameter_transpose_cache": True}
    if fp8 is not None:
        told["fp8"] = "hybrid" if fp8.recipe.gradient_dtype == E5M2 else "e4m3"
        told["fp8_recipe"] = fp8.recipe.name
    return replace(transformer, **told)
