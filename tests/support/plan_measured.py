"""What a model that is built and run does, for tests of the planner's closed forms: FLOPs, saved bytes, kept state.

Jobs for ranks of the pool, whose worlds they replace by fake ones of any size.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megavid.config.load import load_run
from megavid.config.schema import DataConfig, RunConfig
from megavid.models.block import Block
from megavid.models.inputs import ModelInput
from megavid.models.runner import build_engine
from megavid.models.video_dit import VideoTransformer
from megavid.ops.block_attention_aten import CpuFlash
from megavid.ops.packs import Clip, Pack, clip_index
from megavid.parallel.context.ring import Task
from megavid.parallel.engine import Engine
from megavid.parallel.mesh import Mesh
from megavid.plan.activations import (
    activation_bytes,
    context_parallel_bytes,
    dispatcher_bytes,
    in_flight,
    working_bytes,
)
from megavid.plan.buffers import buckets_of_rank, chunk_parameters
from megavid.plan.flops import Flops, forward_flops, recompute_flops
from megavid.plan.layout import layout_of
from megavid.plan.memory import host_bytes, rank_state
from megavid.plan.workload import Workload
from tests.support.fake_world import fake_mesh, meta_engine, on_meta
from tests.support.meta_world import META, meta_rank, step_calls
from tests.support.ranks import RankPool
from tests.support.tiny_world import initialize, tiny_config

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Case:
    """A small model and what it is run on.

    Attributes:
        family: "wan" or "wan_moe".
        model: fields of ``ModelConfig`` that differ from the tiny one's.
        moe: fields of ``MoEConfig``, likewise.
        parallel: fields of ``ParallelConfig``; ranks that are missing are faked.
        dtype: "fp32" or "bf16".
        clips: tokens of each clip of every pack.
        pack_tokens: tokens of a pack.
        packs: packs of the microbatch.
        ops: ``train.ops``.
        lora: fields of ``LoraConfig``.
        fp8: ``precision.fp8``.
        fp8_attention: ``precision.fp8_attention``.
        fp8_skip: blocks at each end that stay out of it.
    """

    family: str = "wan"
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    moe: dict[str, Any] = dataclasses.field(default_factory=dict)
    parallel: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "fp32"
    clips: tuple[int, ...] = (96,)
    pack_tokens: int = 96
    packs: int = 1
    ops: str = "reference"
    lora: dict[str, Any] = dataclasses.field(default_factory=dict)
    fp8: str = "off"
    fp8_attention: bool = False
    fp8_skip: int = 1

    @property
    def config(self) -> RunConfig:
        """The run."""
        config = tiny_config(
            self.family, moe=self.moe, micro=self.packs, dtype=self.dtype, lora=self.lora, **self.parallel
        )
        return replace(
            config,
            model=replace(config.model, **self.model),
            train=replace(config.train, ops=self.ops),
            precision=replace(
                config.precision,
                fp8=self.fp8,
                fp8_attention=self.fp8_attention,
                fp8_skip_first=self.fp8_skip,
                fp8_skip_last=self.fp8_skip,
            ),
            data=DataConfig(pack_tokens=self.pack_tokens),
        )

    @property
    def workload(self) -> Workload:
        """The same packs for the planner."""
        return Workload(tuple(self.clips), self.pack_tokens, self.config.train.global_batch_size, "test")

    @property
    def world_size(self) -> int:
        """Ranks of one model replica."""
        parallel = self.config.parallel
        return max(parallel.tensor * parallel.context, parallel.expert * parallel.expert_tensor) * parallel.pipeline

    @property
    def needs_meta(self) -> bool:
        """Whether it cannot run on one rank: experts' ranks tell each other how many tokens go where."""
        return self.config.parallel.expert * self.config.parallel.expert_tensor > 1

    def inputs(self, mesh: Mesh) -> ModelInput:
        """A microbatch, as rank 0 of ``mesh`` gets it."""
        model, starts = self.config.model, [sum(self.clips[:number]) for number in range(len(self.clips))]
        packs = tuple(
            Pack(
                tuple(
                    Clip(draw=number, sample=number, start=start, grid=(1, 1, tokens), frame_rate=4.0)
                    for number, (start, tokens) in enumerate(zip(starts, self.clips))
                ),
                self.pack_tokens,
            )
            for _ in range(self.packs)
        )
        clips, span = self.packs * len(self.clips), mesh.token_span(self.pack_tokens)
        row_BT = clip_index(packs, span).clamp(min=0)
        return ModelInput(
            packs=packs,
            start=span.start,
            patches_BTP=torch.randn(*row_BT.shape, model.in_channels * model.patch_volume),
            timestep_R=torch.full((clips * model.timesteps_of_clip,), 500.0),
            row_BT=row_BT,
            text_GLD=torch.randn(clips, model.text_length, model.text_size),
            image_GLI=torch.randn(clips, model.image_length, model.image_size) if model.image_size else None,
            has_image_G=torch.ones(clips, dtype=torch.bool) if model.image_size else None,
        )


