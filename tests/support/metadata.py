"""All rows of a table of clips in memory: what reading it in one pass has to come to."""

from __future__ import annotations

from pathlib import Path

from kpmask.data.metadata import clip_name, iter_metadata, leaking_rows
from kpmask.errors import RowError
from kpmask.records import Failure, SourceRow


def read_metadata(path: Path) -> tuple[list[SourceRow], list[Failure]]:
    """The usable rows of a table in the order of the file, and a failure for every other row.

    Raises:
        ConfigError: as `iter_metadata`.
    """
    rows: list[SourceRow] = []
    failures: list[Failure] = []
    for result in iter_metadata(path):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            rows.append(result)
    for check in (_repeated_rows, leaking_rows, _repeated_names):
        refused = check(rows)
        rows = [row for row in rows if row.line not in refused]
        failures += [
            Failure(f"{path.name}:{line}", "metadata", error.code, error.cause, False, 1)
            for line, error in refused.items()
        ]
    return rows, sorted(failures, key=lambda failure: int(failure.item.rpartition(":")[2]))


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
