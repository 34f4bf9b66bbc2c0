"""Latents to tokens and back: the order of both, and what is refused."""

import pytest
import torch

from megavid.ops.patches import patchify, token_grid, unpatchify


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1234)


@pytest.mark.parametrize("patch_size", [(1, 2, 2), (2, 1, 3), (1, 1, 1), (4, 6, 6)])
def test_unpatchify_undoes_patchify(patch_size):
    latents_CFHW = torch.randn(3, 4, 6, 6)
    patches_TP = patchify(latents_CFHW, patch_size)
    grid = token_grid(4, 6, 6, patch_size)
    assert patches_TP.is_contiguous()
    assert torch.equal(unpatchify(patches_TP, grid, patch_size), latents_CFHW)


def test_patchify_orders_tokens_by_frame_row_column_and_numbers_by_channel_first():
    latents_CFHW = torch.arange(2 * 2 * 4 * 6).view(2, 2, 4, 6)
    patches_TP = patchify(latents_CFHW, (1, 2, 2))
    assert patches_TP.shape == (2 * 2 * 3, 8)
    frame, row, column = 1, 0, 2
    token = patches_TP[(frame * 2 + row) * 3 + column]
    assert torch.equal(token, latents_CFHW[:, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten())


def test_patch_embedding_of_patches_equals_a_strided_convolution():
    latents_CFHW = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    kernel = torch.randn(5, 3, 1, 2, 2, dtype=torch.float64)
    convolved_CFHW = torch.nn.functional.conv3d(latents_CFHW, kernel, stride=(1, 2, 2))
    tokens_TD = patchify(latents_CFHW, (1, 2, 2)) @ kernel.flatten(1).T
    torch.testing.assert_close(tokens_TD, convolved_CFHW.flatten(1).T)


def test_sizes_that_do_not_come_out_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 5, 4\) must be multiples of patch_size = \(1, 2, 2\)"):
        patchify(torch.zeros(3, 2, 5, 4), (1, 2, 2))
    with pytest.raises(ValueError, match=r"\(7, 12\) must be 8 tokens"):
        unpatchify(torch.zeros(7, 12), (2, 2, 2), (1, 2, 2))
