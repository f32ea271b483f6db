"""Catalogs: which source is to move like which driving video.

- A table (CSV, or Parquet by its name's ending) with the columns `source` and `driving`, and
  optionally `name`, `motion`, `adapt_scale`, `best_frame`, `audio`, and how the result is cut and
  delivered: `crop`, `driving_crop` (rules, or left-top-right-bottom in pixels as displayed),
  `format`, `fps`, `paste_back`, `side_by_side`. An empty cell takes the job's value. A column of
  another name is refused: a misspelt one would be ignored otherwise.
- A relative path is taken from the catalog's own folder. Absolute paths and `s3://` or `file://`
  URIs are used as they are, since whoever wrote the catalog wrote them on purpose. `..` is refused
  in all of them.
- A row that makes no sense becomes a Failure, and the others go on.
- Tables have any number of rows and are read in one pass; no more is held than a few rows.
- Names label results. They are made of letters, digits and `._-`, and are unique without regard
  to case or to how an accent is written (Unicode's NFC). A given name that occurs twice fails its
  second row; a missing one is made from the two files' names, with a number where that is needed.
  That takes all rows at once: what is here has the parts of it, and holds no names.
"""

from __future__ import annotations

import csv
import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TextIO, get_args

from kpmask.config import CROP_RULES, FPS_RANGE
from kpmask.errors import ConfigError, RowError
from kpmask.records import (
    MAX_GIF_FPS,
    SOUNDLESS,
    SUFFIXES,
    CatalogRow,
    Delivery,
    Failure,
    Motion,
    OutputFormat,
    digest,
    parse_box,
)

COLUMNS = (
    *("source", "driving", "name", "motion", "adapt_scale", "best_frame", "audio"),
    *("crop", "driving_crop", "format", "fps", "paste_back", "side_by_side"),
)
REQUIRED = ("source", "driving")
SCHEMES = ("file", "s3")
MAX_NAME_LENGTH = 100
MAX_CELL_CHARS = 8192
MAX_LINE_CHARS = 131_072  # of a row, which may have several lines; no cell of `csv` is longer
PARQUET_ROWS = 1024  # that are held at once
STAGE = "catalog"
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True, slots=True)
class RowDefaults(Delivery):
    """What a row has where its cells are empty."""

    motion: Motion = "absolute"
    adapt_scale: bool = False
    best_frame: bool = False
    audio: bool = False


def iter_catalog(
    path: Path, defaults: RowDefaults, *, base: str | None = None
) -> Iterator[CatalogRow | Failure]:
    """The rows of a catalog in the order of the table; a failure in the place of each bad one.

    One pass in bounded memory. Rows are not compared with each other: a name is the given one,
    cleaned, or empty where none is given (`made_name`).

    Args:
        path: the table.
        base: folder or URI that relative paths are taken from; the table's folder if None.

    Raises:
        ConfigError: when the iteration begins: no such file, no table, a column is missing or
            unknown. Further on: what comes next is not a table any more, or there was no row.
    """
    if not path.is_file():
        raise ConfigError("no such catalog", subject=str(path))
    folder = str(path.parent) if base is None else base
    read = _parquet_rows if path.suffix.lower() == ".parquet" else _csv_rows
    num_rows = 0
    for line, cells in read(path):
        num_rows += 1
        yield _row_or_failure(line, cells, folder, defaults)
    if num_rows == 0:
        raise ConfigError("the catalog has no rows", subject=str(path), code="nothing_to_do")


def iter_grid(
    sources: Sequence[str], drivings: Sequence[str], defaults: RowDefaults
) -> Iterator[CatalogRow | Failure]:
    """Every source with every driving video, a driving video's rows together; without names.

    A file whose name is not Unicode is a failure of each of its rows.

    Raises:
        ConfigError: when the iteration begins: there is none of the one or of the other.
    """
    for given, subject in ((sources, "sources"), (drivings, "drivings")):
        if not given:
            raise ConfigError("nothing matches", subject=subject, code="nothing_to_do")
    delivery = defaults.delivery()
    for line, (driving, source) in enumerate(itertools.product(drivings, sources), start=1):
        try:
            for reference in (source, driving):
                _check_unicode(reference)
        except RowError as error:
            yield failure_of(_at(line, error))
            continue
        yield CatalogRow(
            line=line,
            name="",
            source=source,
            driving=driving,
            motion=defaults.motion,
            adapt_scale=defaults.adapt_scale,
            best_frame=defaults.best_frame,
            audio=defaults.audio and defaults.format not in SOUNDLESS,
            **delivery,
        )


