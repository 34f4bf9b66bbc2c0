"""Weights, gradients, optimizer and average of a rank, byte for byte: the planner's closed form against built ranks.

Ranks of jobs of up to 1,024 are built on the meta device, each with its DistributedDataParallel and its optimizer.
"""

import pytest

from megavid.config.load import load_run, preset_names
from megavid.plan.buffers import Bucket
from megavid.plan.layout import layout_of
from megavid.plan.memory import memory_of, rank_state
from megavid.plan.workload import workload_of_run
from tests.support.newest import newest_too
from tests.support.plan_measured import measure_on
from tests.support.ranks import RankPool

BATCH = ["--train.global_batch_size", "3072"]


def flags(**degrees: object) -> list[str]:
    """Every degree, those of the preset set back to one."""
    names = ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor", "context")
    wanted = dict.fromkeys(names, 1) | degrees
    return [item for name, value in wanted.items() for item in (f"--parallel.{name}", str(value))] + BATCH


OVERLAP = {"overlap_grad_reduce": "true", "overlap_param_gather": "true"}
LAYOUTS = [
    ("tiny", 1, {}),
    ("tiny", 3, {}),
    ("tiny", 2, {"tensor": 2}),
    ("tiny", 4, {"tensor": 2, "expert_tensor": 2}),
    ("tiny", 4, {"pipeline": 2, "virtual_pipeline": 2}),
    ("tiny", 8, {"pipeline": 4, "expert": 2}),
    ("tiny", 8, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 4}),
    ("tiny", 8, {"context": 4, "expert": 8}),
    ("wan_1b", 8, {}),
    ("wan_1b", 16, {"tensor": 4, "sequence": "false"}),
    ("wan_14b", 64, {"tensor": 8, "pipeline": 4, "virtual_pipeline": 5}),
    ("wan_14b", 128, {"tensor": 4, "context": 8}),
    ("wan_14b", 1024, {"tensor": 2, "context": 4, **OVERLAP}),
    ("wan21_i2v_14b", 64, {"tensor": 4, "pipeline": 2, "virtual_pipeline": 2}),
    ("wan21_i2v_14b", 1024, {"tensor": 2, "context": 2, "pipeline": 2, **OVERLAP}),
    ("wan22_ti2v_5b", 64, {"tensor": 2, "pipeline": 2}),
    ("wan_moe_7b_a2b", 64, {"tensor": 2, "expert": 8, "pipeline": 2}),
    ("wan_moe_7b_a2b", 64, {"expert": 16, "pipeline": 2, "virtual_pipeline": 13, **OVERLAP}),
    ("wan_moe_30b_a3b", 64, {"expert": 16, "pipeline": 4}),
    ("wan_moe_30b_a3b", 96, {"expert": 96}),
    ("wan_moe_30b_a3b", 1024, {"tensor": 4, "context": 2, "pipeline": 4, "expert": 32, "expert_tensor": 4}),
    ("wan_moe_100b_a20b", 1024, {"tensor": 4, "pipeline": 4, "expert": 8, "expert_tensor": 2}),
    ("wan_moe_100b_a20b", 1024, {"tensor": 4, "context": 8, "pipeline": 4, "virtual_pipeline": 5, "expert": 64}),
    ("wan_moe_100b_a20b", 1024, {"pipeline": 8, "virtual_pipeline": 5, "expert": 64, **OVERLAP}),
    ("wan_moe_100b_a20b", 1024, {"tensor": 8, "context": 4, "pipeline": 2, "expert": 32, "expert_tensor": 8}),
]


def cases() -> list[tuple[str, list[str], int, int]]:
    """Every preset as it is, and the layouts: first and last rank, of 1,024 one inside, too."""
    found = [(name, BATCH, dense_ranks(name), 0) for name in preset_names()]
    for preset, world, degrees in LAYOUTS:
        inside = {world // 2 + world // 16} if world == 1024 else set()
        ranks = {world - 1} if preset == "tiny" else {0, world - 1} | inside
        found += [(preset, flags(**degrees), world, rank) for rank in sorted(ranks)]
    return found


def dense_ranks(preset: str) -> int:
    """Ranks that a preset needs at least."""
    parallel = load_run(preset, []).parallel
    dense = parallel.tensor * parallel.context
    return max(dense, parallel.expert * parallel.expert_tensor) * parallel.pipeline


@pytest.mark.parametrize("part", newest_too(range(3), 1))
def test_state_of_built_ranks_is_planned_to_the_byte(pool: RankPool, part: int) -> None:
    wanted = cases()[part::3]
    for case, answer in zip(wanted, measure_on(pool, [("state", case) for case in wanted]), strict=True):
        for name in ("parameters", "buckets"):
            built, planned = answer[name]
            assert built == planned, (case, name)
        assert answer["built"] == answer["planned"], case
        if case[3] == 0:
            built, planned = answer["staged"]
            assert built == planned, case


def test_memory_of_a_stage_is_its_first_ranks() -> None:
    config = load_run("wan_moe_100b_a20b", [*flags(tensor=4, pipeline=4, expert=8)])
    layout = layout_of(config, 1024)
    parts = memory_of(config, layout, 1, workload_of_run(config)).parts
    state = rank_state(config, layout, 256)
    assert layout.coordinates(256) == {"tp": 0, "cp": 0, "dp": 0, "pp": 1, "etp": 0, "ep": 0, "edp": 0}
    assert (parts["weights"], parts["gradients"]) == (state.weights, state.gradients)
    assert (parts["optimizer"], parts["ema"]) == (state.masters + state.moments, state.ema)


def test_ranks_of_a_bucket_own_all_of_its_numbers_once() -> None:
    bucket = Bucket(768, ((0, 100), (128, 500), (512, 700)), is_fp32=False, is_expert=False, ranks=6)
    owned = [bucket.owned(rank) for rank in range(6)]
    assert owned == [100, 128, 128, 116, 128, 60]
    assert sum(owned) == 100 + 372 + 188
