"""What there is to prepare: videos and images with captions, from a folder or a table.

Owns the reading of SOURCE of ``megavid prepare`` into ``SourceItem``; opens no video.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megavid.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from megavid.errors import DataError

_OWN_COLUMNS = ("path", "caption", "start_s", "end_s")
RESERVED_COLUMNS = (
    "source", "frames", "height", "width", "video_frame_rate", "text_ids", "key", "frame_rate", "shape", "text_shape",
    "dtype", "hash", "tokenizer", "known", "image_shape",
)  # fmt: skip
"""Names under which a shard says of a sample what ``prepare`` found out; a column of such a name would be lost."""


@dataclass(frozen=True, slots=True)
class SourceItem:
    """One video, part of a video, or image."""

    file: Path
    caption: str
    """Empty for none."""
    start_s: float = 0.0
    """Where the part begins, seconds from the video's beginning."""
    end_s: float | None = None
    """Where it ends; None for the video's end."""
    fields: Mapping[str, object] = field(default_factory=dict)
    """Other columns of the table (licence, filter scores, ...), kept in the shards."""

    @property
    def is_image(self) -> bool:
        """Whether it is an image, by its suffix."""
        return self.file.suffix.lower() in IMAGE_SUFFIXES


def read_source(source: Path) -> list[SourceItem]:
    """Everything in a source, in an order that depends on its content only.

    Args:
        source: a folder of videos and images, searched with its subfolders, the caption of ``NAME.mp4`` in
            ``NAME.txt`` beside it; or a table, ``.jsonl`` (one object per line) or ``.parquet``, with a column
            ``path`` (relative ones count from the table's folder), and optionally ``caption``, ``start_s``,
            ``end_s`` and any others but ``RESERVED_COLUMNS``.

    Raises:
        DataError: it is none of these, a row is malformed, or there is nothing in it.
    """
    if source.is_dir():
        items = list(_folder_items(source))
    elif source.suffix.lower() == ".jsonl":
        items = [_row_item(row, where, source.parent) for where, row in _jsonl_rows(source)]
    elif source.suffix.lower() == ".parquet":
        items = [_row_item(row, where, source.parent) for where, row in _parquet_rows(source)]
    elif source.exists():
        raise DataError(f"{source} is neither a folder nor a .jsonl or .parquet table of path and caption")
    else:
        raise DataError(f"{source} does not exist; SOURCE is a folder of videos and images or a table of them")
    if not items:
        raise DataError(f"{source} holds no video or image ({', '.join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))})")
    return items


def _folder_items(folder: Path) -> Iterator[SourceItem]:
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES and file.is_file():
            text = file.with_suffix(".txt")
            yield SourceItem(file, _one_line(_read_text(text)) if text.exists() else "")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _jsonl_rows(table: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(_read_text(table).splitlines(), 1):
        if line.strip():
            try:
                yield f"{table}:{number}", json.loads(line)
            except ValueError as error:
                raise DataError(f"{table}:{number} is not JSON: {error}") from error


def _parquet_rows(table: Path) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{table} needs pyarrow, which is not installed; pip install pyarrow, or write the table as .jsonl"
        ) from error
    try:
        rows = pyarrow.parquet.read_table(table).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{table} cannot be read as Parquet: {error}".splitlines()[0]) from error
    for number, row in enumerate(rows, 1):
        # Parquet holds dates and decimals, which JSON does not: keep them as text.
        yield f"{table} row {number}", json.loads(json.dumps(row, default=str))


def _row_item(row: object, where: str, folder: Path) -> SourceItem:
    match row:
        case {"path": str(path), **rest}:
            if taken := [name for name in RESERVED_COLUMNS if name in rest]:
                raise DataError(
                    f"{where}: shards have {', '.join(taken)} of their own; rename, such as {taken[0]} to "
                    f"source_{taken[0]}. Taken names: {', '.join(RESERVED_COLUMNS)}"
                )
            caption = rest.get("caption")
            start, end = rest.get("start_s") or 0.0, rest.get("end_s")
            if not isinstance(caption, str | None):
                raise DataError(f"{where}: caption must be text, got {caption!r}")
            if not isinstance(start, int | float) or not isinstance(end, int | float | None):
                raise DataError(f"{where}: start_s and end_s must be seconds, got {start!r} and {end!r}")
            if start < 0 or (end is not None and end <= start):
                raise DataError(f"{where}: start_s = {start} must be at least 0 and below end_s = {end}")
            fields = {str(name): value for name, value in rest.items() if name not in _OWN_COLUMNS}
            return SourceItem(folder / path, _one_line(caption or ""), float(start), end, fields)
    raise DataError(f"{where}: a row is an object with a text 'path', got {str(row)[:80]}")
