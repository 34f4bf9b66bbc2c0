"""Every patch that lets megatron-core run on CPU ranks does what it is there for."""

import megatron.core.distributed.param_and_grad_buffer as mcore_buffer
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megavid.parallel import cpu, mcore
from megavid.plan.layout import Layout
from megavid.profiling.collectives import CollectiveRecorder
from tests.support.ranks import RankPool
from tests.support.tolerance import LAYER_FP64


def test_to_cpu_replaces_every_spelling_of_a_gpu() -> None:
    for device in ("cuda", "cuda:1", 0, 3, torch.device("cuda"), torch.device("cuda", 2)):
        assert cpu.to_cpu(device) == torch.device("cpu")
    for other in ("meta", torch.device("meta"), None, True, torch.float64):
        assert cpu.to_cpu(other) is other


def tensors_stay_here() -> None:
    x = torch.zeros(2, device="cuda")
    assert x.device.type == "cpu"
    assert torch.ones(1, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.empty_like(x, device="cuda:0").device.type == "cpu"
    assert torch.tensor([1], device="cuda").device == torch.arange(2, device=0).device == x.device
    assert x.to("cuda", non_blocking=True) is x
    assert x.to(device=torch.device("cuda", 1), dtype=torch.float64).dtype == torch.float64
    assert x.to(torch.float64).dtype == torch.float64
    assert x.cuda(0) is x
    assert x.pin_memory() is x
    assert torch.nn.Linear(2, 2).cuda(torch.cuda.current_device()).weight.device.type == "cpu"
    x.record_stream(torch.cuda.current_stream())
    assert torch.zeros(2, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert torch.zeros(2).device.type == torch.ones_like(x).to("meta").device.type == "meta"


def types_are_named_as_the_optimizer_expects() -> None:
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def streams_have_nothing_to_wait_for() -> None:
    stream = torch.cuda.Stream()
    event = stream.record_event()
    assert event.query()
    with torch.cuda.stream(stream):
        torch.cuda.current_stream().wait_event(event)
        stream.wait_stream(torch.cuda.default_stream())
    torch.cuda.synchronize()
    torch.cuda.nvtx.range_push("x")
    torch.cuda.nvtx.range_pop()


def random_streams_are_apart_and_restored() -> None:
    mcore.open_groups(Layout(), seed=7)
    tracker = mcore.get_cuda_rng_tracker()
    torch.manual_seed(1)
    before = torch.rand(3)
    with tracker.fork("model-parallel-rng"):
        first = torch.rand(3)
    after = torch.rand(3)
    with tracker.fork("model-parallel-rng"):
        second = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(6), torch.cat([before, after]))
    assert not torch.equal(first, second)
    mcore.close_groups()
    mcore.open_groups(Layout(), seed=7)
    with mcore.get_cuda_rng_tracker().fork("model-parallel-rng"):
        assert torch.equal(torch.rand(3), first)


@torch.compile
def _fused(x: Tensor) -> Tensor:
    return x.to("cuda").sin()


def compiled_functions_run_eagerly() -> None:
    assert torch.equal(_fused(torch.ones(2)), torch.ones(2).sin())


def install_twice_is_install_once() -> None:
    cpu.install()
    cpu.install()
    assert cpu.is_installed()
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"


def collectives_of_one_rank_are_left_out() -> None:
    """As megatron-core's bucket calls them: a shard that is the buffer stays as it is, another one is filled."""
    buffer = torch.arange(6.0)
    group = dist.group.WORLD
    for collective in (mcore_buffer.dist_reduce_scatter_func, mcore_buffer.dist_all_gather_func):
        with CollectiveRecorder() as recorder:
            with dist._coalescing_manager(group, async_ops=True) as handle:
                assert collective(buffer.view(-1), buffer, group=group, async_op=True) is None
            handle.wait()
            other = torch.empty(6)
            collective(other, buffer, group=group)
        assert recorder.calls == []
        assert torch.equal(other, buffer)
        assert torch.equal(buffer, torch.arange(6.0))


def collectives_of_two_ranks_are_not() -> None:
    mine, both = torch.full((2,), dist.get_rank() + 1.0), torch.empty(4)
    mcore_buffer.dist_all_gather_func(both, mine, group=dist.group.WORLD)
    assert both.tolist() == [1, 1, 2, 2]
    mcore_buffer.dist_reduce_scatter_func(mine, both, group=dist.group.WORLD)
    assert mine.tolist() == [2.0 * (dist.get_rank() + 1)] * 2


@pytest.mark.mcore
@pytest.mark.parametrize(
    "case",
    [
        tensors_stay_here,
        types_are_named_as_the_optimizer_expects,
        streams_have_nothing_to_wait_for,
        random_streams_are_apart_and_restored,
        compiled_functions_run_eagerly,
        install_twice_is_install_once,
        collectives_of_one_rank_are_left_out,
    ],
)
def test_cpu_stands_in_for_cuda(pool: RankPool, case: object) -> None:
    pool.run(1, case)  # type: ignore[arg-type]


@pytest.mark.mcore
def test_collectives_of_two_ranks_are_called(pool: RankPool) -> None:
    pool.run(2, collectives_of_two_ranks_are_not)


def gather_of_uneven_sizes(sizes: list[int]) -> float:
    """Largest error of the gathered rows and of the gradients, against the whole tensor on one device."""
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = mcore.open_groups(Layout(tp=world, edp=world))
    whole = torch.arange(sum(sizes) * 3, dtype=torch.float64).view(-1, 3).sin()
    mine = whole.split(sizes)[rank].clone().requires_grad_()
    gathered = mcore.gather_from_sequence_parallel_region(mine, group=groups.tp, output_split_sizes=sizes)
    (gathered.square().sum() * (rank + 1)).backward()
    expected = 2 * mine.detach() * sum(range(1, world + 1))
    assert gathered.shape == whole.shape
    assert mine.grad is not None
    scattered = mcore.reduce_scatter_to_sequence_parallel_region(
        whole * (rank + 1), group=groups.tp, input_split_sizes=sizes
    )
    errors = [gathered - whole, mine.grad - expected, scattered - mine.detach() * sum(range(1, world + 1))]
    return max(float(error.abs().max()) if error.numel() else 0.0 for error in errors)


@pytest.mark.mcore
@pytest.mark.parametrize("sizes", [[3, 5], [0, 4], [2, 2], [0, 0], [1, 7, 0, 2]])
def test_uneven_gather_equals_one_device(pool: RankPool, sizes: list[int]) -> None:
    assert max(pool.run(len(sizes), gather_of_uneven_sizes, sizes)) <= LAYER_FP64


class Router(torch.nn.Module):
    """Sends every token to two experts, by a fixed rule."""

    def __init__(self, config: mcore.TransformerConfig) -> None:
        super().__init__()
        self.num_experts = config.num_moe_experts

    def set_layer_number(self, layer_number: int) -> None:
        """Called by megatron-core."""

    def forward(self, hidden: Tensor, *rest: object, **more: object) -> tuple[Tensor, Tensor]:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        experts = tokens[:, : self.num_experts].argsort(dim=1)[:, :2]
        chosen = torch.zeros(len(tokens), self.num_experts, dtype=torch.bool).scatter_(1, experts, True)
        scores = tokens[:, : self.num_experts].sigmoid()
        return (scores * chosen).to(hidden.dtype), chosen


class Experts(torch.nn.Module):
    """Scales the tokens of expert i by i + 1, each expert-tensor rank its half."""

    def __init__(self, count: int, config: mcore.TransformerConfig, groups: mcore.ProcessGroupCollection) -> None:
        super().__init__()
        first = groups.ep.rank() * count
        self.factors = torch.arange(first + 1, first + count + 1, dtype=torch.float32) / groups.expt_tp.size()

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        factors = self.factors.repeat_interleave(torch.as_tensor(tokens_per_expert))
        return tokens * (factors * probs)[:, None], None


def moe_layer(layout: Layout, dispatcher: str) -> tuple[Tensor, Tensor]:
    """Output and input gradient of megatron-core's MoELayer with the experts above, over the whole sequence."""
    groups = mcore.open_groups(layout)
    config = mcore.TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, num_moe_experts=4, moe_router_topk=2,
        moe_token_dispatcher_type=dispatcher, tensor_model_parallel_size=layout.tp, sequence_parallel=layout.tp > 1,
        expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=layout.etp, add_bias_linear=False,
        use_cpu_initialization=True, moe_router_load_balancing_type="none",
    )  # fmt: skip
    layer = mcore.build_moe_layer(
        config, groups, layer_number=1, router=lambda config, groups: Router(config), experts=Experts
    )
    tokens = torch.randn(16, 1, 8, generator=torch.Generator().manual_seed(3))
    mine = tokens.chunk(layout.world_size)[dist.get_rank()].clone().requires_grad_()
    out, _ = layer(mine)
    out.square().sum().backward()
    return out.detach(), mine.grad


@pytest.mark.mcore
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize(
    "layout",
    [Layout(dp=2, ep=2), Layout(tp=2, etp=2), Layout(tp=2, dp=2, ep=2, etp=2), Layout(tp=2, dp=4, ep=4, edp=2)],
    ids=Layout.describe,
)
def test_moe_layer_on_ranks_equals_one_rank(pool: RankPool, layout: Layout, dispatcher: str) -> None:
    expected = pool.run(1, moe_layer, Layout(), dispatcher)[0]
    got = pool.run(layout.world_size, moe_layer, layout, dispatcher)
    for part in (0, 1):
        torch.testing.assert_close(torch.cat([result[part] for result in got]), expected[part])
