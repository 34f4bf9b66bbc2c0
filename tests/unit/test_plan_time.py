"""The time model: monotone, with the right limits, the same FLOPs as the count, and only the overlap that is there."""

from dataclasses import replace

import pytest

from megavid.config.load import load_run
from megavid.config.schema import RunConfig
from megavid.plan.calibration import PROBE_RANGES, Calibration, CallCost, gpu_calibration
from megavid.plan.critical_path import Schedule, Stage, bubble_share, step_time_of
from megavid.plan.fitting import fit_numbers
from megavid.plan.flops import stage_flops
from megavid.plan.hardware import Hardware, hardware
from megavid.plan.kernels import Attention, Exchange, Machine, Product
from megavid.plan.layout import Layout, layout_of
from megavid.plan.time import mfu, operator_counts, stages_of, step_time
from megavid.plan.workload import Workload, workload_of_clip, workload_of_run
from tests.support.flagship import PLAIN

H100 = hardware("h100-80gb")
CALIBRATION = gpu_calibration()


def planned(preset: str, world: int, *overrides: str) -> tuple[RunConfig, Layout, Workload]:
    config = load_run(preset, list(overrides))
    workload = workload_of_clip(config, 81, 480, 832)
    config = replace(config, data=replace(config.data, pack_tokens=workload.pack_tokens))
    return config, layout_of(config, world), workload


FLAGSHIP = ("wan_moe_100b_a20b", 1024, *PLAIN, "--train.global_batch_size", "1024")


def test_attention_alone_takes_what_its_published_benchmark_measured() -> None:
    """FlashAttention-3 on an H100, head size 128, no mask (arXiv:2407.08608, figures 5 and 6), TFLOP/s."""
    machine = Machine(H100, CALIBRATION)
    for keys, forward, backward in ((512, 467, 316), (2048, 625, 501), (16384, 648, 561)):
        flops = 4.0 * 16384 * keys * 2048
        seconds = machine.attention(Attention("self_attention", flops, float(keys), 128))
        near = 0.005 if keys == 16384 else 0.2
        assert flops / seconds[0] == pytest.approx(forward * 1e12, rel=near)
        assert 2.5 * flops / seconds[1] == pytest.approx(backward * 1e12, rel=near)


def test_parts_add_up_to_the_step_and_none_is_negative() -> None:
    time = step_time(*planned(*FLAGSHIP), H100, CALIBRATION)
    assert time.total == pytest.approx(sum(time.parts.values()))
    assert min(time.parts.values()) > 0
    assert {"self_attention", "experts", "recompute", "glue", "tensor", "expert", "data", "bubble"} <= set(time.parts)


def test_mfu_is_model_flops_over_the_bf16_peak() -> None:
    config, layout, workload = planned("wan_14b", 128, "--parallel.tensor", "2", "--parallel.context", "4")
    seconds = step_time(config, layout, workload, H100, CALIBRATION).total
    share = mfu(config, layout, workload, H100, seconds)
    assert 0.05 < share < 0.7
    assert mfu(config, layout, workload, H100, 2 * seconds) == pytest.approx(share / 2)
    # 6.18 PFLOP for 37,440 tokens (Megatron-Bridge) is 5.07 for 32,760: 2.25 of attention, which is quadratic.
    expected = 5.07e15 * workload.packs_per_step / (128 * seconds * 989.4e12)
    assert share == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "plan",
    [
        planned("wan_1b", 8),
        planned("wan_14b", 128, "--parallel.tensor", "2", "--parallel.context", "4"),
        planned(*FLAGSHIP),
        planned(
            "wan_moe_7b_a2b", 16, "--parallel.tensor", "2", "--parallel.expert", "4", "--parallel.expert_tensor", "2"
        ),
        planned("wan_moe_30b_a3b", 32, "--parallel.pipeline", "2", "--parallel.virtual_pipeline", "2"),
        planned("wan21_i2v_14b", 16, "--parallel.pipeline", "2", "--parallel.context", "2", "--parallel.tensor", "2"),
        planned("wan22_ti2v_5b", 8, "--parallel.tensor", "2", "--parallel.pipeline", "2"),
    ],
    ids=["wan_1b", "tp-cp", "flagship", "etp", "vpp", "image branch", "known frames"],
)
def test_products_are_the_flops_that_are_counted(plan: tuple[RunConfig, Layout, Workload]) -> None:
    config, layout, workload = plan
    packs = config.train.micro_batch_size
    ranks = dict.fromkeys((0, min(1, layout.pp - 1), layout.pp - 1))
    for pp_rank, stage in zip(ranks, stages_of(config, layout, workload, H100), strict=True):
        counted = stage_flops(
            config.model, layout, pp_rank, workload.clip_tokens * packs, padding=workload.padding * packs
        )
        mine: dict[str, float] = {}
        for work in (*stage.products, *stage.attention):
            mine[work.part] = mine.get(work.part, 0.0) + work.flops
        expected = {part: value / (layout.tp * layout.cp) for part, value in counted.parts.items() if value}
        assert mine == pytest.approx(expected, rel=1e-9)


