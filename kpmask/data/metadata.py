"""Metadata tables of the published datasets (Tai-Chi-HD, VoxCeleb, NEMO): CSV in, rows out.

- Columns `video_id,start,end,bbox,fps,width,height,partition`, and where they are present
  `person_id` and `url`; others are ignored. `bbox` is `left-top-right-bottom`. Frame numbers
  (half-open) and boxes are in the reference video of that rate and size.
- Tables have any number of rows and come from strangers: they are read in one pass, a line at a
  time, and nothing is held. They may be packed by gzip.
- A table that lacks a column is a `ConfigError`. A row that makes no sense is a `Failure`, and
  the others go on: also behind a quote that nobody closed, or a line without end.
- Published tables are dirty. A row that repeats another is dropped as `duplicate_row`; a row that
  would write the clip of another, with another box, as `duplicate_name` (the first one stays). An
  identity in both splits stays in `test` and its `train` rows are refused, so that no test person
  is trained on. (That takes all rows at once: `iter_metadata` leaves it to whoever has them.)
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import operator
import re
import stat
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TextIO

from kpmask.data.crop import Box, inside_fraction
from kpmask.errors import ConfigError, RowError
from kpmask.records import Failure, Partition, SourceRow

REQUIRED_COLUMNS = ("video_id", "start", "end", "bbox", "fps", "width", "height", "partition")
MAX_ID_BYTES = 180  # a file name may have 255, and a clip's adds a person and two numbers
MIN_INSIDE_FRACTION = 0.5  # published boxes that leave the frame keep at least 0.83 of their area
MAX_NUMBER = 2**31 - 1
MAX_SPAN_FRAMES = 1_000_000  # 11 hours at 25 frames a second
MAX_URL_CHARS = 4096
MAX_LINE_CHARS = 65_536
MAX_LINES = 200_000_000  # a few packed kilobytes can unpack for ever
MAX_RECORD_LINES = 64  # a quoted cell may hold line breaks; a quote that is not closed holds all
_RATES = (0.01, 1000.0)
_MAX_NUMBER_CHARS = 40
_MAX_SHOWN_CHARS = 80

_BOX = re.compile(r"(\d{1,9})-(\d{1,9})-(\d{1,9})-(\d{1,9})", re.ASCII)


def iter_metadata(path: Path) -> Iterator[SourceRow | Failure]:
    """The rows of a table in the order of the file; a failure in the place of each bad one.

    One pass in bounded memory. Rows are not compared with each other.

    Raises:
        ConfigError: when the iteration begins: no such file, not a CSV text, or a column is
            missing. At its end: there were no rows at all, or the packed file is cut off.
    """
    with _opened(path) as file:
        lines = _Lines(file)
        columns = _columns(lines, path)
        num_rows = 0
        while (line := lines.read()) is not None:
            if line.isspace():
                continue
            num_rows += 1
            number = lines.number
            try:
                result: SourceRow | Failure = _row(_cells(line, lines), columns, number)
            except RowError as error:
                lines.give_back()
                result = _failure(path, number, error)
            lines.forget()
            yield result
    if num_rows == 0:
        raise ConfigError("the table has no rows", subject=str(path), code="nothing_to_do")


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
        raise RowError(f"{what} {shown(text)} is not a plain name", code="path_escape")
    if text.startswith("."):
        raise RowError(f"{what} {shown(text)} would be a hidden file", code="path_escape")
    if len(text.encode("utf-8", "surrogatepass")) > MAX_ID_BYTES:
        raise RowError(f"{what} is longer than {MAX_ID_BYTES} bytes")
    return text


def shown(text: str) -> str:
    """A stranger's text for a message: quoted, control characters escaped, of bounded length."""
    return repr(text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "…")


# --- lines -----------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A table as text; bytes that are not UTF-8 become lone surrogates."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError("not a file", subject=str(path))
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            binary = gzip.GzipFile(fileobj=file) if packed else file
            yield io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"the packed file is damaged: {error}", subject=str(path)) from error
    except OSError as error:
        raise ConfigError(error.strerror or str(error), subject=str(path)) from error


