"""Megatron-core on CPU ranks over gloo: same engine, schedules, dispatchers and optimizer, for tests and demos.

Owns every patch that this takes, each with its reason; ``install()`` applies them once per process and cannot be
undone: a process of its own is the unit of isolation. Nothing above this module knows that the ranks are on CPUs. Each
patch is needed by megatron-core 0.16.1 and 0.19.2 alike, and goes when megatron-core itself asks for a device.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# First: it imports megatron-core without its warnings, and an unusable Transformer Engine out of the way.
import megavid.parallel.mcore  # noqa: F401

# isort: split
import megatron.core.distributed.param_and_grad_buffer as mcore_buffer
import megatron.core.tensor_parallel.mappings as mcore_mappings
import megatron.core.tensor_parallel.random as mcore_random
import megatron.core.transformer.moe.token_dispatcher as mcore_dispatcher

CPU = torch.device("cpu")
FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like", "rand",
    "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like",
)  # fmt: skip
"""Functions of torch that take ``device=``, with which buffers, masks and counters are made."""


@functools.cache
def install() -> None:
    """Let megatron-core run on this process's CPU. Idempotent, irreversible, inherited by forked children."""
    # Linears with sequence parallelism warn without it; it orders kernels of one GPU, so it means nothing here.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # megatron-core's jit_fuser is torch.compile, and dynamo refuses to trace the replaced torch.cuda names.
    torch.compiler.set_stance("force_eager")
    _replace_cuda_runtime()
    _replace_random_state()
    _repair_dispatcher()
    _repair_uneven_collectives()
    _skip_collectives_of_one()
    _replace_tensor_functions()


def is_installed() -> bool:
    """Whether ``install()`` has run in this process or in the one it was forked from."""
    return install.cache_info().currsize > 0


def to_cpu(device: Any) -> Any:
    """The CPU for every spelling of a GPU (index, string, torch.device); anything else as it is."""
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return CPU if device.split(":")[0] == "cuda" else device
    if isinstance(device, int) and not isinstance(device, bool):
        return CPU
    return device


class HostStream:
    """A stream or an event of a machine that has none: everything asked for has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what torch.cuda.Stream and torch.cuda.Event take."""

    def wait_stream(self, *args: Any) -> "HostStream":
        """Nothing to wait for; returns itself because ``record_event`` must return an event."""
        return self

    wait_event = record_event = synchronize = record = wait = wait_stream

    def query(self) -> bool:
        """Whether all work is done: always."""
        return True

    def elapsed_time(self, end: "HostStream") -> float:
        """Milliseconds between two events: none were recorded."""
        return 0.0


def _replace_cuda_runtime() -> None:
    """Replace the parts of the CUDA runtime that raise, or need a driver, on a machine without a GPU."""
    cuda: Any = torch.cuda
    stream = HostStream()

    def nothing() -> Callable[..., None]:
        """A function of its own for each name: torch.compile refuses one object under two names."""
        return lambda *args, **kwargs: None

    # Used as `device=torch.cuda.current_device()` in every buffer of the collectives, and as a plain device.
    cuda.current_device = lambda: CPU
    cuda.synchronize, cuda.empty_cache, cuda.set_device, cuda.set_stream = (nothing() for _ in range(4))
    # Overlap of gradient reduction, of shared experts and of the dispatcher's copies to the host.
    cuda.Stream = cuda.Event = HostStream
    cuda.current_stream = cuda.default_stream = lambda *args: stream
    cuda.stream = lambda *args: contextlib.nullcontext()
    cuda.nvtx.range_push, cuda.nvtx.range_pop = nothing(), nothing()
    # Modules move themselves with .cuda(torch.cuda.current_device()).
    module: Any = torch.nn.Module
    module.cuda = lambda self, *args, **kwargs: self


