"""One rank of a job of any size, alone in a process: process groups that talk to nobody, tensors without numbers.

Building is all that works here: parameters, DistributedDataParallel's buffers, the sharded optimizer. It replaces what
the CPU engine answers about devices for as long as it is open, so use it in a process of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megavid.config.schema import RunConfig
from megavid.models.runner import build_engine
from megavid.parallel import cpu
from megavid.parallel.engine import Engine
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layout_of

META = torch.device("meta")


TYPES = {torch.float32: "torch.cuda.FloatTensor", torch.bfloat16: "torch.cuda.BFloat16Tensor"}
"""What ``Tensor.type()`` says of a GPU's tensor: the sharded optimizer compares that string."""


@contextmanager
def fake_mesh(config: RunConfig, world_size: int, rank: int) -> Iterator[Mesh]:
    """The mesh of ``rank``, its groups real in everything but that nobody answers."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with Mesh.open(layout_of(config, world_size), "cpu") as mesh:
            yield mesh
    finally:
        dist.destroy_process_group()


@contextmanager
def on_meta() -> Iterator[None]:
    """Inside, parameters, buffers of megatron-core and all other new tensors are on the meta device."""
    cpu.install()
    cuda: Any = torch.cuda
    tensor: Any = torch.Tensor
    device, type_ = cuda.current_device, tensor.type
    cuda.current_device = lambda: META
    tensor.type = lambda self, *args: TYPES[self.dtype] if self.is_meta and not args else type_(self, *args)
    try:
        with META:
            yield
    finally:
        cuda.current_device, tensor.type = device, type_


def meta_engine(config: RunConfig, mesh: Mesh) -> Engine[Any]:
    """The engine of a rank, with its optimizer; call it inside ``on_meta``."""
    return build_engine(config, mesh)
