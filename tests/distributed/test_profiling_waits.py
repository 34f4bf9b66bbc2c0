"""The clock of collectives on real ranks: whose axis, who waits for whom, and a straggler that is named."""

import time

import torch
import torch.distributed as dist

from megavid.parallel.mesh import Mesh
from megavid.plan.layout import Layout
from megavid.profiling.collectives import names_of
from megavid.profiling.waits import WaitClock
from tests.support.ranks import RankPool

LATE_S = 0.3


def clock_job(late_rank: int) -> dict[str, dict[str, float]]:
    """Seconds by axis of a sum over tp, of one over dp that is waited for later, and of a message, one rank late."""
    with Mesh.open(Layout(tp=2, dp=2, edp=4, sequence=True)) as mesh:
        found = {}
        for name in ("blocking", "later", "message"):
            mesh.barrier()
            with WaitClock(names_of(mesh)) as clock:
                if mesh.rank == late_rank:
                    time.sleep(LATE_S)
                if name == "blocking":
                    mesh.sum(torch.ones(4), over="tp")
                elif name == "later":
                    work = dist.all_reduce(torch.ones(4), group=mesh.group("dp"), async_op=True)
                    work.wait()
                else:
                    peer = dist.get_global_rank(mesh.group("tp"), 1 - mesh.coordinate("tp"))
                    box = torch.ones(1)
                    call = dist.isend if mesh.coordinate("tp") == 0 else dist.irecv
                    call(box, peer, group=mesh.group("tp")).wait()
            found[name] = dict(clock.seconds)
        return found


def test_clock_books_waiting_on_the_axis_and_on_the_ranks_that_wait(pool: RankPool) -> None:
    rows = pool.run(4, clock_job, 0)
    for row in rows:
        assert set(row["blocking"]) == {"tp"}
        assert set(row["later"]) == {"dp"}
        assert set(row["message"]) == {"tp"}
    # Rank 0 is late: its tp neighbour is rank 1, its dp neighbour rank 2, and nobody else waits.
    late, tp_neighbour, dp_neighbour, other = rows
    assert tp_neighbour["blocking"]["tp"] > 0.8 * LATE_S
    assert dp_neighbour["later"]["dp"] > 0.8 * LATE_S
    assert tp_neighbour["message"]["tp"] > 0.8 * LATE_S
    for row, name, axis in ((late, "blocking", "tp"), (late, "later", "dp"), (other, "blocking", "tp")):
        assert row[name][axis] < 0.5 * LATE_S
