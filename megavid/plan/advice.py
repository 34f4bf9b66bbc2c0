"""What holds a run back, and what to try, in words.

Owns the grouping of a step's parts into causes and the advice for each; it computes no time and no memory of its own,
but asks ``memory`` and ``time`` what another setting would need before it recommends it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from megavid.config.schema import RunConfig
from megavid.plan.calibration import Calibration
from megavid.plan.critical_path import StepTime
from megavid.plan.goodput import LLAMA3_GPUS, LLAMA3_STORAGE_RATE
from megavid.plan.hardware import Hardware
from megavid.plan.layout import Layout, microbatches_of_step
from megavid.plan.memory import GIB, Memory, worst_memory
from megavid.plan.time import step_time
from megavid.plan.workload import Workload

CAUSES: Mapping[str, tuple[str, ...]] = {
    "attention": ("self_attention",),
    "matrix products": (
        "cross_attention", "projections", "dense_ffn", "experts", "shared_expert", "router", "modulation", "embedders",
        "head",
    ),
    "recompute": ("recompute",),
    "memory bandwidth": ("glue",),
    "rounding to FP8": ("rounding",),
    "tensor parallel": ("tensor",),
    "context parallel": ("context",),
    "all-to-all": ("expert",),
    "pipeline sends": ("pipeline",),
    "bubble": ("bubble",),
    "data parallel": ("data",),
    "imbalance": ("imbalance",),
    "host": ("host",),
    "optimizer": ("optimizer",),
}  # fmt: skip
"""Parts of a step by what causes them."""
NODE_GPUS = 8
"""GPUs of a node, which share its memory of files."""
NOTABLE = 0.05
"""Share of the step from which on a cause that is no useful work gets a word of advice."""
NEARLY = 0.25
"""What may be lacking, as a share of the memory that may be used, for a setting to be named that does not fit."""


@dataclass(frozen=True, slots=True)
class Binding:
    """What binds.

    Attributes:
        name: "memory" where it does not fit, "input" where reading takes longer than the step, or a key of ``CAUSES``.
        share: of the step; of the accelerator's memory for "memory".
        text: one sentence.
        advice: sentences, the most promising first.
    """

    name: str
    share: float
    text: str
    advice: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Case:
    config: RunConfig
    layout: Layout
    workload: Workload
    hardware: Hardware
    memory: Memory
    limit: float
    time: StepTime
    calibration: Calibration


def causes_of(time: StepTime) -> dict[str, float]:
    """Seconds of a step by cause, the largest first; parts of no known cause stand under their own name."""
    left = dict(time.parts)
    found = {name: sum(left.pop(part, 0.0) for part in parts) for name, parts in CAUSES.items()}
    return dict(sorted((found | left).items(), key=lambda pair: -pair[1]))


def binding_of(
    config: RunConfig,
    layout: Layout,
    workload: Workload,
    hardware: Hardware,
    memory: Memory,
    time: StepTime,
    calibration: Calibration,
    *,
    headroom: float,
) -> Binding:
    """What binds a run, and what to try.

    Args:
        config: the run.
        layout: its layout.
        workload: its packs.
        hardware: what it runs on.
        memory: of the fullest rank.
        time: of a step.
        calibration: that it was predicted with.
        headroom: share of memory that has to stay free.
    """
    case = _Case(
        config, layout, workload, hardware, memory, hardware.memory_bytes * (1.0 - headroom), time, calibration
    )
    causes = causes_of(time)
    advice = [
        sentence
        for name, seconds in causes.items()
        if seconds > NOTABLE * time.total and name in _ADVICE
        for sentence in [_ADVICE[name](case)]
        if sentence
    ]
    if memory.total > case.limit:
        share = memory.total / hardware.memory_bytes
        part, size = max(memory.parts.items(), key=lambda pair: pair[1])
        text = f"memory: {_words(part)} take {size / GIB:.1f} of {memory.total / GIB:.1f} GiB"
        return Binding("memory", share, text, (_of_memory(case), *advice))
    input_s = input_seconds(config, layout, workload)
    if input_s > time.total:
        text = f"input: a node reads its clips of a step in {input_s:.1f} s, the step takes {time.total:.1f} s"
        return Binding("input", input_s / time.total, text, (_of_input(), *advice))
    name, seconds = next(iter(causes.items()))
    share = seconds / time.total
    return Binding(name, share, f"{name}: {share:.0%} of the step", tuple(advice[:4]))


def input_seconds(config: RunConfig, layout: Layout, workload: Workload) -> float:
    """Seconds in which a node reads latents, text and image features of one step, all in bf16.

    Every rank reads all clips of its replica; ranks of one node share what the node has read. A node reads at the share
    of a published file system that falls to its GPUs (``megavid.plan.goodput``).
    """
    model, on_node = config.model, min(NODE_GPUS, layout.world_size)
    # The mask is made, not read; the latents of known frames are.
    channels = model.in_channels - model.mask_channels
    latents = workload.tokens * model.patch_volume * channels * 2
    features = model.text_length * model.text_size + model.image_tokens * model.image_size
    text = len(workload.clip_tokens) * features * 2
    # Ranks of one stage and replica stand next to each other.
    replicas = max(1, min(on_node // (layout.tp * layout.cp), layout.dp))
    packs = replicas * workload.packs_per_step / layout.dp
    return packs * (latents + text) / (LLAMA3_STORAGE_RATE / LLAMA3_GPUS * on_node)


# Advice, one function for each cause; "" where there is nothing to say


def _of_memory(case: _Case) -> str:
    part = max(case.memory.parts, key=lambda name: case.memory.parts[name])
    if part in ("activations", "dispatcher", "context_parallel"):
        modes = {"none": ("selective", "full"), "selective": ("full",)}
        for mode in modes.get(case.config.parallel.recompute, ()):
            total = _with_recompute(case, mode).total
            if total <= case.limit:
                return f"parallel.recompute = '{mode}' needs {total / GIB:.1f} GiB and fits"
        return "more ranks for the tokens of a pack: raise parallel.context or parallel.tensor, or shorten clips"
    if case.layout.ep < case.config.model.moe.num_experts and case.config.model.family == "wan_moe":
        return "share the weights among more ranks: raise parallel.expert or parallel.pipeline, or take more GPUs"
    return "share the weights among more ranks: raise parallel.tensor or parallel.pipeline, or take more GPUs"


def _of_input() -> str:
    return "read faster storage, or raise parallel.* so that fewer replicas read at once"


def _of_recompute(case: _Case) -> str:
    less = {"full": "selective", "selective": "none"}.get(case.config.parallel.recompute)
    if less is None:
        return ""
    total = _with_recompute(case, less).total
    if total <= case.limit:
        return f"parallel.recompute = '{less}' fits ({total / GIB:.1f} GiB) and computes less again"
    if total - case.limit > NEARLY * case.limit:
        return ""
    return (
        f"less recomputation: parallel.recompute = '{less}' lacks {(total - case.limit) / GIB:.1f} GiB; more ranks on "
        "parallel.context or parallel.tensor would make room"
    )


def _of_bubble(case: _Case) -> str:
    microbatches, layout = microbatches_of_step(case.config, case.layout), case.layout
    wanted = _next_chunks(case.config.model.num_layers, layout)
    if wanted and microbatches % layout.pp == 0 and _is_faster_with_chunks(case, wanted):
        return f"a smaller bubble: parallel.virtual_pipeline = {wanted} instead of {layout.vpp}"
    return (
        f"a smaller bubble: more than {microbatches} microbatches for {layout.pp} stages (a larger "
        "train.global_batch_size, more ranks on other axes), or fewer stages"
    )


def _of_all_to_all(case: _Case) -> str:
    spread = case.layout.ep * case.layout.etp
    domain = case.hardware.nvlink_domain
    if spread > domain:
        return (
            f"expert ranks cross NVLink domains ({case.layout.ep} x {case.layout.etp} > {domain}): "
            f"parallel.expert = {max(1, domain // case.layout.etp)} keeps their tokens inside"
        )
    overlap = case.config.model.moe.shared_ffn_size > 0 and not case.config.parallel.shared_expert_overlap
    if overlap:
        return "parallel.shared_expert_overlap = true computes the shared expert while tokens travel"
    return "fewer expert ranks (parallel.expert) where memory allows; the engine hides no all-to-all of experts yet"


def _of_data(case: _Case) -> str:
    parallel = case.config.parallel
    if not parallel.overlap_grad_reduce:
        return "parallel.overlap_grad_reduce = true reduces gradients while the backward pass runs"
    if not parallel.overlap_param_gather:
        return "parallel.overlap_param_gather = true gathers weights while the next forward pass runs"
    return "a larger train.global_batch_size, so that gradients travel for more work"


def _of_tensor(case: _Case) -> str:
    if case.layout.tp > case.hardware.nvlink_domain:
        domain = case.hardware.nvlink_domain
        return f"parallel.tensor = {case.layout.tp} crosses NVLink domains: keep it at most {domain}"
    return f"fewer tensor ranks than {case.layout.tp}, parallel.context in their place: it moves fewer bytes a token"


def _of_context(case: _Case) -> str:
    return (
        f"another parallel.context_strategy than {case.layout.context_plan.describe()}, or fewer context ranks than "
        f"{case.layout.cp}"
    )


def _of_imbalance(case: _Case) -> str:
    return (
        "experts that are loaded more evenly: watch load max/mean in metrics.jsonl, raise "
        "model.moe.bias_update_rate, or put clips of several noise levels into an expert group (a larger micro batch)"
    )


def _of_glue(case: _Case) -> str:
    one_pass = "one pass over memory of each norm, modulation and activation"
    match case.config.train.ops:
        case "compiled":
            return ""
        case "auto":
            return f"csrc/ built (megavid doctor says if it is): train.ops = 'auto' then makes {one_pass}"
        case "reference":
            return f"train.ops = 'auto' makes {one_pass} where csrc/ is built"


def _of_host(case: _Case) -> str:
    return "more work for each operator: a larger train.micro_batch_size, fewer tensor or context ranks"


def _of_optimizer(case: _Case) -> str:
    return "a larger train.global_batch_size, so that the optimizer runs for more work"


_ADVICE: Mapping[str, Callable[[_Case], str]] = {
    "recompute": _of_recompute,
    "memory bandwidth": _of_glue,
    "tensor parallel": _of_tensor,
    "context parallel": _of_context,
    "all-to-all": _of_all_to_all,
    "bubble": _of_bubble,
    "data parallel": _of_data,
    "imbalance": _of_imbalance,
    "host": _of_host,
    "optimizer": _of_optimizer,
}


def _with_recompute(case: _Case, mode: Literal["none", "selective", "full"] | str) -> Memory:
    parallel = replace(case.config.parallel, recompute=mode)  # type: ignore[arg-type]
    return worst_memory(replace(case.config, parallel=parallel), case.layout, case.workload, hardware=case.hardware)[1]


def _is_faster_with_chunks(case: _Case, chunks: int) -> bool:
    """Whether a step of so many chunks a stage takes less time: more of them also send and hold more."""
    config = replace(case.config, parallel=replace(case.config.parallel, virtual_pipeline=chunks))
    layout = replace(case.layout, vpp=chunks)
    needed = worst_memory(config, layout, case.workload, hardware=case.hardware)[1].total
    if needed > max(case.limit, case.memory.total):
        return False
    return step_time(config, layout, case.workload, case.hardware, case.calibration).total < case.time.total


def _next_chunks(num_layers: int, layout: Layout) -> int:
    """The next larger number of chunks that holds equal numbers of blocks; 0 for none."""
    most = num_layers // layout.pp
    larger = (vpp for vpp in range(layout.vpp + 1, most + 1) if num_layers % (layout.pp * vpp) == 0)
    return next(larger, 0) if layout.pp > 1 else 0


def _words(part: str) -> str:
    return part.replace("_", " ")
