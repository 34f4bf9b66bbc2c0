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
from torch.overrides import TorchFunctionMode

# First: it imports megatron-core without its warnings, and an unusable Transformer Engine out of the way.
import megavid.parallel.mcore  # noqa: F401

# isort: split
import megatron.core.tensor_parallel.mappings as mcore_mappings
import megatron.core.tensor_parallel.random as mcore_random
import megatron.core.transformer.moe.token_dispatcher as mcore_dispatcher

CPU = torch.device("cpu")


@functools.cache
def install() -> None:
    """Let megatron-core run on this process's CPU. Idempotent, irreversible, inherited by forked children.

    Torch functions called on other threads than this one are not redirected: what asks for "cuda" must run here.
    """
    # Linears with sequence parallelism warn without it; it orders kernels of one GPU, so it means nothing here.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # megatron-core's jit_fuser is torch.compile, and dynamo refuses to trace the replaced torch.cuda names.
    torch.compiler.set_stance("force_eager")
    _replace_cuda_runtime()
    _replace_random_state()
    _repair_dispatcher()
    _repair_uneven_collectives()
    CudaMeansCpu().__enter__()  # type: ignore[no-untyped-call]


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


class CudaMeansCpu(TorchFunctionMode):
    """Sends what asks for a GPU to the CPU, and gives the few answers about tensors that megatron-core insists on."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for each of its functions while the mode is active, so the common path is two lookups."""
        if kwargs and kwargs.get("device") is not None:
            # Factories of buffers, masks and counters: torch.zeros(..., device="cuda").
            kwargs = {**kwargs, "device": to_cpu(kwargs["device"])}
        answer = _ANSWERS.get(func)
        if answer is not None:
            return answer(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _answer_to(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.to("cuda", ...)``, where the device is positional."""
    if len(args) > 1:
        args = (args[0], to_cpu(args[1]), *args[2:])
    return func(*args, **kwargs)


def _answer_type(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.type()``: the optimizers compare it with "torch.cuda.FloatTensor" and refuse anything else."""
    result = func(*args, **kwargs)
    if len(args) == 1 and not kwargs:
        return result.replace("torch.", "torch.cuda.", 1)
    return result


def _answer_self(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.cuda()`` and ``x.pin_memory()``: the tensor is where it should be."""
    return args[0]


_ANSWERS: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    torch.Tensor.to: _answer_to,
    torch.Tensor.type: _answer_type,
    torch.Tensor.cuda: _answer_self,
    torch.Tensor.pin_memory: _answer_self,
}


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
    # Not an answer of the mode: torch refuses the stand-in for a stream before it asks any mode.
    tensor: Any = torch.Tensor
    tensor.record_stream = nothing()
    # Modules move themselves with .cuda(torch.cuda.current_device()); Tensor.cuda is the mode's business.
    module: Any = torch.nn.Module
    module.cuda = lambda self, *args, **kwargs: self


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
