"""The schedule of jobs that nobody has started: what their ranks say fits together, and is as much as planned.

Every rank of a small job and one of each kind of a large one take a training step on meta tensors. First: they say what
real ranks say. Then: no send is unmatched, no group sees two orders, no rank waits for ever, and the bytes by axis are
the plan's.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megavid.config.load import load_run
from megavid.config.schema import RunConfig
from megavid.plan.layout import Layout, layout_of
from megavid.plan.traffic import traffic_of
from megavid.plan.workload import workload_of_run
from megavid.profiling.collectives import ALONE, Call
from tests.support.meta_world import meta_calls, real_calls, recordings
from tests.support.newest import newest_too
from tests.support.ranks import RankPool
from tests.support.schedule_match import check, differences
from tests.support.tiny_world import tiny_config

SMALL: dict[str, tuple[str, int, dict[str, Any]]] = {
    "tp2": ("wan", 2, {"tensor": 2}),
    "pp4": ("wan", 4, {"pipeline": 4}),
    "pp2 vpp2": ("wan_moe", 2, {"pipeline": 2, "virtual_pipeline": 2}),
    "dp2 overlap": ("wan_moe", 2, {"overlap_grad_reduce": True, "overlap_param_gather": True, "expert": 2}),
    "tp2 ep2 selective": ("wan_moe", 4, {"tensor": 2, "expert": 2, "recompute": "selective"}),
    "tp2 etp2 ep2": ("wan_moe", 4, {"tensor": 2, "expert_tensor": 2, "expert": 2}),
    "cp4 hybrid": ("wan_moe", 4, {"context": 4, "context_strategy": "hybrid", "expert": 4, "recompute": "full"}),
    "tp2 pp2, image branch": ("wan", 4, {"tensor": 2, "pipeline": 2, "task": "i2v", "image": (10, 6, 6)}),
    "tp2 cp2, known frames": ("wan", 4, {"tensor": 2, "context": 2, "task": "ti2v", "recompute": "selective"}),
    "tp2 cp2 pp2 ep4": ("wan_moe", 8, {"tensor": 2, "context": 2, "pipeline": 2, "expert": 4}),
}


def with_microbatches(config: RunConfig, world: int, microbatches: int) -> RunConfig:
    """``config`` with a global batch of so many microbatches for each data-parallel rank."""
    parallel = config.parallel
    dp = world // (parallel.tensor * parallel.context * parallel.pipeline)
    return replace(config, train=replace(config.train, global_batch_size=dp * microbatches))


@pytest.mark.parametrize("name", newest_too(SMALL, "dp2 overlap", "tp2 etp2 ep2", "tp2 cp2 pp2 ep4"))
def test_ranks_on_meta_say_what_real_ranks_say(pool: RankPool, name: str) -> None:
    family, world, parallel = SMALL[name]
    config = with_microbatches(tiny_config(family, **parallel), world, parallel.get("pipeline", 2))
    real = pool.run(world, real_calls, config, world)
    for share in pool.run(2, meta_calls, config, world, range(world)):
        for rank, calls in share.items():
            for number, (got, want) in enumerate(zip(calls, real[rank])):
                assert got == want, f"rank {rank}, call {number}"
            assert len(calls) == len(real[rank])


def test_routing_decides_how_many_rows_go_and_nothing_else(pool: RankPool) -> None:
    world = 4
    config = with_microbatches(tiny_config(tensor=2, context=2, expert=2, expert_tensor=2), world, 2)
    balanced = pool.run(world, real_calls, config, world)
    routed = pool.run(world, functools.partial(real_calls, is_balanced=False), config, world)
    assert check(dict(enumerate(routed))).problems == []
    for by_turns, by_router in zip(balanced, routed):
        assert [without_rows(call) for call in by_turns] == [without_rows(call) for call in by_router]
    assert balanced != routed


def without_rows(call: Call) -> Call:
    """A call with the number of rows left out where experts' ranks talk."""
    if call.group not in ("ep", "etp"):
        return call
    return replace(call, shape=call.shape[1:], bytes=0, splits=None)


