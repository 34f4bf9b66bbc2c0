"""Synthetic clips: a pure function of (seed, index), and what the caption says is what is seen."""

import numpy as np
import pytest

from megavid.data.sample import TextSpec
from megavid.data.synthetic import (
    COLOURS,
    DIRECTIONS,
    SIZES,
    SyntheticSource,
    draw,
    scene_of,
    synthetic_captions,
)
from megavid.data.tokenizer import DctTokenizer

TEXT = TextSpec("stub", "1", 8, 6)


def centres(video: np.ndarray, background: str) -> np.ndarray:
    """Middle (row, column) of what is not background, in each frame."""
    is_shape = np.abs(video.astype(int) - np.array(COLOURS[background])).sum(-1) > 30
    return np.array([np.argwhere(frame).mean(0) for frame in is_shape])


@pytest.mark.parametrize("index", range(40))
def test_caption_is_true(index: int) -> None:
    size = SIZES[index % len(SIZES)]
    scene = scene_of(3, index, size)
    video = draw(scene, size)
    assert video.shape == (*size, 3)
    assert scene.caption in synthetic_captions()
    for name, word in ((scene.colour, 1), (scene.background, -2)):
        assert scene.caption.split()[word] == name
    path = centres(video, scene.background)
    row, column = np.rint(path[len(path) // 2]).astype(int)
    assert np.abs(video[len(path) // 2, row, column].astype(int) - COLOURS[scene.colour]).max() <= 1
    assert (video[:, 0, 0] == COLOURS[scene.background]).all() or (video[:, -1, -1] == COLOURS[scene.background]).all()
    moved = path[-1] - path[0]
    if size[0] == 1:
        assert "moving" not in scene.caption
    else:
        assert f"moving {scene.direction}" in scene.caption
        along = moved @ np.array(DIRECTIONS[scene.direction])
        assert along > 4
        assert np.abs(moved).sum() - along < 1
    # The whole shape stays in the picture: its area does not change.
    areas = [(np.abs(frame.astype(int) - COLOURS[scene.background]).sum(-1) > 30).sum() for frame in video]
    assert max(areas) < 1.25 * min(areas)


def test_shapes_of_one_caption_differ_in_area() -> None:
    """A triangle is not a square is not a circle: parts of their bounding boxes that they fill."""
    fill = {}
    for index in range(60):
        scene = scene_of(3, index, (1, 96, 96))
        frame = draw(scene, (1, 96, 96))[0]
        rows, columns = np.nonzero(np.abs(frame.astype(int) - COLOURS[scene.background]).sum(-1) > 50)
        fill[scene.shape] = len(rows) / (np.ptp(rows) + 1) / (np.ptp(columns) + 1)
    assert fill["square"] > 0.95
    assert 0.7 < fill["circle"] < 0.87
    assert fill["triangle"] < 0.65


def test_source_is_a_pure_function_of_seed_and_index() -> None:
    source, again, other = (SyntheticSource(seed, DctTokenizer(16), TEXT) for seed in (1, 1, 2))
    for index in (0, 1, 9, 4095):
        sample = source.read(index)
        assert sample.shape == source.shape(index)
        assert sample.frame_rate == 4.0
        assert (sample.latents_CFHW == again.read(index).latents_CFHW).all()
    assert [source.read(n).caption for n in range(9)] != [other.read(n).caption for n in range(9)]
    assert sum(map(len, source.buckets)) == len(source) == 4096
    assert len(source.buckets) == len(SIZES)


def test_captions_are_many_and_clips_are_images_and_several_lengths() -> None:
    assert len(set(synthetic_captions())) == len(synthetic_captions()) == 840
    assert len({scene_of(1, n, SIZES[n % 8]).caption for n in range(512)}) > 250
    assert {frames for frames, _, _ in SIZES} == {1, 5, 9, 13, 17}
