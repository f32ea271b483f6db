"""Digests of inputs, kept between runs in the user's cache.

To start a catalog again, all of its images and videos must be known by their content; to read a
million of them takes hours. What was read once, and is in its place unchanged, is not read again.

- A place is a path or URI. Whether it has changed is told by its version (`version`): of a file the
  inode, size and times, of an object in a store the ETag, of a folder that of all its files.
- Times of files are coarse: one that was written a moment ago could change and look the same. It
  is not kept, and neither is what changed while it was read.
- Any number of processes may share the file. Any trouble with it means reading again.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple, Self

from kpmask.errors import StorageError
from kpmask.records import digest
from tasks import storage
from tasks.cache import user_cache

log = logging.getLogger(__name__)

MAX_ROWS: Final = 1_000_000  # some 250 bytes each
ROWS_BETWEEN_SWEEPS: Final = 1000
WAIT_S: Final = 10.0  # for another process that writes
SETTLED_NS: Final = 2_000_000_000  # the coarsest clock of a file system in use, FAT's
_SERVER: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_CONFIG_FILE")

_TABLE: Final = """
CREATE TABLE IF NOT EXISTS hash
    (id INTEGER PRIMARY KEY, uri TEXT UNIQUE, version TEXT, sha256 TEXT, num_frames INT)
"""


class Known(NamedTuple):
    """What was found of an input; `num_frames` is None where nobody asked for it."""

    sha256: str
    num_frames: int | None


class HashCache:
    """What is known of inputs, in a SQLite file at `path`; for any number of threads.

    It holds the `max_rows` that were found last.
    """

    def __init__(self, path: Path, *, max_rows: int = MAX_ROWS) -> None:
        self._path = path
        self._max_rows = max_rows
        self._num_added = 0
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        with self._troubles():
            path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(
                path, timeout=WAIT_S, isolation_level=None, check_same_thread=False
            )
            self._db = db
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(_TABLE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._troubles():
            self._sweep()
        if self._db is not None:
            self._db.close()
            self._db = None

    @contextmanager
    def _troubles(self) -> Iterator[None]:
        """Go on without the file where it cannot be used."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            log.warning("%s cannot be used, and inputs are read again: %s", self._path, error)
            if self._db is not None:
                self._db.close()
                self._db = None

    def get(self, uri: str, version: str) -> Known | None:
        """What was found at `uri` when it was at this version."""
        found = None
        with self._lock, self._troubles():
            if self._db is not None:
                query = "SELECT sha256, num_frames FROM hash WHERE uri = ? AND version = ?"
                found = self._db.execute(query, (uri, version)).fetchone()
        return None if found is None else Known(*found)

    def put(self, uri: str, version: str, known: Known) -> None:
        """Keep what was found; what was known of another version is forgotten."""
        with self._lock, self._troubles():
            if self._db is None:
                return
            self._db.execute(
                "INSERT OR REPLACE INTO hash (uri, version, sha256, num_frames)"
                " VALUES (?, ?, ?, ?)",
                (uri, version, *known),
            )
            self._num_added += 1
            if self._num_added % ROWS_BETWEEN_SWEEPS == 0:
                self._sweep()

    def _sweep(self) -> None:
        """Remove the oldest rows. Ids grow, and a replaced row gets a new one."""
        if self._db is not None:
            statement = "DELETE FROM hash WHERE id <= (SELECT MAX(id) FROM hash) - ?"
            self._db.execute(statement, (self._max_rows,))


def user_hashes() -> HashCache:
    """The user's own.

    Raises:
        ConfigError: the variables of the cache make no sense.
    """
    return HashCache(user_cache().folder.parent / "hashes.sqlite")


# --- versions --------------------------------------------------------------------------------


def version(uri: str) -> str | None:
    """What changes when the content at `uri` does; None where it cannot be told, or is not there.

    Raises:
        ConfigError: it is no URI of ours.
        StorageError: path_escape; or the store denies or does not answer.
    """
    store, key = storage.open_object(uri)
    if "://" not in store.uri:
        return _local_version(Path(store.uri) / key)
    try:
        return f"{_server()} {store.info(key).etag}"
    except StorageError as error:
        if error.code != "not_found":
            raise
    found = [(i.key, i.etag) for i in store.child(key).list() if "/" not in i.key]
    return f"{_server()} {digest(found)}" if found else None


def _server() -> str:
    """ETags of two servers mean two things. A digest, for an address may hold a password."""
    return digest([os.environ.get(name, "") for name in _SERVER])[:8]


def _local_version(path: Path) -> str | None:
    try:
        if not path.is_dir():
            return _file_version(path)
        files = [p for p in sorted(path.iterdir()) if p.is_file() and not p.name.startswith(".")]
        versions = [(file.name, _file_version(file)) for file in files]
    except OSError:  # which reading it tells, better than we can
        return None
    return None if any(v is None for _, v in versions) else digest(versions)


def _file_version(path: Path) -> str | None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return None
    changed_ns = max(status.st_mtime_ns, status.st_ctime_ns)
    if time.time_ns() - changed_ns < SETTLED_NS:
        return None
    return f"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}-{status.st_ctime_ns:x}"
