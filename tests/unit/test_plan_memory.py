"""Memory of a rank in closed form: what the parts depend on. That they are right is tested on built models."""

from dataclasses import replace

import pytest

from megavid.config.load import load_run
from megavid.config.schema import RunConfig
from megavid.plan.activations import activation_bytes, context_parallel_bytes, in_flight
from megavid.plan.buffers import buckets_of_rank
from megavid.plan.layout import Layout, layout_of
from megavid.plan.memory import (
    EXCHANGE_BYTES,
    GIB,
    PARTS,
    communicator_bytes,
    communicators,
    host_bytes,
    memory_of,
    rank_state,
    worst_memory,
)
from megavid.plan.parameters import count_rank
from megavid.plan.workload import workload_of_clip
from tests.support.flagship import PLAIN


def flagship(*flags: str) -> RunConfig:
    return load_run("wan_moe_100b_a20b", ["--train.global_batch_size", "1024", *PLAIN, *flags])


def test_optimizers_of_all_ranks_have_every_number_once() -> None:
    config = load_run("tiny", ["--parallel.tensor", "2", "--parallel.pipeline", "2", "--parallel.expert", "2"])
    layout = layout_of(config, 8)
    moments = sum(rank_state(config, layout, rank).moments for rank in range(8))
    numbers = 0.0
    for rank in range(8):
        held = count_rank(config.model, layout, rank)
        experts = held.by_part["experts"]
        numbers += (held.held - experts) / (layout.dp * layout.cp) + experts / layout.edp
    assert moments == 8 * numbers


def test_parts_are_those_that_are_named_and_their_sum() -> None:
    config = flagship()
    memory = memory_of(config, layout_of(config, 1024), 0, workload_of_clip(config, 81, 480, 832))
    assert tuple(memory.parts) == PARTS
    assert memory.total == sum(memory.parts.values())
    assert memory.parts["fp8"] == 0


def test_recompute_trades_activations() -> None:
    found = []
    for mode in ("none", "selective", "full"):
        config = flagship("--parallel.recompute", mode)
        workload = workload_of_clip(config, 81, 480, 832)
        found.append(memory_of(config, layout_of(config, 1024), 0, workload).parts["activations"])
    assert found[0] > 2 * found[1] > 2 * found[2]


def test_the_first_stage_keeps_most_microbatches_and_the_worst_stage_is_found() -> None:
    config = flagship()
    layout, workload = layout_of(config, 1024), workload_of_clip(config, 81, 480, 832)
    parts = [memory_of(config, layout, stage, workload) for stage in range(layout.pp)]
    kept = [memory.parts["activations"] for memory in parts]
    assert kept == sorted(kept, reverse=True)
    stage, worst = worst_memory(config, layout, workload)
    assert worst.total == max(memory.total for memory in parts) == parts[stage].total


def test_imbalance_needs_rows() -> None:
    config = flagship("--parallel.recompute", "none")
    layout, workload = layout_of(config, 1024), workload_of_clip(config, 81, 480, 832)
    even, uneven = (activation_bytes(config, layout, 0, workload, factor) for factor in (1.0, 2.0))
    assert uneven["experts"] > 1.9 * even["experts"]
    assert {part: size for part, size in uneven.items() if part != "experts"} == {
        part: size for part, size in even.items() if part != "experts"
    }


def test_context_parallel_buffers_follow_the_strategy() -> None:
    sizes = {}
    for strategy in ("ulysses", "ring", "allgather"):
        flags = ("--parallel.context", "8", "--parallel.context_strategy", strategy, "--parallel.expert", "1")
        config = flagship(*flags, "--parallel.tensor", "1", "--train.global_batch_size", "1024")
        layout = layout_of(config, 128)
        workload = workload_of_clip(config, 81, 480, 832)
        sizes[strategy] = context_parallel_bytes(config, layout, workload)
        width = workload.pack_tokens // 8 * config.model.hidden_size
        expected = {"ulysses": 3 * 2, "ring": 2 * (2 * 2 + 3 * 4), "allgather": 2 * 8 * (2 * 2 + 4)}
        assert sizes[strategy] == expected[strategy] * width
    assert context_parallel_bytes(flagship(), layout_of(flagship(), 1024), workload) == 0


@pytest.mark.parametrize(
    ("layout", "microbatches", "expected"),
    [
        (Layout(pp=4), 8, [4, 3, 2, 1]),
        (Layout(pp=4), 2, [2, 2, 2, 1]),
        (Layout(pp=1), 8, [1]),
        # (2 x stages behind + (vpp - 1) x pp + 1) chunks of which two are a stage
        (Layout(pp=4, vpp=2), 8, [5.5, 4.5, 3.5, 2.5]),
        (Layout(pp=4, vpp=2), 4, [4, 4, 3.5, 2.5]),
    ],
)
def test_microbatches_in_flight(layout: Layout, microbatches: int, expected: list[float]) -> None:
    assert [in_flight(layout, stage, microbatches) for stage in range(layout.pp)] == expected


def test_overlapped_reduction_cuts_the_first_stage_into_buckets() -> None:
    plain = flagship()
    overlapped = replace(plain, parallel=replace(plain.parallel, overlap_grad_reduce=True))
    layout = layout_of(plain, 1024)
    assert len(buckets_of_rank(overlapped, layout, 0)) > len(buckets_of_rank(plain, layout, 0))
    assert len(buckets_of_rank(overlapped, layout, 1)) == len(buckets_of_rank(plain, layout, 1))


def test_checkpoints_stage_what_a_rank_owns() -> None:
    config = flagship()
    layout = layout_of(config, 1024)
    state = rank_state(config, layout, 0)
    assert host_bytes(config, layout, 0) == 2 * state.moments  # master, two moments and the average, four bytes each
    without = replace(config, optimizer=replace(config.optimizer, ema_decay=0.0))
    assert host_bytes(without, layout, 0) == 1.5 * state.moments
    assert rank_state(without, layout, 0).ema == 0


def test_communicators_are_counted_where_ranks_talk() -> None:
    alone = load_run("tiny", [])
    assert communicators(alone, layout_of(alone, 1)) == {}
    named = communicators(flagship(), layout_of(flagship(), 1024))
    assert named == {
        "tp": 4, "dp": 64, "dp_cp": 64, "pp": 4, "ep": 8, "tp_ep": 8, "edp": 32, "intra_dist_opt": 1024, "world": 1024,
    }  # fmt: skip


def test_an_all_to_all_costs_what_its_peers_do() -> None:
    config = flagship()
    layout = layout_of(config, 1024)
    near, far = (communicator_bytes(config, layout, domain) for domain in (8, 4))
    assert near - far == EXCHANGE_BYTES - EXCHANGE_BYTES * 3 // 7
    assert communicator_bytes(config, layout, 72) == near


def test_the_flagship_does_not_fit_one_gpu() -> None:
    config = flagship("--parallel.tensor", "1", "--parallel.pipeline", "1", "--parallel.expert", "1")
    workload = workload_of_clip(config, 81, 480, 832)
    assert memory_of(config, layout_of(config, 1), 0, workload).total > 1000 * GIB
