"""Rows sorted by expert, with rows of zeros after each expert's own, for products that take multiples only.

Owns where they go and that they come out again. A row of zeros whose gate is zero gives zeros, and gets no gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class FilledRows(NamedTuple):
    """What ``fill_rows`` gives.

    Attributes:
        x_SD: rows.
        probability_S: their gates.
        tokens_per_expert: rows of each expert, those that fill up counted; int64 on the host.
        place_R: where each of the rows that were given stands now; None where none were added.
    """

    x_SD: Tensor
    probability_S: Tensor
    tokens_per_expert: Tensor
    place_R: Tensor | None

    def take_out(self, out_SD: Tensor) -> Tensor:
        """The outputs of the rows that were given, in their order."""
        return out_SD if self.place_R is None else out_SD.index_select(0, self.place_R)


def fill_rows(x_RD: Tensor, probability_R: Tensor, tokens_per_expert: Tensor, *, multiple: int) -> FilledRows:
    """Fill the rows of each expert up to a multiple; an expert without rows gets none.

    Args:
        x_RD: rows sorted by expert.
        probability_R: gate of each row.
        tokens_per_expert: rows of each expert, int64 [e]; read on the host.
        multiple: at least 1.
    """
    own = tokens_per_expert.cpu()
    filled = -(-own // multiple) * multiple
    rows, total = x_RD.shape[0], int(filled.sum())
    if total == rows:
        return FilledRows(x_RD, probability_R, own, None)
    added = filled - own
    before = (added.cumsum(0) - added).to(x_RD.device, non_blocking=True)
    shift_R = torch.repeat_interleave(before, own.to(x_RD.device, non_blocking=True), output_size=rows)
    place_R = torch.arange(rows, device=x_RD.device) + shift_R
    return FilledRows(
        x_RD.new_zeros(total, x_RD.shape[1]).index_copy(0, place_R, x_RD),
        probability_R.new_zeros(total).index_copy(0, place_R, probability_R),
        filled,
        place_R,
    )
