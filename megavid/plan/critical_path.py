"""The step's critical path: what one rank of the slowest pipeline stage computes and waits for, part by part.

Owns the rules that join kernels to a step: microbatches, recomputation, which communication hides behind what, the
pipeline bubble, imbalance of routing, the optimizer. Knows neither configs nor presets: our models (``time``) and
published runs of others (``reference``) both arrive here as ``Stage``s, so that both are timed by the same rules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megavid.plan.kernels import Attention, Exchange, Machine, Product, Rounding

AXIS_PARTS = {
    "tp": "tensor", "etp": "tensor", "cp": "context", "ep": "expert", "pp": "pipeline", "dp": "data", "edp": "data",
    "fsdp": "data", "embedders": "data", "scalars": "data",
    "amax": "rounding",
}  # fmt: skip
"""Part that exposed communication of an axis is booked as."""


@dataclass(frozen=True)
class Stage:
    """What one rank of one pipeline stage does.

    Attributes:
        products: matrix products of the forward pass of one microbatch.
        attention: attention likewise.
        roundings: rounding of products' operands likewise.
        glue_bytes: bytes that memory-bound operators move in the forward and backward pass of one microbatch.
        is_estimate: ``glue_bytes`` are estimated by hand, not counted operator by operator.
        recompute: forward passes done again, by part (1.0: all of it); "glue" for the memory-bound ones.
        operators: operators that the host issues for one microbatch, both passes.
        stalls: times a microbatch makes the device wait for the host: a dropless dispatcher reads its splits.
        exchanges: collectives of the whole step.
        optimizer_bytes: bytes that the optimizer moves.
        optimizer_operators: operators that the host issues once a step.
    """

    products: tuple[Product, ...]
    attention: tuple[Attention, ...] = ()
    roundings: tuple[Rounding, ...] = ()
    glue_bytes: float = 0.0
    is_estimate: bool = False
    recompute: Mapping[str, float] = field(default_factory=dict)
    operators: float = 0.0
    stalls: float = 0.0
    exchanges: tuple[Exchange, ...] = ()
    optimizer_bytes: float = 0.0
    optimizer_operators: float = 0.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a step's microbatches pass the stages.

    Attributes:
        microbatches: of one pipeline.
        pp: stages.
        vpp: chunks of a stage.
        imbalance: rows of the busiest expert-parallel rank over the mean; 1 for balanced routing.
    """

    microbatches: int
    pp: int = 1
    vpp: int = 1
    imbalance: float = 1.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the critical path, by part.

    Parts: those of ``megavid.plan.flops`` (forward and backward), "recompute", "glue" (memory-bound work), "rounding"
    (of operands in FP8, and the wait for their largest magnitude), exposed communication "tensor", "context", "expert",
    "pipeline" and "data", then "imbalance", "host", "bubble" and "optimizer". Parts that are zero are left out.
    """

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())


def step_time_of(stages: Sequence[Stage], schedule: Schedule, machine: Machine) -> StepTime:
    """Time of a step whose slowest stage sets the pace of all."""
    return max((_stage_time(stage, schedule, machine) for stage in stages), key=lambda time: time.total)


def bubble_share(schedule: Schedule) -> float:
    """Idle time of a stage over its work under (interleaved) 1F1B: (pp - 1) / (vpp x microbatches).

    Source: Narayanan et al. 2021 (arXiv:2104.04473), section 2.2.
    """
    return (schedule.pp - 1) / (schedule.vpp * schedule.microbatches)


@dataclass
class _Compute:
    """Seconds of one microbatch on the device."""

    forward: float = 0.0
    backward: float = 0.0
    attention: float = 0.0
    by_part: dict[str, float] = field(default_factory=dict)
    backward_products: float = 0.0


def _stage_time(stage: Stage, schedule: Schedule, machine: Machine) -> StepTime:
    count = schedule.microbatches
    parts, compute = _compute(stage, machine)
    for part in parts:
        parts[part] *= count
    exposed = _exposed(stage, schedule, machine, compute)
    for part, seconds in exposed.items():
        parts[part] = parts.get(part, 0.0) + seconds
    parts["imbalance"] = (schedule.imbalance - 1.0) * (
        compute.by_part.get("experts", 0.0) * count + exposed.get("expert", 0.0)
    )
    device = sum(parts.values()) - exposed.get("data", 0.0)
    parts["host"] = _host(stage, count, device, machine)
    once = exposed.get("data", 0.0)
    parts["bubble"] = bubble_share(schedule) * (sum(parts.values()) - once)
    calibration = machine.calibration
    parts["optimizer"] = stage.optimizer_bytes / machine.memory_rate + calibration.step_s
    parts["host"] += 0.0 if calibration.is_asynchronous else stage.optimizer_operators * machine.operator_s
    return StepTime({part: seconds for part, seconds in parts.items() if seconds > 0})


def _compute(stage: Stage, machine: Machine) -> tuple[dict[str, float], _Compute]:
    parts: dict[str, float] = {}
    compute = _Compute()
    again = 0.0
    timed: list[tuple[Product | Attention, tuple[float, float]]] = []
    timed += [(work, machine.product(work)) for work in stage.products]
    timed += [(work, machine.attention(work)) for work in stage.attention]
    for work, (forward, backward) in timed:
        repeated = stage.recompute.get(work.part, 0.0) * forward
        parts[work.part] = parts.get(work.part, 0.0) + forward + backward
        again += repeated
        compute.forward += forward
        compute.backward += backward + repeated
        compute.by_part[work.part] = compute.by_part.get(work.part, 0.0) + forward + backward + repeated
        if isinstance(work, Attention):
            compute.attention += forward + backward
        else:
            compute.backward_products += backward
    for rounding in stage.roundings:
        forward, backward = machine.rounding(rounding)
        repeated = stage.recompute.get(rounding.part, 0.0) * forward
        parts["rounding"] = parts.get("rounding", 0.0) + forward + backward
        again += repeated
        compute.forward += forward
        compute.backward += backward + repeated
        compute.by_part[rounding.part] = compute.by_part.get(rounding.part, 0.0) + forward + backward + repeated
    glue = machine.glue(stage.glue_bytes, is_estimate=stage.is_estimate)
    # A third of memory-bound work is the forward pass's: the backward one reads what it saved and gradients besides.
    again += stage.recompute.get("glue", 0.0) * glue / 3
    parts |= {"glue": glue, "recompute": again}
    compute.forward += glue / 3
    compute.backward += glue * 2 / 3 + stage.recompute.get("glue", 0.0) * glue / 3
    return parts, compute


def _exposed(stage: Stage, schedule: Schedule, machine: Machine, compute: _Compute) -> dict[str, float]:
    """Seconds of a step that each axis makes the rank wait."""
    waits: dict[str, float] = {}
    hiding = _hiding(schedule, compute)
    for exchange in stage.exchanges:
        seconds = machine.exchange(exchange)
        if not machine.calibration.is_asynchronous:
            pass  # Ranks that compute are the ranks that copy: a probe measures what is left of one beside a product.
        elif exchange.beside == "pieces":
            # Cut in as many as there are ranks, each beside a piece of a product; the first has nothing beside it.
            seconds /= exchange.group_size
        elif exchange.beside == "neighbour":
            # Beside the computation of another microbatch, as far as measured.
            seconds *= 1.0 - machine.calibration.expert_overlap
        elif exchange.beside:
            # What hides one collective does not hide another.
            hidden = min(seconds, hiding[exchange.beside])
            hiding[exchange.beside] -= hidden
            seconds -= hidden
        part = AXIS_PARTS[exchange.axis]
        waits[part] = waits.get(part, 0.0) + seconds
    return waits


def _hiding(schedule: Schedule, compute: _Compute) -> dict[str, float]:
    """Seconds of a step's computation that collectives can run beside.

    "products": one of the two products of each backward pass. "last_backward", "first_forward": once a step, of the
    last or the first microbatch. "step": everything.
    """
    count = schedule.microbatches
    return {
        "products": compute.backward_products / 2 * count,
        "attention": compute.attention * count,
        "shared_expert": compute.by_part.get("shared_expert", 0.0) * count,
        "last_backward": compute.backward,
        "first_forward": compute.forward,
        "step": (compute.forward + compute.backward) * count,
    }


def _host(stage: Stage, count: int, device: float, machine: Machine) -> float:
    """Time that the device waits for the host: for its operators, or at the points where it has to."""
    calibration = machine.calibration
    issue = stage.operators * count * machine.operator_s
    stalls = stage.stalls * count * calibration.stall_s
    return stalls + (max(0.0, issue - device) if calibration.is_asynchronous else issue)
