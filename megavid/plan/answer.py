"""The whole answer of ``megavid plan`` for one layout, and its JSON, which other programs read.

Owns what is put together and under which key; every figure comes from the module that it belongs to. Nothing is
printed here: ``megavid.cli.plan_text`` does that.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from megavid.config.schema import RunConfig
from megavid.plan.advice import Binding, binding_of
from megavid.plan.flops import Flops, forward_flops, recompute_flops
from megavid.plan.fp8 import fp8_notes
from megavid.plan.goodput import Goodput, checkpoint_bytes, plan_goodput
from megavid.plan.hardware import Hardware
from megavid.plan.hindcast import evidence
from megavid.plan.job import Job
from megavid.plan.layout import Layout, layout_of, microbatches_of_step
from megavid.plan.memory import GIB, Memory, host_bytes, memory_of, worst_memory
from megavid.plan.parameters import Counts, count, count_rank
from megavid.plan.time import StepTime, mfu, not_counted, peak_dtype, step_time
from megavid.plan.traffic import Transfer, traffic_of
from megavid.plan.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """FLOPs of all packs of one optimizer step, by part.

    Attributes:
        forward: model FLOPs of the forward pass.
        backward: of the backward pass, twice the forward.
        recompute: what the backward pass computes again, padding included.
        padding: forward and backward of tokens that belong to no clip.
    """

    forward: Flops
    backward: Flops
    recompute: Flops
    padding: float

    @property
    def model(self) -> float:
        """What MFU counts: forward and backward pass of the clips."""
        return self.forward.total + self.backward.total

    @property
    def hardware(self) -> float:
        """What the accelerators compute (HFU): recomputation and padding too."""
        return self.model + self.recompute.total + self.padding


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a run of one layout needs and takes.

    Attributes:
        config: the run in this layout, its packs cut for the planned clips.
        layout: its layout.
        hardware: what it runs on.
        workload: what its packs hold.
        counts: parameters of the model.
        rank_parameters: parameters that the fullest stage's rank holds.
        work: FLOPs of a step.
        stage: pipeline stage whose ranks need most memory.
        memory: their memory.
        stage_bytes: memory of a rank of every stage.
        host_bytes: host memory of that rank for asynchronous checkpoints.
        headroom: share of memory that has to stay free.
        transfers: what a rank of ``traffic_stage`` sends in a step.
        traffic_stage: the stage whose ranks send most.
        time: a step.
        mfu: model FLOPs over what the accelerators could do in that time at ``peak``.
        mfu_interval: likewise, lowest and highest after the errors of the hindcast.
        evidence: which published runs those errors are of, in words.
        goodput: checkpoints and failures.
        budget_tokens: video tokens to train on.
        binding: what holds the run back, and what to try.
        notes: what is assumed about this layout and may be too good, in words.
    """

    config: RunConfig
    layout: Layout
    hardware: Hardware
    workload: Workload
    counts: Counts
    rank_parameters: int
    work: Work
    stage: int
    memory: Memory
    stage_bytes: tuple[int, ...]
    host_bytes: int
    headroom: float
    transfers: tuple[Transfer, ...]
    traffic_stage: int
    time: StepTime
    mfu: float
    mfu_interval: tuple[float, float]
    evidence: str
    goodput: Goodput
    budget_tokens: float
    binding: Binding
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the fullest rank leaves the headroom free."""
        return fits(self.memory, self.hardware, self.headroom)

    @property
    def microbatches(self) -> int:
        """Microbatches of each data-parallel rank in one step."""
        return microbatches_of_step(self.config, self.layout)

    @property
    def peak(self) -> str:
        """The peak that MFU is a share of, in words."""
        kind = "dense" if self.hardware.generation else "probed"
        return f"{kind} {peak_dtype(self.config, self.hardware)} peak"

    @property
    def tokens_per_s(self) -> float:
        """Video tokens of clips that the job takes in a second of steps."""
        return self.workload.tokens * self.workload.packs_per_step / self.time.total

    @property
    def hfu(self) -> float:
        """As ``mfu``, with recomputation and padding counted."""
        return self.mfu * self.work.hardware / self.work.model

    @property
    def step_interval(self) -> tuple[float, float]:
        """Seconds of a step at the best and at the worst MFU of the interval."""
        low, high = self.mfu_interval
        return self.time.total * self.mfu / high, self.time.total * self.mfu / low

    def days(self, *, mfu: float | None = None, with_failures: bool = True) -> float:
        """Days for the token budget, at another MFU than the predicted one if given."""
        seconds = self.budget_tokens / self.tokens_per_s * (self.mfu / (mfu or self.mfu))
        goodput = max(self.goodput.fraction, 1e-9) if with_failures else 1.0
        return seconds / goodput / 86400

    def to_json(self) -> dict[str, Any]:
        """Every figure under the keys that other programs read; GiB, seconds, FLOPs, bytes."""
        work, clips = self.work, self.workload.samples_per_step
        return {
            "gpu": self.hardware.name,
            "world_size": self.layout.world_size,
            "parameters": {
                "total": self.counts.total,
                "active": self.counts.active,
                "per_rank": self.rank_parameters,
                "by_part": dict(self.counts.by_part),
            },
            "layout": parallel_keys(self.config),
            "ranks": {axis: self.layout.size(axis) for axis in ("tp", "cp", "dp", "pp", "ep", "etp", "edp")},
            "batch": {
                "clip": self.workload.name,
                "clip_tokens": list(self.workload.clip_tokens),
                "pack_tokens": self.workload.pack_tokens,
                "micro_batch_size": self.config.train.micro_batch_size,
                "microbatches": self.microbatches,
                "global_batch_size": self.config.train.global_batch_size,
            },
            "flops": {
                "per_sample": work.model / clips,
                "per_step": work.model,
                "forward": dict(work.forward.parts),
                "backward": dict(work.backward.parts),
                "recompute": dict(work.recompute.parts),
                "hardware_per_step": work.hardware,
            },
            "memory": self._memory_json(),
            "fits": self.fits,
            "traffic_stage": self.traffic_stage,
            "traffic": [asdict(transfer) for transfer in self.transfers],
            "step_time_s": self.time.total,
            "step_time_interval_s": list(self.step_interval),
            "step_time_parts_s": dict(self.time.parts),
            "mfu": self.mfu,
            "mfu_interval": list(self.mfu_interval),
            "mfu_interval_of": self.evidence,
            "hfu": self.hfu,
            "tokens_per_s": self.tokens_per_s,
            "budget": self._budget_json(),
            "goodput": asdict(self.goodput),
            "binds": self.binding.name,
            "binds_share": self.binding.share,
            "try": list(self.binding.advice),
            "assumes": list(self.notes),
        }

    def _memory_json(self) -> dict[str, Any]:
        return {
            "per_rank_gib": self.memory.total / GIB,
            "parts": {part: size / GIB for part, size in self.memory.parts.items()},
            "stage": self.stage,
            "stages_gib": [size / GIB for size in self.stage_bytes],
            "limit_gib": self.hardware.memory_bytes / GIB,
            "headroom": self.headroom,
            "host_gib": self.host_bytes / GIB,
        }

    def _budget_json(self) -> dict[str, Any]:
        low, high = self.mfu_interval
        days, fast, slow = self.days(), self.days(mfu=high), self.days(mfu=low)
        gpus = self.layout.world_size
        return {
            "tokens": self.budget_tokens,
            "days": days,
            "days_interval": [fast, slow],
            "days_without_failures": self.days(with_failures=False),
            "gpu_hours": days * 24 * gpus,
            "gpu_hours_interval": [fast * 24 * gpus, slow * 24 * gpus],
        }


def plan_run(config: RunConfig, workload: Workload, job: Job) -> Answer:
    """Answer for one layout.

    Args:
        config: the run; ``parallel.*`` is the layout.
        workload: what each pack holds; ``data.pack_tokens`` follows it.
        job: what it runs on.

    Raises:
        ConfigError: the layout is not legal.
    """
    config, hardware = with_packs(config, workload), job.hardware
    layout = layout_of(config, job.world_size)
    stage, memory = worst_memory(config, layout, workload, hardware=hardware)
    time = step_time(config, layout, workload, hardware, job.calibration)
    share, basis = mfu(config, layout, workload, hardware, time.total), evidence(hardware)
    traffic_stage, transfers = _most_traffic(config, layout, workload, hardware)
    host = host_bytes(config, layout, stage)
    return Answer(
        config=config,
        layout=layout,
        hardware=hardware,
        workload=workload,
        counts=count(config.model),
        rank_parameters=count_rank(config.model, layout, _first_rank(layout, stage)).held,
        work=work_of(config, workload),
        stage=stage,
        memory=memory,
        stage_bytes=tuple(memory_of(config, layout, s, workload, hardware=hardware).total for s in range(layout.pp)),
        host_bytes=host,
        headroom=job.headroom,
        transfers=transfers,
        traffic_stage=traffic_stage,
        time=time,
        mfu=share,
        mfu_interval=basis.interval(share),
        evidence=basis.text,
        goodput=_goodput(config, job, time.total, host),
        budget_tokens=job.budget_tokens or float(config.train.steps * workload.packs_per_step * workload.tokens),
        binding=binding_of(config, layout, workload, hardware, memory, time, job.calibration, headroom=job.headroom),
        notes=_notes(config, layout, transfers, job),
    )


def _goodput(config: RunConfig, job: Job, step_time_s: float, host: int) -> Goodput:
    return plan_goodput(
        checkpoint_size=checkpoint_bytes(count(config.model).total, config.optimizer),
        rank_bytes=host,
        host_bytes=host,
        world_size=job.world_size,
        step_time_s=step_time_s,
        interval_steps=config.checkpoint.interval_steps,
        is_async=config.checkpoint.async_save,
        faults=job.faults,
    )


def with_packs(config: RunConfig, workload: Workload) -> RunConfig:
    """The run whose packs are those of ``workload``."""
    return replace(config, data=replace(config.data, pack_tokens=workload.pack_tokens))


def parallel_keys(config: RunConfig) -> dict[str, Any]:
    """The table ``parallel`` as its keys and values."""
    return asdict(config.parallel)


def fits(memory: Memory, hardware: Hardware, headroom: float) -> bool:
    """Whether ``memory`` leaves that share of the accelerator's memory free."""
    return memory.total <= hardware.memory_bytes * (1.0 - headroom)


