"""Whose time a moment is: small traces written by hand, where every answer is plain to see."""

from typing import Any

import pytest

from megavid.profiling.attribution import NOBODY, Owner, Split, split_steps
from megavid.profiling.attribution_gpu import split_steps_of_gpu
from megavid.profiling.trace import Slice, Trace, trace_of
from megavid.profiling.waterfall import imbalance_of, mean_owners, waterfall

NODE = "autograd::engine::evaluate_function: "


def at(start: int, stop: int, name: str, *, sequence: int = -1, thread: int = 1) -> Slice:
    """A slice in milliseconds; a name without "::" or a known beginning is a region."""
    is_region = "::" not in name and not name.endswith("Backward0")
    return Slice(start * 1_000_000, stop * 1_000_000, f"megavid/{name}" if is_region else name, thread, sequence)


def milliseconds(split: Split) -> dict[tuple[str, str, str], int]:
    return {tuple(owner): round(seconds * 1e3) for owner, seconds in split.owners.items() if round(seconds * 1e3)}


def test_every_moment_has_one_owner() -> None:
    (split,) = split_steps(
        [
            at(0, 100, "step"),
            at(5, 15, "input_wait"),
            at(20, 60, "self_attention"),
            at(25, 40, "aten::linear"),
            at(30, 38, "aten::addmm"),
            at(45, 55, "projections"),
            at(46, 54, "aten::addmm"),
            at(0, 100, "aten::addmm", thread=2),  # another thread's work is not this one's time
        ]
    )
    assert split.seconds == pytest.approx(0.1)
    assert sum(split.owners.values()) == pytest.approx(split.seconds)
    assert milliseconds(split) == {
        ("step", NOBODY, "host"): 50,
        ("step", "input_wait", "host"): 10,
        ("forward", "self_attention", "host"): 15,
        ("forward", "self_attention", "operators"): 15,
        ("forward", "projections", "host"): 2,
        ("forward", "projections", "operators"): 8,
    }
    assert split.unattributed_s == pytest.approx(0.05)


def test_backward_belongs_to_the_part_that_made_the_node() -> None:
    (split,) = split_steps(
        [
            at(0, 100, "step"),
            at(0, 10, "norms"),
            at(1, 2, "aten::detach", sequence=7),  # carries the number of the next node, but does not make it
            at(10, 20, "experts/3"),
            at(11, 19, "aten::mm", sequence=7),
            at(20, 90, "schedule"),
            at(25, 75, "autograd"),
            at(30, 50, NODE + "MmBackward0", sequence=7),
            at(32, 48, "MmBackward0", sequence=7),
            at(35, 45, "aten::mm"),
            at(50, 60, NODE + "torch::autograd::AccumulateGrad"),
            at(52, 58, "aten::add_"),
            at(60, 70, NODE + "OldBackward0", sequence=99),  # made before the trace began
        ]
    )
    found = milliseconds(split)
    assert found["backward", "experts", "operators"] == 10
    assert found["backward", "experts", "host"] == 10
    assert found["backward", "accumulate", "operators"] == 6
    assert found["backward", "autograd", "host"] == 10  # the engine, before the first node and after the last
    assert found["backward", NOBODY, "host"] == 10  # nothing of this trace made it
    assert ("backward", "norms", "host") not in found
    assert split.calls == pytest.approx({(3, 0): 0.030})
    # That node, the schedule's own 20 and what is behind it: a schedule is no part.
    assert split.unattributed_s == pytest.approx(0.01 + 0.02 + 0.01)


def test_regions_inside_a_node_are_recomputation_and_collectives_are_communication_everywhere() -> None:
    (split,) = split_steps(
        [
            at(0, 100, "step"),
            at(0, 30, "cross_attention"),
            at(5, 15, "aten::mm", sequence=4),
            at(15, 25, "communication/tp"),
            at(16, 20, "c10d::allreduce_"),
            at(30, 100, "schedule"),
            at(40, 80, NODE + "MmBackward0", sequence=4),
            at(45, 60, "cross_attention"),
            at(46, 50, "aten::mm", sequence=4),  # recomputed operators make nodes that never run
            at(50, 55, "communication/tp"),
            at(62, 72, "aten::mm"),
            at(80, 90, "communication/pp"),
        ]
    )
    assert milliseconds(split) == {
        ("forward", "cross_attention", "host"): 10,
        ("forward", "cross_attention", "operators"): 10,
        ("communication", "tp", "host"): 15,
        ("communication", "pp", "host"): 10,
        ("recompute", "cross_attention", "operators"): 4,
        ("recompute", "cross_attention", "host"): 6,
        ("backward", "cross_attention", "operators"): 10,
        ("backward", "cross_attention", "host"): 15,
        ("step", NOBODY, "host"): 20,
    }


def test_two_steps_are_two_splits() -> None:
    first, second = split_steps([at(0, 10, "step"), at(10, 30, "step"), at(12, 20, "optimizer")])
    assert (first.seconds, second.seconds) == pytest.approx((0.01, 0.02))
    assert first.of(part="optimizer") == 0
    assert second.of(part="optimizer") == pytest.approx(0.008)


