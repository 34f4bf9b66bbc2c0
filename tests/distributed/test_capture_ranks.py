"""``train.capture = "compile"`` against off in the same layout, over ranks, with every recomputation and adapters.

torch.compile traces here as in a run, and then calls torch's own operators (backends ``aot_eager``, which also cuts the
graphs into forward and backward pass, and ``eager``): what inductor makes of them is in tests/unit/test_capture.py and
tests/integration/test_capture_cli.py.
"""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from megavid.models import video_dit
from megavid.models.capture import Capture
from megavid.ops.block_ops import BlockOps
from tests.distributed.test_layouts import ABSOLUTE, assert_near, compare
from tests.support import tolerance
from tests.support.ranks import RankPool
from tests.support.tiny_world import assemble, tiny_config, train

PARTS = {
    "modulated_norm", "sum_of_squares", "norm_rope", "residual_affine_norm", "rms_norm", "residual_modulated_norm",
    "gated_residual",
}  # fmt: skip
CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "adapters, selective": ("aot_eager", "wan", 1, {"recompute": "selective", "lora": {"rank": 4}}),
    "tp2 dp2 ep2, full": ("eager", "wan_moe", 4, {"tensor": 2, "expert": 2, "recompute": "full"}),
}
STEPS = 2


def train_captured(backend: str, *args: Any) -> dict[str, Any]:
    """Job: ``train``, and what was compiled in it."""
    made: list[Capture] = []

    def capture(choice: Any, ops: BlockOps) -> Capture:
        made.append(Capture(choice, ops, backend))
        return made[-1]

    with mock.patch.object(video_dit, "Capture", capture):
        told = train(*args)
    return {**told, "news": [event for each in made for event in each.take_news()]}


@pytest.mark.parametrize("name", CASES)
def test_a_captured_run_computes_what_it_did_without(pool: RankPool, name: str) -> None:
    """To rounding: compiled functions add up in another order, and round to the model's dtype less often."""
    backend, family, world, options = CASES[name]
    config = tiny_config(family, **options)
    captured = replace(config, train=replace(config.train, capture="compile"))
    want = pool.run(world, train, config, world, STEPS)
    got = pool.run(world, train_captured, backend, captured, world, STEPS)
    for plain, told in zip(want, got, strict=True):
        assert told["loss"] == pytest.approx(plain["loss"], rel=tolerance.LOSS_FP32)
        assert told["norm"] == pytest.approx(plain["norm"], rel=tolerance.GRAD_NORM_FP32)
        assert {event.part for event in told["news"]} == PARTS
        assert not any(event.is_refused for event in told["news"])
    gradients, others = (assemble([rank["first"] for rank in ranks]) for ranks in (want, got))
    assert gradients.keys() == others.keys()
    for parameter, gradient in gradients.items():
        assert_near(others[parameter], gradient, tolerance.GRAD_NORM_FP32, parameter, absolute=1e-9)
    compare(*(assemble([rank["final"] for rank in ranks]) for ranks in (got, want)), ABSOLUTE)
