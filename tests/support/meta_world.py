"""One training step of any rank of a job of any size, on meta tensors: nothing is computed and nothing is sent.

Owns the world that makes the engine believe it: a fake process group, megatron-core's CPU path sent to the meta device,
and answers where the host asks a tensor for a number, which a meta tensor does not have. What a step does next must not
depend on those answers, and it does in one place only: how many tokens go to each expert. Here they go round and round,
so every expert gets as many as every other and every rank the same; run real ranks under ``round_robin`` to compare.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe import moe_utils
from torch import Tensor, _meta_registrations
from torch._C._distributed_c10d import FakeWork
from torch._decomp import global_decomposition_table
from torch.testing._internal.distributed.fake_pg import FakeStore

from megavid.config.schema import RunConfig
from megavid.diffusion.objective import FlowObjective
from megavid.models.moe.dispatcher import AllToAllDispatcher
from megavid.models.runner import build_engine
from megavid.ops import grouped_experts
from megavid.ops.packs import Clip, LatentBatch, Pack
from megavid.parallel import cpu
from megavid.parallel.context import attention
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layout_of, microbatches_of_step
from megavid.profiling.collectives import Call, CollectiveRecorder, names_of
from megavid.training.model_step import train_step
from tests.support.ranks import RankPool
from tests.support.tiny_world import LEARNING_RATE, SEED, initialize

META = torch.device("meta")


@contextmanager
def host_reads() -> Iterator[None]:
    """Numbers for the host where a meta tensor has none: always 1, in the shape that was asked for.

    Methods are replaced, because a mode of torch functions is off in the backward pass, and so in recomputation.
    """
    with ExitStack() as stack:
        for name, answer in _ANSWERS.items():
            stack.enter_context(patch.object(torch.Tensor, name, _answering(getattr(torch.Tensor, name), answer)))
        # How megatron-core finds the rows of each expert: 0.16.1, 0.19.2.
        stack.enter_context(patch.object(torch.Tensor, "masked_select", _masked_select))
        argsort = torch.Tensor.argsort
        stack.enter_context(patch.object(torch.Tensor, "argsort", lambda *a, **k: argsort(*a, **k).to(META)))
        yield


def _answering(original: Any, answer: Any) -> Any:
    def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.is_meta:
            return answer(tensor, *args, **kwargs)
        return original(tensor, *args, **kwargs)

    return method


def _type(tensor: Tensor) -> str:
    """What the optimizers insist on."""
    return {torch.float32: "torch.cuda.FloatTensor", torch.bfloat16: "torch.cuda.BFloat16Tensor"}[tensor.dtype]


def _masked_select(tensor: Tensor, mask: Tensor) -> Tensor:
    """The mask is on the CPU, so its size is known; the result indexes meta tensors."""
    assert not mask.is_meta
    return tensor.to(META).reshape(-1).index_select(0, mask.reshape(-1).nonzero().squeeze(1).to(META))


_ANSWERS: dict[str, Any] = {
    "item": lambda tensor: 1.0 if tensor.is_floating_point() else 1,
    "tolist": lambda tensor: torch.ones(tensor.shape, dtype=tensor.dtype, device="cpu").tolist(),
    "__float__": lambda tensor: 1.0,
    "__int__": lambda tensor: 1,
    "__bool__": lambda tensor: True,
    "type": _type,
}


@contextmanager
def round_robin() -> Iterator[None]:
    """Send token t to experts t * K, t * K + 1, ..., modulo E, whatever the router chose; gates stay the router's.

    With as many tokens on a rank as a multiple of E / K, every rank sends as much to every other.
    """
    original = AllToAllDispatcher.dispatch_preprocess

    def dispatch(self: Any, hidden: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        tokens, experts = routing_map.shape
        top_k = self.config.moe_router_topk
        chosen_TK = (torch.arange(tokens * top_k, device="cpu") % experts).view(tokens, top_k)
        balanced = torch.zeros(tokens, experts, dtype=torch.bool, device="cpu").scatter_(1, chosen_TK, True)
        result: tuple[Tensor, Tensor] = original(self, hidden, balanced, probs)
        return result

    AllToAllDispatcher.dispatch_preprocess = dispatch
    try:
        yield
    finally:
        AllToAllDispatcher.dispatch_preprocess = original


@contextmanager
def _host_gathers() -> Iterator[None]:
    """Gather what is on the host, the counts of tokens, on the host; the fake group gives every rank this rank's."""
    original = mappings._gather_along_first_dim

    def gather(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, cpu.CPU = cpu.CPU, tensor.device
        try:
            gathered: Tensor = original(tensor, *args, **kwargs)
        finally:
            cpu.CPU = device
        return gathered

    mappings._gather_along_first_dim = gather
    try:
        yield
    finally:
        mappings._gather_along_first_dim = original


@contextmanager
def _coalesced() -> Iterator[None]:
    """Let the fake group take coalesced calls of meta tensors, which torch has no kernels for, and batches of sends.

    gloo issues a batch one by one; here it is one, as with NCCL.
    """

    def batch(calls: list[dist.P2POp]) -> list[Any]:
        group = calls[0].group
        group._start_coalescing(META)
        for call in calls:
            call.op(call.tensor, call.peer, group, call.tag)
        group._end_coalescing(META)
        return [FakeWork()]

    kind = dist.ProcessGroup
    with ExitStack() as stack:
        for name in vars(kind):
            if name.endswith(("_coalesced", "_coalescing")):
                stack.enter_context(patch.object(kind, name, lambda *args, **kwargs: FakeWork()))
        stack.enter_context(patch.object(dist, "batch_isend_irecv", batch))
        yield


@contextmanager
def _attention_at_work() -> Iterator[None]:
    """Let attention over context-parallel ranks do on meta tensors what it does: told only shapes, it sends nothing."""
    with ExitStack() as stack:
        for operator in (attention._attend, attention._attend_backward, attention._to_heads, attention._to_tokens):
            stack.enter_context(patch.object(operator, "_abstract_fn", operator._init_fn))
        yield


@functools.cache
def use_quick_kernels() -> torch.library.Library:
    """Let C++ tell the shapes of results wherever it can: torch asks Python first, which takes some 300 times as long.

    Once in a process, for the rest of its life; returns what must stay alive for it.
    """
    python = _meta_registrations._meta_lib_dont_use_me_use_register_meta
    registered, tables = set(python._op_impls), global_decomposition_table
    kernels = {**tables["pre_autograd"], **tables["post_autograd"], **tables["meta"]}
    python._destroy()
    needed = torch.library.Library("aten", "IMPL", "Meta")
    for op, kernel in kernels.items():
        name = op.name()
        if f"aten/{name.removeprefix('aten::')}/Meta" not in registered:
            continue
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"):
            needed.impl(op, kernel)
    return needed


@contextmanager
def meta_rank(rank: int, world: int) -> Iterator[None]:
    """Be ``rank`` of a world of ``world`` ranks that are not there, on the meta device.

    Call it where ``cpu.install()`` has run and no process group is open, in a process of its own.
    """
    # megatron-core keeps this tensor from one step to the next.
    loss_scale = patch.object(moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    use_quick_kernels()
    kept, grouped = cpu.CPU, grouped_experts.GROUPED_DTYPES
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        # What megatron-core puts on its GPU goes to what the CPU path takes for it.
        cpu.CPU = META
        grouped_experts.GROUPED_DTYPES = (torch.bfloat16,)  # the only one that torch's meta kernel takes
        with host_reads(), META, round_robin(), _host_gathers(), _coalesced(), _attention_at_work(), loss_scale:
            yield
    finally:
        cpu.CPU, grouped_experts.GROUPED_DTYPES = kept, grouped
        dist.destroy_process_group()


def one_clip_packs(config: RunConfig, count: int, device: torch.device) -> LatentBatch:
    """A microbatch of ``count`` packs that one clip fills; its numbers do not matter."""
    model, tokens = config.model, config.data.pack_tokens
    known = (0,) if model.task == "ti2v" else ()
    packs = tuple(
        Pack((Clip(number, number, 0, (tokens // 6, 2, 3), frame_rate=4.0, known=known),), tokens)
        for number in range(count)
    )
    latent, given = (channels * model.patch_volume for channels in (model.out_channels, model.in_channels))
    return LatentBatch(
        packs,
        torch.ones(count, tokens, latent, device=device),
        torch.ones(count, model.text_length, model.text_size, device=device),
        condition_BTP=torch.ones(count, tokens, given - latent, device=device) if given > latent else None,
        image_GLI=torch.ones(count, model.image_length, model.image_size, device=device) if model.image_size else None,
        has_image_G=torch.ones(count, dtype=torch.bool, device=device) if model.image_size else None,
    )


def as_on_gpus() -> Any:
    """Meta tensors say that they are on a GPU: who asks sends in batches, as NCCL wants it."""
    return patch.object(torch.Tensor, "is_cuda", property(lambda tensor: tensor.is_meta))


def step_calls(config: RunConfig, mesh: Mesh, *, in_batches: bool = False) -> list[Call]:
    """Everything that this rank says in one training step of a new engine, as it would in any later step.

    Args:
        config: the run.
        mesh: open, in its layout.
        in_batches: let stages of the pipeline talk as they do on GPUs, sends and receives in batches.
    """
    engine = build_engine(config, mesh)
    engine.chunks[0].config.batch_p2p_comm = in_batches
    if mesh.device == META:
        engine.updates.publish()
    else:
        initialize(engine)
    batch = one_clip_packs(config, config.train.micro_batch_size, mesh.device)
    microbatches = [batch] * microbatches_of_step(config, mesh.layout)
    objective = FlowObjective(config.diffusion, SEED)
    if config.parallel.overlap_param_gather:
        # Parameters are gathered in the forward pass of the step after: the first one has none to gather.
        train_step(engine, microbatches, objective, learning_rate=LEARNING_RATE)
    with CollectiveRecorder(names_of(mesh)) as recorder:
        metrics = train_step(engine, microbatches, objective, learning_rate=LEARNING_RATE)
    assert metrics.finite
    return recorder.calls


def real_calls(config: RunConfig, world: int, *, is_balanced: bool = True) -> list[Call]:
    """Job: ``step_calls`` of this rank of a world that is there, routed ``round_robin`` or by its routers."""
    with ExitStack() as stack:
        if is_balanced:
            stack.enter_context(round_robin())
        return step_calls(config, stack.enter_context(Mesh.open(layout_of(config, world))))


def meta_calls(
    config: RunConfig, world: int, ranks: Sequence[int], *, in_batches: bool = False
) -> dict[int, list[Call]]:
    """Job: ``step_calls`` of some ranks of a job of ``world`` ranks, without the job.

    On several ranks of the pool each takes a part of ``ranks``: join what they return.
    """
    share = ranks[dist.get_rank() :: dist.get_world_size()]
    dist.barrier()  # nobody leaves while another still connects
    dist.destroy_process_group()
    found = {}
    for rank in share:
        with ExitStack() as stack:
            stack.enter_context(meta_rank(rank, world))
            mesh = stack.enter_context(Mesh.open(layout_of(config, world), "cpu"))
            if in_batches:
                stack.enter_context(as_on_gpus())
            found[rank] = step_calls(config, replace(mesh, device=META), in_batches=in_batches)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the pool to close
    return found


def recordings(pool: RankPool, config: RunConfig, world: int, ranks: Sequence[int]) -> dict[int, list[Call]]:
    """``meta_calls`` on two ranks of the pool, sends in batches."""
    job = functools.partial(meta_calls, in_batches=True)
    shares = pool.run(2, job, config, world, ranks, timeout_s=300.0)
    return {rank: calls for share in shares for rank, calls in share.items()}
