"""Bytes of activations on one rank: what a microbatch keeps for its backward pass, how many are kept, working memory.

Owns the formulas that ``megavid.plan.memory`` adds up. They follow the ops as they are written, tensor by tensor, so
an op that is fused changes its line here; tests count what autograd really keeps. What FP8 changes of them is
``megavid.plan.fp8_activations``'s, the notation ``megavid.plan.shapes``'s.
"""

from megavid.config.schema import ModelConfig, RunConfig
from megavid.plan.buffers import chunk_parameters
from megavid.plan.fp8 import fp8_layers_of_stage
from megavid.plan.fp8_activations import eight_bit_bytes, eight_bit_temporaries
from megavid.plan.layout import Layout
from megavid.plan.shapes import INDEX, WIDE, Shapes, expert_rows_of_rank, layers_of_stage
from megavid.plan.workload import Workload

EXPERT_PARTS = ("router", "experts", "shared_expert")
"""Parts of an expert layer's feed-forward."""


def activation_bytes(
    config: RunConfig, layout: Layout, pp_rank: int, workload: Workload, imbalance: float = 1.0
) -> dict[str, int]:
    """Bytes that ONE microbatch keeps for its backward pass on a rank of stage ``pp_rank``, all its chunks, by part.

    Args:
        config: the run.
        layout: its layout.
        pp_rank: pipeline stage.
        workload: what its packs hold.
        imbalance: rows of this rank's experts over the mean.
    """
    model, shapes = config.model, Shapes.of(config, layout, workload)
    parts: dict[str, float] = {}

    def add(found: dict[str, float], times: int = 1) -> None:
        for part, size in found.items():
            parts[part] = parts.get(part, 0.0) + size * times

    add(_shared(model, shapes), layout.vpp)
    recompute = config.parallel.recompute
    for is_moe, is_fp8, count in kinds_of_stage(config, layout, pp_rank):
        add(block_bytes(model, shapes, recompute, is_moe=is_moe, imbalance=imbalance, is_fp8=is_fp8), count)
    if pp_rank == 0:
        patch = model.in_channels * model.patch_volume
        add({"embedders": shapes.own * patch * shapes.narrow})
    if pp_rank == layout.pp - 1:
        add({"head": _head(model, shapes)})
    return {part: round(size) for part, size in parts.items()}


def kinds_of_stage(config: RunConfig, layout: Layout, pp_rank: int) -> list[tuple[bool, bool, int]]:
    """Kinds of blocks of a stage: whether with experts, whether in FP8, and how many; those that it has."""
    layers, inside = layers_of_stage(config.model, layout, pp_rank), fp8_layers_of_stage(config, layout, pp_rank)
    found = []
    for is_moe in (False, True):
        counts = {True: inside[is_moe], False: layers[is_moe] - inside[is_moe]}
        found += [(is_moe, is_fp8, count) for is_fp8, count in counts.items() if count]
    return found


def block_bytes(
    model: ModelConfig,
    shapes: Shapes,
    recompute: str,
    *,
    is_moe: bool,
    imbalance: float = 1.0,
    is_fp8: bool = False,
) -> dict[str, float]:
    """Bytes that one block keeps, by part; the residual stream that it is given counts as its own."""
    stream = shapes.own * model.hidden_size * shapes.narrow
    if recompute == "full":
        return {"residual": stream}
    if recompute == "selective":
        # The stream before the first two branches, the outputs of these, which the next branch adds to it, the last
        # one's gate, and what attention keeps.
        return {
            "residual": 4 * stream + _gated_residual(model, shapes),
            "self_attention": _attention_output(model, shapes),
            "modulation": _tables(model, shapes),
        }
    tables = {"modulation": _tables(model, shapes)} if shapes.is_fused else {}
    wide = {
        **tables,
        "residual": 2 * _gated_residual(model, shapes),
        "self_attention": _modulated_norm(model, shapes) + _self_attention(model, shapes),
        "cross_attention": _norm_input(model, shapes) + _cross_attention(model, shapes),
        **_feed_forward(model, shapes, is_moe=is_moe, imbalance=imbalance),
    }
    if not is_fp8:
        return wide
    changes = eight_bit_bytes(model, shapes, is_moe=is_moe, imbalance=imbalance)
    return {part: size + changes.get(part, 0.0) for part, size in wide.items()}


# Branches


def _head(model: ModelConfig, shapes: Shapes) -> float:
    return _modulated_norm(model, shapes) + shapes.own * model.hidden_size * shapes.narrow


