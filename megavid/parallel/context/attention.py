"""Self-attention over context-parallel ranks: the one that the model calls, with one rank or many.

Owns the order of things: tokens for heads over the Ulysses group; a ring or an all-gather of keys and values over the
ring group, merged block by block; heads back for tokens. Norms of q and k and RoPE come before, on the tokens' rank.

The ring is one operator of torch's dispatcher, ``megavid::context_attention``, which returns (out, lse): selective
recomputation keeps both and never runs the ring's forward pass twice (see ``recompute``). Its plan and its groups are
Python objects, which operators cannot take; it takes the number of a ``Task`` that this module looks up.

Ranks: every rank holds its own tokens before and after. Gradient: the all-to-alls again, the ring's keys and values
again, and the keys' and values' gradients with them and one hop home (or a reduce-scatter).
"""

import copy
import itertools
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megavid.errors import ConfigError
from megavid.ops.block_attention import BlockAttention, wide_dtype
from megavid.ops.block_attention_fp8 import AttentionRounding, Fp8Attention, has_fp8_forward
from megavid.ops.block_attention_library import block_attention
from megavid.parallel.context.attn_plan import AttnPlan
from megavid.parallel.context.blockwise import Given
from megavid.parallel.context.exchange import Exchange
from megavid.parallel.context.layout import CPLayout
from megavid.parallel.context.ring import Task
from megavid.plan.context import Kind, Strategy

_tasks: WeakValueDictionary[int, Task] = WeakValueDictionary()
_numbers = itertools.count()