FASTER = {
    "peak": {"peak": {key: 2 * value for key, value in H100.peak.items()}},
    "memory": {"memory_rate": 2 * H100.memory_rate},
    "nvlink": {"nvlink_rate": 2 * H100.nvlink_rate},
    "network": {"network_rate": 2 * H100.network_rate},
    "domain": {"nvlink_domain": 64},
    "exponentials": {"exponential_rate": 2 * H100.exponential_rate},
}


@pytest.mark.parametrize("better", FASTER.values(), ids=FASTER.keys())
def test_faster_hardware_is_never_slower(better: dict[str, object]) -> None:
    plan = planned(*FLAGSHIP, "--parallel.context", "2")
    base = step_time(*plan, H100, CALIBRATION).total
    assert step_time(*plan, replace(H100, **better), CALIBRATION).total < base  # type: ignore[arg-type]


WORSE = [
    {"matrix_efficiency": 0.5}, {"attention_efficiency": 0.5}, {"memory_efficiency": 0.5}, {"glue_factor": 2.0},
    {"nvlink_efficiency": 0.5}, {"network_efficiency": 0.5}, {"alltoall_efficiency": 0.5}, {"operator_s": 1e-3},
    {"stall_s": 1e-2}, {"step_s": 1.0}, {"routing_imbalance": 2.0}, {"network_latency_s": 1e-3},
    {"attention_half_keys": 5000.0}, {"attention_backward_ratio": 0.4},
]  # fmt: skip


@pytest.mark.parametrize("worse", WORSE, ids=[next(iter(numbers)) for numbers in WORSE])
def test_worse_efficiencies_and_latencies_cost_time(worse: dict[str, float]) -> None:
    plan = planned(*FLAGSHIP, "--parallel.expert", "16")
    assert step_time(*plan, H100, CALIBRATION.with_numbers(**worse)).total > step_time(*plan, H100, CALIBRATION).total


@pytest.mark.parametrize(("pp", "vpp", "microbatches"), [(4, 1, 16), (8, 5, 32), (2, 2, 4), (1, 1, 7)])
def test_bubble_is_stages_less_one_over_chunks_and_microbatches(pp: int, vpp: int, microbatches: int) -> None:
    schedule = Schedule(microbatches, pp, vpp)
    stage = Stage(products=(Product("dense_ffn", 4096, 4096, 4096),))
    parts = step_time_of([stage], schedule, Machine(H100, CALIBRATION)).parts
    assert bubble_share(schedule) == (pp - 1) / (vpp * microbatches)
    assert parts.get("bubble", 0.0) == pytest.approx(bubble_share(schedule) * parts["dense_ffn"])


def test_recomputation_costs_a_forward_pass_of_what_it_repeats() -> None:
    none, selective, full = (
        step_time(*planned("wan_14b", 128, "--parallel.recompute", mode), H100, CALIBRATION).parts
        for mode in ("none", "selective", "full")
    )
    assert "recompute" not in none
    assert 0 < selective["recompute"] < full["recompute"]
    # What full recomputation adds over selective is attention's forward pass: less than a third of its 1 + 2.5 parts.
    gap = full["recompute"] - selective["recompute"]
    assert 0.15 * full["self_attention"] < gap < full["self_attention"] / 3


@pytest.mark.parametrize(
    "beside", ["pieces", "products", "attention", "neighbour", "last_backward", "first_forward", "step"]
)
@pytest.mark.parametrize("size", [1e6, 1e9, 1e12])
def test_overlap_never_makes_a_step_longer(beside: str, size: float) -> None:
    stage = Stage(
        products=(Product("dense_ffn", 4096, 4096, 16384, 4), Product("shared_expert", 4096, 4096, 4096)),
        attention=(Attention("self_attention", 1e12, 4096, 128),),
    )
    axis = {"pieces": "tp", "products": "tp", "attention": "cp", "neighbour": "ep", "step": "pp"}.get(beside, "dp")
    exposed = Exchange(axis, "all_gather", 4, size, 16, 8)
    hidden = replace(exposed, beside=beside)  # type: ignore[arg-type]
    machine, schedule = Machine(H100, CALIBRATION), Schedule(4)
    times = [
        step_time_of([replace(stage, exchanges=exchanges)], schedule, machine).total
        for exchanges in ((), (hidden,), (exposed,))
    ]
    assert times[0] <= times[1] < times[2]


