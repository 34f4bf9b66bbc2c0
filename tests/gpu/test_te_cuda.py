"""Linears and experts of Transformer Engine on a GPU: as near to fp32 as megavid's own, and their gradients too."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megavid.config.schema import PrecisionConfig
from megavid.errors import ConfigError
from megavid.models.te import check_usable
from megavid.parallel import te
from tests.support.te_world import FORMATS, assert_as_near, errors, passes

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not te.HAS_TE, reason="needs Transformer Engine"),
]


@pytest.fixture(scope="module")
def truth() -> Iterator[dict[str, dict[str, Tensor]]]:
    """What fp32 gives, of a dense feed-forward and of experts, with a world of one rank open."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield {family: passes("native", "fp32", "off", "cuda", family) for family in ("wan", "wan_moe")}
    dist.destroy_process_group()


@pytest.mark.parametrize("family", ["wan", "wan_moe"])
@pytest.mark.parametrize("name", FORMATS)
def test_its_linears_are_as_near_to_fp32_as_ours(truth: dict[str, dict[str, Tensor]], name: str, family: str) -> None:
    fp8, whose = FORMATS[name], ("native", "transformer_engine")
    try:
        check_usable(PrecisionConfig(linears="transformer_engine", fp8=fp8), "cuda")  # type: ignore[arg-type]
    except ConfigError as error:
        pytest.skip(str(error))
    ours, theirs = (errors(passes(which, "bf16", fp8, "cuda", family), truth[family]) for which in whose)
    print(f"{family}, {name}: errors of ours {ours}, of Transformer Engine {theirs}")
    assert_as_near(ours, theirs, fp8)
