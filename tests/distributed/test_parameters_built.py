"""The closed form of parameter counts equals the built model: every preset, and layouts up to a thousand ranks."""

import json

from megavid.config.load import preset_names
from tests.support.warm_parent import WarmParent

Case = tuple[str, list[str], int, int]


def _flags(**degrees: int) -> list[str]:
    """Every degree, those of the preset set back to one."""
    names = ("tensor", "context", "pipeline", "virtual_pipeline", "expert", "expert_tensor")
    flags = [item for name in names for item in (f"--parallel.{name}", str(degrees.get(name, 1)))]
    return [*flags, "--train.global_batch_size", "1024"]


TINY_LAYOUTS = [
    (2, {"tensor": 2}),
    (2, {"expert": 2}),
    (4, {"pipeline": 2, "virtual_pipeline": 2}),
    (4, {"tensor": 2, "expert_tensor": 2}),
    (8, {"tensor": 2, "pipeline": 2, "expert": 2}),
    (8, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 4}),
    (8, {"pipeline": 4, "expert": 2}),
]
LARGE_LAYOUTS = [
    ("wan_14b", 64, {"tensor": 8, "pipeline": 4, "virtual_pipeline": 5}),
    ("wan_moe_7b_a2b", 64, {"tensor": 2, "expert": 8, "pipeline": 2}),
    ("wan_moe_30b_a3b", 64, {"expert": 16, "pipeline": 4}),
    ("wan_moe_100b_a20b", 1024, {"tensor": 4, "pipeline": 4, "expert": 8, "expert_tensor": 2}),
]


def _run(warm: WarmParent, cases: list[Case]) -> list[dict[str, object]]:
    done = warm.run_module("tests.support.built_counts", stdin=json.dumps(cases))
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _check(warm: WarmParent, cases: list[Case]) -> None:
    answers = _run(warm, cases)
    assert len(answers) == len(cases)
    for case, answer in zip(cases, answers):
        assert (answer["wrong"], answer["missing"]) == ([], []), case
        assert answer["planned"] == answer["built"], case


def test_every_preset_on_one_rank(warm: WarmParent) -> None:
    _check(warm, [(preset, _flags(), 1, 0) for preset in preset_names()])


def test_every_rank_of_small_layouts(warm: WarmParent) -> None:
    _check(warm, [("tiny", _flags(**degrees), world, rank) for world, degrees in TINY_LAYOUTS for rank in range(world)])


def test_first_middle_and_last_ranks_of_large_layouts(warm: WarmParent) -> None:
    _check(
        warm,
        [
            (preset, _flags(**degrees), world, rank)
            for preset, world, degrees in LARGE_LAYOUTS
            for rank in (0, 1, world // 2 + 3, world - 1)
        ],
    )
