"""Latents as tokens and back: a token is a box of ``patch_size`` latent positions with all its channels.

Owns the order of both: tokens run over (time, row, column) of the token grid, the numbers of a token over
(channel, frame, row, column) of its patch, as a flattened convolution kernel (Wan's patch embedding) does.
"""

import math

from torch import Tensor

Triple = tuple[int, int, int]


def token_grid(frames: int, height: int, width: int, patch_size: Triple) -> Triple:
    """Tokens along time, height and width of a latent clip.

    Raises:
        ValueError: the patch does not divide the clip.
    """
    size = (frames, height, width)
    if any(extent % patch for extent, patch in zip(size, patch_size, strict=True)):
        raise ValueError(f"latent frames, height, width = {size} must be multiples of patch_size = {patch_size}")
    time, rows, columns = (extent // patch for extent, patch in zip(size, patch_size, strict=True))
    return time, rows, columns


def patchify(latents_CFHW: Tensor, patch_size: Triple) -> Tensor:
    """Tokens of one clip, [tokens, P], P = C * prod(patch_size); contiguous, same dtype and device.

    Raises:
        ValueError: the patch does not divide the clip.
    """
    channels, frames, height, width = latents_CFHW.shape
    time, rows, columns = token_grid(frames, height, width, patch_size)
    pt, ph, pw = patch_size
    split = latents_CFHW.reshape(channels, time, pt, rows, ph, columns, pw)
    tokens = split.permute(1, 3, 5, 0, 2, 4, 6).contiguous()
    return tokens.view(time * rows * columns, channels * math.prod(patch_size))


def unpatchify(patches_TP: Tensor, grid: Triple, patch_size: Triple) -> Tensor:
    """Latents of one clip, [C, F, H, W]: the inverse of ``patchify``.

    Args:
        patches_TP: the clip's tokens, without padding.
        grid: its tokens along time, height and width.
        patch_size: latent frames, rows and columns of a token.

    Raises:
        ValueError: the number of tokens or of channels does not come out.
    """
    time, rows, columns = grid
    pt, ph, pw = patch_size
    tokens, numbers = patches_TP.shape
    if tokens != math.prod(grid) or numbers % math.prod(patch_size):
        raise ValueError(
            f"patches of shape {(tokens, numbers)} must be {math.prod(grid)} tokens (grid = {grid}) of a multiple "
            f"of {math.prod(patch_size)} numbers (patch_size = {patch_size})"
        )
    channels = numbers // math.prod(patch_size)
    split = patches_TP.reshape(time, rows, columns, channels, pt, ph, pw)
    return split.permute(3, 0, 4, 1, 5, 2, 6).reshape(channels, time * pt, rows * ph, columns * pw)