def failure_of(error: RowError) -> Failure:
    """The failure row of a refused catalog row."""
    return Failure(
        item=error.subject,
        stage=STAGE,
        code=error.code,
        cause=error.cause,
        retryable=error.retryable,
        attempts=1,
    )


def resolve(reference: str, base: str) -> str:
    """A reference as a path or URI that stands by itself.

    Raises:
        RowError: it is empty, climbs with `..` or is not Unicode (path_escape), or has a scheme
            that is not ours.
    """
    if not reference or "\0" in reference:
        raise RowError("the reference is empty or has a NUL character")
    scheme, separator, rest = reference.partition("://")
    if separator and scheme not in SCHEMES:
        raise RowError(f"{scheme}:// is not among {', '.join(s + '://' for s in SCHEMES)}")
    parts = re.split(r"[/\\]", rest if separator else reference)
    if ".." in parts:
        raise RowError(f"{reference!r} climbs out of its folder", code="path_escape")
    if not separator and not reference.startswith("/"):
        reference = f"{base.rstrip('/')}/{reference}"
    _check_unicode(reference)
    return reference


def clean_name(text: str) -> str:
    """A name that is safe in file names and pages; empty if nothing is left of it."""
    text = unicodedata.normalize("NFC", text)
    kept = "".join(c if c.isalnum() or c in "._-" else "_" for c in text.strip())
    return re.sub(r"_+", "_", kept).strip("._")[:MAX_NAME_LENGTH]


# --- the table -------------------------------------------------------------------------------

Cells = Mapping[str, Any]
Read = Iterator[tuple[int, Cells | RowError]]  # by line; what is wrong with one that has no cells


def _csv_rows(path: Path) -> Read:
    columns: list[str] = []
    for line, row in csv_lines(path):
        if isinstance(row, RowError):
            if not columns:
                raise ConfigError(f"not a CSV table: {row.cause}", subject=str(path))
            yield line, row
        elif columns:
            cells: dict[str, Any] = dict(zip(columns, row, strict=False))
            if len(row) > len(columns):
                cells["too_many"] = len(row)
            yield line, cells
        else:
            columns = row
            _check_columns(columns, path)
    if not columns:
        raise ConfigError("the catalog is empty", subject=str(path), code="nothing_to_do")


def csv_lines(path: Path) -> Iterator[tuple[int, list[str] | RowError]]:
    """What is in each row that is not blank, by the number of its last line; cells are stripped.

    A row that is too long is a RowError in its place.

    Raises:
        ConfigError: the file cannot be read, or is not a CSV table.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = _Lines(file)
            reader = csv.reader(lines, strict=True)
            while (row := _next_row(reader, lines)) is not None:
                if isinstance(row, RowError):
                    yield lines.number, row
                    continue
                cells = [cell.strip() for cell in row]
                if any(cells):
                    yield lines.number, cells
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"not a CSV table: {error}", subject=str(path)) from error
    except OSError as error:
        raise ConfigError(error.strerror or str(error), subject=str(path)) from error


def _next_row(reader: Iterator[list[str]], lines: _Lines) -> list[str] | RowError | None:
    lines.begin_row()
    try:
        return next(reader, None)
    except RowError as error:  # out of `lines`; the reader begins its next row afresh
        return error


class _Lines:
    """The lines of a table, numbered from 1, of which no row holds more than `MAX_LINE_CHARS`.

    A longer line is passed over. A row of several lines that gets longer has a quote that nobody
    closed; which rows it hides cannot be known, and the table cannot be used.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._row_chars = 0
        self.number = 0  # of the line that was given last

    def begin_row(self) -> None:
        self._row_chars = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_LINE_CHARS + 1)
        if not line:
            raise StopIteration
        self.number += 1
        is_first = self._row_chars == 0
        self._row_chars += len(line)
        if self._row_chars <= MAX_LINE_CHARS:
            return line
        if not is_first:
            raise csv.Error(f"the quoted text before line {self.number} does not end")
        while line and not line.endswith(("\n", "\r")):
            line = self._file.readline(MAX_LINE_CHARS)
        raise RowError(f"the line has more than {MAX_LINE_CHARS} characters")


