"""Rectified flow: the straight path between a clean clip and noise, and what a model predicts on it.

Owns the path's formulas. ``sigma`` is the noise level: 0 is clean, 1 is noise. What is predicted everywhere is
``velocity = noise - clean``, the derivative of the noised clip by sigma.

Source: Liu et al. 2022 (arXiv:2209.03003); Esser et al. 2024 (arXiv:2403.03206).
"""

from typing import TypeVar

import torch
from torch import Tensor

Level = TypeVar("Level", float, Tensor)


def shift_sigma(sigma: Level, *, shift: float) -> Level:
    """Move noise levels toward 1 so that clips of many tokens see enough noise.

    sigma' = shift * sigma / (1 + (shift - 1) * sigma); the identity at shift = 1, monotone, fixes 0 and 1.

    Args:
        sigma: noise level in [0, 1], 0 is clean; a number or a tensor of any shape.
        shift: above 0, unitless; larger for more tokens (diffusers' Wan pipelines: 3 at 480p, 5 at 720p).

    Returns:
        Shifted noise level, same kind, shape, dtype and device.

    Raises:
        ValueError: shift is not above 0.

    Source: Esser et al. 2024 (arXiv:2403.03206), eq. 23; same form as diffusers FlowMatchEulerDiscreteScheduler.
    """
    if not shift > 0:
        raise ValueError(f"shift = {shift} must be above 0; change diffusion.flow_shift")
    # The same with a denominator that makes both ends exact in floating point.
    return shift * sigma / (shift * sigma + (1 - sigma))


def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The noised clip, (1 - sigma) * clean + sigma * noise; sigma broadcasts."""
    return torch.lerp(clean, noise, sigma)


def velocity_of(clean: Tensor, noise: Tensor) -> Tensor:
    """What the model learns to predict: noise - clean."""
    return noise - clean


def clean_of(noised: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """The clean clip that a velocity at ``noised`` points to: noised - sigma * velocity."""
    return noised - sigma * velocity
