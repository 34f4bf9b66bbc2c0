"""``--verify``: silent about rounding, loud about a tensor in the wrong place."""

from pathlib import Path

import pytest
import torch

from megavid.checkpoint.convert import open_model, write_model
from megavid.checkpoint.convert.verify import check_gaps, compare
from megavid.cli.convert_verify import load_served, verify
from megavid.errors import CheckpointError
from tests.support.wan_folders import VARIANTS, assert_same_files, save_wan


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("to", ["megavid", "original"])
def test_converted_model_computes_the_same(tmp_path: Path, variant: str, to: str) -> None:
    # The original class knows image features of one width only.
    width = {"image_dim": 1280} if to == "original" and "image_dim" in VARIANTS[variant] else {}
    src = save_wan(tmp_path / "src", variant, **width)
    write_model(open_model(src), tmp_path / "dst", to=to, check=lambda folder: verify(open_model(src), folder))
    if to == "original":
        write_model(open_model(tmp_path / "dst"), tmp_path / "back", to="diffusers")
        assert_same_files(tmp_path / "back", src)


@pytest.mark.parametrize("to", ["megavid", "diffusers"])
def test_rounding_of_weights_is_no_difference(tmp_path: Path, to: str) -> None:
    source = open_model(save_wan(tmp_path / "src"))
    check = lambda folder: verify(source, folder)  # noqa: E731
    write_model(source, tmp_path / "dst", to=to, dtype=torch.bfloat16, check=check)


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [
        ("blocks.1.self_attention.q.weight", "blocks.1.self_attention.k.weight", "block 1"),
        ("blocks.0.cross_norm.weight", "blocks.0.cross_norm.bias", "block 0"),
        ("time_embedder.down.bias", "text_embedder.down.bias", "block 0"),
    ],
)
def test_swapped_tensors_are_told_by_the_block_where_they_begin(
    tmp_path: Path, one: str, other: str, place: str
) -> None:
    source = open_model(save_wan(tmp_path / "src"))
    swapped = {**source.tensors, one: source.tensors[other], other: source.tensors[one]}
    with pytest.raises(CheckpointError, match=f"differ from {place} on"):
        check_gaps(compare(source.config, swapped, load_served(source)))
