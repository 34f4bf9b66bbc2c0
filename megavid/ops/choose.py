"""Which ops a model gets: plain torch or the compiled ones, and whether those compute the same on the device at hand.

Owns the choice and the check before it. The tests of the ops are thorough; the check is for what a run really has: its
processor or GPU, driver and build. It takes milliseconds, once for each device and dtype of a process.
"""

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from megavid.errors import ConfigError
from megavid.ops.block_ops import COMPILED, REFERENCE, BlockOps
from megavid.ops.compiled import why_not_compiled_for
from megavid.ops.expert_activation import expert_activation_op, expert_activation_reference
from megavid.ops.expert_activation_fp8 import expert_activation_fp8_op
from megavid.ops.fp8 import E4M3, E5M2, E8M0, dequantize
from megavid.ops.moe_permute import moe_permute_op, moe_permute_reference, moe_unpermute_op, moe_unpermute_reference

Choice = Literal["auto", "reference", "compiled"]
TOLERANCE = {torch.float32: 2.0**-14, torch.bfloat16: 2.0**-5}
"""Norm of the gap over the norm of plain torch's numbers: several times what another order of sums makes of it."""
TOKENS = {"cpu": 45, "cuda": 4099}
"""Of the trial: on a GPU more than its multiprocessors take at once."""
WIDTH, ROWS, HEAD, EXPERTS = 408, 3, 24, 6
"""Numbers of a token more than threads of a block."""

logger = logging.getLogger(__name__)
Case = tuple[str, Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]
"""Name of an op, in plain torch, compiled, and its arguments."""


def block_ops(choice: Choice, device: torch.device, dtype: torch.dtype) -> BlockOps:
    """The ops for a model of this dtype on this device.

    Args:
        choice: "auto" takes the compiled ones where there are any that agree with plain torch.
        device: where the model is; of meta tensors, that of the run they stand for. Nothing is tried for those.
        dtype: of its activations.

    Raises:
        ConfigError: "compiled", and there are none, or they compute something else.
    """
    if choice == "reference":
        return REFERENCE
    reason = why_not_compiled_for(device, dtype)
    if not reason and "meta" not in (device.type, torch.get_default_device().type):  # else only shapes are asked for
        reason = disagreement(device, dtype)
        if reason and choice == "auto":
            logger.warning("train.ops = 'auto' takes plain torch: %s; please report it", reason)
    if reason and choice == "compiled":
        raise ConfigError(f"train.ops = 'compiled' cannot run here: {reason}; set 'auto' or 'reference'")
    return REFERENCE if reason else COMPILED


@lru_cache
def disagreement(device: torch.device, dtype: torch.dtype) -> str:
    """Which compiled op fails here or computes something else than plain torch, in one line; "" where all agree."""
    for name, plain, compiled, given in _cases(device, dtype):
        try:
            numbers = _numbers(compiled, given)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # for example, no kernel was compiled for this GPU
            return f"{name} does not run on {device}: {' '.join(str(error).split())[:160]}"
        for found, wanted in zip(numbers, _numbers(plain, given), strict=True):
            gap = float((found - wanted).norm() / wanted.norm().clamp_min(1e-6))
            if not gap <= TOLERANCE[dtype]:
                return f"{name} is off by {gap:.2g} of plain torch's numbers on {device} in {dtype}"
    return ""


def _numbers(op: Callable[..., Any], given: tuple[Tensor, ...]) -> list[Tensor]:
    """Everything that an op gives, and the gradients of all that it is given, in fp32."""
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in given]
    found = op(*leaves)
    results = [x for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, Tensor)]
    learnt = [x for x in results if x.requires_grad]
    # Not all alike, so that rows or columns in another order show; the same for both sides.
    towards = [torch.linspace(-1.0, 1.0, x.numel(), device=x.device).view_as(x).to(x.dtype) for x in learnt]
    if learnt:
        torch.autograd.backward(learnt, towards)
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves if x.requires_grad]
    return [x.detach().float() for x in (*results, *gradients)]


