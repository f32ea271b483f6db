"""Metadata tables of the published datasets (Tai-Chi-HD, VoxCeleb, NEMO): CSV in, rows out.

- Columns `video_id,start,end,bbox,fps,width,height,partition`, and where they are present
  `person_id` and `url`; others are ignored. `bbox` is `left-top-right-bottom`. Frame numbers
  (half-open) and boxes are in the reference video of that rate and size.
- A table that lacks a column is a `ConfigError`. A row that makes no sense is a `Failure`, and
  the others go on.
- Published tables are dirty. A row that repeats another is dropped as `duplicate_row`; a row that
  would write the clip of another, with another box, as `duplicate_name` (the first one stays). An
  identity in both splits stays in `test` and its `train` rows are refused, so that no test person
  is trained on.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from pathlib import Path

from kpmask.data.crop import Box, inside_fraction
from kpmask.errors import ConfigError, RowError
from kpmask.records import Failure, Partition, SourceRow

REQUIRED_COLUMNS = ("video_id", "start", "end", "bbox", "fps", "width", "height", "partition")
MAX_ID_BYTES = 180  # a file name may have 255, and a clip's adds a person and two numbers
MIN_INSIDE_FRACTION = 0.5  # published boxes that leave the frame keep at least 0.83 of their area
MAX_NUMBER = 2**31 - 1

_BOX = re.compile(r"(\d{1,9})-(\d{1,9})-(\d{1,9})-(\d{1,9})", re.ASCII)


def read_metadata(path: Path) -> tuple[list[SourceRow], list[Failure]]:
    """The usable rows of a table in the order of the file, and a failure for every other row.

    Raises:
        ConfigError: no such file, not a CSV text, no rows at all, or a column is missing.
    """
    rows: list[SourceRow] = []
    failures: list[Failure] = []
    reader = _open_table(path)
    num_lines = 0
    try:
        for cells in reader:
            num_lines += 1
            line = reader.line_num
            try:
                rows.append(parse_row(cells, line))
            except RowError as error:
                failures.append(_failure(path, line, error))
    except csv.Error as error:
        raise ConfigError(f"line {reader.line_num}: not CSV: {error}", subject=str(path)) from None
    if num_lines == 0:
        raise ConfigError("the table has no rows", subject=str(path), code="nothing_to_do")
    for check in (_repeated_rows, leaking_rows, _repeated_names):
        refused = check(rows)
        rows = [row for row in rows if row.line not in refused]
        failures += [_failure(path, line, error) for line, error in refused.items()]
    return rows, sorted(failures, key=lambda failure: int(failure.item.rpartition(":")[2]))


def clip_name(row: SourceRow, *, start_frame: int | None, end_frame: int | None) -> str:
    """The original code's name of a clip, without the extension.

    `[person_id#]` + the parts of the video id split at `#`, in reverse + `#start#end`.
    """
    parts = row.video_id.split("#")[::-1]
    if row.person_id is not None:
        parts.insert(0, row.person_id)
    if start_frame is not None and end_frame is not None:
        parts += [f"{start_frame:06d}", f"{end_frame:06d}"]
    return "#".join(parts)


def raw_stem(video_id: str) -> str:
    """The file name, without extension, of the raw video of an id: the part before any `#`."""
    return video_id.split("#")[0]


def checked_name(text: str, *, what: str) -> str:
    """`text` if it can be one part of a file's path and nothing else.

    Raises:
        RowError: `path_escape` where it could name something outside; `bad_row` where it is
            empty or too long.
    """
    if not text:
        raise RowError(f"{what} is empty")
    if "/" in text or "\\" in text or text in {".", ".."} or not text.isprintable():
        raise RowError(f"{what} {text!r} is not a plain name", code="path_escape")
    if text.startswith("."):
        raise RowError(f"{what} {text!r} would be a hidden file", code="path_escape")
    if len(text.encode("utf-8", "surrogatepass")) > MAX_ID_BYTES:
        raise RowError(f"{what} is longer than {MAX_ID_BYTES} bytes")
    return text


def parse_row(cells: Mapping[str | None, str | list[str] | None], line: int) -> SourceRow:
    """One row.

    Raises:
        RowError: what is wrong with it.
    """
    if None in cells or any(cells.get(name) is None for name in REQUIRED_COLUMNS):
        raise RowError("the row has more or fewer cells than the header")
    cell = {str(key): str(value).strip() for key, value in cells.items() if value is not None}
    video_id = checked_name(cell["video_id"], what="video_id")
    checked_name(raw_stem(video_id), what="video_id before '#'")
    person_id = cell.get("person_id") or None
    if person_id is not None:
        checked_name(person_id, what="person_id")
    start = _whole_number(cell["start"], "start")
    end = _whole_number(cell["end"], "end")
    if end <= start:
        raise RowError(f"the span is empty: start {start}, end {end}")
    size = (_positive(cell["width"], "width"), _positive(cell["height"], "height"))
    return SourceRow(
        line=line,
        video_id=video_id,
        partition=_partition(cell["partition"]),
        identity=person_id or raw_stem(video_id),
        start_frame=start,
        end_frame=end,
        bbox_px=_box(cell["bbox"], size),
        ref_fps=_rate(cell["fps"]),
        ref_size_px=size,
        person_id=person_id,
        url=cell.get("url") or None,
    )


def _open_table(path: Path) -> csv.DictReader[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(error.strerror or str(error), subject=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError("not UTF-8 text", subject=str(path)) from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        header = reader.fieldnames or []
    except csv.Error as error:
        raise ConfigError(f"not CSV: {error}", subject=str(path)) from None
    reader.fieldnames = [name.strip() for name in header]
    missing = [name for name in REQUIRED_COLUMNS if name not in reader.fieldnames]
    if missing:
        raise ConfigError(
            f"column missing: {', '.join(missing)}",
            subject=str(path),
            hint=f"needed: {', '.join(REQUIRED_COLUMNS)}; optional: person_id, url",
        )
    return reader


def _number(text: str, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise RowError(f"{what} {text!r} is not a number") from None
    if not math.isfinite(number) or abs(number) > MAX_NUMBER:
        raise RowError(f"{what} {text!r} is out of range")
    return number


def _whole_number(text: str, what: str) -> int:
    """A whole number from 0; `12.0`, as some tools write it, is one."""
    number = _number(text, what)
    if number < 0 or number != int(number):
        raise RowError(f"{what} {text!r} is not a frame number or a size")
    return int(number)


def _positive(text: str, what: str) -> int:
    number = _whole_number(text, what)
    if number == 0:
        raise RowError(f"{what} is 0")
    return number


def _rate(text: str) -> float:
    rate = _number(text, "fps")
    if rate <= 0:
        raise RowError(f"fps {text!r} is not above 0")
    return rate


def _partition(text: str) -> Partition:
    if text == "train":
        return "train"
    if text == "test":
        return "test"
    raise RowError(f"partition {text!r} is neither train nor test")


def _box(text: str, ref_size_px: tuple[int, int]) -> Box:
    match = _BOX.fullmatch(text)
    if match is None:
        raise RowError(f"bbox {text!r} is not left-top-right-bottom")
    left, top, right, bottom = (int(group) for group in match.groups())
    if right <= left or bottom <= top:
        raise RowError(f"bbox {text!r} has no area")
    box = (left, top, right, bottom)
    if inside_fraction(box, frame_px=ref_size_px) < MIN_INSIDE_FRACTION:
        width, height = ref_size_px
        raise RowError(f"bbox {text!r} lies mostly outside the {width}x{height} frame")
    return box


def _repeated_rows(rows: list[SourceRow]) -> dict[int, RowError]:
    """Rows that say what an earlier one says, by line."""
    first: dict[object, int] = {}
    refused = {}
    for row in rows:
        key = tuple(getattr(row, name) for name in SourceRow.__slots__ if name != "line")
        if key in first:
            refused[row.line] = RowError(f"repeats line {first[key]}", code="duplicate_row")
        first.setdefault(key, row.line)
    return refused


def leaking_rows(rows: list[SourceRow]) -> dict[int, RowError]:
    """Training rows of identities that are tested on, by line."""
    tested = {row.identity for row in rows if row.partition == "test"}
    return {
        row.line: RowError(f"{row.identity!r} is in both splits; kept in test only")
        for row in rows
        if row.partition == "train" and row.identity in tested
    }


def _repeated_names(rows: list[SourceRow]) -> dict[int, RowError]:
    """Rows whose clip would have the name of an earlier row's, by line."""
    first: dict[str, int] = {}
    refused = {}
    for row in rows:
        name = clip_name(row, start_frame=row.start_frame, end_frame=row.end_frame)
        if name in first:
            cause = f"the clip {name!r} is line {first[name]}'s already"
            refused[row.line] = RowError(cause, code="duplicate_name")
        first.setdefault(name, row.line)
    return refused


def _failure(path: Path, line: int, error: RowError) -> Failure:
    return Failure(
        item=f"{path.name}:{line}",
        stage="metadata",
        code=error.code,
        cause=error.cause,
        retryable=False,
        attempts=1,
    )