def _parquet_rows(path: Path) -> Read:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Pages are read as they are needed, and not a row group at once.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            _check_columns(file.schema_arrow.names, path)
            batches = file.iter_batches(batch_size=PARQUET_ROWS)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from enumerate(rows, start=1)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"not a Parquet table: {error}", subject=str(path)) from error


def _check_columns(columns: Sequence[str], path: Path) -> None:
    for name in REQUIRED:
        if name not in columns:
            raise ConfigError(f"the catalog has no column {name!r}", subject=str(path))
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown:
        raise ConfigError(
            f"unknown column {unknown[0]!r}; allowed: {', '.join(COLUMNS)}", subject=str(path)
        )
    if len(set(columns)) < len(columns):
        raise ConfigError("a column occurs twice", subject=str(path))


# --- a row -----------------------------------------------------------------------------------


def _row_or_failure(
    line: int, cells: Cells | RowError, base: str, defaults: RowDefaults
) -> CatalogRow | Failure:
    try:
        if isinstance(cells, RowError):
            raise cells
        return _parsed(line, cells, base, defaults)
    except RowError as error:
        return failure_of(_at(line, error))


def _at(line: int, error: RowError) -> RowError:
    return RowError(error.cause, subject=f"line {line}", code=error.code)


def _parsed(line: int, cells: Cells, base: str, defaults: RowDefaults) -> CatalogRow:
    if "too_many" in cells:
        raise RowError(f"{cells['too_many']} cells are more than the table has columns")
    for column, value in cells.items():
        if isinstance(value, str) and len(value) > MAX_CELL_CHARS:
            raise RowError(f"{column} has more than {MAX_CELL_CHARS} characters")
    motion = _motion(cells.get("motion"), defaults.motion)
    relative = motion == "relative"
    given_name = str(cells.get("name") or "")
    name = _told_apart(given_name)
    if given_name and not name:
        raise RowError(f"nothing of the name {given_name[:MAX_NAME_LENGTH]!r} can be used")
    adapt_scale = _flag("adapt_scale", cells.get("adapt_scale"))
    best_frame = _flag("best_frame", cells.get("best_frame"))
    if not relative and (adapt_scale or best_frame):
        raise RowError("adapt_scale and best_frame need motion=relative")
    audio = _flag("audio", cells.get("audio"))
    delivery = _delivery(cells, defaults)
    if audio and delivery.format in SOUNDLESS:
        raise RowError(f"audio: a {delivery.format} has no sound")
    return CatalogRow(
        line=line,
        name=name,
        source=_reference("source", cells, base),
        driving=_reference("driving", cells, base),
        motion=motion,
        # The job's own wishes are for its relative rows; they mean nothing to the others.
        adapt_scale=relative and (defaults.adapt_scale if adapt_scale is None else adapt_scale),
        best_frame=relative and (defaults.best_frame if best_frame is None else best_frame),
        # So is its wish for sound: for the rows whose file can have it.
        audio=(defaults.audio if audio is None else audio) and delivery.format not in SOUNDLESS,
        **delivery.delivery(),
    )


def _delivery(cells: Cells, defaults: RowDefaults) -> Delivery:
    paste_back = _flag("paste_back", cells.get("paste_back"))
    side_by_side = _flag("side_by_side", cells.get("side_by_side"))
    form, fps = _format(cells.get("format")), _fps(cells.get("fps"))
    delivery = Delivery(
        crop=_crop("crop", cells) or defaults.crop,
        driving_crop=_crop("driving_crop", cells) or defaults.driving_crop,
        format=defaults.format if form is None else form,
        fps=defaults.fps if fps is None else fps,
        paste_back=defaults.paste_back if paste_back is None else paste_back,
        side_by_side=defaults.side_by_side if side_by_side is None else side_by_side,
    )
    if delivery.format == "gif" and (delivery.fps or 0) > MAX_GIF_FPS:
        raise RowError(f"fps: a gif has at most {MAX_GIF_FPS:g} frames/s, not {delivery.fps:g}")
    return delivery