def _replace_tensor_functions() -> None:
    """Send what asks for a GPU to the CPU, and give the few answers about tensors that megatron-core insists on.

    One by one, and not by a TorchFunctionMode: that is asked for every function of torch, a quarter of a small step.
    """

    def on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> Tensor:
            if kwargs.get("device") is not None:
                kwargs["device"] = to_cpu(kwargs["device"])
            return factory(*args, **kwargs)

        return make

    with CPU:
        torch.empty(0)  # `with torch.device(...)` lists torch's own factories at its first use: let it see them here
    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    move, name_type = on_cpu(tensor.to), tensor.type

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return move(self, *((to_cpu(args[0]), *args[1:]) if args else ()), **kwargs)

    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The optimizers compare ``x.type()`` with "torch.cuda.FloatTensor" and refuse anything else."""
        found = name_type(self, *args, **kwargs)
        return found if args or kwargs else found.replace("torch.", "torch.cuda.", 1)

    tensor.to, tensor.type = to, type_
    tensor.cuda = tensor.pin_memory = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, stream: None


def _replace_random_state() -> None:
    """Let the random state tracker fork the CPU's generator, which is the one that CPU kernels draw from."""

    def get_state(*args: Any, **kwargs: Any) -> Tensor:
        return torch.get_rng_state()

    def set_state(state: Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    cuda: Any = torch.cuda
    # torch.manual_seed calls these in turn, so they must not call it.
    cuda.manual_seed = cuda.manual_seed_all = torch.default_generator.manual_seed
    cuda.get_rng_state, cuda.set_rng_state = get_state, set_state
    # These two reach below torch.cuda, into the driver's generators.
    mcore_random._get_cuda_rng_state = get_state
    mcore_random._set_cuda_rng_state = set_state


def _repair_dispatcher() -> None:
    """The all-to-all dispatcher turns split sizes into numbers only if they are on a GPU; gloo refuses tensors."""

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor

    mcore_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _repair_uneven_collectives() -> None:
    """Pad gathers and reduce-scatters of uneven sizes, which gloo refuses.

    The all-to-all dispatcher gathers each expert-tensor rank's tokens, whose number differs: ETP > 1 needs this.
    """
    gather, reduce_scatter = (
        mcore_mappings._gather_along_first_dim,
        mcore_mappings._reduce_scatter_along_first_dim,
    )

    def gather_along_first_dim(
        tensor: Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            result: Tensor = gather(tensor, group, output_split_sizes, use_global_buffer)
            return result
        return gather_uneven(tensor, group, output_split_sizes)

    def reduce_scatter_along_first_dim(
        tensor: Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            result: Tensor = reduce_scatter(tensor, group, input_split_sizes, use_global_buffer)
            return result
        return reduce_scatter_uneven(tensor, group, input_split_sizes)

    mcore_mappings._gather_along_first_dim = gather_along_first_dim
    mcore_mappings._reduce_scatter_along_first_dim = reduce_scatter_along_first_dim


def _skip_collectives_of_one() -> None:
    """Leave out the gradients' and weights' collectives where one rank is the whole group: the shard is the buffer.

    NCCL finds that out; gloo takes a gigabyte of gradients through buffers of its own, in one thread.
    """

    def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def call(output: Tensor, given: Tensor, *args: Any, group: Any, **kwargs: Any) -> Any:
            if group.size() > 1:
                return collective(output, given, *args, group=group, **kwargs)
            if output.data_ptr() != given.data_ptr():
                output.copy_(given)
            return None  # the handle of a collective inside _coalescing_manager, where these two are called

        return call

    mcore_buffer.dist_reduce_scatter_func = unless_alone(mcore_buffer.dist_reduce_scatter_func)
    mcore_buffer.dist_all_gather_func = unless_alone(mcore_buffer.dist_all_gather_func)


def gather_uneven(tensor: Tensor, group: dist.ProcessGroup, sizes: list[int]) -> Tensor:
    """Concatenate the tensors of all ranks along dim 0, where rank i has ``sizes[i]`` rows.

    Ranks:
        Before: each its own rows, ``[sizes[rank], ...]``. After: every rank all rows, ``[sum(sizes), ...]``.
    """
    longest = max(sizes)
    mine = tensor.new_zeros((longest, *tensor.shape[1:]))
    mine[: tensor.shape[0]] = tensor
    everyone = tensor.new_empty((len(sizes) * longest, *tensor.shape[1:]))
    dist.all_gather_into_tensor(everyone, mine, group=group)
    padded = everyone.view(len(sizes), longest, *tensor.shape[1:])
    return torch.cat([rows[:size] for rows, size in zip(padded, sizes, strict=True)])


def reduce_scatter_uneven(tensor: Tensor, group: dist.ProcessGroup, sizes: list[int]) -> Tensor:
    """Sum over ranks, then give rank i its ``sizes[i]`` rows: the gradient of ``gather_uneven``.

    Ranks:
        Before: each ``[sum(sizes), ...]``. After: rank i the sum of rows of block i, ``[sizes[i], ...]``.
    """
    longest = max(sizes)
    padded = tensor.new_zeros((len(sizes), longest, *tensor.shape[1:]))
    for rows, block in zip(padded, torch.split(tensor, sizes), strict=True):
        rows[: block.shape[0]] = block
    mine = tensor.new_empty((longest, *tensor.shape[1:]))
    dist.reduce_scatter_tensor(mine, padded.view(len(sizes) * longest, *tensor.shape[1:]), group=group)
    return mine[: sizes[group.rank()]].clone()
