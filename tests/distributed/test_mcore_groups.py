"""The process groups that megatron-core makes of a layout are those that ``Layout.coordinates`` says."""

import inspect
from itertools import product
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megavid.parallel import mcore
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import Layout, layout_of
from tests.support.ranks import RankPool
from tests.support.tiny_world import tiny_config

FIELDS = {
    "tp": ("tp",), "cp": ("cp",), "dp": ("dp",), "pp": ("pp",), "ep": ("ep",), "expt_tp": ("etp",), "expt_dp": ("edp",),
    "tp_cp": ("tp", "cp"), "dp_cp": ("dp", "cp"), "tp_dp_cp": ("tp", "dp", "cp"), "mp": ("tp", "pp"),
    "intra_dp_cp": ("dp", "cp"), "intra_expt_dp": ("edp",),
    "tp_ep": ("etp", "ep"), "tp_ep_pp": ("etp", "ep", "pp"),
    "intra_dist_opt": ("tp", "cp", "dp", "pp"),
}  # fmt: skip
DENSE, EXPERT = ("tp", "cp", "dp", "pp"), ("etp", "ep", "edp", "pp")


def layouts_of(world: int) -> list[Layout]:
    """Every layout of a world: powers of two on each axis, interleaved where there is a pipeline."""
    found = []
    sizes = [2**power for power in range(world.bit_length())]
    for tp, cp, pp, etp, ep in product(sizes, repeat=5):
        if world % (tp * cp * pp) == 0 and world % (etp * ep * pp) == 0:
            dp, edp = world // (tp * cp * pp), world // (etp * ep * pp)
            found.append(Layout(tp=tp, cp=cp, dp=dp, pp=pp, vpp=2 if pp > 1 else 1, ep=ep, etp=etp, edp=edp))
    return found


def differences(layout: Layout, rank: int, groups: object) -> list[str]:
    """Groups whose ranks are not those that share all other coordinates of their grid with ``rank``."""
    mine, wrong = layout.coordinates(rank), []
    for field, axes in FIELDS.items():
        grid = EXPERT if set(axes) & {"etp", "ep", "edp"} else DENSE
        fixed = [axis for axis in grid if axis not in axes]
        expected = [
            other
            for other in range(layout.world_size)
            if all(layout.coordinates(other)[axis] == mine[axis] for axis in fixed)
        ]
        got = dist.get_process_group_ranks(vars(groups)[field])
        if sorted(got) != expected:
            wrong.append(f"{layout.describe()} rank {rank}: {field} = {got}, not {expected}")
        elif len(axes) == 1 and got.index(rank) != mine[axes[0]]:
            wrong.append(f"{layout.describe()} rank {rank}: coordinate in {field} = {got.index(rank)}")
    return wrong


def differences_of_fake_worlds(world: int, every: int) -> tuple[int, list[str]]:
    """Number of layouts seen, and what is wrong with them; ranks that are not real, so any number of them."""
    dist.destroy_process_group()
    wrong = []
    cases = [(layout, rank) for layout in layouts_of(world) for rank in range(world)][::every]
    for layout, rank in cases:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        wrong += differences(layout, rank, mcore.open_groups(layout))
        mcore.close_groups()
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return len(cases), wrong


def sums_over_groups(layout: Layout) -> list[str]:
    """What is wrong with the groups of real ranks: members, and a sum of global ranks over each of them."""
    rank = dist.get_rank()
    groups = mcore.open_groups(layout)
    wrong = differences(layout, rank, groups)
    for field in FIELDS:
        group = vars(groups)[field]
        total = torch.tensor(rank)
        dist.all_reduce(total, group=group)
        if int(total) != sum(dist.get_process_group_ranks(group)):
            wrong.append(f"{layout.describe()} rank {rank}: sum over {field} = {int(total)}")
    dist.barrier()
    mcore.close_groups()
    mcore.close_groups()  # a second time does nothing
    assert not mcore.parallel_state.is_initialized()
    return wrong


@pytest.mark.mcore
@pytest.mark.parametrize(("world", "every"), [(1, 1), (2, 1), (4, 3), (8, 23), (64, 3_989)])
def test_groups_agree_with_layout_coordinates(pool: RankPool, world: int, every: int) -> None:
    [(seen, wrong)] = pool.run(1, differences_of_fake_worlds, world, every)
    assert seen > 0
    assert wrong == []


@pytest.mark.mcore
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, dp=1, edp=2),
        Layout(tp=2, dp=2, ep=2, etp=2),
        Layout(tp=2, dp=2, pp=2, vpp=2, ep=2, edp=2),
        Layout(tp=2, cp=2, dp=2, ep=4, etp=2),
    ],
    ids=Layout.describe,
)
def test_groups_of_real_ranks_communicate(pool: RankPool, layout: Layout) -> None:
    assert pool.run(layout.world_size, sums_over_groups, layout) == [[]] * layout.world_size


def limits_of_groups(layout: Layout) -> set[float]:
    """Seconds that each group was made with."""
    with mock.patch.object(dist, "new_group", wraps=dist.new_group) as make, Mesh.open(layout, timeout_s=2460.0):
        pass
    bound = [inspect.signature(dist.new_group).bind(*call.args, **call.kwargs).arguments for call in make.mock_calls]
    return {arguments["timeout"].total_seconds() for arguments in bound}


@pytest.mark.mcore
def test_every_group_has_the_limit_that_is_asked_for(pool: RankPool) -> None:
    """megatron-core's own is half an hour, which a watchdog that waits longer never outlives."""
    layout = layout_of(tiny_config(context=4, context_strategy="hybrid"), 4)
    assert pool.run(4, limits_of_groups, layout) == [{2460.0}] * 4


@pytest.mark.mcore
def test_version_is_one_that_is_supported() -> None:
    assert (0, 16, 1) <= mcore.version() < (0, 20, 0)
