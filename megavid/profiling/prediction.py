"""What the planner predicts of a profiled step, beside what was measured, part by part.

Owns which measured seconds belong to which predicted part. The prediction is ``megavid.plan.time``'s; nothing here
fits it to the measurement.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from megavid.config.schema import RunConfig
from megavid.plan.calibration import Calibration
from megavid.plan.flops import PARTS
from megavid.plan.fp8 import fp8_notes
from megavid.plan.hardware import Hardware
from megavid.plan.layout import Layout
from megavid.plan.time import not_counted, step_time
from megavid.plan.workload import Workload
from megavid.profiling.attribution import NOBODY, Owner
from megavid.profiling.waterfall import AXES, OF_STEP

COMMUNICATION: Mapping[str, str] = {
    "tp": "communication: tensor", "cp": "communication: context", "ep": "communication: expert",
    "etp": "communication: expert", "pp": "pipeline and bubble",
}  # fmt: skip
"""Where communication over an axis stands; all other axes are data parallel."""
DATA = "communication: data"
JOINED: Mapping[str, str] = {
    "tensor": "communication: tensor", "context": "communication: context", "expert": "communication: expert",
    "imbalance": "communication: expert", "data": DATA,
    "pipeline": "pipeline and bubble", "bubble": "pipeline and bubble", "rounding": "glue",
}  # fmt: skip
"""Where the planner's parts stand. What a measurement cannot tell apart is one: a wait for a stage is transfer and
bubble, a wait in the experts' exchange is transfer and imbalance."""
NOT_PREDICTED = ("input wait", "statistics and reports", "no part")
"""Measured parts that the planner says nothing about."""
WHOLE_STEP = "whole step"


def prediction_rows(
    config: RunConfig,
    layout: Layout,
    clips: Sequence[Sequence[int]],
    machine: tuple[Hardware, Calibration],
    owners: Mapping[Owner, float],
    step_s: float,
) -> dict[str, Any]:
    """Rows for the report: predicted and measured seconds of every part; None for what is not predicted.

    Args:
        config: the run.
        layout: of its ranks.
        clips: tokens of each clip of every measured step, over all ranks.
        machine: rates, and what kernels and links reach of them.
        owners: measured seconds of a traced step, mean over ranks.
        step_s: a measured step, without the profiler.
    """
    workload = usual_pack(config, clips)
    predicted = step_time(config, layout, workload, *machine)
    expected: dict[str, float] = defaultdict(float)
    for part, seconds in predicted.parts.items():
        expected[JOINED.get(part, part)] += seconds
    found: dict[str, float] = defaultdict(float)
    for owner, seconds in owners.items():
        found[measured_part(owner)] += seconds
    rows: list[dict[str, Any]] = [
        {
            "part": part,
            "predicted_s": None if part in NOT_PREDICTED else expected.get(part, 0.0),
            "measured_s": found.get(part, 0.0),
        }
        for part in [*expected, *(name for name in found if name not in expected)]
    ]
    rows.sort(key=lambda row: (row["part"] in NOT_PREDICTED, -row["measured_s"]))
    whole = {"part": WHOLE_STEP, "predicted_s": predicted.total, "measured_s": step_s}
    return {
        "machine": machine[0].name,
        "calibration": machine[1].name,
        "workload": workload.name,
        "notes": [*not_counted(config), *fp8_notes(config, *machine)],
        "parts": [whole, *rows],
    }


def measured_part(owner: Owner) -> str:
    """The predicted part that measured seconds stand beside."""
    if owner.part == NOBODY:
        return "no part"
    if owner.phase == "communication":
        return COMMUNICATION.get(AXES.get(owner.part, owner.part), DATA)
    if owner.phase == "step":
        of_step = OF_STEP.get(owner.part)
        if of_step is not None:
            return of_step
    if owner.kind == "host":
        return "host"
    if owner.phase == "recompute":
        return "recompute"
    return owner.part if owner.part in PARTS else "glue"


def usual_pack(config: RunConfig, clips: Sequence[Sequence[int]]) -> Workload:
    """A pack with as many clips as the run's have on average, of sizes that stand for all of the run's."""
    every = sorted(tokens for step in clips for tokens in step)
    packs = len(clips) * config.train.global_batch_size
    count = max(1, round(len(every) / packs))
    chosen = [every[int((number + 0.5) * len(every) / count)] for number in range(count)]
    room = config.data.pack_tokens
    while sum(chosen) > room:  # rounding can take a little too much
        chosen[-1] -= min(sum(chosen) - room, chosen[-1] - 1)
    return Workload(
        tuple(chosen), room, config.train.global_batch_size, f"{count} clips in a pack, {sum(chosen)} tokens"
    )
