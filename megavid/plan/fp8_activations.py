"""What FP8 changes of the activations that a block keeps, and of the memory that its backward pass works in.

Owns the list of a block's layers in FP8. Each keeps its input in eight bits along its rows; the wide input goes where
nothing else keeps it. Under sequence parallelism those are the gathered tokens, of which a wide layer keeps its own.
"""

from dataclasses import dataclass

from megavid.config.schema import ModelConfig
from megavid.plan.fp8 import TILED, kept_bytes
from megavid.plan.shapes import WIDE, Shapes, expert_rows_of_rank


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer in FP8 on one rank.

    Attributes:
        part: that its activations are booked as.
        rows: tokens.
        inner: width of the input.
        columns: width of the output.
        replaced: bytes of the wide input that nobody else keeps.
        experts: matrices that share the rows; 0 for a dense layer.
    """

    part: str
    rows: float
    inner: float
    columns: float
    replaced: float
    experts: int = 0


def layers_of_block(model: ModelConfig, shapes: Shapes, *, is_moe: bool, imbalance: float = 1.0) -> list[Layer]:
    """The layers of one block that are in FP8."""
    width, span, narrow = model.hidden_size, shapes.span, shapes.narrow
    local, stream = width / shapes.tp, shapes.own * width * narrow
    found = [
        Layer("self_attention", span, width, 3 * local, stream),
        # Attention keeps its output, but for Ulysses, after which it is brought back to its tokens.
        Layer("self_attention", span, local, width, span * local * narrow if shapes.ulysses > 1 else 0.0),
        Layer("cross_attention", span, width, local, stream),
        Layer("cross_attention", span, local, width, span * local * narrow),
    ]
    if not is_moe:
        hidden = model.ffn_size / shapes.tp
        return [
            *found,
            Layer("dense_ffn", span, width, hidden, stream),
            Layer("dense_ffn", span, hidden, width, span * hidden * narrow),
        ]
    moe, matrices = model.moe, 2 if model.moe.activation == "swiglu" else 1
    rows, hidden = expert_rows_of_rank(model, shapes, imbalance), moe.expert_ffn_size / shapes.etp
    experts = shapes.local_experts
    for number in range(matrices):
        found.append(Layer("experts", rows, width, hidden, rows * width * narrow if number == 0 else 0.0, experts))
    found.append(Layer("experts", rows, hidden, width, rows * hidden * narrow, experts))
    if moe.shared_ffn_size:
        hidden = moe.shared_ffn_size / shapes.tp
        # In fp32 its input is the router's, too.
        replaced = stream if shapes.has_copies else 0.0
        found.append(Layer("shared_expert", span, width, matrices * hidden, replaced))
        found.append(Layer("shared_expert", span, hidden, width, span * hidden * narrow))
    return found


def eight_bit_bytes(model: ModelConfig, shapes: Shapes, *, is_moe: bool, imbalance: float) -> dict[str, float]:
    """Bytes that a block in FP8 keeps more than a wide one, by part; mostly below 0."""
    changes: dict[str, float] = {}
    for layer in layers_of_block(model, shapes, is_moe=is_moe, imbalance=imbalance):
        kept = kept_bytes(shapes.precision, layer.rows, layer.inner, layer.experts, is_fused=shapes.is_fused)
        changes[layer.part] = changes.get(layer.part, 0.0) + kept - layer.replaced
    return changes


def eight_bit_temporaries(model: ModelConfig, shapes: Shapes, *, is_moe: bool, imbalance: float) -> dict[str, float]:
    """Bytes that live while one layer's operands are rounded, and turned back where they are: the most, by part."""
    most: dict[str, float] = {}
    for layer in layers_of_block(model, shapes, is_moe=is_moe, imbalance=imbalance):
        most[layer.part] = max(most.get(layer.part, 0.0), _temporaries(shapes, layer))
    if shapes.precision.fp8_attention:
        most["self_attention"] = max(most["self_attention"], _attention_temporaries(model, shapes))
    return most


def _attention_temporaries(model: ModelConfig, shapes: Shapes) -> float:
    """Of its backward pass: queries, keys and values in eight bits and turned back, and one on its way there.

    Keys and values are those of one rectangle of a clip that fills its pack: under all-gather those of all ranks, whose
    gradients in fp32 come after them (``activations.context_parallel_bytes`` has those).
    """
    on_its_way = WIDE + (shapes.narrow if shapes.narrow < WIDE else 0)
    queries, keys = shapes.span, shapes.span * shapes.rectangle
    numbers = (queries + 2 * keys) * (1 + shapes.narrow) + keys * on_its_way
    later = 2 * keys * WIDE if shapes.rectangle > 1 else 0
    return (numbers - later) * model.hidden_size / shapes.tp


def _temporaries(shapes: Shapes, layer: Layer) -> float:
    """Of the backward pass, without the gradients of the input and of the matrix, which wide layers have too.

    Rounding scales, cuts and casts, with tiles in a copy of whole ones, or needs nothing beside the bytes where it is
    fused; turning back takes the numbers, their scales and their product, of one operand at a time. Tiles are taken to
    be turned back on every machine, as memory is planned without one; elsewhere it is less.
    """
    wide = 0 if shapes.is_fused else shapes.narrow
    experts = max(1, layer.experts)
    matrices, inputs, gradient = (
        experts * layer.inner * layer.columns, layer.rows * layer.inner, layer.rows * layer.columns,
    )  # fmt: skip
    if shapes.precision.fp8 not in TILED:
        return max(gradient * (2 * wide + 1), gradient + matrices * (2 * wide + 1))
    rounded = matrices + gradient
    of_input = rounded + (3 * matrices + gradient) / experts * WIDE
    of_matrix = rounded + gradient + (gradient + 3 * inputs) / experts * WIDE
    return max(max(gradient, matrices) * 3 * wide + rounded, of_input, of_matrix)
