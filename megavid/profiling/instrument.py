"""Which module of the model is which part of a profile: hooks that mark regions, for as long as a trace is taken.

Owns the table of modules. What is no module (noise, loss, dispatch, optimizer, ...) marks its region where it stands,
with ``megavid.ops.regions``.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megavid.config.schema import MoEConfig
from megavid.models.attention import AcrossHeadsNorm, CrossAttention, SelfAttention
from megavid.models.block import Block
from megavid.models.moe.tokens import TokenInfo
from megavid.models.video_dit import VideoTransformer
from megavid.ops.moe_math import round_robin
from megavid.ops.regions import mark
from megavid.parallel.engine import Engine


@contextmanager
def instrumented(engine: Engine[Any]) -> Iterator[None]:
    """Mark the regions of the engine's modules while entered; their backward pass follows from autograd's numbers."""
    with ExitStack() as stack:
        for chunk in engine.chunks:
            for name, module in named_parts(chunk):
                _mark(module, name, stack)
        stack.enter_context(engine.timed_by(ScheduleTimers()))
        yield


class ScheduleTimers:
    """What megatron-core's schedules time, as regions: the backward passes, and messages between stages.

    The timers of forward passes and of the whole are left out: all that they hold has regions of its own.
    """

    def __init__(self) -> None:
        """Begin with nothing running."""
        self._timers: dict[str, _Timer] = {}

    def __call__(self, name: str, log_level: int = 0) -> "_Timer":
        """The timer of this name."""
        if name not in self._timers:
            is_message = name.endswith(("-send", "-recv"))
            part = "messages" if is_message else {"backward-compute": "autograd"}.get(name, "")
            self._timers[name] = _Timer(part)
        return self._timers[name]


class _Timer:
    def __init__(self, part: str) -> None:
        self.part = part
        self._open: Any = None

    def start(self, barrier: bool = False) -> None:
        if self.part:
            self._open = mark(self.part)
            self._open.__enter__()

    def stop(self, barrier: bool = False) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None


def named_parts(chunk: VideoTransformer) -> Iterator[tuple[str, nn.Module]]:
    """(part, module) of everything in a chunk that a profile tells apart; inner modules take from outer ones."""
    yield "modulation", chunk.timestep_embedder
    yield "embedders", chunk.text_embedder
    if chunk.model.image_size:
        yield "embedders", chunk.image_embedder
    if chunk.pre_process:
        yield "embedders", chunk.patch_embedder
    if chunk.post_process:
        yield "head", chunk.head
    for block in chunk.blocks:
        assert isinstance(block, Block)
        yield from _of_block(block)


def _of_block(block: Block) -> Iterator[tuple[str, nn.Module]]:
    yield "self_attention", block.self_attention
    yield "cross_attention", block.cross_attention
    if block.is_moe:
        moe = block.feed_forward
        yield "router", moe.router
        yield f"experts/{block.layer}", moe.experts
        if moe.shared is not None:
            yield "shared_expert", moe.shared
    else:
        yield "dense_ffn", block.feed_forward
    for attention in (block.self_attention, block.cross_attention):
        yield from _of_attention(attention)


def _of_attention(attention: SelfAttention | CrossAttention) -> Iterator[tuple[str, nn.Module]]:
    """The matrices of an attention; what is left is the product of queries, keys and values."""
    for module in attention.children():
        if isinstance(module, AcrossHeadsNorm):
            yield "norms", module
        elif next(module.parameters(), None) is not None:
            yield "projections", module


def _mark(module: nn.Module, name: str, stack: ExitStack) -> None:
    open_regions: list[Any] = []

    def begin(*_: Any) -> None:
        open_regions.append(mark(name))
        open_regions[-1].__enter__()

    def end(*_: Any) -> None:
        open_regions.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(begin).remove)
    stack.callback(module.register_forward_hook(end, always_call=True).remove)


@contextmanager
def forced_balance(engine: Engine[Any]) -> Iterator[None]:
    """Balance every router by round robin while entered: what a step takes if no expert is busier than another.

    Nothing sensible is learnt meanwhile.
    """
    routers = [block.feed_forward.router for chunk in engine.chunks for block in chunk.blocks if block.is_moe]
    told = [router.on_choice for router in routers]
    for router in routers:
        router.on_choice = partial(_in_turn, router.moe)
    try:
        yield
    finally:
        for router, before in zip(routers, told, strict=True):
            router.on_choice = before


def _in_turn(moe: MoEConfig, chosen: Tensor, info: TokenInfo) -> Tensor:
    """A hook of ``Router.on_choice``: the next experts for each token, whatever was chosen."""
    ids_TK = round_robin(info.is_valid, top_k=moe.top_k, num_experts=moe.num_experts)
    return torch.zeros_like(chosen).scatter(1, ids_TK, True) if chosen.dtype == torch.bool else ids_TK
