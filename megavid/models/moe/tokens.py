"""What a router must know of this rank's tokens: whose they are, and how noisy.

Owns the record and the noise buckets of the statistics. A clip lies whole in one pack, so the ranks that share a pack's
tokens (tensor parallel under sequence parallelism, context parallel) are the only ones that share a clip.
"""

from dataclasses import dataclass

from torch import Tensor

NOISE_BUCKETS = 4
"""Equal ranges of the noise level that routing statistics are kept by (Q)."""


@dataclass(frozen=True)
class TokenInfo:
    """This rank's tokens in the row order of ``hidden_tBD.view(-1, D)``: token by token, and pack by pack within.

    Attributes:
        clip_T: clip (0 to G-1) of each local token, int64; -1 in the padding, which goes to no expert.
        bucket_T: noise bucket of each local token, int64, 0 to NOISE_BUCKETS-1; anything in the padding.
        num_clips: G.
        tokens_of_clip_G: tokens of each whole clip, on all ranks together, int64.
        aux_scale: weight of one clip's router losses, 1 / clips of the global batch; 0 leaves the losses out.
        loss_scale: what the backward pass multiplies every loss by, ``Engine.loss_scale``.
        draw_B: draw of each pack's first clip, -1 for a pack without one: what the pack is known by in any layout.
        first_token: the first of these tokens in their packs.
    """

    clip_T: Tensor
    bucket_T: Tensor
    num_clips: int
    tokens_of_clip_G: Tensor
    aux_scale: float
    loss_scale: float = 1.0
    draw_B: tuple[int, ...] = ()
    first_token: int = 0

    @property
    def is_valid(self) -> Tensor:
        """Whether a token belongs to a clip, bool."""
        return self.clip_T >= 0


def noise_bucket(sigma: Tensor) -> Tensor:
    """Bucket of each noise level (0 is clean, 1 is noise): 0 for the cleanest, int64, same shape."""
    return (sigma * NOISE_BUCKETS).long().clamp(0, NOISE_BUCKETS - 1)
