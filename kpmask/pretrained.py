"""Weights of other projects, downloaded once.

A download is verified, resumed where it broke off, and shown whole or not at all.
Several processes may want the same file at once. The first takes a lock and downloads; the others
wait for it and find the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NoReturn

from kpmask.errors import CheckpointError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class PublishedFile:
    """A file on the web.

    Attributes:
        url: where it is; http or https.
        sha256_prefix: how its SHA-256 begins, in hex.
        max_bytes: refuse anything longer.
    """

    url: str
    sha256_prefix: str
    max_bytes: int

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def cache_folder() -> Path:
    """$KPMASK_CACHE, else $XDG_CACHE_HOME/kpmask, else ~/.cache/kpmask."""
    if own := os.environ.get("KPMASK_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kpmask"


def fetch(file: PublishedFile, folder: Path, *, timeout_s: float = 30.0) -> Path:
    """The file in the cache folder, downloaded and verified when it is not there yet.

    A download that broke off is continued by the next call.

    Raises:
        CheckpointError: code weights_unavailable; it cannot be had, or is not what was published.
    """
    path = folder / file.name
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f".lock-{file.name}"):
            if not path.is_file():
                part = folder / f".part-{file.name}"
                _download(file, part, timeout_s=timeout_s)
                _verify(file, part)
                part.replace(path)
    except (urllib.error.URLError, HTTPException, OSError) as error:
        _unavailable(file, str(getattr(error, "reason", "") or error), error)
    return path


def _unavailable(file: PublishedFile, cause: str, error: Exception | None = None) -> NoReturn:
    raise CheckpointError(
        cause,
        subject=file.url,
        code="weights_unavailable",
        hint="give a local copy as perceptual_weights, or set perceptual to another kind",
        retryable=isinstance(error, OSError),
    ) from error


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released when the file is closed, or the process dies
        yield


def _download(file: PublishedFile, part: Path, *, timeout_s: float) -> None:
    have_bytes = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(file.url)  # noqa: S310 - a constant of this package
    if have_bytes:
        request.add_header("Range", f"bytes={have_bytes}-")
    try:
        response = urllib.request.urlopen(request, timeout=timeout_s)  # noqa: S310 - as above
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have_bytes:  # all of it is here already
            return
        _unavailable(file, f"HTTP {error.code} {error.reason}", error)
    resumed = response.status == 206
    with response, part.open("ab" if resumed else "wb") as out:
        size_bytes = have_bytes if resumed else 0
        expected_bytes = size_bytes + int(response.headers.get("Content-Length") or 0)
        while chunk := response.read(CHUNK_BYTES):
            size_bytes += len(chunk)
            if size_bytes > file.max_bytes:
                out.truncate(0)
                _unavailable(file, f"is longer than {file.max_bytes} bytes")
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    if size_bytes < expected_bytes:
        raise OSError(f"the connection ended after {size_bytes} of {expected_bytes} bytes")


def _verify(file: PublishedFile, part: Path) -> None:
    with part.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if not found.startswith(file.sha256_prefix):
        part.unlink()  # or the next call would try to continue it
        _unavailable(file, f"SHA-256 {found[:16]}... does not begin with {file.sha256_prefix}")
