"""From peak to achieved: where the seconds of a step go beyond what the model's FLOPs would take at the peak.

Owns the bars and their order. They are means over the ranks and the traced steps and sum to the traced step, because
every moment has one owner; the only difference taken is that of measured kernel seconds and the peak's.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megavid.plan.flops import PARTS
from megavid.profiling.attribution import NOBODY, Owner, Split

AXES: Mapping[str, str] = {
    "dp_cp": "dp", "intra_dp_cp": "dp", "intra_dist_opt": "dp", "tp_dp_cp": "dp", "intra_expt_dp": "edp",
    "tp_ep": "ep", "tp_ep_pp": "ep", "tp_cp": "tp", "embd": "pp", "pos_embd": "pp",
}  # fmt: skip
"""Axis under whose name a combined group is shown; other names stand for themselves."""

IDEAL = "useful work at peak"
KERNELS = "kernel inefficiency"
OTHER = "other operators"
RECOMPUTE = "recompute"
BUBBLE = "pipeline bubble"
IMBALANCE = "routing imbalance"
OPTIMIZER = "optimizer"
INPUT = "input wait"
HOST = "host gaps"
REPORTS = "statistics and reports"
UNATTRIBUTED = "no part"

NOTES: Mapping[str, str] = {
    IDEAL: "model FLOPs, forward and backward pass of the clips, at the peak of all ranks",
    KERNELS: "operators of the parts that have FLOPs, beyond what these FLOPs take at the peak; padding included",
    OTHER: "operators of norms, rotary embedding, noise, loss, permutation, gradient accumulation: no FLOPs counted",
    RECOMPUTE: "forward passes that the backward pass runs again, host time included",
    BUBBLE: "waiting for the neighbouring pipeline stages, transfers included",
    IMBALANCE: "waiting for the busiest experts of the expert group: maximum minus mean of the ranks, call by call",
    OPTIMIZER: "gradient norm, clipping, update, moving average, gradients brought together; communication apart",
    INPUT: "waiting for the reader of clips",
    HOST: "no operator runs: Python, autograd and the schedule, inside the forward and backward pass",
    REPORTS: "sums of loss, counters and routing, rows and progress",
    UNATTRIBUTED: "in no region that has a name",
}


OF_STEP: Mapping[str, str] = {
    "optimizer": OPTIMIZER, "gradients": OPTIMIZER, "zero_gradients": OPTIMIZER, "average": OPTIMIZER,
    "input_wait": INPUT, "statistics": REPORTS, "reports": REPORTS,
}  # fmt: skip
"""Bars of the step's own parts; of the others, operators are other operators and what is between them is the host's."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: seconds of a traced step, mean over the ranks, and what they are."""

    name: str
    seconds: float
    note: str

    def to_json(self) -> dict[str, Any]:
        """As report.json has it."""
        return asdict(self)


def mean_owners(splits: Sequence[Split]) -> dict[Owner, float]:
    """Seconds of every owner, mean over ``splits``."""
    sums: dict[Owner, float] = defaultdict(float)
    for split in splits:
        for owner, seconds in split.owners.items():
            sums[owner] += seconds / len(splits)
    return dict(sums)


def waterfall(owners: Mapping[Owner, float], *, ideal_s: float, imbalance_s: float) -> list[Bar]:
    """The bars of a run: the useful work first, then everything that keeps a step from taking only that.

    Args:
        owners: mean seconds of every owner over ranks and traced steps.
        ideal_s: model FLOPs of a step / (ranks x peak).
        imbalance_s: seconds that ranks wait for the busiest experts; taken out of the communication of experts, and
            no more than there is of it.
    """
    seconds: dict[str, float] = dict.fromkeys((IDEAL, KERNELS, OTHER, RECOMPUTE), 0.0)
    exposed: dict[str, float] = defaultdict(float)
    for owner, value in owners.items():
        if owner.phase == "communication":
            exposed[AXES.get(owner.part, owner.part)] += value
        else:
            name = _bar_of(owner)
            seconds[name] = seconds.get(name, 0.0) + value
    seconds[KERNELS] -= ideal_s
    seconds[IDEAL] = ideal_s
    waited = min(imbalance_s, exposed.get("ep", 0.0))
    bubble = exposed.pop("pp", 0.0)
    if waited > 0:
        exposed["ep"] -= waited
    names = {name: value for name, value in seconds.items() if name in (IDEAL, KERNELS, OTHER, RECOMPUTE)}
    bars = [Bar(name, value, NOTES[name]) for name, value in names.items()]
    for axis, value in sorted(exposed.items()):
        bars.append(Bar(f"exposed communication: {axis}", value, f"in collectives over {axis}, and waiting for them"))
    late = {BUBBLE: bubble, IMBALANCE: waited}
    bars += [Bar(name, value, NOTES[name]) for name, value in late.items()]
    rest = (OPTIMIZER, INPUT, HOST, REPORTS, UNATTRIBUTED)
    return bars + [Bar(name, seconds.get(name, 0.0), NOTES[name]) for name in rest]


def _bar_of(owner: Owner) -> str:
    if owner.part == NOBODY:
        return UNATTRIBUTED
    if owner.phase == "recompute":
        return RECOMPUTE
    if owner.phase == "step":
        return OF_STEP.get(owner.part, OTHER if owner.kind == "operators" else HOST)
    if owner.kind == "host":
        return HOST
    return KERNELS if owner.part in PARTS else OTHER


def imbalance_of(groups: Sequence[Sequence[Split]]) -> float:
    """Seconds that a rank waits on average for the busiest rank of its expert group, over all calls of all layers.

    Args:
        groups: for each expert group and traced step, the splits of its ranks.
    """
    waited = []
    for splits in groups:
        calls = set().union(*(split.calls for split in splits))
        of_call = [[split.calls.get(call, 0.0) for split in splits] for call in calls]
        waited.append(sum(max(values) - sum(values) / len(values) for values in of_call))
    return sum(waited) / len(waited) if waited else 0.0
