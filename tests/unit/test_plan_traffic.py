"""Traffic in closed form: fabrics, overlap and scaling. Bytes and calls are tested against recorded steps."""

from dataclasses import replace

import pytest

from megavid.config.load import load_run
from megavid.config.schema import RunConfig
from megavid.plan.layout import layout_of
from megavid.plan.traffic import Transfer, traffic_of
from megavid.plan.workload import workload_of_run
from tests.support.flagship import PLAIN


def traffic(config: RunConfig, world: int, *, stage: int = 0, domain: int = 8) -> dict[tuple[str, str], list[Transfer]]:
    """Transfers of a rank by axis and operation."""
    found: dict[tuple[str, str], list[Transfer]] = {}
    for transfer in traffic_of(config, layout_of(config, world), stage, workload_of_run(config), domain):
        found.setdefault((transfer.axis, transfer.operation), []).append(transfer)
    return found


def flagship(*flags: str) -> RunConfig:
    return load_run("wan_moe_100b_a20b", ["--train.global_batch_size", "1024", *PLAIN, *flags])


def test_one_rank_sends_nothing() -> None:
    assert traffic(load_run("tiny", []), 1) == {}


@pytest.mark.parametrize(
    ("domain", "fabrics"),
    [
        (8, {"tp": "nvlink", "ep": "nvlink", "dp": "network", "pp": "network"}),
        (4, {"tp": "nvlink", "ep": "network", "dp": "network", "pp": "network"}),
        (6, {"tp": "network", "ep": "network", "dp": "network", "pp": "network"}),
        (1024, {"tp": "nvlink", "ep": "nvlink", "dp": "nvlink", "pp": "nvlink"}),
    ],
)
def test_groups_leave_a_domain_where_their_ranks_do(domain: int, fabrics: dict[str, str]) -> None:
    # Tensor-parallel ranks are 4 neighbours, expert-parallel ones 8.
    found = traffic(flagship(), 1024, domain=domain)
    for axis, fabric in fabrics.items():
        names = {t.fabric for (name, _), transfers in found.items() for t in transfers if name == axis}
        assert names == {fabric}, axis


def test_only_what_the_engine_overlaps_is_overlapped() -> None:
    plain = flagship()
    found = traffic(plain, 1024)
    overlapped = {key for key, transfers in found.items() if any(t.is_overlapped for t in transfers)}
    # A column-parallel matrix's backward pass gathers its input beside one product and sums gradients beside the other.
    assert overlapped == {("tp", "all_gather"), ("tp", "reduce_scatter"), ("tp", "all_reduce")}
    options = replace(plain.parallel, overlap_grad_reduce=True, overlap_param_gather=True)
    found = traffic(replace(plain, parallel=options), 1024)
    for axis in ("dp", "edp"):
        assert all(t.is_overlapped for t in found[axis, "reduce_scatter"] + found[axis, "all_gather"])


def test_recompute_repeats_the_forward_passs_calls() -> None:
    sent = {}
    for mode in ("none", "selective", "full"):
        found = traffic(flagship("--parallel.recompute", mode), 1024)
        sent[mode] = sum(t.bytes for t in found["ep", "all_to_all"])
    assert sent["selective"] == sent["full"] == 1.5 * sent["none"]


def test_ends_of_the_pipeline_send_less() -> None:
    config = flagship("--parallel.virtual_pipeline", "2")
    sent = [traffic(config, 1024, stage=stage)["pp", "send"][0].bytes for stage in range(4)]
    assert sent == [3 * sent[0] / 3, 4 * sent[0] / 3, 4 * sent[0] / 3, sent[0]]


def test_weights_travel_in_their_dtype_and_gradients_in_fp32() -> None:
    config = load_run("wan_14b", ["--parallel.tensor", "1"])
    found = traffic(config, 8)
    gathered, reduced = (sum(t.bytes for t in found["dp", name]) for name in ("all_gather", "reduce_scatter"))
    assert 0.5 < gathered / reduced < 0.52  # bf16, but for the timestep's MLP and the norms
    fp32 = replace(config, precision=replace(config.precision, dtype="fp32"))
    found = traffic(fp32, 8)
    assert sum(t.bytes for t in found["dp", "all_gather"]) == sum(t.bytes for t in found["dp", "reduce_scatter"])