class _Lines:
    """The lines of a text, numbered from 1.

    Of a line longer than `MAX_LINE_CHARS` the beginning is given and the rest passed over.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._back: deque[str] = deque()
        self._more: list[str] = []  # lines of the record being read, behind its first
        self.number = 0  # of the line that was given last

    def read(self) -> str | None:
        """The next line; None at the end."""
        if self._back:
            line = self._back.popleft()
        else:
            line = self._file.readline(MAX_LINE_CHARS + 1)
            if not line:
                return None
            if len(line) > MAX_LINE_CHARS:
                self._pass_over(line)
            if self.number >= MAX_LINES:
                raise ConfigError(f"a table of more than {MAX_LINES} lines")
        self.number += 1
        return line

    def read_more(self) -> str | None:
        """The next line of a record of several lines; None where it has too many."""
        if len(self._more) >= MAX_RECORD_LINES - 1:
            return None
        line = self.read()
        if line is not None:
            self._more.append(line)
        return line

    def give_back(self) -> None:
        """Put back what `read_more` gave: it was no part of the record."""
        self._back.extendleft(reversed(self._more))
        self.number -= len(self._more)

    def forget(self) -> None:
        """The record is read."""
        if self._more:
            self._more = []

    def _pass_over(self, line: str) -> None:
        while line and not line.endswith("\n"):
            line = self._file.readline(MAX_LINE_CHARS)


def _cells(line: str, lines: _Lines) -> list[str]:
    """The cells of the record that begins with `line`; further lines of it are read.

    Raises:
        RowError: it is not CSV.
    """
    if '"' not in line:  # nearly all are so, and this is several times faster
        return _checked_line(line).rstrip("\n").split(",")
    reader = csv.reader(_record(line, lines), strict=True)
    try:
        return next(reader)
    except csv.Error as error:
        raise RowError(f"not CSV: {error}") from None


def _record(line: str | None, lines: _Lines) -> Iterator[str]:
    while line is not None:
        yield _checked_line(line)
        line = lines.read_more()


def _checked_line(line: str) -> str:
    if len(line) > MAX_LINE_CHARS:
        raise RowError(f"the line is longer than {MAX_LINE_CHARS} characters")
    if not line.isascii():
        try:
            line.encode()
        except UnicodeEncodeError:
            raise RowError("not UTF-8 text") from None
    return line


# --- columns ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where a table has its columns: `required` picks the cells of `REQUIRED_COLUMNS`."""

    count: int
    required: Callable[[Sequence[str]], tuple[str, ...]]
    person_id: int | None
    url: int | None


def _columns(lines: _Lines, path: Path) -> _Columns:
    """The header.

    Raises:
        ConfigError: it is none.
    """
    line = lines.read()
    while line is not None and line.isspace():
        line = lines.read()
    try:
        names = [] if line is None else [cell.strip() for cell in _cells(line, lines)]
    except RowError as error:
        raise ConfigError(error.cause, subject=str(path), hint="a CSV table is needed") from None
    lines.forget()
    known = (*REQUIRED_COLUMNS, "person_id", "url")
    missing = [name for name in REQUIRED_COLUMNS if name not in names]
    twice = [name for name in known if names.count(name) > 1]
    if missing or twice:
        what = "column missing" if missing else "column there twice"
        raise ConfigError(
            f"{what}: {', '.join(missing or twice)}",
            subject=str(path),
            hint=f"needed: {', '.join(REQUIRED_COLUMNS)}; optional: person_id, url",
        )
    return _Columns(
        count=len(names),
        required=operator.itemgetter(*map(names.index, REQUIRED_COLUMNS)),
        person_id=names.index("person_id") if "person_id" in names else None,
        url=names.index("url") if "url" in names else None,
    )


# --- rows ------------------------------------------------------------------------------------


