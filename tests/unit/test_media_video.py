"""Reading, cutting, writing and showing video."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavid.data.captions import SourceItem, read_source
from megavid.data.clips import ClipRules, clips_of_item, nearest_size
from megavid.data.pictures import contact_sheet, enlarge, side_by_side
from megavid.data.tokenizer import Frames, psnr
from megavid.data.video import (
    at_frame_rate,
    clips_of,
    fit_frame,
    frame_rate_of,
    read_frames,
    read_image,
    timed_frames,
    write_gif,
    write_png,
    write_video,
)
from megavid.errors import DataError, StorageError


def numbered(count: int, height: int = 32, width: int = 48) -> Frames:
    """Frames whose grey value is 4 times their number."""
    return np.stack([np.full((height, width, 3), 4 * number, np.uint8) for number in range(count)])


def numbers(frames: list[Frames]) -> list[int]:
    return [round(float(frame.mean()) / 4) for frame in frames]


def one_pixel(count: int) -> list[Frames]:
    return list(numbered(count, 1, 1))


@pytest.fixture
def video(tmp_path: Path) -> Path:
    file = tmp_path / "video.mp4"
    write_video(file, numbered(40), 20.0, crf=0)
    return file


def test_written_video_is_read_back(video: Path) -> None:
    assert frame_rate_of(video) == pytest.approx(20)
    frames = list(read_frames(video))
    assert numbers(frames) == list(range(40))
    assert psnr(np.stack(frames), numbered(40)) > 40
    assert [time for time, _ in timed_frames(video)] == pytest.approx([number / 20 for number in range(40)])


def test_a_part_of_a_video_is_what_the_seconds_say(video: Path) -> None:
    part = list(timed_frames(video, 0.5, 0.9))
    assert numbers([frame for _, frame in part]) == list(range(10, 18))
    assert [time for time, _ in part] == pytest.approx([number / 20 for number in range(8)])
    with pytest.raises(DataError, match=r"has no frame from 5\.0 s"):
        list(timed_frames(video, 5.0))


@pytest.mark.parametrize(("rate", "expected"), [(20, range(10)), (10, range(0, 10, 2)), (5, range(0, 10, 4))])
def test_resampling_goes_by_time(rate: float, expected: range) -> None:
    timed = ((number / 20, frame) for number, frame in enumerate(one_pixel(10)))
    assert numbers(list(at_frame_rate(timed, rate))) == list(expected)


def test_resampling_upwards_repeats_frames_and_follows_uneven_times() -> None:
    timed = zip([0.0, 0.05, 0.3, 0.35], one_pixel(4), strict=True)
    assert numbers(list(at_frame_rate(timed, 10))) == [0, 1, 1, 2]


@pytest.mark.parametrize("length", [1, 4, 5])
@pytest.mark.parametrize("stride", [1, 3, 5, 9])
@pytest.mark.parametrize("limit", [0, 2])
def test_clips_equal_plain_slices(length: int, stride: int, limit: int) -> None:
    starts = [start for start in range(0, 17, stride) if start + length <= 17]
    expected = [list(range(start, start + length)) for start in starts][: limit or None]
    assert [numbers(clip) for clip in clips_of(iter(one_pixel(17)), length, stride, limit)] == expected


def test_frames_cover_the_size_and_keep_their_aspect() -> None:
    frame = np.zeros((40, 100, 3), np.uint8)
    frame[:, 40:60] = 255  # a square in the middle half of what is kept
    fitted = fit_frame(frame, 20, 20)
    assert fitted.shape == (20, 20, 3)
    assert fitted[:, 6:14].min() > 250
    assert fitted[:, :4].max() < 5
    assert fit_frame(frame, 40, 100) is frame


def test_images_are_one_frame_and_turned_upright(tmp_path: Path) -> None:
    picture = np.zeros((8, 16, 3), np.uint8)
    picture[:, :8] = 200
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png")
    assert image.shape == (1, 16, 8, 3)
    assert image[0, :8].min() == 200
    (tmp_path / "bad.png").write_bytes(b"\x89PNG damaged")
    with pytest.raises(DataError, match="cannot be read as an image"):
        read_image(tmp_path / "bad.png")


def test_broken_videos_are_data_errors(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"bad\.mp4 cannot be decoded"):
        list(read_frames(tmp_path / "bad.mp4"))
    with pytest.raises(DataError, match=r"bad\.mp4 cannot be opened"):
        frame_rate_of(tmp_path / "bad.mp4")


def test_gif_and_png_can_be_read(tmp_path: Path) -> None:
    write_gif(tmp_path / "a.gif", numbered(5), 10)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 5  # type: ignore[attr-defined]
        assert image.info["duration"] == 100
        assert image.info["loop"] == 0
    write_png(tmp_path / "a.png", numbered(2)[1])
    assert read_image(tmp_path / "a.png").max() == 4
    for write in (lambda file: write_gif(file, numbered(2), 10), lambda file: write_video(file, numbered(2), 10)):
        with pytest.raises(StorageError, match="cannot write"):
            write(tmp_path / "none" / "a.mp4")


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(720, 1280, (64, 96)), (720, 720, (96, 96)), (80, 80, (64, 64)), (40, 40, (64, 64)), (144, 176, (96, 96))],
)
def test_a_video_goes_to_the_nearest_size(height: int, width: int, expected: tuple[int, int]) -> None:
    buckets = [(17, 64, 64), (17, 96, 96), (17, 64, 96), (9, 96, 96)]
    assert nearest_size(buckets, height, width) == expected


def test_a_short_video_goes_to_a_shorter_bucket(tmp_path: Path) -> None:
    file = tmp_path / "short.mp4"
    write_video(file, numbered(12), 10.0, crf=0)
    item = SourceItem(file, "")
    rules = ClipRules(((17, 32, 32), (5, 32, 32), (9, 32, 32)))
    assert [clip.video.shape for clip in clips_of_item(item, rules)] == [(9, 32, 32, 3)]
    with pytest.raises(DataError, match="shorter than 13 frames at 10 frames per second"):
        list(clips_of_item(item, ClipRules(((13, 32, 32),))))


def test_clips_know_where_they_begin(video: Path) -> None:
    item = SourceItem(video, "", start_s=0.5)
    clips = list(clips_of_item(item, ClipRules(((5, 32, 48),), frame_rate=10, stride=4, clips_per_video=2)))
    assert [clip.start_s for clip in clips] == pytest.approx([0.5, 0.9])
    assert numbers(list(clips[1].video)) == [18, 20, 22, 24, 26]
    assert clips[0].frame_rate == 10


def test_a_folder_is_read_with_its_captions(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.mp4", "a.png", "sub/c.webm", "notes.md"):
        (tmp_path / name).touch()
    (tmp_path / "b.txt").write_text(" two\n words ")
    items = read_source(tmp_path)
    assert [(item.file.name, item.caption) for item in items] == [("a.png", ""), ("b.mp4", "two words"), ("c.webm", "")]
    assert [item.is_image for item in items] == [True, False, False]


def test_a_table_keeps_its_other_columns(tmp_path: Path) -> None:
    table = tmp_path / "clips.jsonl"
    table.write_text(
        '{"path": "a.mp4", "caption": "x", "start_s": 1, "end_s": 2.5, "licence": "CC0"}\n\n{"path": "/b.png"}\n'
    )
    first, second = read_source(table)
    assert first == SourceItem(tmp_path / "a.mp4", "x", 1.0, 2.5, {"licence": "CC0"})
    assert second == SourceItem(Path("/b.png"), "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{}", "clips.jsonl:1: a row is an object with a text 'path'"),
        ("[1", "clips.jsonl:1 is not JSON"),
        ('{"path": "a", "caption": 3}', "caption must be text, got 3"),
        ('{"path": "a", "start_s": 2, "end_s": 1}', "start_s = 2 must be at least 0 and below end_s = 1"),
        ("", "holds no video or image"),
        (
            '{"path": "a", "licence": "CC0", "width": 640, "source": "web"}',
            "clips.jsonl:1: .* source, width of their",
        ),
    ],
)
def test_bad_tables_say_where(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "clips.jsonl").write_text(row)
    with pytest.raises(DataError, match=message):
        read_source(tmp_path / "clips.jsonl")


def test_other_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match="neither a folder nor"):
        read_source(tmp_path / "a.csv")
    with pytest.raises(DataError, match="does not exist"):
        read_source(tmp_path / "none")


def test_contact_sheet_shows_every_pixel_of_a_small_clip() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (9, 48, 64, 3), dtype=np.uint8)
    sheet = contact_sheet([("real over generated", [clip, 255 - clip])], row_labels=("real", "made"), frames=3)
    tile = enlarge(clip[4:5], 3)[0]
    found = [
        (top, left)
        for top in range(sheet.shape[0] - tile.shape[0])
        for left in np.flatnonzero((sheet[top, : -tile.shape[1]] == tile[0, 0]).all(-1))
        if np.array_equal(sheet[top : top + tile.shape[0], left : left + tile.shape[1]], tile)
    ]
    assert len(found) == 1


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("shape", [(1, 64, 64), (5, 480, 832), (3, 64, 96)])
def test_contact_sheet_takes_any_clips(count: int, shape: tuple[int, int, int]) -> None:
    groups = [("words " * 60 * number, [np.zeros((*shape, 3), np.uint8)]) for number in range(count)]
    sheet = contact_sheet(groups)
    assert sheet.dtype == np.uint8
    assert sheet.ndim == 3


def test_side_by_side_holds_the_last_frame_of_shorter_clips() -> None:
    long, short = numbered(4, 8, 8), numbered(2, 8, 8)
    video = side_by_side([[long, short]])
    assert video.shape == (4, 8, 20, 3)
    assert int(video[3, 0, -1, 0]) == 4


def test_a_picture_of_too_many_pixels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_png(tmp_path / "big.png", np.zeros((32, 32, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"big\.png cannot be read as an image: .*1024 pixels"):
        read_image(tmp_path / "big.png")