class ContextParallelAttention:
    """Attention of packs whose tokens lie on the ranks of a layout.

    Args:
        layout: who holds which tokens, and the groups.
        strategy: ``ring`` or ``allgather`` over the ring group, at any Ulysses degree; ``ulysses`` and ``hybrid``
            besides check the degrees. ``auto`` is decided before, by ``megavid.plan.context.context_plan``.
        backend: name of a block attention, see ``megavid.ops.block_attention``; or one itself.
        kv_grad_dtype: dtype in which gradients of keys and values travel and are summed over ranks, where the
            activations are narrower; bf16 halves their bytes.

    Raises:
        ConfigError: the strategy does not fit the layout's degrees.
    """

    def __init__(
        self,
        layout: CPLayout,
        strategy: Strategy = "ring",
        backend: str | BlockAttention = "aten",
        kv_grad_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layout, self.kind, self.backend = layout, _kind(strategy, layout), backend
        self.kv_grad_dtype = kv_grad_dtype
        self.tasks: dict[AttentionRounding | None, Task] = {}

    def __call__(
        self,
        q_tBNA: Tensor,
        k_tBNA: Tensor,
        v_tBNA: Tensor,
        plans: Sequence[AttnPlan],
        rounding: AttentionRounding | None = None,
    ) -> Tensor:
        """Attention of this rank's tokens to all ranks' tokens, [t, B, N, A].

        Args:
            q_tBNA: queries of this rank's tokens, normed and rotated.
            k_tBNA: keys; as many heads, or a divisor of them.
            v_tBNA: values, like the keys.
            plans: one for each of the B packs, in global tokens; the same on every rank.
            rounding: of a layer whose attention is in FP8; None where it is not.

        Raises:
            ConfigError: heads, dtype or lengths that the layout or the backend cannot take.
        """
        task = self._task(tuple(plans), q_tBNA, k_tBNA, rounding)
        ulysses, heads, kv_heads = self.layout.groups.plan.ulysses, q_tBNA.shape[2], k_tBNA.shape[2]
        q, k, v = q_tBNA, k_tBNA, v_tBNA
        if ulysses > 1:
            whole = _to_heads([q, k, v], task.number)
            q, k, v = torch.split(whole, [heads // ulysses, kv_heads // ulysses, kv_heads // ulysses], dim=2)
            del whole
        kv = [k, v]
        if task.travels:
            # One tensor to send; and none keeps alive what all three came in.
            q, kv = q.contiguous(), [torch.stack((k, v))]
        del k, v
        out_tBNA: Tensor = _Attention.apply(task.number, q, *kv)  # type: ignore[no-untyped-call]
        if ulysses > 1:
            (out_tBNA,) = _to_tokens(out_tBNA, [heads], task.number)
        return out_tBNA

    def _task(
        self, plans: tuple[AttnPlan, ...], q_tBNA: Tensor, k_tBNA: Tensor, rounding: AttentionRounding | None
    ) -> Task:
        tokens, batch, heads, width = q_tBNA.shape
        if len(plans) != batch or tokens != self.layout.local_tokens:
            raise ConfigError(
                f"attention got {tokens} tokens of {batch} packs, and a layout of {self.layout.local_tokens} tokens on "
                f"this rank with {len(plans)} plans; both must match"
            )
        ulysses, kv_heads = self.layout.groups.plan.ulysses, k_tBNA.shape[2]
        if heads % kv_heads or heads % ulysses or kv_heads % ulysses:
            raise ConfigError(
                f"a Ulysses degree of {ulysses} must divide the query heads = {heads} and the key heads = {kv_heads} "
                "of a rank, and those of keys the others; set parallel.context_strategy = 'hybrid' or 'ring'"
            )
        planned = next(iter(self.tasks.values()), None)
        if planned is not None and not (planned.plans is plans and planned.fits(q_tBNA)):
            self.tasks, planned = {}, None
        if rounding in self.tasks:
            return self.tasks[rounding]
        number, backend = next(_numbers), self._backend(q_tBNA, width, rounding)
        if planned is not None:  # the same rectangles, by another kernel
            task = copy.copy(planned)
            task.number, task.backend = number, backend
        else:
            where = (q_tBNA.device, q_tBNA.dtype)
            task = Task(number, plans, self.kind, Exchange(self.layout), backend, self.kv_grad_dtype, *where)
        _tasks[number] = self.tasks[rounding] = task
        return task

    def _backend(self, q_tBNA: Tensor, width: int, rounding: AttentionRounding | None) -> BlockAttention:
        """The kernel for tensors like the queries, and what rounds around it."""
        backend, device = self.backend, q_tBNA.device
        if isinstance(backend, str):
            backend = block_attention(backend, device, q_tBNA.dtype, width)
        if rounding is None:
            return backend
        return Fp8Attention(backend, rounding, is_in_eight_bits=has_fp8_forward(backend, device, width))


def _kind(strategy: Strategy, layout: CPLayout) -> Kind:
    plan = layout.groups.plan
    if strategy == "auto":
        raise ConfigError(
            "parallel.context_strategy = 'auto' must be decided before; ask megavid.plan.context.context_plan"
        )
    is_legal = {
        "ulysses": plan.ring == 1,
        "ring": True,
        "allgather": True,
        "hybrid": plan.cp == 1 or (plan.ring > 1 and plan.ulysses > 1),
    }[strategy]
    if not is_legal:
        raise ConfigError(
            f"parallel.context_strategy = '{strategy}' does not fit ulysses {plan.ulysses} x ring {plan.ring} ranks; "
            "ask megavid.plan.context.context_plan for the degrees"
        )
    return "allgather" if strategy == "allgather" else "ring"


@torch.library.custom_op("megavid::context_attention", mutates_args=())
def _attend(q_TBNA: Tensor, kv: Sequence[Tensor], task: int) -> tuple[Tensor, Tensor]:
    """(out [T, B, N, A], lse [B, N, T]) of this rank's queries over its ring group's keys; see ``Task.forward``."""
    return _tasks[task].forward(q_TBNA, kv)


@torch.library.custom_op("megavid::context_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, kv: Sequence[Tensor], out: Tensor, lse: Tensor, task: int
) -> list[Tensor]:
    return _tasks[task].backward(Given(grad, q, out, lse), kv)


@torch.library.custom_op("megavid::context_to_heads", mutates_args=())
def _to_heads(tensors: Sequence[Tensor], task: int) -> Tensor:
    return _tasks[task].exchange.to_heads(tensors)


@torch.library.custom_op("megavid::context_to_tokens", mutates_args=())
def _to_tokens(x_TBNA: Tensor, heads: Sequence[int], task: int) -> list[Tensor]:
    return _tasks[task].exchange.to_tokens(x_TBNA, heads)


def _is_plan(x: Tensor) -> bool:
    """Whether these are meta tensors of a plan of a big job: all of its calls are made, but nothing is computed.

    Tensors of a tracer (torch.compile) are none of these: of them only the shapes are asked.
    """
    return x.is_meta and type(x) is Tensor


@_attend.register_fake
def _attend_shapes(q_TBNA: Tensor, kv: Sequence[Tensor], task: int) -> tuple[Tensor, Tensor]:
    if _is_plan(q_TBNA):
        return _tasks[task].forward(q_TBNA, kv)
    tokens, batch, heads, _ = q_TBNA.shape
    lse_BNT = q_TBNA.new_empty(batch, heads, tokens, dtype=wide_dtype(q_TBNA.dtype))
    return torch.empty_like(q_TBNA, memory_format=torch.contiguous_format), lse_BNT


@_attend_backward.register_fake
def _attend_backward_shapes(
    grad: Tensor, q: Tensor, kv: Sequence[Tensor], out: Tensor, lse: Tensor, task: int
) -> list[Tensor]:
    if _is_plan(q):
        return _tasks[task].backward(Given(grad, q, out, lse), kv)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, *kv)]


@_to_heads.register_fake
def _to_heads_shapes(tensors: Sequence[Tensor], task: int) -> Tensor:
    if _is_plan(tensors[0]):
        return _tasks[task].exchange.to_heads(tensors)
    layout = _tasks[task].exchange.layout
    heads = sum(x.shape[2] // layout.groups.plan.ulysses for x in tensors)
    tokens = layout.ring_lengths[layout.groups.ring_rank]
    return tensors[0].new_empty(tokens, tensors[0].shape[1], heads, tensors[0].shape[3])


@_to_tokens.register_fake
def _to_tokens_shapes(x_TBNA: Tensor, heads: Sequence[int], task: int) -> list[Tensor]:
    if _is_plan(x_TBNA):
        return _tasks[task].exchange.to_tokens(x_TBNA, heads)
    tokens = _tasks[task].exchange.layout.local_tokens
    return [x_TBNA.new_empty(tokens, x_TBNA.shape[1], each, x_TBNA.shape[3]) for each in heads]


class _Attention(torch.autograd.Function):
    """``_attend`` with its gradient: what operators register themselves takes more Python a call."""

    @staticmethod
    def forward(ctx: Any, number: int, q_TBNA: Tensor, *kv: Tensor) -> Tensor:
        out_TBNA: Tensor
        out_TBNA, lse_BNT = _attend(q_TBNA, kv, number)
        ctx.save_for_backward(q_TBNA, out_TBNA, lse_BNT, *kv)
        ctx.task = _tasks[number]  # so that it lives until the backward pass
        return out_TBNA

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TBNA: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse, *kv = ctx.saved_tensors
        if type(grad_TBNA) is Tensor:
            return (None, *ctx.task.backward(Given(grad_TBNA, q, out, lse), kv))
        # A tracer's tensors: it wants one operator here too.
        return (None, *_attend_backward(grad_TBNA, q, kv, out, lse, ctx.task.number))


def _keep_heads(ctx: Any, inputs: tuple[list[Tensor], int], output: Tensor) -> None:
    tensors, number = inputs
    ctx.heads, ctx.task = [x.shape[2] for x in tensors], _tasks[number]


def _gradients_to_tokens(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None]:
    return _to_tokens(grad, ctx.heads, ctx.task.number), None


def _keep_tokens(ctx: Any, inputs: tuple[Tensor, list[int], int], output: list[Tensor]) -> None:
    ctx.task = _tasks[inputs[2]]


def _gradients_to_heads(ctx: Any, grads: list[Tensor]) -> tuple[Tensor, None, None]:
    return _to_heads(grads, ctx.task.number), None, None


_to_heads.register_autograd(_gradients_to_tokens, setup_context=_keep_heads)
_to_tokens.register_autograd(_gradients_to_heads, setup_context=_keep_tokens)
