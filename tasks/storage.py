"""The object store seam: a local folder and S3 behind one protocol.

- An object appears whole or not at all, under every interruption.
- A key is relative, `/`-separated Unicode; it never leads out of its store (`check_key`).
- What goes wrong is a `StorageError` whose code says what and whose hint says the way out.
- The S3 endpoint and credentials come from the standard AWS variables and profiles only. A store
  pickles as its URI, so that no secret travels with it.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from kpmask.errors import ConfigError, StorageError

log = logging.getLogger(__name__)

TEMPORARY_PREFIX: Final = ".tmp-"
TEMPORARY_MAX_AGE_S: Final = 24 * 3600.0
_CREATE_ATTEMPTS: Final = 5


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as listed. `etag` changes whenever the content does; it means nothing else."""

    key: str
    size_bytes: int
    etag: str


class ObjectStore(Protocol):
    """Whole objects by key, under one root URI. Every method may raise `StorageError`."""

    @property
    def uri(self) -> str:
        """The root: a folder's absolute path or `s3://bucket/prefix`."""
        ...

    def get(self, key: str) -> bytes:
        """The object's bytes; code `not_found` where there is none."""
        ...

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Publish `data`. With `if_absent` an object that is there stays, and False returns."""
        ...

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> bool:
        """`put` of a local file of any size, with flat memory."""
        ...

    def exists(self, key: str) -> bool: ...

    def info(self, key: str) -> ObjectInfo: ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """The objects whose keys start with `prefix`, in the order of their keys."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens where there is none."""
        ...

    def local(self, key: str) -> Path:
        """A local file with the object's content: not to be written to."""
        ...

    def child(self, prefix: str) -> ObjectStore:
        """The store of the keys under `prefix/`; the same store for the empty prefix."""
        ...

    def sweep(self) -> int:
        """Remove what killed writers left half written; how many pieces that were."""
        ...


# --- keys and URIs ---------------------------------------------------------------------------


def check_key(key: str) -> str:
    """The key, if it is a valid one.

    Raises:
        StorageError: code `path_escape`: empty, absolute, with an empty, `.` or `..` part, a
            control character or a backslash, text that is not Unicode, or a name kept for
            temporary files.
    """
    problem = _key_problem(key)
    if problem:
        raise StorageError(f"no valid key: {problem}", subject=ascii(key), code="path_escape")
    return key


def _key_problem(key: str) -> str:
    parts = key.split("/")
    if "" in parts:
        return "it is empty, absolute or has an empty part"
    if "." in parts or ".." in parts:
        return "it has a part '.' or '..'"
    if any(ord(c) < 32 or ord(c) in {92, 127} for c in key):  # servers take 92, \\, for a slash
        return "it has a control character or a backslash"
    if any(part.startswith(TEMPORARY_PREFIX) for part in parts):
        return f"names with {TEMPORARY_PREFIX!r} are kept for temporary files"
    if any(0xD800 <= ord(c) <= 0xDFFF for c in key):
        return "it is not Unicode"
    return ""


def check_prefix(prefix: str) -> str:
    """A listing prefix, if valid: a key's beginning, which may be empty or end in a slash."""
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


def absolute(reference: str) -> str:
    """A path or URI that means the same in every process."""
    return reference if "://" in reference else str(Path(reference).absolute())


def open_store(uri: str) -> ObjectStore:
    """The store at a folder path, a `file://` URI or `s3://bucket[/prefix]`.

    Nothing is touched or created yet.

    Raises:
        ConfigError: another scheme, or an S3 URI without a bucket.
    """
    if uri.startswith("s3://"):
        from tasks.s3 import S3Store  # brings in boto3, which a local folder does not need

        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        return S3Store(bucket, prefix.strip("/"))
    return LocalStore(_local_path(uri))


