"""Attention of one rectangle without a mask, with the log-sum-exp that lets rectangles be merged: backends and limits.

Owns the protocol, the table of what each backend can do, and the slow twin. The backends themselves are beside this
file. What is a rectangle, and how results are merged, is ``megavid.parallel.context``'s business.

Conventions of every backend: natural logarithm; scores scaled by 1 / sqrt(A); keys may have fewer heads than queries
(each serves N / n queries); blocks are never empty, because the CPU's kernel ends the process on one; ``out`` and the
gradients have the input's dtype, ``lse`` is fp32 (fp64 for fp64).
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megavid.errors import ConfigError


class BlockGradients(NamedTuple):
    """Gradients of queries, keys and values of one block, each in its input's shape and dtype."""

    q: Tensor
    k: Tensor
    v: Tensor


class BlockAttention(Protocol):
    """A kernel for one rectangle; shapes [B, heads, tokens, A], any strides but the last, which is 1."""

    def forward(self, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor) -> tuple[Tensor, Tensor]:
        """Output [B, N, T, A] of this rectangle alone, and its log-sum-exp [B, N, T]."""
        ...

    def backward(
        self, grad_BNTA: Tensor, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor, out_BNTA: Tensor, lse_BNT: Tensor
    ) -> BlockGradients:
        """This rectangle's part of the gradients, from its queries' output and log-sum-exp over ALL their keys."""
        ...


@dataclass(frozen=True, slots=True)
class Capability:
    """What a backend can do on one kind of device.

    Attributes:
        dtypes: of queries, keys and values.
        max_head_size: widest head; 0 for any.
        head_multiple: what the head's width must be a multiple of.
        compute_capability: of the only GPUs that it runs on; None for any.
    """

    dtypes: tuple[torch.dtype, ...]
    max_head_size: int = 0
    head_multiple: int = 1
    compute_capability: tuple[int, int] | None = None


HALF = (torch.bfloat16, torch.float16)
CAPABILITIES: dict[tuple[str, str], Capability] = {
    ("aten", "cpu"): Capability((torch.float64, torch.float32, *HALF)),
    ("aten", "cuda"): Capability((torch.float32, *HALF), max_head_size=256, head_multiple=8),
    ("cudnn", "cuda"): Capability(HALF, max_head_size=128, head_multiple=8),
    ("flash_attn", "cuda"): Capability(HALF, max_head_size=256, head_multiple=8),
    ("flash_attn_3", "cuda"): Capability(HALF, max_head_size=256, head_multiple=8, compute_capability=(9, 0)),
    ("reference", "cpu"): Capability((torch.float64, torch.float32, *HALF)),
    ("reference", "cuda"): Capability((torch.float64, torch.float32, *HALF)),
    # Shapes without numbers, to plan with.
    ("aten", "meta"): Capability((torch.float64, torch.float32, *HALF)),
}
"""By backend and device."""
KEY = "set parallel.attention_backend to one of"


def check_capability(backend: str, device: str, dtype: torch.dtype, head_size: int) -> None:
    """Refuse what a backend cannot do, before anything is computed.

    Raises:
        ConfigError: naming what the backend lacks and what has it.
    """
    known = sorted({name for name, _ in CAPABILITIES})
    if backend not in known:
        raise ConfigError(f"attention backend '{backend}' is unknown; {KEY} {', '.join(known)}")
    capability, way_out = CAPABILITIES.get((backend, device)), way_out_of(device, dtype, head_size)
    if capability is None:
        raise ConfigError(f"attention backend '{backend}' does not run on {device}; {way_out}")
    if dtype not in capability.dtypes:
        names = ", ".join(_name(each) for each in capability.dtypes)
        raise ConfigError(f"attention backend '{backend}' on {device} takes {names}, got {_name(dtype)}; {way_out}")
    if not _can(capability, dtype, head_size):
        widest = f", at most {capability.max_head_size}" if capability.max_head_size else ""
        raise ConfigError(
            f"attention backend '{backend}' on {device} takes heads whose width is a multiple of "
            f"{capability.head_multiple}{widest}, got {head_size}; change model.num_heads, or {way_out}"
        )


