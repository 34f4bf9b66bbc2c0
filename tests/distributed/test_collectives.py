"""The recorder sees every call of real ranks, whoever makes it, and changes none."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavid.parallel.mesh import Mesh
from megavid.plan.layout import Layout
from megavid.profiling.collectives import ALONE, Call, CollectiveRecorder, names_of
from tests.support.ranks import RankPool

WORLD = (0, 1)


@torch.library.custom_op("megavid_test::summed", mutates_args=())
def summed(x: Tensor) -> Tensor:
    """A sum over ranks inside an operator, where modes of torch's dispatcher see nothing."""
    total = x.clone()
    dist.all_reduce(total)
    return total


class SumGradients(torch.autograd.Function):
    """The identity, whose backward pass sums over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return summed(grad.contiguous())


def every_call() -> tuple[list[Call], list[Call]]:
    """Job of two ranks: one of each; and a second recorder's, that was open for the sums only."""
    rank = dist.get_rank()
    other = 1 - rank
    x, long = torch.ones(4, 3), torch.empty(8, 3)
    with CollectiveRecorder() as recorder:
        with CollectiveRecorder() as inner:
            dist.all_reduce(x)
            dist.all_reduce(x, op=dist.ReduceOp.MAX, async_op=True).wait()
        dist.all_gather_into_tensor(long, x)
        dist.all_gather([torch.empty(4, 3), torch.empty(4, 3)], x)
        dist.reduce_scatter_tensor(x, long)
        dist.broadcast(x, src=1)
        splits = [[1, 3], [3, 1]][rank]
        dist.all_to_all_single(torch.empty(4, 3), x, splits, splits)
        dist.all_to_all_single(torch.empty(4, 3), x)
        works = [dist.isend(x, other), dist.irecv(torch.empty(4, 3), other)]
        for work in works:
            work.wait()
        dist.reduce(x, 0)
        dist.barrier()
        with dist._coalescing_manager(async_ops=True) as coalesced:
            for part in x.split(2):
                dist.all_gather_into_tensor(torch.empty(4, 3), part.contiguous())
        coalesced.wait()
        SumGradients.apply(torch.ones(2, requires_grad=True)).sum().backward()
    dist.all_reduce(x)
    return recorder.calls, inner.calls


def test_every_call_is_recorded_in_order(pool: RankPool) -> None:
    for rank, (calls, inner) in enumerate(pool.run(2, every_call)):
        other, splits = 1 - rank, [(1, 3), (3, 1)][rank]
        brief = [(c.operation, c.shape, c.bytes, c.peer, c.splits, c.reduction, c.is_async) for c in calls]
        assert brief == [
            ("all_reduce", (4, 3), 48, None, None, "SUM", False),
            ("all_reduce", (4, 3), 48, None, None, "MAX", True),
            ("all_gather", (4, 3), 48, None, None, "", False),
            ("all_gather", (4, 3), 48, None, None, "", False),
            ("reduce_scatter", (8, 3), 96, None, None, "SUM", False),
            ("broadcast", (4, 3), 48, 1, None, "", False),
            ("all_to_all", (4, 3), 48, None, (splits, splits), "", False),
            ("all_to_all", (4, 3), 48, None, None, "", False),
            ("send", (4, 3), 48, other, None, "", True),
            ("recv", (4, 3), 48, other, None, "", True),
            ("reduce", (4, 3), 48, 0, None, "SUM", False),
            ("barrier", (), 0, None, None, "", False),
            ("all_gather", (2, 3), 24, None, None, "", True),
            ("all_gather", (2, 3), 24, None, None, "", True),
            ("all_reduce", (2,), 8, None, None, "SUM", False),
        ]
        assert [c.batch for c in calls] == [*range(13), 12, 13]
        assert all(c.ranks == WORLD and c.dtype == "float32" for c in calls if c.operation != "barrier")
        assert [c.operation for c in inner] == ["all_reduce", "all_reduce"]


def bytes_sent() -> list[float]:
    """Job of two ranks, of rank 0's calls in ``every_call``: bytes that rank 0 sends."""
    return [call.sent_by(dist.get_rank()) for call in every_call()[0]]


def test_bytes_sent_leave_out_what_stays(pool: RankPool) -> None:
    first, second = pool.run(2, bytes_sent)
    assert first == [48, 48, 48, 48, 48, 0, 36, 24, 48, 0, 0, 0, 24, 24, 8]
    assert second == [48, 48, 48, 48, 48, 48, 36, 24, 48, 0, 48, 0, 24, 24, 8]


def named() -> list[tuple[str, tuple[int, ...]]]:
    """Job of four ranks: a sum along every axis of a mesh."""
    with Mesh.open(Layout(tp=2, dp=2, ep=4)) as mesh, CollectiveRecorder(names_of(mesh)) as recorder:
        for axis in ("tp", "dp", "dp_cp", "pp", "ep", "edp", "tp_dp_cp", "world"):
            mesh.sum(torch.ones(1), over=axis)  # type: ignore[arg-type]
    return [(call.group, call.ranks) for call in recorder.calls]


def test_groups_have_the_names_of_axes(pool: RankPool) -> None:
    everyone = (0, 1, 2, 3)
    assert pool.run(4, named)[1] == [
        ("tp", (0, 1)),
        ("dp", (1, 3)),
        ("dp_cp", (1, 3)),
        (ALONE, (1,)),
        ("ep", everyone),
        (ALONE, (1,)),
        ("tp_dp_cp", everyone),
        ("world", everyone),
    ]