def _local_path(uri: str) -> Path:
    if uri.startswith("file:"):
        parsed = urllib.parse.urlsplit(uri)
        if parsed.netloc not in {"", "localhost"} or not parsed.path.startswith("/"):
            raise ConfigError("a file URI is file:///absolute/path", subject=uri)
        return Path(urllib.parse.unquote(parsed.path))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", uri):
        scheme = uri.partition("://")[0]  # alone, for the rest may hold a password
        raise ConfigError(
            "no such kind of store; there are a folder's path, file:// and s3://",
            subject=f"{scheme}://",
        )
    if not uri or "\0" in uri:
        raise ConfigError("a store's URI is a folder's path, file:// or s3://", subject=repr(uri))
    return Path(uri)


def open_object(uri: str) -> tuple[ObjectStore, str]:
    """The store that holds the object at `uri`, and the object's key in it."""
    if uri.startswith("s3://"):
        parent, _, key = uri.rpartition("/")
        if parent in {"s3:/", "s3:"} or not key:
            raise ConfigError("an object's URI is s3://bucket/key", subject=uri)
        return open_store(parent), check_key(key)
    path = _local_path(uri).absolute()
    return LocalStore(path.parent), check_key(path.name)


def local_copy(uri: str) -> Path:
    """A local file with the content of the object at `uri`: not to be written to."""
    store, key = open_object(uri)
    return store.local(key)


# --- local folder ----------------------------------------------------------------------------


class LocalStore:
    """A folder. It comes into being with the first object.

    Symbolic links within it are followed: who can place one there can write there anyway.
    A conditional write is a hard link, which is atomic on local and network file systems alike.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    @property
    def uri(self) -> str:
        return str(self.root)

    def __repr__(self) -> str:
        return f"LocalStore({self.uri!r})"

    def __reduce__(self) -> tuple[Callable[[str], ObjectStore], tuple[str]]:
        return open_store, (self.uri,)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def get(self, key: str) -> bytes:
        path = self._path(key)
        with os_errors(str(path)):
            return path.read_bytes()

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        def fill(file: BinaryIO) -> None:
            file.write(data)

        return self._publish(self._path(key), fill, if_absent)

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> bool:
        def fill(file: BinaryIO) -> None:
            with path.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)

        target = self._path(key)
        with os_errors(str(path)):
            path.stat()
        return self._publish(target, fill, if_absent)

    def _publish(self, path: Path, fill: Callable[[BinaryIO], None], if_absent: bool) -> bool:
        with os_errors(str(path)):
            if if_absent and path.exists():
                return False
            temporary, file = create_temporary(path.parent)
            try:
                with file:
                    fill(file)
                    file.flush()
                    os.fsync(file.fileno())
                if if_absent:
                    return _linked(temporary, path)
                temporary.replace(path)
                return True
            finally:
                temporary.unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        path = self._path(key)
        try:
            return stat.S_ISREG(path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise storage_error(error, str(path)) from error

    def info(self, key: str) -> ObjectInfo:
        path = self._path(key)
        with os_errors(str(path)):
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        return _info(key, status)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder, _, start = check_prefix(prefix).rpartition("/")
        with os_errors(self.uri):
            yield from self._walk(folder, start, frozenset())

    def _walk(
        self, folder: str, start: str, above: frozenset[tuple[int, int]]
    ) -> Iterator[ObjectInfo]:
        """Files below `folder` whose next name starts with `start`, in S3's order of keys."""
        path = self.root / folder
        try:
            status = path.stat()
            entries = [e for e in os.scandir(path) if e.name.startswith(start) and not _endless(e)]
        except FileNotFoundError:
            return
        except NotADirectoryError:
            if folder:
                return
            raise
        here = (status.st_dev, status.st_ino)
        if here in above:  # a symbolic link back to a folder that we are in
            return
        for entry in sorted(entries, key=lambda e: e.name + "/" * e.is_dir()):
            key = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(TEMPORARY_PREFIX) or not listable(key, self.uri):
                continue
            if entry.is_dir():
                yield from self._walk(key, "", above | {here})
                continue
            try:
                entry_status = entry.stat()
            except FileNotFoundError:  # removed while we list
                continue
            if stat.S_ISREG(entry_status.st_mode):
                yield _info(key, entry_status)

    def delete(self, key: str) -> None:
        """Also removes the folders that it leaves empty, as an object store would."""
        path = self._path(key)
        with os_errors(str(path)):
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                return
        for folder in path.parents:
            if folder == self.root:
                return
            try:
                folder.rmdir()
            except OSError:
                return  # not empty, or not ours to remove: the object itself is gone

    def local(self, key: str) -> Path:
        self.info(key)
        return self._path(key)

    def child(self, prefix: str) -> ObjectStore:
        return LocalStore(self.root / check_key(prefix)) if prefix else self

    def sweep(self) -> int:
        if not self.root.is_dir():
            return 0
        with os_errors(self.uri):
            return sum(sweep_temporaries(Path(folder)) for folder, _, _ in os.walk(self.root))


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    etag = f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"
    return ObjectInfo(key=key, size_bytes=status.st_size, etag=etag)


