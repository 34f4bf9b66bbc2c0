"""What a video diffusion transformer is called with.

Owns the argument record only. Modulation, timesteps and text each have their own name; every pipeline stage gets the
whole record from its own microbatch, never from its neighbour.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megavid.ops.packs import Pack, Span


@dataclass(frozen=True)
class ModelInput:
    """Noised packs and what they are conditioned on.

    Attributes:
        packs: the B segment tables (host data) of whole packs, G clips in all.
        patches_BTP: noised latents as patches, fp32, and in further channels what is known of them (P = in_channels x
            patch volume); the padding is zero.
        timestep_R: 1000 * noise level of each row of the timestep table, fp32; one row per clip, or per frame of a clip
            where known frames are clean.
        row_BT: row of that table for every token, int64; 0 in the padding.
        text_GLD: text features of each clip, fp32.
        image_GLI: image features of each clip, fp32, for models with an image branch; None for all others.
        has_image_G: bool, whether a clip has an image; a clip without one attends to the text alone.
        start: token of every pack that patches_BTP and row_BT begin with.
    """

    packs: tuple[Pack, ...]
    patches_BTP: Tensor
    timestep_R: Tensor
    row_BT: Tensor
    text_GLD: Tensor
    start: int = 0
    image_GLI: Tensor | None = None
    has_image_G: Tensor | None = None

    @property
    def span(self) -> Span:
        """The tokens that patches_BTP and row_BT hold."""
        return Span(self.start, self.start + self.patches_BTP.shape[1])

    def to(self, device: torch.device) -> "ModelInput":
        """The same record with its tensors on ``device``."""
        return replace(
            self,
            patches_BTP=self.patches_BTP.to(device),
            timestep_R=self.timestep_R.to(device),
            row_BT=self.row_BT.to(device),
            text_GLD=self.text_GLD.to(device),
            image_GLI=None if self.image_GLI is None else self.image_GLI.to(device),
            has_image_G=None if self.has_image_G is None else self.has_image_G.to(device),
        )
