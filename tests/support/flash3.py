"""A stand-in for FlashAttention-3's module on a CPU: operators that take the keywords that are passed, the checks on
them, its formats.

Owns no numerics but that weights of the values are rounded to e4m3 in FP8, as the package does.

Source: hopper/flash_attn_interface.py and flash_api.cpp of Dao-AILab/flash-attention, commit 0251105a.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megavid.ops.block_attention import ReferenceAttention
from megavid.ops.fp8 import E4M3

MODULE, BACKEND = "flash_attn_interface", "megavid.ops.block_attention_flash3"
OPERATORS = "stand_in_for_flash_attn_3"
"""Namespace of the operators, which the package's stands for."""
MAX_OFFSET = 2.0**8
"""What the largest weight of a row is multiplied by before it is rounded."""


def check(condition: bool, words: str) -> None:
    """Raise what torch's TORCH_CHECK raises."""
    if not condition:
        raise RuntimeError(words)


def check_operands(q: Tensor, k: Tensor, v: Tensor, multiple: int) -> None:
    """The package's checks of shapes and strides: [packs, tokens, heads, width]."""
    packs, _, heads, width = q.shape
    check(q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    check(all(x.stride(-1) == 1 for x in (q, k, v)), "Input tensor must have contiguous last dimension")
    check(k.shape == v.shape == (packs, k.shape[1], k.shape[2], width), "shapes")
    check(heads % k.shape[2] == 0, "Number of heads in key/value must divide number of heads in query")
    check(width % multiple == 0 and width <= 256, f"head_size should be a multiple of {multiple}")


class Stand:
    """The two calls, and how often each was made."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.deterministic: list[bool] = []

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_new: Tensor | None = None,
        v_new: Tensor | None = None,
        qv: Tensor | None = None,
        out_: Tensor | None = None,
        q_descale: Tensor | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        num_splits: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``_flash_attn_forward``: output, log-sum-exp [packs, heads, queries], and two that are empty."""
        is_fp8 = q.dtype == E4M3
        self.calls.append("fp8" if is_fp8 else "wide")
        check(is_fp8 or q.dtype in (torch.bfloat16, torch.float16), "only supports fp16, bf16, and fp8_e4m3 data type")
        check_operands(q, k, v, 16 if is_fp8 else 8)
        check(not causal and softmax_scale == q.shape[-1] ** -0.5, "what megavid asks for")
        wide_q, wide_k, wide_v = (x.float().transpose(1, 2) for x in (q, k, v))
        packs, kv_heads = k.shape[0], k.shape[2]
        shared = q.shape[2] // kv_heads
        if is_fp8:
            scales = []
            for descale in (q_descale, k_descale, v_descale):
                assert descale is not None
                check(descale.shape == (packs, kv_heads) and descale.dtype == torch.float32, "descale")
                scales.append(descale.view(packs, kv_heads, 1, 1))
            wide_q, wide_k = wide_q * scales[0].repeat_interleave(shared, 1), wide_k * scales[1]
        else:
            check(q_descale is None and k_descale is None and v_descale is None, "descales are of FP8")
        scores = wide_q @ wide_k.repeat_interleave(shared, 1).mT * softmax_scale
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top).exp()
        total = weights.sum(-1, keepdim=True)
        if is_fp8:
            weights = (weights * MAX_OFFSET).to(E4M3).float() / MAX_OFFSET
            wide_v = wide_v * scales[2]
        out = weights @ wide_v.repeat_interleave(shared, 1) / total
        lse = (top + total.log()).squeeze(-1)
        told = out.transpose(1, 2).contiguous().to(torch.bfloat16 if is_fp8 else q.dtype)
        return told, lse, torch.empty(0), torch.empty(0)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
        softmax_scale: float | None = None,
        is_causal: bool = False,
        deterministic: bool = False,
    ) -> Tensor:
        """``_flash_attn_backward``: fills ``dq``, ``dk`` and ``dv``."""
        self.calls.append("backward")
        self.deterministic.append(deterministic)
        check(q.dtype in (torch.bfloat16, torch.float16), "FlashAttention only support fp16 and bf16 data type")
        check(q.dtype == out.dtype == dout.dtype, "query, out and dout must have the same dtype")
        check_operands(q, k, v, 8)
        check(not is_causal and softmax_scale == q.shape[-1] ** -0.5, "what megavid asks for")
        check(softmax_lse.is_contiguous() and softmax_lse.dtype == torch.float32, "softmax_lse")
        heads_first = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
        found = ReferenceAttention().backward(*heads_first, softmax_lse)
        for given, gradient in zip((dq, dk, dv), found):
            assert given is not None
            check(given.is_contiguous() and given.shape == gradient.transpose(1, 2).shape, "gradients")
            given.copy_(gradient.transpose(1, 2))
        return torch.empty(0)


class OldStand(Stand):
    """A version whose forward pass has no defaults."""

    def forward(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None, qv: Tensor | None, softmax_scale: float
    ) -> Tensor:
        """Never called."""
        raise AssertionError


@contextmanager
def operators_of(stand: Stand) -> Iterator[Any]:
    """The calls of ``stand`` as torch operators in the package's namespace."""
    library = torch.library.Library(OPERATORS, "FRAGMENT")
    try:
        for name, call, mutated in (("forward", stand.forward, ()), ("backward", stand.backward, ("dq", "dk", "dv"))):
            library.define(f"_flash_attn_{name}{torch.library.infer_schema(call, mutates_args=mutated)}")
            library.impl(f"_flash_attn_{name}", call, "CPU")
        operators = getattr(torch.ops, OPERATORS)
        with patch.object(torch.ops, "flash_attn_3", operators):
            yield operators
    finally:
        library._destroy()


@contextmanager
def stand_in(stand: Stand | None = None) -> Iterator[tuple[Any, Stand]]:
    """``FlashAttn3`` over the stand-in, whether the package is there or not, and the stand-in."""
    stand, module = stand or Stand(), ModuleType(MODULE)
    module.__spec__ = ModuleSpec(MODULE, None)
    before = {name: sys.modules.pop(name, None) for name in (MODULE, BACKEND)}
    sys.modules[MODULE] = module
    try:
        with operators_of(stand) as operators:
            for name in ("_flash_attn_forward", "_flash_attn_backward"):
                setattr(module, name, getattr(operators, name))
            from megavid.ops.block_attention_flash3 import FlashAttn3

            yield FlashAttn3(), stand
    finally:
        for name, was in before.items():
            sys.modules.pop(name, None)
            if was is not None:
                sys.modules[name] = was
