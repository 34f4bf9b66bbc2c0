"""Pictures of clips: contact sheets and grids.

Owns layout and lettering; files are ``video``'s. Small clips are enlarged by whole numbers without smoothing, so that
every pixel is one that the model or the tokenizer made.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megavid.data.tokenizer import Frames

# Sides of a tile in pixels: enlarged to at least the first, shrunk to at most the second.
_SMALL, _LARGE = 144, 320
_MARGIN, _GAP, _GROUP_GAP, _TEXT_SIZE, _LINES = 16, 4, 22, 17, 2
_PAPER, _INK, _FAINT = (255, 255, 255), (28, 28, 30), (120, 120, 126)
_COLUMNS_FROM = 4  # groups that begin a second column

Group = tuple[str, Sequence[Frames]]
"""A caption and the clips under it, one row each: the real one over the generated one."""


@dataclass(frozen=True, slots=True)
class _Sheet:
    """Sizes of a contact sheet."""

    tiles: int
    tile: tuple[int, int]
    rows: int
    gutter: int
    line: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of one group."""
        height, width = self.tile
        caption = _LINES * self.line + 6
        return caption + self.rows * (height + _GAP), self.gutter + self.tiles * (width + _GAP) - _GAP


def contact_sheet(groups: Sequence[Group], *, row_labels: Sequence[str] = (), frames: int = 5) -> Frames:
    """Frames of clips in rows, captions above them.

    Args:
        groups: what to show; all groups should have as many clips.
        row_labels: words at the left of the rows of a group, such as ("real", "generated").
        frames: frames of each clip, evenly spread over its time; a shorter clip shows all it has.

    Returns:
        The picture, [height, width, 3] uint8.
    """
    clips = [clip for _, rows in groups for clip in rows]
    tile = _tile_size(max(clip.shape[1] for clip in clips), max(clip.shape[2] for clip in clips))
    font = ImageFont.load_default(_TEXT_SIZE)
    gutter = max((int(font.getlength(label)) + 12 for label in row_labels), default=0)
    tiles = min(frames, max(len(clip) for clip in clips))
    sheet = _Sheet(tiles, tile, max(len(rows) for _, rows in groups), gutter, _TEXT_SIZE + 4)
    # Groups of single pictures would make a thin strip: lay them out as a page.
    columns = min(len(groups), 6) if tiles == 1 else 1 + (len(groups) >= _COLUMNS_FROM)
    height, width = sheet.size
    lines = -(-len(groups) // columns)
    page = Image.new(
        "RGB",
        (
            2 * _MARGIN + columns * (width + _GROUP_GAP) - _GROUP_GAP,
            2 * _MARGIN + lines * (height + _GROUP_GAP) - _GROUP_GAP,
        ),
        _PAPER,
    )
    for number, group in enumerate(groups):
        row, column = divmod(number, columns)
        place = _MARGIN + column * (width + _GROUP_GAP), _MARGIN + row * (height + _GROUP_GAP)
        _draw_group(page, place, group, sheet, row_labels)
    return np.asarray(page)


def side_by_side(rows: Sequence[Sequence[Frames]]) -> Frames:
    """Clips in a grid, playing together: for a GIF or an MP4 of several.

    Clips that are shorter hold their last frame; smaller ones stand in the middle of their cell.

    Returns:
        One video, [frames, height, width, 3].
    """
    clips = [clip for row in rows for clip in row]
    frames, height, width = (max(clip.shape[axis] for clip in clips) for axis in range(3))
    columns = max(len(row) for row in rows)
    video = np.full((frames, len(rows) * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), _PAPER, np.uint8)
    for line, row in enumerate(rows):
        for column, clip in enumerate(row):
            held = clip[np.minimum(np.arange(frames), len(clip) - 1)]
            top = line * (height + _GAP) + (height - clip.shape[1]) // 2
            left = column * (width + _GAP) + (width - clip.shape[2]) // 2
            video[:, top : top + clip.shape[1], left : left + clip.shape[2]] = held
    return video


def enlarge(video: Frames, factor: int) -> Frames:
    """Each pixel as ``factor`` x ``factor`` pixels."""
    return video.repeat(factor, axis=1).repeat(factor, axis=2)


def display_factor(height: int, width: int) -> int:
    """Whole number that makes a small clip large enough to look at."""
    return max(1, -(-_SMALL // min(height, width)))


def _tile_size(height: int, width: int) -> tuple[int, int]:
    factor: float = display_factor(height, width)
    if max(height, width) * factor > _LARGE:
        factor = min(1.0, _LARGE / max(height, width)) if factor == 1 else factor
    return round(height * factor), round(width * factor)


def _draw_group(
    page: Image.Image, place: tuple[int, int], group: Group, sheet: _Sheet, row_labels: Sequence[str]
) -> None:
    """Draw one caption and its rows of frames; ``place`` is left, top."""
    left, top = place
    caption, rows = group
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(_TEXT_SIZE)
    lines = _wrap(caption or "(no caption)", font, sheet.size[1])
    offset = (_LINES - len(lines)) * sheet.line
    draw.multiline_text((left, top + offset), "\n".join(lines), _INK, font, spacing=4)
    top += _LINES * sheet.line + 6
    height, width = sheet.tile
    for row, clip in enumerate(rows):
        y = top + row * (height + _GAP)
        if row < len(row_labels):
            draw.text((left, y + height // 2), row_labels[row], _FAINT, font, anchor="lm")
        for column, number in enumerate(np.linspace(0, len(clip) - 1, min(sheet.tiles, len(clip))).round().astype(int)):
            x = left + sheet.gutter + column * (width + _GAP)
            tile = _scaled(clip[number], sheet.tile)
            page.paste(tile, (x + (width - tile.width) // 2, y + (height - tile.height) // 2))


def _scaled(frame: Frames, tile: tuple[int, int]) -> Image.Image:
    """A frame as large as fits a tile: by a whole number where it grows."""
    height, width, _ = frame.shape
    factor = min(tile[0] / height, tile[1] / width)
    image = Image.fromarray(frame)
    if factor >= 1:
        return image.resize((width * int(factor), height * int(factor)), Image.Resampling.NEAREST)
    return image.resize((max(1, round(width * factor)), max(1, round(height * factor))), Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """At most ``_LINES`` lines of ``text`` that are at most ``width`` pixels wide; what is cut ends in dots."""
    lines = [""]
    words = text.split()
    for number, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < _LINES:
            lines.append(word)
        else:
            rest = lines[-1]
            while rest and font.getlength(rest + " ...") > width:
                rest = rest.rpartition(" ")[0]
            return [*lines[:-1], f"{rest} ..."] if number < len(words) else lines
    return lines
