"""What turns timesteps, captions, images and latents into vectors: on every pipeline stage, except the patches.

Owns the conditioning of the family ``wan``. Every stage computes the same vectors from its own microbatch; the copies'
gradients are summed over the stages and counted once.
"""

import torch
from torch import Tensor, nn

from megavid.models.build import Build, PlainLinear
from megavid.ops.norm import layer_norm, wide
from megavid.ops.timestep import timestep_features
from megavid.parallel.placement import Init


class TimestepEmbedder(nn.Module):
    """Timestep to the vector of the head and, projected, the six modulation vectors of every block; fp32 throughout."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        width, frequencies = build.model.hidden_size, build.model.frequency_size
        self.frequencies = frequencies

        def linear(name: str, input_size: int, output_size: int) -> PlainLinear:
            return PlainLinear(
                build, f"time_embedder.{name}", input_size, output_size,
                is_partial=True, on_every_stage=True, is_fp32=True,
            )  # fmt: skip

        self.up = linear("up", frequencies, width)
        self.down = linear("down", width, width)
        self.projection = linear("projection", width, 6 * width)

    def forward(self, timestep_R: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of each row of the timestep table: for the head [R, D], and for the blocks [R, 6, D]; fp32."""
        features = timestep_features(timestep_R, self.frequencies)
        head_RD = self.down(torch.nn.functional.silu(self.up(features)))
        blocks = self.projection(torch.nn.functional.silu(head_RD))
        return head_RD, blocks.unflatten(-1, (6, -1))


class TextEmbedder(nn.Module):
    """Text features to the model's width: a two-layer MLP with GELU-tanh."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        width = build.model.hidden_size

        def linear(name: str, input_size: int) -> PlainLinear:
            # Keys and values of the text are column-parallel products of the whole caption, whose backward pass already
            # sums over tensor-parallel ranks: the gradient here is whole.
            return PlainLinear(
                build, f"text_embedder.{name}", input_size, width,
                is_partial=False, on_every_stage=True,
            )  # fmt: skip

        self.up = linear("up", build.model.text_size)
        self.down = linear("down", width)

    def forward(self, text_GLD: Tensor) -> Tensor:
        """Captions at the model's width, token first as megatron-core's linears want them: [L, G, D]."""
        hidden = torch.nn.functional.gelu(self.up(text_GLD.transpose(0, 1).contiguous()), approximate="tanh")
        out: Tensor = self.down(hidden)
        return out


class ImageEmbedder(nn.Module):
    """Features of an image encoder to the model's width: an MLP with GELU between two affine norms.

    Source: Wan 2.1's image-to-video models (arXiv:2503.20314), as diffusers' WanImageEmbedding has it: exact GELU, the
    hidden width that of the features, norms with torch's epsilon and in fp32.
    """

    EPS = 1e-5

    def __init__(self, build: Build) -> None:
        super().__init__()
        model, self.has_positions = build.model, build.model.image_positions > 0

        def whole(name: str, *shape: int, init: Init, is_fp32: bool = True) -> nn.Parameter:
            parameter = build.empty(*shape, is_fp32=is_fp32)
            build.place_whole(
                parameter, f"image_embedder.{name}", init=init,
                is_partial=False, on_every_stage=True, has_decay=False,
            )  # fmt: skip
            return parameter

        def linear(name: str, output_size: int) -> PlainLinear:
            # Like the text's: gradients are whole, see TextEmbedder.
            return PlainLinear(
                build, f"image_embedder.{name}", model.image_size, output_size,
                is_partial=False, on_every_stage=True,
            )  # fmt: skip

        self.norm_in_weight = whole("norm_in.weight", model.image_size, init=Init(mean=1.0))
        self.norm_in_bias = whole("norm_in.bias", model.image_size, init=Init())
        self.norm_out_weight = whole("norm_out.weight", model.hidden_size, init=Init(mean=1.0))
        self.norm_out_bias = whole("norm_out.bias", model.hidden_size, init=Init())
        if self.has_positions:
            self.positions = whole("positions", model.image_positions, model.image_size, init=Init(), is_fp32=False)
        self.up = linear("up", model.image_size)
        self.down = linear("down", model.hidden_size)

    def forward(self, image_GLI: Tensor) -> Tensor:
        """Image tokens at the model's width, token first as megatron-core's linears want them: [L, G, D]."""
        x_LGI = image_GLI.transpose(0, 1).contiguous()
        if self.has_positions:
            x_LGI = x_LGI + self.positions.unsqueeze(1)
        normed = layer_norm(x_LGI, self.EPS, self.norm_in_weight, self.norm_in_bias)
        out = self.down(torch.nn.functional.gelu(self.up(normed)))
        return layer_norm(out, self.EPS, self.norm_out_weight, self.norm_out_bias)


class PatchEmbedder(nn.Module):
    """Patches of noised latents to tokens; the first pipeline stage only."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        inputs = build.model.in_channels * build.model.patch_volume
        self.linear = PlainLinear(build, "patch_embedder", inputs, build.model.hidden_size)

    def forward(self, patches_tBP: Tensor) -> Tensor:
        """Tokens of this rank, [t, B, D]."""
        out: Tensor = self.linear(patches_tBP)
        return out


class Head(nn.Module):
    """Tokens to the velocity of their patches; the last pipeline stage only."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        model = build.model
        self.eps, self.ops = model.norm_eps, build.ops
        self.table = build.empty(2, model.hidden_size, is_fp32=True)
        build.place_whole(
            self.table, "head.modulation", init=Init(std=model.hidden_size**-0.5), is_partial=True, has_decay=False
        )
        # Zero: a fresh model predicts no velocity, so that the first loss is the variance of the target.
        self.linear = PlainLinear(
            build, "head.projection", model.hidden_size, model.out_channels * model.patch_volume, init=Init()
        )

    def forward(self, x_tBD: Tensor, vector_RD: Tensor, row_tB: Tensor) -> Tensor:
        """Velocity of this rank's tokens, [t, B, P]."""
        shift_RD, scale_RD = (wide(self.table)[i] + vector_RD for i in (0, 1))
        out: Tensor = self.linear(self.ops.modulated_norm(x_tBD, shift_RD, scale_RD, row_tB, self.eps))
        return out