def _self_attention(model: ModelConfig, shapes: Shapes) -> float:
    width = shapes.span * model.hidden_size / shapes.tp
    kept = shapes.own * model.hidden_size * shapes.narrow + _attention_output(model, shapes)
    if not shapes.is_fused:
        kept += _norm_across_heads(shapes, width, count=2)
    if shapes.ulysses == shapes.ring == 1:
        # q and k rotated, and the storage that q, k and v came in, which v keeps alive.
        return kept + 5 * width * shapes.narrow
    # q, k and v as they travel, and with Ulysses the output back in token layout, are tensors of their own.
    copies = 3 + (shapes.ulysses > 1)
    # That q, k and v came in, which their norms keep, unless those work on copies.
    storage = 0 if shapes.has_copies and not shapes.is_fused else 3 * width * shapes.narrow
    return kept + copies * width * shapes.narrow + storage


def _cross_attention(model: ModelConfig, shapes: Shapes) -> float:
    width, heads = shapes.span * model.hidden_size / shapes.tp, shapes.span * model.num_heads / shapes.tp
    text = shapes.clips * model.text_length * model.hidden_size / shapes.tp
    matrix_input = shapes.own * model.hidden_size * shapes.narrow
    queries = _norm_across_heads(shapes, width, count=1) + (2 * width * shapes.narrow + heads * WIDE)
    queries += width * shapes.narrow
    if shapes.is_fused or not shapes.has_copies:  # what the queries came in, which their norm keeps
        queries += width * shapes.narrow
    keys = _norm_across_heads(shapes, text, count=1) + 3 * text * shapes.narrow
    return matrix_input + queries + keys + _image_attention(model, shapes)


def _image_attention(model: ModelConfig, shapes: Shapes) -> float:
    """What attention to image tokens keeps beside the queries: its output, normed keys and the values that count."""
    if not model.image_size:
        return 0.0
    width, heads = shapes.span * model.hidden_size / shapes.tp, shapes.span * model.num_heads / shapes.tp
    image = shapes.clips * model.image_tokens * model.hidden_size / shapes.tp
    keys = _norm_across_heads(shapes, image, count=1) + 2 * image * shapes.narrow
    storage = 0 if shapes.has_copies else 2 * image * WIDE  # that k and v came in, which the norm of k keeps
    return width * shapes.narrow + heads * WIDE + keys + storage


def _feed_forward(model: ModelConfig, shapes: Shapes, *, is_moe: bool, imbalance: float) -> dict[str, float]:
    normed = _modulated_norm(model, shapes)
    hidden_input = shapes.own * model.hidden_size * shapes.narrow
    if not is_moe:
        return {"dense_ffn": normed + hidden_input + 2 * shapes.span * model.ffn_size / shapes.tp * shapes.narrow}
    found = {"router": normed + _router(model, shapes), "experts": _experts(model, shapes, imbalance)}
    if model.moe.shared_ffn_size:
        kept = 4 if model.moe.activation == "swiglu" else 2
        found["shared_expert"] = kept * shapes.span * model.moe.shared_ffn_size / shapes.tp * shapes.narrow
    # The router's input in fp32; the shared expert's in the narrow dtype, which is the same tensor where that is fp32.
    if model.moe.shared_ffn_size and shapes.has_copies:
        found["shared_expert"] += hidden_input
    return found


def _router(model: ModelConfig, shapes: Shapes) -> float:
    moe = model.moe
    is_plain = moe.router != "expert_choice" and not shapes.is_fused
    choice = moe.top_k * (INDEX + WIDE) + WIDE if is_plain else 0
    scores = moe.num_experts * (WIDE + 1) + choice
    return shapes.own * (model.hidden_size * WIDE + scores)


def _experts(model: ModelConfig, shapes: Shapes, imbalance: float) -> float:
    moe = model.moe
    rows = expert_rows_of_rank(model, shapes, imbalance)
    hidden = moe.expert_ffn_size / shapes.etp
    # GELU keeps its input, the hidden activation (not if fused) and that times the gate; SwiGLU also the gate's side.
    kept = (5 if moe.activation == "swiglu" else 3) - (1 + (moe.activation == "swiglu")) * shapes.is_fused
    # Of each row: its tokens' numbers, where it came from (and if fused where it goes), its expert, its gate.
    indices = (2 + shapes.is_fused) * INDEX + WIDE
    permutation = shapes.own * (INDEX if shapes.is_fused else moe.num_experts * (1 + WIDE))
    return rows * (model.hidden_size * shapes.narrow + kept * hidden * shapes.narrow + indices) + permutation


