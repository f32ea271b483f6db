"""Tables of a run on this machine's disk: what all of them have, whatever they hold.

They are thrown away with the run. So no write waits for the disk, and there is no way back from
half a statement: whatever must outlive the run is in a store.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

from kpmask.errors import StorageError

BATCH: Final = 10_000
CACHE_KIB: Final = 64 * 1024


class SqliteBook:
    """A SQLite file at `path`, opened; for one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Many statements as one write; after an error the tables are of no use any more."""
        self._db.execute("BEGIN")
        yield
        self._db.execute("COMMIT")

    def _many(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        stream = iter(rows)
        # What `rows` raises, a store's error say, is raised between two transactions.
        while batch := list(itertools.islice(stream, BATCH)):
            with self._transaction():
                self._db.executemany(statement, batch)

    def _one(self, query: str, *values: Any) -> Any:  # noqa: ANN401 - a column's value
        return self._db.execute(query, values).fetchone()[0]


@contextmanager
def full_disks(path: Path) -> Iterator[None]:
    """Turn an error of SQLite's, at the file `path`, into a `StorageError`."""
    try:
        yield
    except sqlite3.OperationalError as error:
        full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
        raise StorageError(
            str(error),
            subject=str(path.parent),
            code="no_space" if full else "unavailable",
            hint="free some space; TMPDIR and KPMASK_CACHE say where tables are kept",
        ) from error