def check_generation(backend: str, found: tuple[int, int], dtype: torch.dtype, head_size: int) -> None:
    """Refuse a backend that is not built for GPUs of this compute capability.

    Raises:
        ConfigError: naming what it is built for, and what runs here.
    """
    wanted = CAPABILITIES[backend, "cuda"].compute_capability
    if wanted not in (None, found):
        raise ConfigError(
            f"attention backend '{backend}' runs on GPUs of compute capability {'.'.join(map(str, wanted))}, this one "
            f"has {'.'.join(map(str, found))}; {way_out_of('cuda', dtype, head_size, found)}"
        )


def way_out_of(device: str, dtype: torch.dtype, head_size: int, generation: tuple[int, int] | None = None) -> str:
    """What to set: the backends that can do this there; without a ``generation`` those of any."""
    able = [
        name
        for (name, kind), each in CAPABILITIES.items()
        if kind == device
        and _can(each, dtype, head_size)
        and (generation is None or each.compute_capability in (None, generation))
    ]
    return f"{KEY} {', '.join(able)}" if able else "no backend has it"


def _can(capability: Capability, dtype: torch.dtype, head_size: int) -> bool:
    is_narrow = capability.max_head_size in (0, max(capability.max_head_size, head_size))
    return dtype in capability.dtypes and is_narrow and head_size % capability.head_multiple == 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of ``lse``: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


class ReferenceAttention:
    """The slow, obvious twin of every backend: scores, softmax and gradients written out."""

    def forward(self, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor) -> tuple[Tensor, Tensor]:
        """See ``BlockAttention``."""
        scores, values = self._scores(q_BNTA, k_BNTA), self._grouped(v_BNTA, q_BNTA)
        lse = scores.logsumexp(dim=-1)
        return ((scores - lse.unsqueeze(-1)).exp() @ values).to(q_BNTA.dtype), lse

    def backward(
        self, grad_BNTA: Tensor, q_BNTA: Tensor, k_BNTA: Tensor, v_BNTA: Tensor, out_BNTA: Tensor, lse_BNT: Tensor
    ) -> BlockGradients:
        """See ``BlockAttention``."""
        wide, scale = wide_dtype(q_BNTA.dtype), q_BNTA.shape[-1] ** -0.5
        grad, q, out = (x.to(wide) for x in (grad_BNTA, q_BNTA, out_BNTA))
        k, v = self._grouped(k_BNTA, q_BNTA), self._grouped(v_BNTA, q_BNTA)
        weight = (self._scores(q_BNTA, k_BNTA) - lse_BNT.unsqueeze(-1)).exp()
        delta = (grad * out).sum(-1, keepdim=True)
        grad_scores = weight * (grad @ v.transpose(-1, -2) - delta) * scale
        grad_k, grad_v = grad_scores.transpose(-1, -2) @ q, weight.transpose(-1, -2) @ grad
        kv_heads = k_BNTA.shape[1]
        grad_k, grad_v = (x.unflatten(1, (kv_heads, -1)).sum(2).to(k_BNTA.dtype) for x in (grad_k, grad_v))
        return BlockGradients((grad_scores @ k).to(q_BNTA.dtype), grad_k, grad_v)

    def _scores(self, q_BNTA: Tensor, k_BNTA: Tensor) -> Tensor:
        q, k = q_BNTA.to(wide_dtype(q_BNTA.dtype)), self._grouped(k_BNTA, q_BNTA)
        scale: float = q.shape[-1] ** -0.5
        return q @ k.transpose(-1, -2) * scale

    def _grouped(self, x_BNTA: Tensor, q_BNTA: Tensor) -> Tensor:
        """Keys or values for every query head."""
        return x_BNTA.to(wide_dtype(x_BNTA.dtype)).repeat_interleave(q_BNTA.shape[1] // x_BNTA.shape[1], dim=1)
