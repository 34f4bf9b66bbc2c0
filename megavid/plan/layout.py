"""The layout of a run: how many ranks stand on each axis, where each rank stands, and which layers it holds.

Owns every check that joins tables of the config with the world size. Pure arithmetic, no torch: the trainer,
the planner and the tests ask the same functions. The order of ranks is megatron-core's: tensor fastest, then
context, data, pipeline; for experts expert-tensor, expert, expert-data, pipeline.
"""

from dataclasses import dataclass

from megavid.config.deepspeed import check_backend
from megavid.config.schema import ModelConfig, RunConfig, require
from megavid.config.unread import refuse_unread
from megavid.plan.context import ContextPlan, context_plan

DENSE_AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("etp", "ep", "edp", "pp")
FAST_DOMAIN = 8
"""Ranks that one fast domain (NVLink) is taken to join where nothing else is known: one node of GPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Degrees of every axis; ``tp * cp * dp * pp == etp * ep * edp * pp == world_size``.

    Attributes:
        sequence: activations between tensor-parallel blocks are sharded over tokens.
        context: how attention crosses the ``cp`` ranks; None for a ring.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    edp: int = 1
    sequence: bool = False
    context: ContextPlan | None = None

    @property
    def context_plan(self) -> ContextPlan:
        """How attention crosses the context-parallel ranks; a ring where nothing else was chosen."""
        return self.context or ContextPlan(ring=self.cp)

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tp * self.cp * self.dp * self.pp

    def size(self, axis: str) -> int:
        """Ranks on ``axis`` ("tp", "cp", "dp", "pp", "ep", "etp", "edp")."""
        return {
            "tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp,
            "ep": self.ep, "etp": self.etp, "edp": self.edp,
        }[axis]  # fmt: skip

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where ``rank`` stands on every axis."""
        place = {}
        for axes in (DENSE_AXES, EXPERT_AXES):
            rest = rank
            for axis in axes:
                rest, place[axis] = divmod(rest, self.size(axis))
        return place

    def describe(self) -> str:
        """One short line, axes of size 1 left out: ``dp2 tp2+sp cp4 (ulysses2 x ring2) pp2 vpp2 ep2``."""
        parts = [f"dp{self.dp}"]
        parts += [f"tp{self.tp}" + ("+sp" if self.sequence else "")] if self.tp > 1 else []
        parts += [f"cp{self.cp} ({self.context_plan.describe()})"] if self.cp > 1 else []
        parts += [f"{axis}{size}" for axis, size in (("pp", self.pp), ("vpp", self.vpp)) if size > 1]
        parts += [f"{axis}{size}" for axis, size in (("ep", self.ep), ("etp", self.etp)) if size > 1]
        return " ".join(parts)


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """The layout that ``config`` asks for on ``world_size`` ranks.

    Raises:
        ConfigError: the degrees do not divide the world, the model, the experts, the packs or the batch.
    """
    parallel, train = config.parallel, config.train
    tp, cp, pp, ep, etp = (
        parallel.tensor,
        parallel.context,
        parallel.pipeline,
        parallel.expert,
        parallel.expert_tensor,
    )
    dense, expert = tp * cp * pp, etp * ep * pp
    require(
        world_size % dense == 0,
        f"parallel.tensor x context x pipeline = {tp} x {cp} x {pp} = {dense} must divide the number of "
        f"ranks = {world_size}; change parallel.* or --ranks",
    )
    require(
        world_size % expert == 0,
        f"parallel.expert_tensor x expert x pipeline = {etp} x {ep} x {pp} = {expert} must divide the number "
        f"of ranks = {world_size}; change parallel.* or --ranks",
    )
    dp = world_size // dense
    refuse_unread(config)
    _check_model(config)
    _check_rollback(config)
    check_backend(config)
    require(
        train.global_batch_size % (train.micro_batch_size * dp) == 0,
        f"train.micro_batch_size x data parallel = {train.micro_batch_size} x {dp} = "
        f"{train.micro_batch_size * dp} must divide "
        f"train.global_batch_size = {train.global_batch_size}",
    )
    require(
        config.data.pack_tokens % (tp * cp) == 0,
        f"data.pack_tokens = {config.data.pack_tokens} must be a multiple of parallel.tensor x context = {tp * cp}",
    )
    _check_samples(config)
    _check_adapters(config)
    microbatches = train.global_batch_size // (train.micro_batch_size * dp)
    require(
        parallel.virtual_pipeline == 1 or microbatches % pp == 0,
        f"with parallel.virtual_pipeline > 1 the microbatches of a step = {microbatches} must be a multiple "
        f"of parallel.pipeline = {pp}; change train.global_batch_size or train.micro_batch_size",
    )
    context = context_plan(
        parallel.context_strategy, heads_per_tp=config.model.num_heads // tp, cp=cp, tokens=config.data.pack_tokens,
        domain=max(FAST_DOMAIN // tp, 1),
    )  # fmt: skip
    return Layout(
        tp=tp, cp=cp, dp=dp, pp=pp, vpp=parallel.virtual_pipeline, ep=ep, etp=etp, edp=world_size // expert,
        context=context, sequence=parallel.is_sequence_parallel,
    )  # fmt: skip


def _check_rollback(config: RunConfig) -> None:
    """A checkpoint that is old enough must still be there when a run is to go back."""
    steps, kept = config.train.spike_rollback_steps, config.checkpoint
    reach = (kept.keep_last - 1) * kept.interval_steps + 1
    require(
        steps == 0 or (kept.interval_steps > 0 and steps <= reach),
        f"train.spike_rollback_steps = {steps} needs a checkpoint that old, but checkpoint.interval_steps = "
        f"{kept.interval_steps} and checkpoint.keep_last = {kept.keep_last} keep "
        + (f"{reach} steps at the least" if kept.interval_steps else "the last step's only")
        + "; raise one of them, or go back fewer steps",
    )


def _check_samples(config: RunConfig) -> None:
    require(
        config.log.sample_interval_steps == 0 or config.diffusion.has_all_levels,
        f"log.sample_interval_steps = {config.log.sample_interval_steps} needs all noise levels, this model is "
        f"trained from diffusion.sigma_min = {config.diffusion.sigma_min} to sigma_max = "
        f"{config.diffusion.sigma_max}; set 0, and sample with both experts later",
    )
    require(
        not config.log.sample_prompts or config.model.task != "i2v",
        "log.sample_prompts must be empty with model.task = 'i2v', which needs a picture too; "
        "log.sample_interval_steps alone draws from pictures of held-out clips",
    )


def _check_model(config: RunConfig) -> None:
    parallel, model = config.parallel, config.model
    require(
        model.num_heads % parallel.tensor == 0,
        f"parallel.tensor = {parallel.tensor} must divide model.num_heads = {model.num_heads}",
    )
    require(
        model.ffn_size % parallel.tensor == 0,
        f"parallel.tensor = {parallel.tensor} must divide model.ffn_size = {model.ffn_size}",
    )
    chunks = parallel.pipeline * parallel.virtual_pipeline
    require(
        chunks <= model.num_layers,
        f"parallel.pipeline x virtual_pipeline = {chunks} must be at most model.num_layers = {model.num_layers}",
    )
    has_shared = model.family == "wan_moe" and model.moe.shared_ffn_size > 0
    require(
        not parallel.shared_expert_overlap or has_shared,
        "parallel.shared_expert_overlap = true needs a shared expert; set model.family = 'wan_moe' and "
        "model.moe.shared_ffn_size, or leave it false",
    )
    require(
        not parallel.shared_expert_overlap or parallel.dispatcher == "alltoall",
        f"parallel.shared_expert_overlap = true needs parallel.dispatcher = 'alltoall', got '{parallel.dispatcher}'",
    )
    _check_fp8(config)
    _check_te(config)
    if model.family == "wan":
        require(
            parallel.expert == 1 and parallel.expert_tensor == 1,
            f"parallel.expert = {parallel.expert} and parallel.expert_tensor = {parallel.expert_tensor} need "
            "model.family = 'wan_moe'; a dense model has no experts",
        )
        return
    _check_experts(config)


def _check_adapters(config: RunConfig) -> None:
    """Every pipeline stage must have something to train: one without is asked for gradients that do not exist."""
    lora, model, parallel = config.lora, config.model, config.parallel
    if not lora.rank or set(lora.targets) != {"ffn"}:
        return
    for stage in range(parallel.pipeline):
        for chunk in range(parallel.virtual_pipeline):
            stages = Layout(pp=parallel.pipeline, vpp=parallel.virtual_pipeline)
            layers = layers_of_chunk(model, stages, stage, chunk)
            require(
                not all(model.is_moe_layer(layer) for layer in layers),
                f"lora.targets = ['ffn'] leaves blocks {layers.start} to {layers.stop - 1} without an adapter: they "
                "have experts, no dense feed-forward; add self_attention or cross_attention, or lower "
                "parallel.pipeline",
            )


def _check_experts(config: RunConfig) -> None:
    parallel, model, moe = config.parallel, config.model, config.model.moe
    require(
        moe.num_experts % parallel.expert == 0,
        f"parallel.expert = {parallel.expert} must divide model.moe.num_experts = {moe.num_experts}; set 1, "
        "2, 4, 8, ...",
    )
    require(
        moe.expert_ffn_size % parallel.expert_tensor == 0,
        f"parallel.expert_tensor = {parallel.expert_tensor} must divide model.moe.expert_ffn_size = "
        f"{moe.expert_ffn_size}",
    )
    require(
        model.hidden_size % parallel.expert_tensor == 0,
        f"parallel.expert_tensor = {parallel.expert_tensor} must divide model.hidden_size = {model.hidden_size}",
    )
    require(
        moe.shared_ffn_size % parallel.tensor == 0,
        f"parallel.tensor = {parallel.tensor} must divide model.moe.shared_ffn_size = {moe.shared_ffn_size}",
    )
    require(
        parallel.tensor == 1 or parallel.is_sequence_parallel,
        "parallel.sequence = false with parallel.tensor > 1 is for dense models: experts need sequence "
        "parallelism; leave parallel.sequence at 'auto'",
    )


FP8_MULTIPLES = {"tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
"""What the sides of a rank's matrices must be multiples of: GPUs' products with one scale, and whole tiles, so that no
layout cuts one."""


def _check_fp8(config: RunConfig) -> None:
    precision, model, parallel, moe = config.precision, config.model, config.parallel, config.model.moe
    if precision.fp8 == "off":
        return
    require(
        config.lora.rank == 0,
        f"precision.fp8 = '{precision.fp8}' with lora.rank = {config.lora.rank}: FP8 beside adapters is not built; set "
        "one of them to off, or 0",
    )
    layers = [i for i in range(model.num_layers) if precision.is_fp8_layer(i, model.num_layers)]
    require(
        bool(layers),
        f"precision.fp8 = '{precision.fp8}' leaves none of model.num_layers = {model.num_layers} in FP8: "
        f"precision.fp8_skip_first = {precision.fp8_skip_first} and fp8_skip_last = {precision.fp8_skip_last} keep "
        "them out; lower these",
    )
    sides = [("model.hidden_size", model.hidden_size, "parallel.tensor", parallel.tensor)]
    if any(not model.is_moe_layer(i) for i in layers):
        sides.append(("model.ffn_size", model.ffn_size, "parallel.tensor", parallel.tensor))
    if any(model.is_moe_layer(i) for i in layers):
        sides.append(
            ("model.moe.expert_ffn_size", moe.expert_ffn_size, "parallel.expert_tensor", parallel.expert_tensor)
        )
        sides.append(("model.moe.shared_ffn_size", moe.shared_ffn_size, "parallel.tensor", parallel.tensor))
    multiple = FP8_MULTIPLES[precision.fp8]
    for key, size, degree, ranks in sides:
        require(
            size % (ranks * multiple) == 0,
            f"precision.fp8 = '{precision.fp8}' needs {key} = {size} to be a multiple of {multiple} on each of "
            f"{degree} = {ranks} ranks; change one of them, or take another recipe",
        )


def _check_te(config: RunConfig) -> None:
    precision, parallel = config.precision, config.parallel
    if precision.linears == "native" or precision.fp8 == "off":
        return
    require(
        precision.fp8 != "delayed",
        "precision.fp8 = 'delayed' needs precision.linears = 'native': Transformer Engine's histories would not be in "
        "checkpoints; set 'native', or precision.fp8 = 'tensorwise'",
    )
    ranks = parallel.context * (parallel.tensor if parallel.is_sequence_parallel else 1)
    tokens, multiple = config.data.pack_tokens * config.train.micro_batch_size, FP8_MULTIPLES[precision.fp8]
    require(
        tokens % (ranks * multiple) == 0,
        f"precision.fp8 = '{precision.fp8}' with precision.linears = 'transformer_engine' needs data.pack_tokens x "
        f"train.micro_batch_size = {tokens} to be a multiple of {multiple} on each of {ranks} ranks that share a "
        "pack's tokens; change data.pack_tokens, or set precision.linears = 'native'",
    )


def layers_of_chunk(model: ModelConfig, layout: Layout, pp_rank: int, vpp_rank: int) -> range:
    """Blocks (from 0) of one model chunk: contiguous, as even as can be, the earlier ones longer."""
    chunks, chunk = layout.pp * layout.vpp, vpp_rank * layout.pp + pp_rank
    base, extra = divmod(model.num_layers, chunks)
    first = chunk * base + min(chunk, extra)
    return range(first, first + base + (chunk < extra))


def microbatches_of_step(config: RunConfig, layout: Layout) -> int:
    """Microbatches that each data-parallel rank takes in one optimizer step."""
    return config.train.global_batch_size // (config.train.micro_batch_size * layout.dp)