def test_trace_of_the_profiler_is_read() -> None:
    events: list[dict[str, Any]] = [
        {"ph": "X", "cat": "user_annotation", "name": "megavid/step", "tid": 5, "ts": 1.5, "dur": 2.0},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "tid": 5, "ts": 2, "dur": 1,
         "args": {"Sequence number": 3, "External id": 8}},
        {"ph": "X", "cat": "kernel", "name": "gemm", "tid": 7, "ts": 3, "dur": 1, "args": {"External id": 8}},
        {"ph": "i", "name": "[memory]", "ts": 4, "args": {"Total Allocated": 64, "Device Id": -1}},
        {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    trace = trace_of(events)
    assert [piece.name for piece in trace.slices] == ["megavid/step", "aten::mm"]
    assert trace.slices[0].start_ns == 1500
    assert (trace.slices[1].sequence, trace.slices[1].external) == (3, 8)
    assert trace.kernels[0].external == 8
    assert trace.allocations == [(4000, 64, -1)]


def test_waterfall_sums_to_the_step_and_takes_imbalance_from_the_experts_exchange() -> None:
    split = Split(
        10.0,
        {
            Owner("forward", "self_attention", "operators"): 2.0,
            Owner("backward", "experts", "operators"): 3.0,
            Owner("forward", "norms", "operators"): 0.25,
            Owner("recompute", "experts", "host"): 0.25,
            Owner("communication", "ep", "host"): 0.5,
            Owner("communication", "tp_ep", "host"): 0.25,
            Owner("communication", "intra_dist_opt", "host"): 0.75,
            Owner("communication", "pp", "host"): 1.0,
            Owner("step", "zero_gradients", "operators"): 0.25,
            Owner("step", "input_wait", "host"): 0.25,
            Owner("step", "average", "operators"): 0.25,
            Owner("step", "batch", "operators"): 0.25,
            Owner("backward", "autograd", "host"): 0.5,
            Owner("backward", "experts", "host"): 0.25,
            Owner("step", "statistics", "host"): 0.125,
            Owner("step", NOBODY, "host"): 0.125,
        },
    )
    bars = {bar.name: bar.seconds for bar in waterfall(mean_owners([split, split]), ideal_s=4.0, imbalance_s=0.5)}
    assert bars == {
        "useful work at peak": 4.0,
        "kernel inefficiency": 1.0,
        "other operators": 0.5,
        "recompute": 0.25,
        "exposed communication: dp": 0.75,
        "exposed communication: ep": 0.25,
        "pipeline bubble": 1.0,
        "routing imbalance": 0.5,
        "optimizer": 0.5,
        "input wait": 0.25,
        "host gaps": 0.75,
        "statistics and reports": 0.125,
        "no part": 0.125,
    }
    assert sum(bars.values()) == split.seconds
    capped = {bar.name: bar.seconds for bar in waterfall(mean_owners([split]), ideal_s=4.0, imbalance_s=9.0)}
    assert (capped["routing imbalance"], capped["exposed communication: ep"]) == (0.75, 0.0)


def test_imbalance_is_maximum_minus_mean_call_by_call() -> None:
    busy_first = Split(1.0, calls={(2, 0): 4.0, (2, 1): 1.0})
    busy_later = Split(1.0, calls={(2, 0): 2.0, (2, 1): 3.0})
    assert imbalance_of([[busy_first, busy_later]]) == pytest.approx((4 - 3) + (3 - 2))
    assert imbalance_of([[busy_first], [busy_later]]) == 0.0


def test_gpu_moments_belong_to_kernels_first_then_to_collectives_then_to_the_host() -> None:
    def launch(start: int, name: str, number: int, *, thread: int = 1, sequence: int = -1) -> Slice:
        return Slice(start * 1_000_000, (start + 2) * 1_000_000, name, thread, sequence, number)

    def kernel(start: int, stop: int, number: int) -> Slice:
        return Slice(start * 1_000_000, stop * 1_000_000, "kernel", 7, -1, number)

    slices = [
        at(0, 100, "step"),
        at(0, 10, "input_wait"),
        at(10, 30, "experts/1"),
        launch(12, "aten::mm", 1, sequence=5),
        at(30, 36, "communication/ep"),
        launch(31, "c10d::alltoall_", 2),
        at(36, 90, "schedule"),
        at(40, 50, NODE + "MmBackward0", sequence=5, thread=2),  # autograd's own thread
        launch(42, "aten::mm", 3, thread=2),
    ]
    kernels = [kernel(20, 40, 1), kernel(32, 60, 2), kernel(50, 80, 3)]
    (split,) = split_steps_of_gpu(Trace(slices, kernels, []))
    assert milliseconds(split) == {
        ("step", "input_wait", "host"): 10,
        ("forward", "experts", "host"): 10,
        ("forward", "experts", "operators"): 20,
        ("communication", "ep", "host"): 10,  # 40 to 50: before and after, a part's kernel runs beside it
        ("backward", "experts", "operators"): 30,
        ("step", NOBODY, "host"): 20,
    }
    assert split.calls == pytest.approx({(1, 0): 0.050})
    assert sum(split.owners.values()) == pytest.approx(split.seconds)