# Ops


def _attention_output(model: ModelConfig, shapes: Shapes) -> float:
    """Output and log-sum-exp of self-attention; the output is the input of the matrix after it, too."""
    return shapes.span / shapes.tp * (model.hidden_size * shapes.narrow + model.num_heads * WIDE)


def _norm_input(model: ModelConfig, shapes: Shapes) -> float:
    """LayerNorm: its input, in fp32 unless fused, mean and deviation."""
    return shapes.own * (model.hidden_size * (shapes.narrow if shapes.is_fused else WIDE) + 2 * WIDE)


def _modulated_norm(model: ModelConfig, shapes: Shapes) -> float:
    """LayerNorm and, unless fused, its result, and every token's row of the scale."""
    rows = 0 if shapes.is_fused else 2 * shapes.own * model.hidden_size * WIDE
    return _norm_input(model, shapes) + rows


def _tables(model: ModelConfig, shapes: Shapes) -> float:
    """A block's own six vectors of each row of the timestep table."""
    return 6 * shapes.clips * model.timesteps_of_clip * model.hidden_size * WIDE


def _gated_residual(model: ModelConfig, shapes: Shapes) -> float:
    """The update; unless fused in fp32, and every token's row of the gate."""
    return shapes.own * model.hidden_size * (shapes.narrow if shapes.is_fused else 2 * WIDE)


def _norm_across_heads(shapes: Shapes, width: float, count: int) -> float:
    """RMSNorm of ``count`` tensors of ``width`` numbers: a product in fp32, and copies if narrower, one for the sum of
    squares unless that is fused."""
    copies = 2 - shapes.is_fused if shapes.has_copies else 0
    return count * width * WIDE * (1 + copies)


def _shared(model: ModelConfig, shapes: Shapes) -> dict[str, float]:
    """What all blocks of a chunk share: captions, images, angles, each token's row, and the embedders' own."""
    text, image = shapes.clips * model.text_length, shapes.clips * model.image_tokens
    embedders = text * (model.text_size + 3 * model.hidden_size) * shapes.narrow
    # Of images, the inputs of two norms in fp32 with mean and deviation, three hidden tensors, and the result.
    embedders += image * (model.image_size * (WIDE + 3 * shapes.narrow) + model.hidden_size * (WIDE + shapes.narrow))
    embedders += image * 4 * WIDE
    # Of each row of the timestep table: six vectors for the blocks, one for the head, what the MLP keeps.
    modulation = shapes.clips * model.timesteps_of_clip * model.hidden_size * 12 * WIDE
    angles = shapes.span * model.head_size * WIDE
    return {"embedders": embedders, "modulation": modulation, "angles": angles + shapes.own * INDEX}


# Beside what is kept


def sent_bytes(config: RunConfig, layout: Layout, pp_rank: int, workload: Workload) -> int:
    """Hidden states of ONE microbatch that a stage has sent on and its schedule holds until their gradient is back."""
    shapes = Shapes.of(config, layout, workload)
    chunks = layout.vpp - (pp_rank == layout.pp - 1)
    return chunks * shapes.own * config.model.hidden_size * shapes.narrow


def in_flight(layout: Layout, pp_rank: int, microbatches: int) -> float:
    """Microbatches whose activations a stage keeps at its peak, in whole stages (a chunk counts 1 / vpp).

    Source: megatron-core's schedules: 1F1B runs pp - stage - 1 microbatches ahead of the first backward pass, the
    interleaved schedule 2 (pp - stage - 1) + (vpp - 1) pp chunks.
    """
    if layout.vpp == 1:
        return float(min(microbatches, layout.pp - pp_rank))
    warmup = 2 * (layout.pp - pp_rank - 1) + (layout.vpp - 1) * layout.pp
    return min(warmup + 1, microbatches * layout.vpp) / layout.vpp