def test_every_rank_of_a_small_job_fits(pool: RankPool) -> None:
    world, stage = 16, 8
    parallel = {"tensor": 2, "context": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 4}
    config = with_microbatches(tiny_config(context_strategy="ring", **parallel), world, 2)
    layout = layout_of(config, world)
    recorded = recordings(pool, config, world, range(world))
    match = check(recorded)
    assert match.problems == []
    assert match.unseen == 0
    assert match.sends > 0
    # The same found from one rank of each stage: what larger jobs are judged by.
    folded = check({rank: recorded[rank] for rank in first_ranks(layout)}, layout)
    assert folded.problems == []
    assert folded.sends * stage == match.sends
    for rank in range(world):
        first = rank // stage * stage
        assert list(differences(layout, (first, recorded[first]), (rank, recorded[rank]))) == []


def test_damage_to_a_real_schedule_is_found(pool: RankPool) -> None:
    config = with_microbatches(tiny_config(tensor=2, pipeline=2, expert=2), 4, 2)
    recorded = recordings(pool, config, 4, range(4))
    assert check(recorded).problems == []
    calls = recorded[1]
    send = next(at for at, call in enumerate(calls) if call.operation == "send")
    pair = next(at for at, call in enumerate(calls) if (call.group, calls[at + 1].group) == ("ep", "tp"))
    exchange = next(at for at, call in enumerate(calls) if call.operation == "all_to_all")
    wrong_shape = replace(calls[exchange], shape=(calls[exchange].shape[0], 7))
    damaged = {
        "a dropped send": calls[:send] + calls[send + 1 :],
        "two calls swapped": [*calls[:pair], *swapped(calls[pair], calls[pair + 1]), *calls[pair + 2 :]],
        "a wrong shape": [*calls[:exchange], wrong_shape, *calls[exchange + 1 :]],
    }
    for what, said in damaged.items():
        assert check({**recorded, 1: said}).problems, what


def swapped(first: Call, second: Call) -> tuple[Call, Call]:
    """Two calls the other way round."""
    return replace(second, batch=first.batch), replace(first, batch=second.batch)


LARGE: dict[str, list[str]] = {
    "dp64 tp4 pp4 ep8": [
        "--parallel.tensor=4", "--parallel.context=1", "--parallel.pipeline=4", "--parallel.virtual_pipeline=1",
        "--parallel.expert=8", "--parallel.recompute=full", "--parallel.overlap_grad_reduce=false",
        "--parallel.overlap_param_gather=false", "--model.num_layers=16",
    ],
    "dp16 tp2 cp4 pp8 vpp2 ep16": [
        "--parallel.tensor=2", "--parallel.context=4", "--parallel.context_strategy=hybrid", "--parallel.pipeline=8",
        "--parallel.virtual_pipeline=2", "--parallel.expert=16", "--parallel.recompute=selective",
        "--model.num_layers=16",
    ],
    # What the search recommends for 1,024 H100, see README.md.
    "dp32 cp8 pp4 vpp5 ep8": [
        "--parallel.tensor=1", "--parallel.context=8", "--parallel.context_strategy=ulysses", "--parallel.pipeline=4",
        "--parallel.virtual_pipeline=5", "--parallel.expert=8", "--parallel.recompute=selective",
        "--parallel.overlap_grad_reduce=true", "--parallel.overlap_param_gather=true", "--model.num_layers=20",
    ],
}  # fmt: skip
"""Of 40 blocks: a stage only says the same for each, and each takes its time here."""


def test_what_the_readme_recommends_is_among_the_large_jobs() -> None:
    page = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    block = page.partition("--world-size 1024 --gpu h100-80gb --search")[2].partition("<!--")[0]
    command = block.partition("\nCommand\n")[2].partition("```")[0].replace("\\\n", " ").split()
    flags = dict(itertools.pairwise(command))
    recommended = {f"{key}={value}" for key, value in flags.items() if key.startswith("--parallel.")}
    preset = load_run("wan_moe_100b_a20b", sorted(recommended)).parallel
    assert preset in [load_run("wan_moe_100b_a20b", flags).parallel for flags in LARGE.values()]


