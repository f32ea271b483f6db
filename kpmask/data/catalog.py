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
- Names label results. They are made of letters, digits and `._-`, and are unique without regard
  to case or to how an accent is written (Unicode's NFC). A given name that occurs twice fails its
  second row; a missing one is made from the two files' names, with a number where that is needed.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, get_args

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
STAGE = "catalog"
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True, slots=True)
class RowDefaults(Delivery):
    """What a row has where its cells are empty."""

    motion: Motion = "absolute"
    adapt_scale: bool = False
    best_frame: bool = False
    audio: bool = False


def read_catalog(
    path: Path, defaults: RowDefaults, *, base: str | None = None
) -> tuple[list[CatalogRow], list[Failure]]:
    """The rows of a catalog and the failures of those that make no sense.

    Args:
        path: the table.
        base: folder or URI that relative paths are taken from; the table's folder if None.

    Raises:
        ConfigError: no such file, no table, a column is missing or unknown, or no row at all.
    """
    columns, cells = _read_table(path)
    _check_columns(columns, path)
    folder = str(path.parent) if base is None else base
    rows: list[CatalogRow] = []
    failures: list[Failure] = []
    for line, row in cells:
        try:
            rows.append(_parse_row(line, row, folder, defaults))
        except RowError as error:
            failures.append(failure_of(error))
    if not rows and not failures:
        raise ConfigError("the catalog has no rows", subject=str(path), code="nothing_to_do")
    named, duplicates = _with_unique_names(rows)
    return named, [*failures, *duplicates]


def grid_rows(
    sources: Sequence[str], drivings: Sequence[str], defaults: RowDefaults
) -> list[CatalogRow]:
    """Every source with every driving video, a driving video's rows together.

    Raises:
        ConfigError: there is none of the one or of the other.
    """
    for given, subject in ((sources, "sources"), (drivings, "drivings")):
        if not given:
            raise ConfigError("nothing matches", subject=subject, code="nothing_to_do")
    pairs = itertools.product(drivings, sources)
    rows = [
        CatalogRow(
            line=line,
            name="",
            source=source,
            driving=driving,
            motion=defaults.motion,
            adapt_scale=defaults.adapt_scale,
            best_frame=defaults.best_frame,
            audio=defaults.audio and defaults.format not in SOUNDLESS,
            **defaults.delivery(),
        )
        for line, (driving, source) in enumerate(pairs, start=1)
    ]
    return _with_unique_names(rows)[0]


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
        RowError: it is empty, climbs with `..` (path_escape), or has a scheme that is not ours.
    """
    if not reference or "\0" in reference:
        raise RowError("the reference is empty or has a NUL character")
    scheme, separator, rest = reference.partition("://")
    if separator and scheme not in SCHEMES:
        raise RowError(f"{scheme}:// is not among {', '.join(s + '://' for s in SCHEMES)}")
    parts = re.split(r"[/\\]", rest if separator else reference)
    if ".." in parts:
        raise RowError(f"{reference!r} climbs out of its folder", code="path_escape")
    if separator or reference.startswith("/"):
        return reference
    return f"{base.rstrip('/')}/{reference}" if base != "/" else f"/{reference}"


def clean_name(text: str) -> str:
    """A name that is safe in file names and pages; empty if nothing is left of it."""
    text = unicodedata.normalize("NFC", text)
    kept = "".join(c if c.isalnum() or c in "._-" else "_" for c in text.strip())
    return re.sub(r"_+", "_", kept).strip("._")[:MAX_NAME_LENGTH]


# --- the table -------------------------------------------------------------------------------

Cells = Mapping[str, Any]


def _read_table(path: Path) -> tuple[list[str], Iterable[tuple[int, Cells]]]:
    """Column names, and (line, cells) of each row that is not blank."""
    if not path.is_file():
        raise ConfigError("no such catalog", subject=str(path))
    return _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)


def _read_csv(path: Path) -> tuple[list[str], Iterable[tuple[int, Cells]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"not a CSV table: {error}", subject=str(path)) from error
    lines = [(line, row) for line, row in lines if any(row)]
    if not lines:
        raise ConfigError("the catalog is empty", subject=str(path), code="nothing_to_do")
    columns = lines[0][1]
    return columns, _csv_cells(columns, lines[1:])


def _csv_cells(columns: list[str], lines: list[tuple[int, list[str]]]) -> Iterator[tuple[int, Any]]:
    for line, row in lines:
        cells: dict[str, Any] = dict(zip(columns, row, strict=False))
        if len(row) > len(columns):
            cells["too_many"] = len(row)
        yield line, cells


def _read_parquet(path: Path) -> tuple[list[str], Iterable[tuple[int, Cells]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"not a Parquet table: {error}", subject=str(path)) from error
    return table.column_names, enumerate(table.to_pylist(), start=1)


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


def _parse_row(line: int, cells: Cells, base: str, defaults: RowDefaults) -> CatalogRow:
    try:
        return _parsed(line, cells, base, defaults)
    except RowError as error:
        raise RowError(error.cause, subject=f"line {line}", code=error.code) from None


def _parsed(line: int, cells: Cells, base: str, defaults: RowDefaults) -> CatalogRow:
    if "too_many" in cells:
        raise RowError(f"{cells['too_many']} cells are more than the table has columns")
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


def _with_unique_names(rows: Sequence[CatalogRow]) -> tuple[list[CatalogRow], list[Failure]]:
    """Rows with a name each, and failures of those whose given name was taken."""
    taken: set[str] = set()
    failures: list[Failure] = []
    for row in rows:
        if row.name.casefold() in taken:
            error = RowError(
                f"the name {row.name!r} occurs twice",
                subject=f"line {row.line}",
                code="duplicate_name",
            )
            failures.append(failure_of(error))
        elif row.name:
            taken.add(row.name.casefold())
    failed = {failure.item for failure in failures}
    next_number: Counter[str] = Counter()
    named = [
        dataclasses.replace(row, name=row.name or _made_name(row, taken, next_number))
        for row in rows
        if f"line {row.line}" not in failed
    ]
    return named, failures


def _made_name(row: CatalogRow, taken: set[str], next_number: Counter[str]) -> str:
    """The two files' names; the second of a kind ends in -2, and so on."""
    stems = (PurePosixPath(reference).stem for reference in (row.source, row.driving))
    base = "--".join(clean_name(stem) or "unnamed" for stem in stems)[:MAX_NAME_LENGTH]
    name = base
    while name.casefold() in taken:
        next_number[base] += 1
        name = f"{base}-{next_number[base] + 1}"
    taken.add(name.casefold())
    return name