# FLOPs


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Forward pass of attention: queries with keys, weights with values."""
    batch, heads, queries, width = q
    return int(4 * batch * heads * queries * k[2] * width)


def _grouped_flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Rows by expert with that expert's matrix ([S, I] x [e, I, O]), or the gradient of it ([I, S] x [S, O])."""
    return int(2 * a[0] * a[1] * b[-1])


FORMULAS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    # Scores again, and four products for the gradients.
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        _attention_flops(q, k, v) * 5 // 2
    ),
    aten._grouped_mm: _grouped_flops,
}
"""Operators that ``FlopCounterMode`` of torch 2.13 has no formula for."""


@contextmanager
def _counted_kernels(found: dict[str, int]) -> Iterator[None]:
    """Count the kernel calls of self-attention, and hide them from a counter of operators.

    The counter sees those that are called from autograd, and not those that are called from a custom operator.
    """
    forward, backward = CpuFlash.forward, CpuFlash.backward

    def count_forward(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        found["forward"] += _attention_flops(q.shape, k.shape, v.shape)
        with _disable_current_modes():
            return forward(self, q, k, v)

    def count_backward(self: Any, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        found["backward"] += _attention_flops(q.shape, k.shape, v.shape) * 5 // 2
        with _disable_current_modes():
            return backward(self, grad, q, k, v, *rest)

    CpuFlash.forward, CpuFlash.backward = count_forward, count_backward  # type: ignore[method-assign]
    try:
        yield
    finally:
        CpuFlash.forward, CpuFlash.backward = forward, backward  # type: ignore[method-assign]


def flops(case: Case) -> dict[str, Any]:
    """FLOPs that torch counts in a forward and a backward pass, by operator, and the closed form."""
    config = case.config
    with _whole_model(case) as (engine, mesh), _counted_kernels(kernels := {"forward": 0, "backward": 0}):
        inputs = case.inputs(mesh)
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            out = engine.chunks[0](inputs, aux_scale=0.1)
        forward = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
        attention = kernels["forward"]
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            out.float().square().sum().backward()
        backward = counter.get_total_flops() + kernels["backward"] + kernels["forward"] - attention
    clips = tuple(case.clips) * case.packs
    padding = (case.pack_tokens - sum(case.clips)) * case.packs
    return {
        "forward": forward,
        "self_attention": attention,
        "backward": backward,
        "recomputed": recompute_flops(config.model, clips, config.parallel.recompute, padding=padding).total,
        "planned": _parts(forward_flops(config.model, clips, padding=padding)),
        "model": _parts(forward_flops(config.model, clips)),
    }


def _parts(found: Flops) -> dict[str, float]:
    return dict(found.parts)


# Activations


def saved(case: Case) -> dict[str, Any]:
    """Bytes that a forward pass keeps for its backward pass, and the closed form.

    Counted once for each storage: what autograd saves; what a block is given besides its input, which recomputation
    keeps by a reference; and what selective recomputation keeps of attention. No hook sees the last two. Parameters are
    left out.
    """
    config, meta = case.config, case.needs_meta
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage  # kept, so that no other storage gets its address
        return tensor

    def keep_given(block: Any, arguments: tuple[Any, ...]) -> None:
        given = arguments[1]
        for value in (*vars(given).values(), *vars(given.prompts).values()):
            if isinstance(value, Tensor):
                keep(value)

    with ExitStack() as stack:
        engine, mesh = stack.enter_context(_meta_model(case) if meta else _whole_model(case))
        parameters = {parameter.untyped_storage()._cdata for parameter in engine.parameters()}
        inputs = case.inputs(mesh)
        for chunk in engine.chunks:
            for block in chunk.blocks:
                assert isinstance(block, Block)
                block.register_forward_pre_hook(keep_given)
        attend = Task.forward

        def keep_attended(task: Task, *tensors: Any) -> tuple[Tensor, Tensor]:
            out, lse = attend(task, *tensors)
            return keep(out), keep(lse)

        if config.parallel.recompute == "selective":
            stack.enter_context(patch.object(Task, "forward", keep_attended))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        engine.chunks[0](inputs, aux_scale=0.1)
        layout = mesh.layout
    found = sum(storage.nbytes() for storage in kept.values())
    return {"saved": found, "planned": activation_bytes(config, layout, 0, case.workload)}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, from the operators that make them, and remembers the most.

    What is made inside of custom operators is not seen.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        number = storage._cdata
        if number in self.sizes or storage.nbytes() == 0:
            return
        self.sizes[number] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, number)

    def _forget(self, number: int) -> None:
        self.now -= self.sizes.pop(number, 0)


def peak(case: Case) -> dict[str, Any]:
    """Most bytes alive in the forward and backward pass of one microbatch, parameters and gradients left out."""
    config = case.config
    with _whole_model(case) as (engine, mesh):
        for parameter in engine.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        inputs = case.inputs(mesh)
        with LiveBytes(engine.parameters()) as live:
            engine.chunks[0](inputs, aux_scale=0.1).sum().backward()
        layout = mesh.layout
    workload = case.workload
    planned = {
        "saved": sum(activation_bytes(config, layout, 0, workload).values()),
        "working": working_bytes(config, layout, 0, workload),
        "dispatcher": dispatcher_bytes(config, layout, 0, workload),
        "context": context_parallel_bytes(config, layout, workload),
    }
    return {"peak": live.peak, "planned": planned}


@contextmanager
def _whole_model(case: Case) -> Iterator[tuple[Engine[Any], Mesh]]:
    torch.manual_seed(0)
    with fake_mesh(case.config, case.world_size, 0) as mesh:
        engine = build_engine(case.config, mesh, with_optimizer=False)
        if case.world_size == 1:
            initialize(engine)
        else:
            for parameter in engine.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        yield engine, mesh


@contextmanager
def _meta_model(case: Case) -> Iterator[tuple[Engine[Any], Mesh]]:
    """The model on the meta device, where dispatchers need no other rank: tokens go round robin over the experts."""
    layout = layout_of(case.config, case.world_size)
    with meta_rank(0, case.world_size), Mesh.open(layout, "cpu") as opened:
        mesh = replace(opened, device=META)
        yield build_engine(case.config, mesh, with_optimizer=False), mesh


def flight(case: Case, microbatches: int) -> dict[str, Any]:
    """Most chunk passes that each stage has run forward and not backward, in whole stages, and the closed form."""
    config = case.config
    config = replace(config, train=replace(config.train, global_batch_size=microbatches))
    layout, found = layout_of(config, case.world_size), []
    for rank in range(0, case.world_size, case.world_size // layout.pp):
        ahead = [0, 0]  # now, and the most
        forward = VideoTransformer.forward

        def counted(chunk: Any, *args: Any, ahead: list[int] = ahead, forward: Any = forward, **kwargs: Any) -> Any:
            out = forward(chunk, *args, **kwargs)
            ahead[0] += 1
            ahead[1] = max(ahead)
            out.register_hook(lambda grad: ahead.__setitem__(0, ahead[0] - 1))
            return out

        with (
            meta_rank(rank, case.world_size),
            Mesh.open(layout, "cpu") as mesh,
            patch.object(VideoTransformer, "forward", counted),
        ):
            step_calls(config, replace(mesh, device=META))
        found.append(ahead[1] / layout.vpp)
    return {"seen": found, "planned": [in_flight(layout, stage, microbatches) for stage in range(layout.pp)]}


# State


def state(preset: str, flags: list[str], world_size: int, rank: int) -> dict[str, Any]:
    """Bytes that a rank keeps from step to step and its buckets, as built on the meta device and as planned."""
    config = load_run(preset, flags)
    layout = layout_of(config, world_size)
    stage = layout.coordinates(rank)["pp"]
    with fake_mesh(config, world_size, rank) as mesh:
        with on_meta():
            engine = meta_engine(config, mesh)
        buffers = [b for chunk in engine._running for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        shards = engine.updates.shards
        assert all(parameter.is_meta for parameter in engine.parameters())
        built = {
            "weights": sum(buffer.param_data.nbytes for buffer in buffers)
            + sum(buffer.nbytes for chunk in engine.chunks for buffer in chunk.buffers()),
            "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
            "masters": sum(shard.master.nbytes for shard in shards if shard.parameter.dtype != torch.float32),
            "moments": sum(shard.state[name].nbytes for shard in shards for name in ("exp_avg", "exp_avg_sq")),
            "ema": sum(shard.ema.nbytes for shard in shards if shard.ema is not None),
        }
        buckets = [bucket.grad_data.numel() for buffer in buffers for bucket in buffer.buckets]
        parameters = [
            [parameter.numel(), parameter.dtype == torch.float32, parameter.sequence_parallel]
            for parameter in engine.parameters()
        ]
        staged = sum(fragment.data.nbytes for fragment in engine.updates.fragments())
    narrow = config.precision.dtype == "bf16"
    planned = [p for chunk in range(layout.vpp) for p in chunk_parameters(config.model, layout, stage, chunk)]
    return {
        "built": built,
        "planned": dataclasses.asdict(rank_state(config, layout, rank)),
        "buckets": [sorted(buckets), sorted(bucket.numel for bucket in buckets_of_rank(config, layout, stage))],
        "parameters": [
            parameters,
            [[p.numel, p.is_fp32 or not narrow, p.is_partial and layout.sequence] for p in planned],
        ],
        "staged": [staged, host_bytes(config, layout, stage)],
    }


def measure(cases: Sequence[tuple[str, Any]]) -> dict[int, dict[str, Any]]:
    """Job: the answers to this rank's share of ``cases``, by their number.

    A case is the name of a job of this module, and its arguments.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # a rank that leaves while another one is still connecting makes that one fail
    dist.destroy_process_group()
    answers = {}
    for number in range(rank, len(cases), size):
        job, given = cases[number]
        jobs: dict[str, Callable[..., dict[str, Any]]] = {
            "state": state, "flops": flops, "saved": saved, "peak": peak, "flight": flight,
        }  # fmt: skip
        answers[number] = jobs[job](*given)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the pool to close
    return answers


def measure_on(pool: RankPool, cases: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
    """The answers to all ``cases``, in their order, by two ranks of the pool."""
    found: dict[int, dict[str, Any]] = {}
    for share in pool.run(2, measure, cases, timeout_s=600):
        found |= share
    return [found[number] for number in range(len(cases))]
