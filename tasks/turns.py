"""How many downloads a machine has in flight, and how often it asks one host.

Places are file locks, which the system takes back from a process that dies. When a host may be
asked next is a number in a file; one that was written in another boot means nothing. All of it is
per user and machine: runs on several machines each keep to the limits by themselves.
"""

from __future__ import annotations

import contextlib
import email.utils
import fcntl
import hashlib
import os
import random
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from kpmask.config import Download
from kpmask.errors import DownloadError, StorageError
from tasks.machine import boot_id, steady_s

LONGEST_PAUSE_S: Final = 86400.0  # however long a host asks for
LONGEST_QUEUE: Final = 1000  # of requests to one host, each an interval behind the other
_POLL_S: Final = 0.2
_jitter = random.Random()  # noqa: S311 - of its own: the caller's random state is not touched


class HostPaused(DownloadError):
    """A host asked for a longer pause than a run waits; trying again in this run is of no use."""


@contextlib.contextmanager
def download_place(url: str | None, download: Download) -> Iterator[None]:
    """A place among this user's downloads on this machine, waited for.

    The place at the host comes first: who waits for a busy host keeps nobody from another one.
    """
    with contextlib.ExitStack() as places:
        if url is not None:
            # Of a list of hosts without number, some share their places: files are not removed.
            places.enter_context(_slot(f"{_site(url)[:4]}-", download.per_host))
        places.enter_context(_slot("", download.concurrency))
        yield


def wait_turn(url: str, download: Download) -> None:
    """Wait until the host may be asked again, and note that it was.

    Raises:
        HostPaused: it asked for a pause that is longer than `max_pause_s`.
    """
    if download.host_interval_s == 0 and not _note_path(url).exists():
        return
    with _next_request(url) as note:
        now_s = steady_s()
        next_s = note.read()
        wait_s = next_s - now_s
        if wait_s > max(download.max_pause_s, LONGEST_QUEUE * download.host_interval_s):
            raise HostPaused(
                f"the host asks for a pause of {wait_s:.0f} s more",
                code="rate_limited",
                retryable=True,
            )
        if wait_s > 0 or download.host_interval_s > 0:
            note.write(max(next_s, now_s) + download.host_interval_s)
        else:
            _note_path(url).unlink(missing_ok=True)
    if wait_s > 0:
        time.sleep(wait_s)


def note_pause(url: str, retry_after: str | None) -> None:
    """Keep everybody on this machine from a host for as long as its answer asks for."""
    pause_s = pause_of(retry_after)
    if pause_s > 0:
        with _next_request(url) as note:
            note.write(max(note.read(), steady_s() + pause_s))


def pause_of(retry_after: str | None) -> float:
    """Seconds that a Retry-After header asks for: a number of them, or a date; else 0."""
    text = (retry_after or "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), LONGEST_PAUSE_S)
    try:
        wanted_s = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(wanted_s - time.time(), 0.0), LONGEST_PAUSE_S)


def _site(url: str) -> str:
    """A digest of a host, by which its files are named."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2].lower().removeprefix("www.")
    return hashlib.sha256(host.encode(errors="replace")).hexdigest()[:32]


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"kpmask-download-slots-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise StorageError("belongs to another user", subject=str(folder), code="denied")
    return folder


@contextlib.contextmanager
def _slot(name: str, count: int) -> Iterator[None]:
    """One of `count` places, by whatever comes free first."""
    folder = _folder()
    while True:
        for number in range(count):
            with (folder / f"{name}{number}").open("wb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield
                return
        time.sleep(_POLL_S * (0.5 + _jitter.random()))


class _Note:
    """When a host may be asked next, by this boot's steady clock."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self) -> float:
        self._file.seek(0)
        boot, _, text = self._file.read(200).decode(errors="replace").partition(" ")
        try:
            next_s = float(text) if boot == boot_id() else 0.0
        except ValueError:
            return 0.0
        return next_s if next_s < steady_s() + LONGEST_PAUSE_S + 1 else 0.0

    def write(self, next_s: float) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(f"{boot_id()} {next_s:.3f}".encode())
        self._file.flush()


def _note_path(url: str) -> Path:
    # A name of its own for every host: none can have another one paused.
    return _folder() / f"{_site(url)}-next"


@contextlib.contextmanager
def _next_request(url: str) -> Iterator[_Note]:
    with os.fdopen(os.open(_note_path(url), os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield _Note(file)