def _linked(temporary: Path, path: Path) -> bool:
    """Give the temporary file its name, unless the name is taken."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    return True


def _endless(entry: os.DirEntry[str]) -> bool:
    """Whether it is a symbolic link that leads to itself, and so to nothing."""
    try:
        entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return True
    return False


def listable(key: str, uri: str) -> bool:
    """Whether a name found in a store is a valid key; one that is not is logged."""
    problem = _key_problem(key)
    if problem:
        log.warning("%s: skipping %s: %s", uri, ascii(key), problem)
    return not problem


# --- temporary files -------------------------------------------------------------------------


def create_temporary(folder: Path) -> tuple[Path, BinaryIO]:
    """A new file in `folder`, which is made, under a name that says who writes it."""
    name = f"{TEMPORARY_PREFIX}{_host()}-{os.getpid()}-{secrets.token_hex(6)}"
    path = folder / name
    for attempt in range(_CREATE_ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return path, path.open("xb")
        except (FileNotFoundError, FileExistsError):
            # A `delete` beside us removed the folder as empty, before we used it or while it was
            # being looked at.
            if attempt == _CREATE_ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def sweep_temporaries(folder: Path) -> int:
    """Remove temporary files in `folder` whose writer is dead, or which are a day old."""
    num_removed = 0
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        try:
            if _abandoned(path):
                path.unlink()
                num_removed += 1
        except (FileNotFoundError, PermissionError):  # gone by now, or another user's
            continue
    return num_removed


def _abandoned(path: Path) -> bool:
    if time.time() - path.stat().st_mtime > TEMPORARY_MAX_AGE_S:
        return True
    match = re.fullmatch(rf"{re.escape(TEMPORARY_PREFIX)}(.+)-(\d+)-[0-9a-f]+", path.name)
    if not match or match[1] != _host():
        return False
    try:
        os.kill(int(match[2]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:64]


# --- errors ----------------------------------------------------------------------------------


@contextmanager
def os_errors(subject: str) -> Iterator[None]:
    """Turn an `OSError` into a `StorageError` about `subject`."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, subject) from error


_CODES: Final = {
    errno.ENOSPC: ("no_space", "free some space, or write elsewhere"),
    errno.EDQUOT: ("no_space", "raise the quota, or write elsewhere"),
    errno.EFBIG: ("too_large", "the file system or a limit forbids files of this size"),
    errno.ENAMETOOLONG: ("too_large", "use a shorter name"),
    errno.ENOENT: ("not_found", ""),
    errno.ENOTDIR: ("not_found", "a file stands where a folder is needed"),
    errno.EISDIR: ("not_found", "it is a folder, not an object"),
    errno.EEXIST: ("denied", "a file stands where a folder is needed"),
    errno.ENOTEMPTY: ("denied", "a folder has this name"),
    errno.EACCES: ("denied", "check who owns it and who may write"),
    errno.EPERM: ("denied", "check who owns it and who may write"),
    errno.EROFS: ("denied", "it is mounted read-only"),
}
_TRANSIENT: Final = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN}


def storage_error(error: OSError, subject: str) -> StorageError:
    """The `StorageError` for an `OSError`."""
    number = error.errno or 0
    code, hint = _CODES.get(number, ("unavailable", ""))
    cause = os.strerror(number).lower() if number else str(error)
    return StorageError(
        cause, subject=subject, code=code, hint=hint, retryable=number in _TRANSIENT
    )
