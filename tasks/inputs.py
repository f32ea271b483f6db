"""What an item's cells name, as local files: an image, a video, or a folder of images.

A folder of images is one driving video. Its digest is that of its files' names and contents.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kpmask.errors import ConfigError, MediaError, RowError, StorageError
from kpmask.records import digest
from tasks import storage
from tasks.storage import ObjectStore

ID_LENGTH: Final = 32  # of a digest, where it names something


@contextmanager
def local_media(uri: str) -> Iterator[Path]:
    """A local file, or a local folder of images, with the content at `uri`; only to be read.

    Raises:
        MediaError: there is nothing (not_found).
        RowError: the reference makes no sense (bad_row, path_escape).
        StorageError: the store denies or does not answer.
    """
    with contextlib.ExitStack() as stack:
        with item_errors(uri):
            store, key = storage.open_object(uri)
            path = _file(store, key) or stack.enter_context(_local_folder(store.child(key)))
        yield path


@contextmanager
def item_errors(uri: str) -> Iterator[None]:
    """Tell what is wrong with a reference from what is wrong with its store."""
    try:
        yield
    except ConfigError as error:  # a bucket without a key, say
        raise RowError(f"{uri}: {error.cause}", subject=uri) from error
    except StorageError as error:
        if error.code == "not_found":
            raise MediaError(f"{uri}: not found", subject=uri, code="not_found") from error
        if error.code == "path_escape":
            raise RowError(f"{uri}: {error.cause}", subject=uri, code=error.code) from error
        raise


def _file(store: ObjectStore, key: str) -> Path | None:
    try:
        return store.local(key)
    except StorageError as error:
        if error.code != "not_found":
            raise
        return None


@contextmanager
def _local_folder(store: ObjectStore) -> Iterator[Path]:
    """The files directly in a folder, under one local folder.

    Raises:
        StorageError: not_found, when there are none.
    """
    if "://" not in store.uri:
        if not Path(store.uri).is_dir():
            raise StorageError("not found", subject=store.uri, code="not_found")
        yield Path(store.uri)
        return
    keys = [info.key for info in store.list() if "/" not in info.key]
    if not keys:
        raise StorageError("not found", subject=store.uri, code="not_found")
    with tempfile.TemporaryDirectory(prefix="kpmask-") as folder:
        for key in keys:
            (Path(folder) / key).symlink_to(store.local(key))
        yield Path(folder)


def content_digest(path: Path) -> str:
    """The SHA-256 of a file, or of a folder's files with their names."""
    if path.is_dir():
        files = [p for p in sorted(path.iterdir()) if p.is_file() and not p.name.startswith(".")]
        return digest([(file.name, content_digest(file)) for file in files])
    with storage.os_errors(str(path)), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