def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The ops as blocks and expert layers call them, on a few random tokens of several clips."""
    generator, tokens = torch.Generator().manual_seed(0), TOKENS[device.type]

    def normal(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, of)

    def below(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=generator).to(device)

    x, update, row = normal(tokens, 1, WIDTH, of=dtype), normal(tokens, 1, WIDTH, of=dtype), below(ROWS, tokens, 1)
    shift, scale, gate = normal(ROWS, WIDTH), normal(ROWS, WIDTH), normal(ROWS, WIDTH)
    angles = normal(tokens, 1, 1, HEAD // 2)
    sums = x.float().square().sum(-1, keepdim=True)
    eps = 1e-6
    for name, given, extra in (
        ("modulated_norm", (x, shift, scale, row), (eps,)),
        ("residual_affine_norm", (x, update, gate, row, normal(WIDTH), normal(WIDTH)), (eps,)),
        ("residual_modulated_norm", (x, update, shift, scale, row), (eps,)),
        ("gated_residual", (x, update, gate, row), ()),
        ("sum_of_squares", (x,), ()),
        ("norm_rope", (x, sums, normal(WIDTH)), (angles.cos(), angles.sin(), WIDTH, eps)),  # angles learn nothing
        ("bias_gelu", (3 * x, normal(WIDTH, of=dtype)), ()),
    ):
        plain, compiled = (_with(getattr(ops, name), extra) for ops in (REFERENCE, COMPILED))
        yield name, plain, compiled, given
    yield from _moe_cases(normal, below, tokens, dtype)
    yield from _fp8_cases(x[:, 0])


def _moe_cases(
    normal: Callable[..., Tensor], below: Callable[..., Tensor], tokens: int, dtype: torch.dtype
) -> Iterator[Case]:
    scores, bias, bucket = normal(tokens, EXPERTS).sigmoid(), normal(EXPERTS) / 8, below(4, tokens)

    def route(ops: BlockOps) -> Callable[..., Any]:
        # The bias chooses and has no gradient.
        return lambda scores, bucket: tuple(
            ops.moe.router_topk(scores, bias, bucket, num_buckets=4, top_k=2, num_groups=2, top_groups=1, scale=2.5)
        )

    yield "router_topk", route(REFERENCE), route(COMPILED), (scores, bucket)
    expert = below(EXPERTS, tokens).sort().values
    rows, gates = normal(tokens, WIDTH, of=dtype), normal(tokens, WIDTH, of=dtype)
    biases = normal(EXPERTS, WIDTH, of=dtype), normal(EXPERTS, WIDTH, of=dtype)
    given: tuple[Tensor, ...] = (rows, gates, *biases, expert, scores[:, 0])
    yield "expert_activation", expert_activation_reference, expert_activation_op, given
    yield "expert_activation_fp8", *_both_roundings(), given
    routing = scores > scores.median()
    num_rows = int(routing.sum())
    given = (rows, scores, routing)
    yield "moe_permute", _with(moe_permute_reference, (num_rows, 1)), _with(moe_permute_op, (num_rows,)), given
    where = moe_permute_reference(rows, scores, routing, num_rows, 1)[2:5]
    given = (normal(num_rows, WIDTH, of=dtype), normal(num_rows).sigmoid(), *where)
    yield "moe_unpermute", moe_unpermute_reference, moe_unpermute_op, given


def _both_roundings() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The compiled activation in eight bits, in two steps and in one: plain torch's may be a step off."""

    def two(*given: Tensor) -> Tensor:
        wide = expert_activation_op(*(x.detach() for x in given))
        return dequantize(REFERENCE.fp8.quantize_tiles(wide, (1, 32), E4M3))

    def one(*given: Tensor) -> Tensor:
        up, gate, up_bias, gate_bias, expert, probability = (x.detach() for x in given)
        in_tiles = expert_activation_fp8_op(up, gate, up_bias, gate_bias, expert, probability, 32, torch.float32)
        return dequantize(in_tiles)

    return two, one


def _fp8_cases(x: Tensor) -> Iterator[Case]:
    """Rounding to eight bits, which has no gradient: the numbers that are left of tokens."""

    def amax(ops: BlockOps) -> Callable[..., Any]:
        return lambda x: ops.fp8.amax(x.detach())

    def one(ops: BlockOps) -> Callable[..., Any]:
        return lambda x: dequantize(ops.fp8.quantize(x.detach(), torch.full((), 2.0**-6, device=x.device), E5M2))

    def tiles(ops: BlockOps) -> Callable[..., Any]:
        def call(x: Tensor) -> tuple[Tensor, Tensor]:
            x, turned = x.detach(), x.detach().t()
            along = ops.fp8.quantize_tiles(x, (1, 32), E4M3, scale_dtype=E8M0)
            return dequantize(along), dequantize(ops.fp8.quantize_tiles(turned, (1, 128), E4M3))

        return call

    for name, case in (("fp8_amax", amax), ("quantize_fp8", one), ("quantize_fp8_tiles", tiles)):
        yield name, case(REFERENCE), case(COMPILED), (x,)


def _with(op: Callable[..., Any], extra: tuple[Any, ...]) -> Callable[..., Any]:
    return lambda *given: op(*given, *extra)
