"""What low-rank adapters add to a model: their tensors in model space, and the FLOPs of a step that trains them only.

Owns both, closed form. The models build the same tensors, and torch counts the same FLOPs; tests compare.
"""

from collections.abc import Iterator, Sequence

from megavid.config.schema import LoraConfig, ModelConfig, RunConfig
from megavid.plan.flops import forward_flops, model_flops
from megavid.plan.parameters import Tensor, block_tensors

A, B = "lora_A.weight", "lora_B.weight"
"""What adapters' tensors are called after their matrix, as in PEFT: [rank, input] and [output, rank]."""


def adapted_matrices(model: ModelConfig, lora: LoraConfig, layer: int) -> Iterator[Tensor]:
    """Matrices of block ``layer`` (from 0) that get an adapter."""
    for tensor in block_tensors(model, layer):
        if tensor.name.endswith(".weight") and len(tensor.shape) == 2 and lora.adapts(tensor.name):
            yield tensor


def adapter_tensors(model: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every A and B by name in model space: [rank, input] and [output, rank]."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(model.num_layers):
        for matrix in adapted_matrices(model, lora, layer):
            stem, (outputs, inputs) = matrix.name.removesuffix("weight"), matrix.shape
            shapes[stem + A] = (lora.rank, inputs)
            shapes[stem + B] = (outputs, lora.rank)
    return shapes


def trained_flops(config: RunConfig, clip_tokens: Sequence[int]) -> float:
    """FLOPs of a step's forward and backward pass that MFU counts.

    With adapters, frozen matrices have no gradient of their own. Gradients that nobody needs are left out: inputs of
    embedders, of the timestep's MLP, of keys and values of prompts, and of the first block's q, k and v. Where
    ``lora.targets`` are not all there are, the rest of the first block is counted as if they were.
    """
    model, lora = config.model, config.lora
    if not lora.rank:
        return model_flops(model, clip_tokens).total
    forward, tokens, clips = forward_flops(model, clip_tokens), sum(clip_tokens), len(clip_tokens)
    products = forward["self_attention"] + forward["cross_attention"]
    prompts = 4.0 * clips * model.prompt_tokens * model.hidden_size**2 * model.num_layers
    stays = forward["modulation"] + forward["embedders"] + prompts + 6.0 * tokens * model.hidden_size**2
    backward = 2.0 * products + (forward.total - products - stays)
    return forward.total + backward + _adapter_flops(model, lora, tokens, clips)


def computed_flops(config: RunConfig, clip_tokens: Sequence[int], *, padding: int) -> float:
    """FLOPs that ranks compute for a step, recomputation left out: ``trained_flops`` with the padding."""
    if not config.lora.rank:
        return 3.0 * forward_flops(config.model, clip_tokens, padding=padding).total
    extra = forward_flops(config.model, clip_tokens, padding=padding) - forward_flops(config.model, clip_tokens)
    return trained_flops(config, clip_tokens) + 2.0 * extra.total


def _adapter_flops(model: ModelConfig, lora: LoraConfig, tokens: int, clips: int) -> float:
    """Forward and backward pass through the adapters."""
    total = 0.0
    for layer in range(model.num_layers):
        for matrix in adapted_matrices(model, lora, layer):
            part, name = matrix.name.split(".")[2:4]
            rows, has_input_gradient = tokens, layer > 0 or part != "self_attention" or name == "out"
            if part == "cross_attention" and name not in ("q", "out"):
                rows = clips * (model.image_tokens if name.startswith("image_") else model.text_length)
                has_input_gradient = False
            outputs, inputs = matrix.shape
            total += 2.0 * rows * lora.rank * (3 * (outputs + inputs) - (0 if has_input_gradient else inputs))
    return total