def _row(cells: Sequence[str], columns: _Columns, line: int) -> SourceRow:
    """One row.

    Raises:
        RowError: what is wrong with it.
    """
    if len(cells) != columns.count:
        raise RowError("the row has more or fewer cells than the header")
    video_id, start_text, end_text, box, fps, width, height, partition = map(
        str.strip, columns.required(cells)
    )
    person_id = None if columns.person_id is None else cells[columns.person_id].strip() or None
    identity = checked_identity(video_id, person_id)
    start = _whole_number(start_text, "start")
    end = _whole_number(end_text, "end")
    if end <= start:
        raise RowError(f"the span is empty: start {start}, end {end}")
    if end - start > MAX_SPAN_FRAMES:
        raise RowError(f"the span has {end - start} frames, and {MAX_SPAN_FRAMES} is the most")
    size = _size(width, height)
    return SourceRow(
        line=line,
        video_id=video_id,
        partition=_partition(partition),
        identity=identity,
        start_frame=start,
        end_frame=end,
        bbox_px=_box(box, size),
        ref_fps=_rate(fps),
        ref_size_px=size,
        person_id=person_id,
        url=None if columns.url is None else _url(cells[columns.url].strip()),
    )


@lru_cache(maxsize=4096)
def checked_identity(video_id: str, person_id: str | None) -> str:
    """Who is in a row: its person where it names one, else its video.

    Raises:
        RowError: a name that is not a plain one.
    """
    checked_name(video_id, what="video_id")
    checked_name(raw_stem(video_id), what="video_id before '#'")
    if person_id is not None:
        checked_name(person_id, what="person_id")
    return person_id or raw_stem(video_id)


def _number(text: str, what: str) -> float:
    try:
        number = float(text) if len(text) <= _MAX_NUMBER_CHARS else math.nan
    except ValueError:
        raise RowError(f"{what} {shown(text)} is not a number") from None
    if not math.isfinite(number) or abs(number) > MAX_NUMBER:
        raise RowError(f"{what} {shown(text)} is out of range")
    return number


def _whole_number(text: str, what: str) -> int:
    """A whole number from 0; `12.0`, as some tools write it, is one."""
    if len(text) < 10 and text.isdecimal() and text.isascii():
        return int(text)
    number = _number(text, what)
    if number < 0 or number != int(number):
        raise RowError(f"{what} {shown(text)} is not a frame number or a size")
    return int(number)


@lru_cache(maxsize=1024)
def _size(width: str, height: str) -> tuple[int, int]:
    return _positive(width, "width"), _positive(height, "height")


def _positive(text: str, what: str) -> int:
    number = _whole_number(text, what)
    if number == 0:
        raise RowError(f"{what} is 0")
    return number


@lru_cache(maxsize=1024)
def _rate(text: str) -> float:
    rate = _number(text, "fps")
    if rate <= 0:
        raise RowError(f"fps {shown(text)} is not above 0")
    if not _RATES[0] <= rate <= _RATES[1]:
        raise RowError(f"fps {shown(text)} is out of range")
    return rate


def _partition(text: str) -> Partition:
    if text == "train":
        return "train"
    if text == "test":
        return "test"
    raise RowError(f"partition {shown(text)} is neither train nor test")


def _url(text: str) -> str | None:
    if len(text) > MAX_URL_CHARS:
        raise RowError(f"url is longer than {MAX_URL_CHARS} characters")
    return text or None


def _box(text: str, ref_size_px: tuple[int, int]) -> Box:
    match = _BOX.fullmatch(text)
    if match is None:
        raise RowError(f"bbox {shown(text)} is not left-top-right-bottom")
    left, top, right, bottom = map(int, match.groups())
    if right <= left or bottom <= top:
        raise RowError(f"bbox {text!r} has no area")
    width, height = ref_size_px
    box = (left, top, right, bottom)
    if right <= width and bottom <= height:
        return box
    if inside_fraction(box, frame_px=ref_size_px) < MIN_INSIDE_FRACTION:
        raise RowError(f"bbox {text!r} lies mostly outside the {width}x{height} frame")
    return box


# --- checks across rows ----------------------------------------------------------------------


def leaking_rows(rows: list[SourceRow]) -> dict[int, RowError]:
    """Training rows of identities that are tested on, by line."""
    tested = {row.identity for row in rows if row.partition == "test"}
    return {
        row.line: RowError(f"{row.identity!r} is in both splits; kept in test only")
        for row in rows
        if row.partition == "train" and row.identity in tested
    }


def _failure(path: Path, line: int, error: RowError) -> Failure:
    return Failure(
        item=f"{path.name}:{line}",
        stage="metadata",
        code=error.code,
        cause=error.cause,
        retryable=False,
        attempts=1,
    )