def test_switching_the_engines_overlap_on_shortens_the_step() -> None:
    overlap = ("--parallel.overlap_grad_reduce", "true", "--parallel.overlap_param_gather", "true")
    base = step_time(*planned(*FLAGSHIP), H100, CALIBRATION)
    hidden = step_time(*planned(*FLAGSHIP, *overlap), H100, CALIBRATION)
    assert hidden.parts.get("data", 0.0) < base.parts["data"]
    assert hidden.total < base.total


def test_few_rows_for_each_expert_are_slower_than_many() -> None:
    machine = Machine(H100, CALIBRATION)
    few, many = (Product("experts", rows, 4096, 3072, 8192 / rows) for rows in (64, 4096))
    assert few.flops == many.flops
    assert sum(machine.product(few)) > 3 * sum(machine.product(many))


def test_attention_reaches_less_of_a_blackwells_peak_and_less_with_narrow_heads() -> None:
    def share(name: str, head: int) -> float:
        work = Attention("self_attention", 1e15, 32768, head)
        return 1e15 / Machine(hardware(name), CALIBRATION).attention(work)[0] / hardware(name).peak_of("bf16")

    assert share("b200", 128) < share("h100-80gb", 128)
    assert share("h100-80gb", 64) < share("h100-80gb", 128)
    # FlashAttention-3 on an H100, head size 128: about 650 TFLOP/s.
    assert share("h100-80gb", 128) == pytest.approx(650 / 989.4, rel=0.03)


def test_groups_that_leave_a_domain_pay_the_network_and_share_its_cards() -> None:
    machine = Machine(H100, CALIBRATION)
    near, spread, alone = (Exchange("dp", "all_gather", 1, 1e9, 8, ranks) for ranks in (8, 4, 1))
    assert machine.exchange(near) < machine.exchange(spread) < machine.exchange(alone)
    # One rank of each node has one card; four have four.
    rate = 1e9 / machine.exchange(alone)
    assert rate == pytest.approx(50e9 * CALIBRATION.network_efficiency, rel=0.01)
    assert 1e9 / machine.exchange(spread) == pytest.approx(4 * rate, rel=0.02)


@pytest.mark.parametrize("machine", ["h100-80gb", "gb200"])
def test_groups_that_straddle_domains_are_timed_on_the_network(machine: str) -> None:
    """6 ranks in domains of 8, or 16 in domains of 72: most groups lie in one, and the others set the pace."""
    overrides = ["--parallel.context", "6", "--parallel.tensor", "1"] if machine == "h100-80gb" else []
    if machine == "gb200":
        overrides = ["--parallel.expert", "16", "--parallel.tensor", "1", "--parallel.pipeline", "1"]
    preset, world = ("wan_1b", 48) if machine == "h100-80gb" else ("wan_moe_7b_a2b", 144)
    plan = planned(preset, world, *overrides, "--train.global_batch_size", "144")
    axis = "context" if machine == "h100-80gb" else "expert"
    slow = step_time(*plan, hardware(machine), CALIBRATION).parts[axis]
    network = replace(hardware(machine), network_rate=1e3 * hardware(machine).network_rate)
    assert step_time(*plan, network, CALIBRATION).parts[axis] < 0.7 * slow


def test_alltoall_pays_the_network_for_what_leaves_the_domain() -> None:
    machine = Machine(H100, CALIBRATION)
    every = Exchange("ep", "all_to_all", 1, 31e9, 32, 8)
    once = replace(every, remote_bytes=8e9)
    assert machine.exchange(every) == pytest.approx(24e9 / 50e9 / CALIBRATION.alltoall_efficiency, rel=0.01)
    assert machine.exchange(once) == pytest.approx(8e9 / 50e9 / CALIBRATION.alltoall_efficiency, rel=0.01)


# A CPU: peak, rates and host overhead all measured by a probe