def _crop(column: str, cells: Cells) -> str:
    """The cell's rule or box; empty where it is."""
    text = str(cells.get(column) or "")
    try:
        known = not text or text in CROP_RULES[column] or parse_box(text) is not None
    except ValueError as error:
        raise RowError(f"{column}: {error}") from None
    if not known:
        allowed = ", ".join(CROP_RULES[column])
        raise RowError(f"{column} must be {allowed} or left-top-right-bottom, not {text!r}")
    return text


def _format(value: Any) -> OutputFormat | None:  # noqa: ANN401 - a table's cell
    if value is None or value == "":
        return None
    for form in SUFFIXES:
        if value == form:
            return form
    raise RowError(f"format must be one of {', '.join(SUFFIXES)}, not {value!r}")


def _fps(value: Any) -> float | None:  # noqa: ANN401 - a table's cell
    if value is None or value == "":
        return None
    try:
        fps = float(value)
    except (TypeError, ValueError):
        fps = 0.0
    if not FPS_RANGE[0] <= fps <= FPS_RANGE[1]:  # false for NaN, too
        raise RowError(f"fps must be {FPS_RANGE[0]:g} to {FPS_RANGE[1]:g}, not {value!r}")
    return fps


def _told_apart(given_name: str) -> str:
    """The name to use; of one that is too long, its beginning and a digest of all of it."""
    given_name = unicodedata.normalize("NFC", given_name.strip())
    name = clean_name(given_name)
    if len(given_name) <= MAX_NAME_LENGTH or len(name) < MAX_NAME_LENGTH:
        return name
    return f"{name[: MAX_NAME_LENGTH - 9]}-{digest(given_name)[:8]}"


def _reference(column: str, cells: Cells, base: str) -> str:
    value = cells.get(column)
    if not isinstance(value, str) or not value:
        raise RowError(f"{column} is empty" if not value else f"{column} is not a text")
    try:
        return resolve(value, base)
    except RowError as error:
        raise RowError(f"{column}: {error.cause}", code=error.code) from None


def _check_unicode(reference: str) -> None:
    """Refuse what neither a table nor an object store can hold: a file name of stray bytes."""
    try:
        reference.encode()
    except UnicodeEncodeError:
        raise RowError(f"{reference!a} is not Unicode", code="path_escape") from None


def _motion(value: Any, default: Motion) -> Motion:  # noqa: ANN401 - a table's cell
    if value is None or value == "":
        return default
    for motion in get_args(Motion):
        if value == motion:
            return motion  # type: ignore[no-any-return]
    raise RowError(f"motion must be one of {', '.join(get_args(Motion))}, not {value!r}")


def _flag(column: str, value: Any) -> bool | None:  # noqa: ANN401 - a table's cell
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        return value
    flag = _TRUTH.get(str(value).lower())
    if flag is None:
        raise RowError(f"{column} must be true or false, not {value!r}")
    return flag


# --- names -----------------------------------------------------------------------------------


def made_name(row: CatalogRow) -> str:
    """The name of a row that was given none: the two files' names.

    Where it is taken already, without regard to case, it ends in the first free of -2, -3, ...
    """
    return f"{_stem(row.source)}--{_stem(row.driving)}"[:MAX_NAME_LENGTH]


@lru_cache(maxsize=65_536)
def _stem(reference: str) -> str:
    return clean_name(PurePosixPath(reference).stem) or "unnamed"


def duplicate_name(row: CatalogRow) -> Failure:
    """The failure of a row whose given name an earlier row was given."""
    cause = f"the name {row.name!r} occurs twice"
    return failure_of(RowError(cause, subject=f"line {row.line}", code="duplicate_name"))
