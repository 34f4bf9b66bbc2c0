"""The schema of a run: one frozen dataclass per table of a preset.

Owns names, types, defaults and the checks that need one table only; tables ``model`` and ``model.moe`` are
``megavid.config.model``'s, ``lora`` is ``megavid.config.lora``'s, and all pass through here. Checks across tables are
``megavid.plan.layout``'s; which keys a run does not read is ``megavid.config.unread``'s. Every field's string below it
is its ``--help``. Nothing here imports torch.
"""

from dataclasses import dataclass, field
from typing import Literal

from megavid.config.checks import at_least, require
from megavid.config.deepspeed import DeepSpeedConfig
from megavid.config.lora import LoraConfig
from megavid.config.model import ModelConfig, MoEConfig
from megavid.config.watchdog import WatchdogConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "DiffusionConfig",
    "LogConfig",
    "LoraConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RunConfig",
    "TrainConfig",
    "WatchdogConfig",
    "require",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the ranks share the work; data parallelism is what is left of the world size."""

    tensor: int = 1
    """Ranks that share every matrix (TP)."""
    sequence: Literal["auto", True, False] = "auto"
    """Shard activations between tensor-parallel blocks over tokens (Megatron's SP); auto: if tensor > 1."""
    pipeline: int = 1
    """Pipeline stages (PP)."""
    virtual_pipeline: int = 1
    """Model chunks of each stage (interleaved schedule, VPP)."""
    context: int = 1
    """Ranks that share the tokens of every pack in attention too (CP)."""
    context_strategy: Literal["auto", "ulysses", "ring", "allgather", "hybrid"] = "auto"
    """How attention crosses context-parallel ranks; auto: heads in a node (ulysses), a ring beyond."""
    attention_backend: Literal["aten", "cudnn", "flash_attn", "flash_attn_3"] = "aten"
    """Kernel of self-attention: torch's flash, cuDNN's, the package flash-attn's, or FlashAttention-3's (Hopper)."""
    expert: int = 1
    """Ranks that share the experts of a layer (EP)."""
    expert_tensor: int = 1
    """Ranks that share the matrices of one expert (ETP)."""
    dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """How tokens travel to experts; flex needs DeepEP or HybridEP."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again: nothing, all inside a block but its self-attention, or whole blocks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs."""
    shared_expert_overlap: bool = False
    """Compute the shared expert while tokens travel."""

    def __post_init__(self) -> None:
        at_least("parallel", 1, tensor=self.tensor, pipeline=self.pipeline, virtual_pipeline=self.virtual_pipeline)
        at_least("parallel", 1, context=self.context, expert=self.expert, expert_tensor=self.expert_tensor)
        require(
            self.sequence is not True or self.tensor > 1,
            f"parallel.sequence = true needs parallel.tensor > 1, got {self.tensor}; leave it at 'auto'",
        )
        require(
            self.virtual_pipeline == 1 or self.pipeline > 1,
            f"parallel.virtual_pipeline = {self.virtual_pipeline} needs parallel.pipeline > 1, got {self.pipeline}",
        )

    @property
    def is_sequence_parallel(self) -> bool:
        """Whether activations are sharded over tokens between tensor-parallel blocks."""
        return self.tensor > 1 if self.sequence == "auto" else self.sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The run itself."""

    steps: int = 200
    """Optimizer steps of the whole run; steps count from 1."""
    seed: int = 1234
    """Seed of initialisation, order, noise and everything else."""
    micro_batch_size: int = 1
    """Packs that one model replica takes at a time."""
    global_batch_size: int = 8
    """Packs of one optimizer step."""
    stop_at_step: int = 0
    """Save and stop after this step with exit status 0, the run unfinished (chained jobs); 0 for never."""
    init_from: str = ""
    """Checkpoint whose weights (its EMA, if any) start this run; optimizer, data and step start anew."""
    backend: Literal["megatron", "deepspeed"] = "megatron"
    """Engine: megatron-core, with every parallel axis, or DeepSpeed's ZeRO, data parallel only (table deepspeed)."""
    ops: Literal["reference", "compiled", "auto"] = "auto"
    """What is between matrix products and attention in plain torch, or in the compiled ops of csrc/, one pass over
    memory each; auto: compiled where they are built and compute what plain torch does, which is tried at the start.
    """
    capture: Literal["off", "compile"] = "off"
    """compile: norms, residuals and rotary embedding of the blocks go through torch.compile, once for each shape."""
    deterministic: bool = False
    """On CUDA: deterministic kernels, so that a resumed run is bitwise the same; CPU runs always are."""
    max_bad_steps: int = 10
    """Steps in a row skipped for a loss or gradient that is not finite, or a spike, before the run stops (status 4)."""
    spike_factor: float = 0.0
    """Skip the update of a step whose loss is above this many times the median of the last train.spike_window losses
    that were not skipped; its samples are named in events.jsonl. 0 for never."""
    spike_window: int = 50
    """Losses of that median; until there are as many, nothing is skipped."""
    spike_rollback_steps: int = 0
    """At a spike, go back to the last checkpoint at least this many steps before it, and leave the samples of the steps
    between out for ever; 0: leave out that step's update alone."""
    max_rollbacks: int = 3
    """Times that a run goes back; at the next spike it stops (status 4)."""

    def __post_init__(self) -> None:
        at_least(
            "train",
            1,
            steps=self.steps,
            micro_batch_size=self.micro_batch_size,
            max_bad_steps=self.max_bad_steps,
            spike_window=self.spike_window,
        )
        require(
            self.spike_factor == 0 or self.spike_factor > 1,
            f"train.spike_factor = {self.spike_factor} must be above 1, or 0 for never",
        )
        at_least(
            "train",
            0,
            stop_at_step=self.stop_at_step,
            seed=self.seed,
            spike_rollback_steps=self.spike_rollback_steps,
            max_rollbacks=self.max_rollbacks,
        )
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"train.micro_batch_size = {self.micro_batch_size} must divide train.global_batch_size = "
            f"{self.global_batch_size}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """Number formats."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Weights and activations; master weights, gradients, router and Wan's fp32 list stay fp32."""
    linears: Literal["native", "transformer_engine"] = "native"
    """Whose linears blocks and experts are built from; Transformer Engine's need a GPU, and have not run on one."""
    fp8: Literal["off", "tensorwise", "delayed", "blockwise", "mxfp8"] = "off"
    """Products of the inner blocks' matrices in FP8, with scales from the tensor at hand, from earlier steps, by 128 x
    128 or by 32 numbers; norms, modulation, router, embedders and head stay out, attention itself by default."""
    fp8_attention: bool = False
    """Round queries, keys and values of those blocks' self-attention to FP8, one scale for a clip's head."""
    fp8_gradients: Literal["auto", "e4m3", "e5m2"] = "auto"
    """Format of gradients; auto: e5m2 where one scale serves a tensor (tensorwise, delayed), else e4m3."""
    fp8_experts: Literal["same", "nvfp4"] = "same"
    """Products of routed experts: as fp8 says, or in NVFP4, an experiment in its numerics that is slower."""
    fp8_skip_first: int = 1
    """Blocks at the beginning that stay out of FP8."""
    fp8_skip_last: int = 1
    """Blocks at the end that stay out of FP8."""
    fp8_history: int = 16
    """Steps whose largest magnitude sets the scale (fp8 = "delayed")."""

    def __post_init__(self) -> None:
        at_least("precision", 0, fp8_skip_first=self.fp8_skip_first, fp8_skip_last=self.fp8_skip_last)
        at_least("precision", 1, fp8_history=self.fp8_history)

    def describe(self) -> str:
        """The number formats, in words."""
        fp8 = "" if self.fp8 == "off" else f", FP8 {self.fp8}"
        fp8 += ", attention too" if self.fp8_attention else ""
        fp8 += "" if self.fp8_experts == "same" else f", experts {self.fp8_experts}"
        return self.dtype + fp8 + (", linears of Transformer Engine" if self.linears == "transformer_engine" else "")

    def is_fp8_layer(self, layer: int, num_layers: int) -> bool:
        """Whether block ``layer`` (from 0) of the model has its matrices in FP8."""
        return self.fp8 != "off" and self.fp8_skip_first <= layer < num_layers - self.fp8_skip_last


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with a sharded state, its schedule, and the moving average of the weights."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay; biases, norms, modulation tables and the router have none."""
    clip_norm: float = 1.0
    """Limit of the global gradient norm; 0 for none."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Shape after the warm-up."""
    schedule_steps: int = 200
    """Step at which the cosine reaches its end; its own key so that train.steps may grow."""
    end_factor: float = 0.1
    """Learning rate at the end of the cosine as a factor of the peak."""
    ema_decay: float = 0.99
    """Decay of the moving average of the weights, kept sharded; 0 for none."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"optimizer.learning_rate = {self.learning_rate} must be above 0")
        at_least(
            "optimizer",
            0,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            warmup_steps=self.warmup_steps,
        )
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2), ("ema_decay", self.ema_decay)):
            require(0 <= value < 1, f"optimizer.{name} = {value} must be at least 0 and below 1")
        at_least("optimizer", 1, schedule_steps=self.schedule_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionConfig:
    """Rectified flow: what is predicted is velocity = noise - clean."""

    timestep_sampling: Literal["uniform", "logit_normal", "mode"] = "logit_normal"
    """Distribution of the noise level before the shift."""
    logit_mean: float = 0.0
    """Mean of the logit (logit_normal)."""
    logit_std: float = 1.0
    """Deviation of the logit (logit_normal)."""
    mode_scale: float = 1.29
    """Weight of the mode (mode)."""
    flow_shift: float = 1.0
    """Shift of noise levels towards 1 (Wan: 3 at 480p, 5 at 720p), in training and sampling alike."""
    shift_reference_tokens: int = 0
    """If above 0, flow_shift is scaled by sqrt(tokens of the clip / this); 0: the same for all clips."""
    caption_drop: float = 0.1
    """Probability that a clip's caption is replaced by the empty one, for classifier-free guidance."""
    sigma_min: float = 0.0
    """Lowest noise level that this model is trained on, after the shift: timestep / 1000 (Wan 2.2's high-noise expert:
    0.875 of text-to-video, 0.9 of image-to-video).
    """
    sigma_max: float = 1.0
    """Highest noise level, likewise (Wan 2.2's low-noise expert: the same figures)."""

    def __post_init__(self) -> None:
        require(self.flow_shift > 0, f"diffusion.flow_shift = {self.flow_shift} must be above 0")
        require(self.logit_std > 0, f"diffusion.logit_std = {self.logit_std} must be above 0")
        require(
            -1 <= self.mode_scale <= 1.75,
            f"diffusion.mode_scale = {self.mode_scale} must be from -1 to 1.75, where noise levels stay in order",
        )
        require(0 <= self.caption_drop <= 1, f"diffusion.caption_drop = {self.caption_drop} must be from 0 to 1")
        at_least("diffusion", 0, shift_reference_tokens=self.shift_reference_tokens)
        require(
            0 <= self.sigma_min < self.sigma_max <= 1,
            f"diffusion.sigma_min = {self.sigma_min} and diffusion.sigma_max = {self.sigma_max} must be from 0 to 1, "
            "the first below the second",
        )

    @property
    def has_all_levels(self) -> bool:
        """Whether every noise level is trained on: alone, such a model can sample."""
        return (self.sigma_min, self.sigma_max) == (0.0, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where clips come from and how they are packed."""

    kind: Literal["synthetic", "shards"] = "synthetic"
    """``synthetic``: procedural clips, no files. ``shards``: what ``megavid prepare`` wrote."""
    path: str = ""
    """Folder of shards (kind = "shards")."""
    pack_tokens: int = 384
    """Tokens of one pack; at least the longest clip, a multiple of tensor x context."""
    validation_samples: int = 8
    """Clips held out of training and used for the validation loss."""
    queue_size: int = 4
    """Microbatches that the background reader keeps ready."""
    max_bad_samples: int = 100
    """Damaged samples that may be replaced and counted before the run stops."""

    def __post_init__(self) -> None:
        at_least("data", 1, pack_tokens=self.pack_tokens, queue_size=self.queue_size)
        at_least("data", 0, validation_samples=self.validation_samples, max_bad_samples=self.max_bad_samples)
        require(
            self.kind != "shards" or self.path != "",
            "data.path must name the folder that `megavid prepare` wrote when data.kind = 'shards'; pass "
            "--data.path DIR",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Saving."""

    interval_steps: int = 100
    """Steps between checkpoints; the last step is always saved. 0 for the last only."""
    keep_last: int = 3
    """Checkpoints kept, newest first."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for ever; 0 for none."""
    async_save: bool = True
    """Write in the background; the step loop waits only for the copy to host memory."""

    def __post_init__(self) -> None:
        at_least("checkpoint", 0, interval_steps=self.interval_steps, keep_every=self.keep_every)
        at_least("checkpoint", 1, keep_last=self.keep_last)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What is reported, and how often."""

    interval_steps: int = 1
    """Steps between lines on the terminal and rows of router.jsonl (metrics.jsonl has every step)."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    wandb_project: str = ""
    """Project of Weights & Biases that steps are sent to, where the package wandb is installed; empty for none."""
    prometheus: str = ""
    """File for the textfile collector of Prometheus' node exporter (it must end in .prom), replaced every
    log.interval_steps; empty for none."""
    validation_interval_steps: int = 0
    """Steps between validation losses on the held-out clips; 0 for none."""
    routing_interval_steps: int = 0
    """Steps between records of the experts of every token, DIR/routing, for megavid replay --routing recorded; 0 for
    none."""
    worst_samples: int = 0
    """Clips with the highest loss to name in events.jsonl at each checkpoint; 0 for none."""
    fp8_interval_steps: int = 100
    """Steps between rows of fp8.jsonl: underflow, overflow and error of every layer in FP8; 0 for none."""
    sample_interval_steps: int = 0
    """Steps between picture grids of sampled prompts; 0 for none."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of those grids; empty for captions of the held-out clips."""
    sample_steps: int = 20
    """Sampler steps of those grids."""

    def __post_init__(self) -> None:
        require(
            self.prometheus == "" or self.prometheus.endswith(".prom"),
            f"log.prometheus = {self.prometheus!r} must end in .prom, the only files that the collector reads",
        )
        at_least("log", 1, interval_steps=self.interval_steps, sample_steps=self.sample_steps)
        at_least(
            "log",
            0,
            validation_interval_steps=self.validation_interval_steps,
            routing_interval_steps=self.routing_interval_steps,
            fp8_interval_steps=self.fp8_interval_steps,
            worst_samples=self.worst_samples,
            sample_interval_steps=self.sample_interval_steps,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The layout."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The run."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number formats."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and EMA."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """The objective."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """ZeRO, with train.backend = "deepspeed"."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    """Hung and slow ranks."""
    log: LogConfig = field(default_factory=LogConfig)
    """Reports."""
