"""What globs name: local files and folders, and objects in a store."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from kpmask.data.layouts import IMAGE_SUFFIXES, find_sources
from kpmask.errors import ConfigError
from tasks import storage
from tasks.storage import absolute

WILDCARDS: Final = "*?["


def matching(pattern: str, *, folders: bool) -> list[str]:
    """What a glob, a file or a folder names, as absolute references in order.

    A glob matches part by part; `**` is any number of folders. A folder means the images in it,
    or with `folders` the videos: files, and deeper folders of images.
    """
    pattern = absolute(pattern)
    if "://" in pattern and not pattern.endswith("//"):
        pattern = pattern.rstrip("/")  # as the path of a folder
    base, rest = _split_glob(pattern)
    found: Iterable[str]  # held once: there may be a million of them
    if not rest:
        found = _itself(pattern) or _in_folder(base, folders=folders)
    elif "://" in base:
        found = _remote_matches(base, rest, folders=folders)
    else:
        found = _local_matches(Path(base), rest, folders=folders)
    return sorted({uri for uri in found if not PurePosixPath(uri).name.startswith(".")})


def _local_matches(base: Path, rest: str, *, folders: bool) -> Iterator[str]:
    try:
        for path in base.glob(rest):
            if path.is_file() or (folders and path.is_dir()):
                yield str(path)
    except ValueError as error:  # `**` as a part of a name
        raise ConfigError(str(error), subject=rest) from error


def _remote_matches(base: str, rest: str, *, folders: bool) -> Iterator[str]:
    patterns = rest.split("/")
    for info in storage.open_store(base).list():
        # An object store has the folders that something lies in.
        above = list(map(str, PurePosixPath(info.key).parents))[:-1] if folders else []
        own = [] if patterns[-1] == "**" else [info.key]  # which is any number of folders
        for key in own + above:
            if _matches(key.split("/"), patterns):
                yield f"{base}/{key}"


def _split_glob(pattern: str) -> tuple[str, str]:
    """The folder before the first part with a wildcard, and the rest."""
    scheme, separator, path = pattern.rpartition("://")
    parts = path.rstrip("/").split("/")
    wild = next((i for i, part in enumerate(parts) if set(part) & set(WILDCARDS)), len(parts))
    return scheme + separator + ("/".join(parts[:wild]) or "/"), "/".join(parts[wild:])


def _itself(uri: str) -> list[str]:
    if uri == "/" or ("://" in uri and "/" not in uri.partition("://")[2]):
        return []  # a root or a bucket is no object
    store, key = storage.open_object(uri)
    return [uri] if store.exists(key) else []


def _in_folder(uri: str, *, folders: bool) -> Iterator[str]:
    keys = (info.key for info in storage.open_store(uri).list())
    if folders:
        keys = (source.key for source in find_sources(keys))
    else:
        keys = (key for key in keys if "/" not in key and _is_image(key))
    return (f"{uri.rstrip('/')}/{key}" for key in keys)


def _is_image(key: str) -> bool:
    return PurePosixPath(key).suffix.lower() in IMAGE_SUFFIXES


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_matches(parts[i:], patterns[1:]) for i in range(len(parts) + 1))
    head = bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0])
    return head and _matches(parts[1:], patterns[1:])
