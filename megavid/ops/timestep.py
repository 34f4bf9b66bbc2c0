"""The sinusoidal code of a timestep, which the time embedder reads."""

import math

import torch
from torch import Tensor

from megavid.ops.regions import in_region


@in_region("timestep_features")
def timestep_features(timestep_R: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of the timestep at ``width / 2`` wavelengths up to 10,000; [R, width] fp32.

    Source: Ho et al. 2020 (arXiv:2006.11239), in the order of Wan 2.1.
    """
    half = width // 2
    index = torch.arange(half, dtype=torch.float64, device=timestep_R.device)
    angle = timestep_R.double()[:, None] * torch.exp(-math.log(10000.0) * index / half)
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()