def work_of(config: RunConfig, workload: Workload) -> Work:
    """FLOPs of one optimizer step, all ranks together; what ranks of one replica do alike counts once."""
    model, packs, clips = config.model, workload.packs_per_step, workload.clip_tokens
    forward = forward_flops(model, clips) * packs
    padded = forward_flops(model, clips, padding=workload.padding) * packs
    recompute = recompute_flops(model, clips, config.parallel.recompute, padding=workload.padding) * packs
    return Work(
        forward=forward, backward=forward * 2.0, recompute=recompute, padding=3.0 * (padded.total - forward.total)
    )


def _most_traffic(
    config: RunConfig, layout: Layout, workload: Workload, hardware: Hardware
) -> tuple[int, tuple[Transfer, ...]]:
    found = [(stage, traffic_of(config, layout, stage, workload, hardware.nvlink_domain)) for stage in range(layout.pp)]
    return max(found, key=lambda pair: sum(transfer.bytes for transfer in pair[1]))


def _notes(config: RunConfig, layout: Layout, transfers: tuple[Transfer, ...], job: Job) -> tuple[str, ...]:
    """Assumptions of the shared calibration that this layout leans on; a probe's numbers are measured."""
    calibration = job.calibration
    notes = [*not_counted(config), *fp8_notes(config, job.hardware, calibration)]
    if config.train.backend == "deepspeed":
        notes.append("train.backend = 'deepspeed': step time is that of megatron-core; DeepSpeed's was not measured")
    far = {t.axis for t in transfers if t.operation == "all_to_all" and t.fabric == "network"}
    # DeepEP's kernels carry the experts' rows only where they are asked for.
    slower = sorted(far - ({"ep"} if config.parallel.dispatcher == "flex" else set()))
    if calibration.name == "gpu" and slower:
        notes.append(
            f"all-to-alls across nodes ({', '.join(slower)}) are timed at {calibration.alltoall_efficiency:.0%} of the "
            "network's rate, which DeepEP's kernels reach: optimistic for NCCL's, which run here"
        )
    return tuple(notes)


def _first_rank(layout: Layout, stage: int) -> int:
    """Number of the first rank of a pipeline stage: the pipeline is the slowest axis."""
    return stage * (layout.world_size // layout.pp)
