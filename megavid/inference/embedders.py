"""Timesteps, captions and images as vectors of the model's width, under diffusers' names."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from megavid.inference.block import AffineNorm
from megavid.ops.timestep import timestep_features

IMAGE_EPS = 1e-5
"""Epsilon of the image embedder's norms, torch's default, as in Wan 2.1."""


class TwoLinears(nn.Module):
    """Two matrices; what is between them is the caller's."""

    def __init__(self, input_size: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(input_size, width), nn.Linear(width, width)


class TimestepEmbedder(TwoLinears):
    """Sinusoidal features to the vector of the head."""

    def forward(self, timestep_R: Tensor) -> Tensor:
        """[R, D] in the dtype of the weights, which stay fp32."""
        features = timestep_features(timestep_R, self.linear_1.in_features).to(self.linear_1.weight.dtype)
        out: Tensor = self.linear_2(silu(self.linear_1(features)))
        return out


class TextEmbedder(TwoLinears):
    """Text features to the model's width."""

    def forward(self, text: Tensor) -> Tensor:
        """[B, L, D]."""
        hidden = gelu(self.linear_1(text.to(self.linear_1.weight.dtype)), approximate="tanh")
        out: Tensor = self.linear_2(hidden)
        return out


class GeluProjection(nn.Module):
    """A matrix with exact GELU behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return gelu(self.proj(x))


class ImageFeedForward(nn.Module):
    """The image embedder's two matrices."""

    def __init__(self, image_size: int, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GeluProjection(image_size), nn.Identity(), nn.Linear(image_size, width)])

    def forward(self, x: Tensor) -> Tensor:
        """The model's width."""
        out: Tensor = self.net[2](self.net[0](x))
        return out


class ImageEmbedder(nn.Module):
    """Features of the image encoder to the model's width, as in Wan 2.1 image to video.

    Args:
        image_size: width of the features.
        width: of the model.
        positions: tokens that have a learned place: those of the first and the last frame together; 0 for none.
    """

    def __init__(self, image_size: int, width: int, positions: int) -> None:
        super().__init__()
        self.norm1 = AffineNorm(image_size, IMAGE_EPS)
        self.ff = ImageFeedForward(image_size, width)
        self.norm2 = AffineNorm(width, IMAGE_EPS)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, image_size)) if positions else None

    def forward(self, image: Tensor) -> Tensor:
        """[B, tokens, D]; with places, the features of first and last frame come one after the other, [2 B, ...]."""
        image = image.to(next(self.ff.parameters()).dtype)
        if self.pos_embed is not None:
            image = image.reshape(-1, self.pos_embed.shape[1], image.shape[-1]) + self.pos_embed.to(image.dtype)
        out: Tensor = self.norm2(self.ff(self.norm1(image)))
        return out


class ConditionEmbedder(nn.Module):
    """All that the blocks are conditioned on."""

    def __init__(
        self, width: int, frequency_size: int, text_size: int, image_size: int = 0, image_positions: int = 0
    ) -> None:
        super().__init__()
        self.time_embedder = TimestepEmbedder(frequency_size, width)
        self.time_proj = nn.Linear(width, 6 * width)
        self.text_embedder = TextEmbedder(text_size, width)
        self.image_embedder = ImageEmbedder(image_size, width, image_positions) if image_size else None

    def forward(
        self, timestep_R: Tensor, text: Tensor, image: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Vectors of the head [R, D] and of the blocks [R, 6, D]; caption and image at the model's width."""
        head_RD = self.time_embedder(timestep_R)
        blocks_R6D = self.time_proj(silu(head_RD)).unflatten(-1, (6, -1))
        image_BxD = None if image is None or self.image_embedder is None else self.image_embedder(image)
        return head_RD, blocks_R6D, self.text_embedder(text), image_BxD