def working_bytes(config: RunConfig, layout: Layout, pp_rank: int, workload: Workload, imbalance: float = 1.0) -> int:
    """Bytes that live only while one block runs backward: what recomputation brings back, and gradients on their way.

    An upper estimate: what later blocks have let go of by then is not taken off, but for the head.
    """
    model, shapes = config.model, Shapes.of(config, layout, workload)
    recompute, worst = config.parallel.recompute, 0.0
    for is_moe, is_fp8, _ in kinds_of_stage(config, layout, pp_rank):
        again = _computed_again(model, shapes, recompute, is_moe=is_moe, imbalance=imbalance, is_fp8=is_fp8)
        again += _temporaries(model, shapes, is_moe=is_moe, imbalance=imbalance)
        worst = max(worst, again)
    if pp_rank == layout.pp - 1:
        worst = max(worst - _head(model, shapes), _temporaries(model, shapes, is_moe=False))
    largest = max(p.numel for chunk in range(layout.vpp) for p in chunk_parameters(model, layout, pp_rank, chunk))
    return round(worst) + largest * shapes.narrow  # what autograd is given for one parameter's gradient


def _computed_again(
    model: ModelConfig, shapes: Shapes, recompute: str, *, is_moe: bool, imbalance: float, is_fp8: bool
) -> float:
    """What recomputation brings back at a time: a block, or a branch, whose gate is behind it by then; and beside it
    the memory that rounding in FP8 works in."""
    rounding = eight_bit_temporaries(model, shapes, is_moe=is_moe, imbalance=imbalance) if is_fp8 else {}
    if recompute == "none":
        return max(rounding.values(), default=0.0)
    parts = block_bytes(model, shapes, "none", is_moe=is_moe, imbalance=imbalance, is_fp8=is_fp8)
    if recompute == "full":
        known = 0 if shapes.has_copies else shapes.own * model.hidden_size * WIDE
        return sum(parts.values()) - known + max(rounding.values(), default=0.0)
    feed_forward = ("dense_ffn", *EXPERT_PARTS)
    branches = (
        parts["self_attention"] - _attention_output(model, shapes) + rounding.get("self_attention", 0.0),
        parts["cross_attention"] + rounding.get("cross_attention", 0.0),
        sum(parts.get(part, 0.0) for part in feed_forward) + max(rounding.get(part, 0.0) for part in feed_forward),
    )
    return max(branches) - _gated_residual(model, shapes)


def _temporaries(model: ModelConfig, shapes: Shapes, *, is_moe: bool, imbalance: float = 1.0) -> float:
    """Gradients inside one branch: three of the stream in fp32 and one narrow, or those of the experts' rows."""
    stream = shapes.own * model.hidden_size * (3 * WIDE + shapes.narrow)
    if not is_moe:
        return stream
    moe, rows = model.moe, expert_rows_of_rank(model, shapes, imbalance)
    narrow, hidden = model.hidden_size * shapes.narrow, moe.expert_ffn_size / shapes.etp
    row = max(3 * narrow, narrow + 2 * WIDE * hidden)
    if moe.has_bias:  # the gate's gradient takes two products in fp32
        row = max(row, 2 * narrow + 2 * WIDE * model.hidden_size)
    # Two narrow rows are the dispatcher's; the branch's gate is behind it by then.
    return max(stream, rows * (row - 2 * narrow) - _gated_residual(model, shapes))


def dispatcher_bytes(
    config: RunConfig, layout: Layout, pp_rank: int, workload: Workload, imbalance: float = 1.0
) -> int:
    """Rows on their way to the experts and back that no backward pass keeps: what is sent and what is received."""
    if not layers_of_stage(config.model, layout, pp_rank)[1]:
        return 0
    shapes = Shapes.of(config, layout, workload)
    return round(2 * expert_rows_of_rank(config.model, shapes, imbalance) * config.model.hidden_size * shapes.narrow)


def context_parallel_bytes(config: RunConfig, layout: Layout, workload: Workload) -> int:
    """Buffers of context-parallel attention that no backward pass keeps, at their most.

    Ulysses packs q, k and v once more to send them. A ring has the keys and values at hand and those that arrive, and
    backward their gradients in fp32 three times: this rank's part, what arrives, what is under way. The all-gather has
    all ranks' keys and values, and backward their gradients in fp32 beside those that the kernel gave.
    """
    plan, shapes = layout.context_plan, Shapes.of(config, layout, workload)
    width = shapes.span * config.model.hidden_size / shapes.tp
    total = 3 * width * shapes.narrow if plan.ulysses > 1 else 0.0
    if plan.ring > 1 and plan.kind == "ring":
        total += 2 * width * (2 * shapes.narrow + 3 * WIDE)
    elif plan.ring > 1:
        total += 2 * width * plan.ring * (2 * shapes.narrow + WIDE)
    return round(total)
