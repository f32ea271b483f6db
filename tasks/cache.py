"""A cache of downloaded objects on the local disk, shared by all processes of a user.

An entry is one file, named by a digest of what identifies the content, so it never goes stale. It
is written beside and renamed. When the sum of all entries exceeds the limit, the ones used longest
ago go; on POSIX systems a file that somebody has open or mapped stays readable for them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final

from kpmask.errors import ConfigError
from tasks.storage import TEMPORARY_PREFIX, create_temporary, os_errors, sweep_temporaries

DEFAULT_LIMIT_BYTES: Final = 10 * 2**30


@dataclass(frozen=True, slots=True)
class FileCache:
    """Files under `folder`, at most `limit_bytes` of them, but always the newest one."""

    folder: Path
    limit_bytes: int

    def fetch(self, identity: str, name: str, download: Callable[[BinaryIO], None]) -> Path:
        """The file for `identity`, downloaded when it is not there yet.

        Args:
            identity: names the content, not only the place (a URI and its ETag).
            name: the object's name; its suffix is kept, since readers go by it.
            download: writes the content.
        """
        digest = hashlib.sha256(identity.encode()).hexdigest()
        suffix = PurePosixPath(name).suffix[:16]
        path = self.folder / digest[:2] / f"{digest}{suffix}"
        with os_errors(str(self.folder)):
            if _touched(path):
                return path
            with self._locked(digest[:2]):  # one download, however many processes want the file
                if not _touched(path):
                    _write(path, download)
            self._evict(keep=path)
        return path

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _evict(self, *, keep: Path) -> None:
        entries = []
        for folder in self.folder.glob("[0-9a-f][0-9a-f]"):
            sweep_temporaries(folder)
            entries += list(_entries(folder))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit_bytes:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


def _entries(folder: Path) -> Iterator[tuple[int, int, Path]]:
    for entry in os.scandir(folder):
        if entry.name.startswith(TEMPORARY_PREFIX):
            continue
        try:
            status = entry.stat()
        except FileNotFoundError:  # evicted by another process
            continue
        yield status.st_mtime_ns, status.st_size, Path(entry.path)


def _touched(path: Path) -> bool:
    """Whether the file is there; if so it counts as used just now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _write(path: Path, download: Callable[[BinaryIO], None]) -> None:
    temporary, file = create_temporary(path.parent)
    try:
        with file:
            download(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def user_cache() -> FileCache:
    """The user's cache: `KPMASK_CACHE`, else `kpmask` in the XDG cache folder.

    `KPMASK_CACHE_BYTES` bounds its size (10 GiB).

    Raises:
        ConfigError: `KPMASK_CACHE_BYTES` is not a number of bytes.
    """
    raw = os.environ.get("KPMASK_CACHE_BYTES", "")
    if raw and not raw.isdecimal():
        raise ConfigError(f"{raw!r} is not a number of bytes", subject="KPMASK_CACHE_BYTES")
    limit_bytes = int(raw) if raw else DEFAULT_LIMIT_BYTES
    return FileCache(folder=_user_folder() / "objects", limit_bytes=limit_bytes)


def _user_folder() -> Path:
    if os.environ.get("KPMASK_CACHE"):
        return Path(os.environ["KPMASK_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "kpmask"
    try:
        return Path.home() / ".cache" / "kpmask"
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.gettempdir()) / f"kpmask-{os.getuid()}"