@pytest.mark.parametrize("name", LARGE)
def test_flagship_on_1024_ranks_fits_and_sends_what_is_planned(pool: RankPool, name: str) -> None:
    world = 1024
    config = load_run("wan_moe_100b_a20b", LARGE[name])
    config = with_microbatches(config, world, config.parallel.pipeline)
    layout = layout_of(config, world)
    firsts = first_ranks(layout)
    stage = world // layout.pp
    others = [firsts[0] + stage - 1, firsts[-1] + stage // 2 + layout.tp + 1]
    recorded = recordings(pool, config, world, [*firsts, *others])
    for rank in others:
        first = rank // stage * stage
        assert list(differences(layout, (first, recorded[first]), (rank, recorded[rank]))) == []
    match = check({rank: recorded[rank] for rank in firsts}, layout)
    assert match.problems == []
    assert match.unseen == 0
    assert match.sends >= 2 * (layout.pp * layout.vpp - 1) * layout.pp
    for rank in firsts:
        assert sent(recorded[rank], rank) == pytest.approx(planned(config, layout, rank), rel=1e-12)


PLANNED: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{name: SMALL[name] for name in ("pp2 vpp2", "dp2 overlap", "tp2 etp2 ep2")},
    "cp2 allgather full": ("wan", 2, {"context": 2, "context_strategy": "allgather", "recompute": "full"}),
    "cp2 ring selective": ("wan_moe", 4, {"context": 2, "context_strategy": "ring", "recompute": "selective"}),
    "tp2 without sp": ("wan", 4, {"tensor": 2, "sequence": False}),
}


@pytest.mark.parametrize("name", PLANNED)
def test_small_jobs_send_what_is_planned(pool: RankPool, name: str) -> None:
    family, world, parallel = PLANNED[name]
    config = with_microbatches(tiny_config(family, **parallel), world, 2)
    for rank, calls in recordings(pool, config, world, [0, world - 1]).items():
        assert sent(calls, rank) == pytest.approx(planned(config, layout_of(config, world), rank), rel=1e-12)


def first_ranks(layout: Layout) -> list[int]:
    """The first rank of each pipeline stage."""
    return list(range(0, layout.world_size, layout.world_size // layout.pp))


def sent(calls: Iterable[Call], rank: int) -> dict[str, float]:
    """Calls and bytes of each axis and operation."""
    found: dict[str, float] = defaultdict(float)
    for call in calls:
        if call.group != ALONE and call.operation != "recv":
            found[f"{axis_of(call)} {call.operation} calls"] += 1
            found[f"{axis_of(call)} {call.operation} bytes"] += call.sent_by(rank)
    return dict(found)


def planned(config: RunConfig, layout: Layout, rank: int) -> dict[str, float]:
    """The same by the plan."""
    found: dict[str, float] = defaultdict(float)
    for transfer in traffic_of(config, layout, layout.coordinates(rank)["pp"], workload_of_run(config), 8):
        found[f"{transfer.axis} {transfer.operation} calls"] += transfer.calls
        found[f"{transfer.axis} {transfer.operation} bytes"] += transfer.bytes
    return dict(found)


def axis_of(call: Call) -> str:
    """What a call is for, in the plan's words."""
    if call.dtype == "float64" or call.group == "intra_dist_opt":
        return "scalars"
    if call.operation == "all_reduce" and call.dtype == "float32" and call.shape in ((1,), (2,)):
        return "amax"
    if call.group == "pp":
        return "embedders" if call.operation == "all_reduce" else "pp"
    axes = {"dp_cp": "dp", "tp_ep": "ep", "tp_cp": "ep", "ulysses": "cp", "ring": "cp", "tp_dp_cp": "scalars"}
    return axes.get(call.group, call.group)
