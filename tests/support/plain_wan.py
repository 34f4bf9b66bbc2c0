"""The dense video DiT written out for one device from its tensors in model space: the slow, obvious twin.

Reads like the paper; shares no code with megavid's layers. fp64 throughout.
"""

import math

import torch
from torch import Tensor

from megavid.config.schema import ModelConfig
from megavid.models.inputs import ModelInput
from megavid.ops.packs import Clip

Weights = dict[str, Tensor]


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def normed(x: Tensor, eps: float) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + eps)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def turned(x_TNA: Tensor, clip: Clip, frame_rate: float) -> Tensor:
    """Rotate each pair of a head as a complex number, token by token."""
    size = x_TNA.shape[-1]
    side = 2 * (size // 6)
    out = torch.empty_like(x_TNA)
    frames, rows, columns = clip.grid
    token = 0
    for frame in range(frames):
        for row in range(rows):
            for column in range(columns):
                place = (frame * frame_rate / clip.frame_rate, row, column)
                angles = [
                    place[axis] * 10000.0 ** (-2 * i / width)
                    for axis, width in enumerate((size - 2 * side, side, side))
                    for i in range(width // 2)
                ]
                pairs = torch.view_as_complex(x_TNA[token].unflatten(-1, (-1, 2)))
                spin = torch.polar(torch.ones(len(angles), dtype=x_TNA.dtype), torch.tensor(angles, dtype=x_TNA.dtype))
                out[token] = torch.view_as_real(pairs * spin).flatten(-2)
                token += 1
    return out


def place_code(clip: Clip, width: int, frame_rate: float) -> Tensor:
    """The code of each token's place: ones turned by it, real and imaginary parts side by side."""
    unit = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(width // 2)
    return turned(unit.expand(clip.tokens, 1, width).contiguous(), clip, frame_rate)[:, 0]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = [torch.softmax(q[:, n] @ k[:, n].T / math.sqrt(q.shape[-1]), -1) @ v[:, n] for n in range(q.shape[1])]
    return torch.cat(heads, dim=-1)


def image_tokens(model: ModelConfig, weights: Weights, image: Tensor) -> Tensor:
    if model.image_positions:
        image = image + weights["image_embedder.positions"]
    name = "image_embedder.norm"
    h = normed(image, 1e-5) * weights[f"{name}_in.weight"] + weights[f"{name}_in.bias"]
    h = linear(h, weights, "image_embedder.up")
    h = linear(0.5 * h * (1 + torch.erf(h / math.sqrt(2))), weights, "image_embedder.down")
    return normed(h, 1e-5) * weights[f"{name}_out.weight"] + weights[f"{name}_out.bias"]


def velocity_of_clip(
    model: ModelConfig,
    weights: Weights,
    patches: Tensor,
    timestep: Tensor,
    text: Tensor,
    clip: Clip,
    image: Tensor | None = None,
) -> Tensor:
    """One clip; ``timestep`` is each token's own, ``image`` its image features if it has an image."""
    eps, split = model.norm_eps, (-1, model.head_size)
    half = model.frequency_size // 2
    rates = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float64) / half)
    angles = timestep.double()[:, None] * rates
    features = torch.cat((angles.cos(), angles.sin()), -1).float().double()
    vector = linear(
        torch.nn.functional.silu(linear(features, weights, "time_embedder.up")), weights, "time_embedder.down"
    )
    modulation = linear(torch.nn.functional.silu(vector), weights, "time_embedder.projection")
    modulation = modulation.view(len(timestep), 6, -1).transpose(0, 1)
    caption = linear(gelu(linear(text, weights, "text_embedder.up")), weights, "text_embedder.down")
    picture = None if image is None else image_tokens(model, weights, image)
    x = linear(patches, weights, "patch_embedder")
    if model.absolute_positions:
        x = x + place_code(clip, model.hidden_size, model.latent_frame_rate)
    for layer in range(model.num_layers):
        name = f"blocks.{layer}"
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = weights[f"{name}.modulation"][:, None] + modulation
        h = normed(x, eps) * (1 + scale) + shift
        q = rms(linear(h, weights, f"{name}.self_attention.q"), weights[f"{name}.self_attention.q_norm.weight"], eps)
        k = rms(linear(h, weights, f"{name}.self_attention.k"), weights[f"{name}.self_attention.k_norm.weight"], eps)
        v = linear(h, weights, f"{name}.self_attention.v").unflatten(-1, split)
        q, k = (turned(t.unflatten(-1, split), clip, model.latent_frame_rate) for t in (q, k))
        x = x + linear(attend(q, k, v), weights, f"{name}.self_attention.out") * gate
        h = normed(x, eps) * weights[f"{name}.cross_norm.weight"] + weights[f"{name}.cross_norm.bias"]
        q = rms(linear(h, weights, f"{name}.cross_attention.q"), weights[f"{name}.cross_attention.q_norm.weight"], eps)
        k = linear(caption, weights, f"{name}.cross_attention.k")
        k = rms(k, weights[f"{name}.cross_attention.k_norm.weight"], eps)
        v = linear(caption, weights, f"{name}.cross_attention.v")
        attended = attend(q.unflatten(-1, split), k.unflatten(-1, split), v.unflatten(-1, split))
        if picture is not None:
            k = linear(picture, weights, f"{name}.cross_attention.image_k")
            k = rms(k, weights[f"{name}.cross_attention.image_k_norm.weight"], eps)
            v = linear(picture, weights, f"{name}.cross_attention.image_v")
            attended = attended + attend(q.unflatten(-1, split), k.unflatten(-1, split), v.unflatten(-1, split))
        x = x + linear(attended, weights, f"{name}.cross_attention.out")
        h = normed(x, eps) * (1 + ffn_scale) + ffn_shift
        x = x + linear(gelu(linear(h, weights, f"{name}.ffn.up")), weights, f"{name}.ffn.down") * ffn_gate
    shift, scale = weights["head.modulation"][:, None] + vector
    return linear(normed(x, eps) * (1 + scale) + shift, weights, "head.projection")


def velocity(model: ModelConfig, weights: Weights, inputs: ModelInput) -> Tensor:
    """[B, T, P]; zero in the padding."""
    out = inputs.patches_BTP.new_zeros(*inputs.patches_BTP.shape[:2], model.out_channels * model.patch_volume)
    number = 0
    for row, pack in enumerate(inputs.packs):
        for clip in pack.clips:
            window = slice(clip.start, clip.start + clip.tokens)
            has_image = inputs.has_image_G is not None and bool(inputs.has_image_G[number])
            out[row, window] = velocity_of_clip(
                model, weights, inputs.patches_BTP[row, window], inputs.timestep_R[inputs.row_BT[row, window]],
                inputs.text_GLD[number], clip, inputs.image_GLI[number] if has_image else None,
            )  # fmt: skip
            number += 1
    return out