def cpu(**numbers: float) -> tuple[Hardware, Calibration]:
    machine = Hardware(
        name="cpu", peak={"fp32": 1e11}, memory_bytes=2**33, memory_rate=1e10, nvlink_rate=1e9, nvlink_domain=8,
        network_rate=1e9,
    )  # fmt: skip
    ones = dict.fromkeys(
        ("matrix_efficiency", "attention_efficiency", "memory_efficiency", "ring_efficiency", "nvlink_efficiency",
         "network_efficiency", "alltoall_efficiency", "attention_backward_ratio", "glue_factor"), 1.0,
    )  # fmt: skip
    measured = {"operator_s": 1e-5, "stall_s": 0.0, "step_s": 1e-3, "routing_imbalance": 1.0, **ones, **numbers}
    return machine, replace(CALIBRATION.with_numbers(**measured), name="cpu", is_asynchronous=False)


def test_a_cpu_pays_for_every_operator() -> None:
    config = load_run("tiny", [])
    layout, workload = layout_of(config, 1), workload_of_run(config)
    machine, calibration = cpu()
    base = step_time(config, layout, workload, machine, calibration)
    counts = operator_counts()["fp32"]
    blocks = 2 * counts["dense_operators"] + 2 * counts["moe_operators"] + counts["microbatch_operators"]
    once = counts["step_operators"] + 4 * counts["layer_step_operators"]
    microbatches = config.train.global_batch_size // config.train.micro_batch_size
    assert base.parts["host"] == pytest.approx(1e-5 * (blocks * microbatches + once))
    slower = step_time(config, layout, workload, machine, cpu(operator_s=2e-5)[1])
    assert slower.total - base.total == pytest.approx(base.parts["host"])
    assert mfu(config, layout, workload, machine, base.total) > 0
    # The same numbers on a device that runs behind the host's back: hidden where the device is busy.
    assert step_time(config, layout, workload, machine, replace(calibration, is_asynchronous=True)).total < base.total


def test_a_collective_costs_what_was_measured_of_its_kind() -> None:
    machine, calibration = cpu(nvlink_latency_s=1e-3)
    calls = {"all_gather": CallCost(2e-3, 5e8), "all_gather beside": CallCost(1e-4, 4e9)}
    measured, plain = (Machine(machine, replace(calibration, calls=found)) for found in (calls, {}))
    waited = Exchange("tp", "all_gather", 3, 6e6, 4, 4)
    assert measured.exchange(waited) == pytest.approx(6e6 / 5e8 + 3 * 2 * 2e-3)
    assert measured.exchange(replace(waited, beside="products")) == pytest.approx(6e6 / 4e9 + 3 * 2 * 1e-4)
    # Of a kind that was not measured the link's rate, and of one that leaves the domain the network's.
    for other in (replace(waited, operation="all_reduce"), replace(waited, ranks_per_domain=2)):
        assert measured.exchange(other) == plain.exchange(other) > 0


def test_ranks_that_compute_at_once_slow_each_other_down() -> None:
    config = load_run("tiny", [])
    machine, calibration = cpu()
    for world, slower in ((1, 1.0), (2, 1.3)):
        plan = config, layout_of(config, world), workload_of_run(config)
        base = step_time(*plan, machine, replace(calibration, crowding=1.0)).parts
        crowded = step_time(*plan, machine, replace(calibration, crowding=1.3)).parts
        for part in ("projections", "self_attention", "glue", "host"):
            assert crowded[part] == pytest.approx(base[part] * slower), part
        assert crowded.get("data") == base.get("data")


def test_a_probe_finds_the_numbers_of_a_machine_from_a_few_steps() -> None:
    """Steps of small models made by known numbers give those numbers back, and predict larger ones."""
    machine, truth = cpu(matrix_efficiency=0.8, attention_efficiency=0.6, glue_factor=1.4, operator_s=2e-5, step_s=4e-3)
    base = load_run("tiny", [])
    plans = []
    for layers, width, tokens in ((3, 32, 96), (6, 32, 96), (3, 128, 384), (3, 256, 384), (3, 64, 1536), (4, 256, 96)):
        model = replace(base.model, num_layers=layers, hidden_size=width, ffn_size=4 * width)
        config = replace(base, model=model, data=replace(base.data, pack_tokens=tokens))
        plans.append((config, layout_of(config, 1), workload_of_run(config)))

    def seconds_of(calibration: Calibration) -> list[float]:
        return [step_time(*plan, machine, calibration).total for plan in plans]

    found = fit_numbers(seconds_of, seconds_of(truth), cpu()[1], PROBE_RANGES)
    assert seconds_of(found) == pytest.approx(seconds_of(truth), rel=0.01)
    large = replace(base, data=replace(base.data, pack_tokens=3072))
    plan = (large, layout_of(large, 1), workload_of_run(large))
    predicted, true = (step_time(*plan, machine, calibration).total for calibration in (found, truth))
    assert predicted == pytest.approx(true, rel=0.05)
