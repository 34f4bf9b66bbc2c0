"""The schema of a run: one frozen dataclass per table of a preset.

Owns names, types, defaults and the checks that need one table only. Checks across tables are
``megavid.plan.layout``'s. Every field's string below it is its ``--help``. Nothing here imports torch.
"""

from dataclasses import dataclass, field
from typing import Literal

from megavid.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise ``ConfigError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def _at_least(table: str, minimum: float, **values: float) -> None:
    for name, value in values.items():
        require(value >= minimum, f"{table}.{name} = {value} must be at least {minimum}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """The mixture-of-experts feed-forward of family ``wan_moe``; not read by family ``wan``."""

    num_experts: int = 8
    """Routed experts of one layer."""
    top_k: int = 2
    """Experts that each token goes to (expert choice: on average)."""
    expert_ffn_size: int = 256
    """Hidden width of one routed expert."""
    shared_ffn_size: int = 0
    """Hidden width of the shared expert that every token passes; 0 for none."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Activation of routed and shared experts: GELU-tanh (two matrices) or SwiGLU (three)."""
    has_bias: bool = True
    """Give the experts the biases that Wan's feed-forward has."""
    router: Literal["sigmoid", "softmax", "expert_choice"] = "sigmoid"
    """How tokens and experts find each other; see megavid/models/moe/router.py."""
    route_scale: float = 1.0
    """Factor on the gates after they are normalised over the selected experts (sigmoid)."""
    num_groups: int = 1
    """Groups that the experts are cut into for group-limited routing; 1 for no limit."""
    top_groups: int = 1
    """Groups that a token may use."""
    bias_update_rate: float = 1e-3
    """Step of the aux-loss-free balancing bias after each optimizer step (sigmoid); 0 for none."""
    aux_loss_weight: float = 0.0
    """Weight of the load-balancing loss of each clip (softmax; 1e-2 is usual)."""
    z_loss_weight: float = 0.0
    """Weight of the squared log-sum-exp of the router's logits."""
    dense_first: int = 1
    """Layers at the beginning that keep a dense feed-forward."""
    dense_last: int = 1
    """Layers at the end that keep a dense feed-forward."""

    def __post_init__(self) -> None:
        _at_least(
            "model.moe",
            1,
            num_experts=self.num_experts,
            top_k=self.top_k,
            expert_ffn_size=self.expert_ffn_size,
        )
        _at_least(
            "model.moe",
            0,
            shared_ffn_size=self.shared_ffn_size,
            dense_first=self.dense_first,
            dense_last=self.dense_last,
        )
        _at_least("model.moe", 1, num_groups=self.num_groups, top_groups=self.top_groups)
        require(
            self.top_k <= self.num_experts,
            f"model.moe.top_k = {self.top_k} must be at most model.moe.num_experts = {self.num_experts}",
        )
        require(
            self.num_experts % self.num_groups == 0,
            f"model.moe.num_groups = {self.num_groups} must divide model.moe.num_experts = {self.num_experts}",
        )
        require(
            self.top_groups <= self.num_groups,
            f"model.moe.top_groups = {self.top_groups} must be at most model.moe.num_groups = {self.num_groups}",
        )
        require(
            self.top_k <= self.top_groups * (self.num_experts // self.num_groups),
            f"model.moe.top_k = {self.top_k} must fit in the {self.top_groups} groups of "
            f"{self.num_experts // self.num_groups} experts that model.moe.top_groups allows",
        )
        require(
            self.router != "expert_choice" or self.num_groups == 1,
            "model.moe.num_groups must be 1 with model.moe.router = 'expert_choice'",
        )
        require(
            self.aux_loss_weight == 0 or self.router == "softmax",
            f"model.moe.aux_loss_weight = {self.aux_loss_weight} is read by model.moe.router = 'softmax' only; set 0",
        )
        require(
            self.route_scale == 1.0 or self.router == "sigmoid",
            f"model.moe.route_scale = {self.route_scale} is read by model.moe.router = 'sigmoid' only; set 1.0",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The video diffusion transformer."""

    family: Literal["wan", "wan_moe"] = "wan_moe"
    """``wan``: the dense block of Wan 2.1/2.2. ``wan_moe``: the same with experts between its dense first and
    last layers.
    """
    num_layers: int = 4
    """Transformer blocks."""
    hidden_size: int = 128
    """Width of the residual stream (D)."""
    num_heads: int = 4
    """Attention heads (N)."""
    ffn_size: int = 512
    """Hidden width of the dense feed-forward (M)."""
    in_channels: int = 16
    """Latent channels that enter."""
    out_channels: int = 16
    """Latent channels of the predicted velocity."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns of one token."""
    text_size: int = 4096
    """Width of the text encoder's features."""
    text_length: int = 512
    """Text tokens of one caption (L); shorter ones end in zeros, which are attended to, as in Wan."""
    frequency_size: int = 256
    """Width of the sinusoidal timestep embedding."""
    norm_eps: float = 1e-6
    """Epsilon of every norm."""
    latent_frame_rate: float = 4.0
    """Latent frames per second at which one frame is one step of the time axis of RoPE (Wan: 16 fps / 4)."""
    absolute_positions: bool = False
    """Add a fixed code of each token's time, row and column to its patch. RoPE tells distances alone, so at high noise,
    where all tokens look alike, nothing says where the edges are. Off in Wan.
    """
    moe: MoEConfig = field(default_factory=MoEConfig)
    """Experts."""

    def __post_init__(self) -> None:
        _at_least("model", 1, num_layers=self.num_layers, hidden_size=self.hidden_size, num_heads=self.num_heads)
        _at_least("model", 1, ffn_size=self.ffn_size, in_channels=self.in_channels, text_length=self.text_length)
        require(
            self.hidden_size % self.num_heads == 0,
            f"model.num_heads = {self.num_heads} must divide model.hidden_size = {self.hidden_size}",
        )
        require(
            (self.hidden_size // self.num_heads) % 2 == 0,
            f"model.hidden_size / model.num_heads = {self.hidden_size // self.num_heads} must be even for RoPE",
        )
        require(min(self.patch_size) >= 1, f"model.patch_size = {self.patch_size} must be at least 1 on each axis")
        require(
            self.frequency_size % 2 == 0,
            f"model.frequency_size = {self.frequency_size} must be even (sines and cosines)",
        )
        require(
            self.family == "wan" or self.moe.dense_first + self.moe.dense_last < self.num_layers,
            f"model.moe.dense_first + dense_last = {self.moe.dense_first + self.moe.dense_last} "
            f"leaves no expert layer among model.num_layers = {self.num_layers}; lower them or set "
            "model.family = 'wan'",
        )

    @property
    def head_size(self) -> int:
        """Width of one head (A)."""
        return self.hidden_size // self.num_heads

    @property
    def patch_volume(self) -> int:
        """Latent positions of one token."""
        frames, rows, columns = self.patch_size
        return frames * rows * columns

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block ``layer`` (from 0) has experts."""
        return self.family == "wan_moe" and self.moe.dense_first <= layer < self.num_layers - self.moe.dense_last


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
    attention_backend: Literal["aten", "cudnn", "flash_attn"] = "aten"
    """Kernel of self-attention: torch's flash (memory-efficient in fp32), cuDNN's, or the package flash-attn's."""
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
        _at_least("parallel", 1, tensor=self.tensor, pipeline=self.pipeline, virtual_pipeline=self.virtual_pipeline)
        _at_least("parallel", 1, context=self.context, expert=self.expert, expert_tensor=self.expert_tensor)
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
    deterministic: bool = False
    """On CUDA: deterministic kernels, so that a resumed run is bitwise the same; CPU runs always are."""
    max_bad_steps: int = 10
    """Steps in a row skipped for a loss or gradient that is not finite, before the run stops (status 4)."""

    def __post_init__(self) -> None:
        _at_least(
            "train",
            1,
            steps=self.steps,
            micro_batch_size=self.micro_batch_size,
            max_bad_steps=self.max_bad_steps,
        )
        _at_least("train", 0, stop_at_step=self.stop_at_step, seed=self.seed)
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
    fp8: Literal["off"] = "off"
    """FP8 recipe; only "off" is built yet."""


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
        _at_least(
            "optimizer",
            0,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            warmup_steps=self.warmup_steps,
        )
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2), ("ema_decay", self.ema_decay)):
            require(0 <= value < 1, f"optimizer.{name} = {value} must be at least 0 and below 1")
        _at_least("optimizer", 1, schedule_steps=self.schedule_steps)


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

    def __post_init__(self) -> None:
        require(self.flow_shift > 0, f"diffusion.flow_shift = {self.flow_shift} must be above 0")
        require(self.logit_std > 0, f"diffusion.logit_std = {self.logit_std} must be above 0")
        require(
            -1 <= self.mode_scale <= 1.75,
            f"diffusion.mode_scale = {self.mode_scale} must be from -1 to 1.75, where noise levels stay in order",
        )
        require(0 <= self.caption_drop <= 1, f"diffusion.caption_drop = {self.caption_drop} must be from 0 to 1")
        _at_least("diffusion", 0, shift_reference_tokens=self.shift_reference_tokens)


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
        _at_least("data", 1, pack_tokens=self.pack_tokens, queue_size=self.queue_size)
        _at_least("data", 0, validation_samples=self.validation_samples, max_bad_samples=self.max_bad_samples)
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
        _at_least("checkpoint", 0, interval_steps=self.interval_steps, keep_every=self.keep_every)
        _at_least("checkpoint", 1, keep_last=self.keep_last)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What is reported, and how often."""

    interval_steps: int = 1
    """Steps between lines on the terminal (metrics.jsonl has every step)."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    validation_interval_steps: int = 0
    """Steps between validation losses on the held-out clips; 0 for none."""
    worst_samples: int = 0
    """Clips with the highest loss to name in events.jsonl at each checkpoint; 0 for none."""
    sample_interval_steps: int = 0
    """Steps between picture grids of sampled prompts; 0 for none."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of those grids; empty for captions of the held-out clips."""
    sample_steps: int = 20
    """Sampler steps of those grids."""

    def __post_init__(self) -> None:
        _at_least("log", 1, interval_steps=self.interval_steps, sample_steps=self.sample_steps)
        _at_least(
            "log",
            0,
            validation_interval_steps=self.validation_interval_steps,
            worst_samples=self.worst_samples,
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
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and EMA."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """The objective."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    log: LogConfig = field(default_factory=LogConfig)
    """Reports."""
