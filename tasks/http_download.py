"""A file by HTTP: resumed by ranges, never larger, slower or elsewhere than it may be.

- A partial file is taken up only as the same version of the file: the server compares the ETag or
  the date (If-Range), and we compare what it answers. Where it names neither, the length must be
  the same.
- What it announces is compared with what may be, before a byte of it is read.
"""

from __future__ import annotations

import hashlib
import http.cookiejar
import itertools
import json
import urllib.parse
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Final

import httpcore

from kpmask.config import Download
from kpmask.data.layouts import VIDEO_SUFFIXES
from kpmask.errors import DownloadError
from tasks.hosts import clean_text, host_of
from tasks.http_client import Answer, Version, opened
from tasks.patience import Patience, Throttle
from tasks.turns import note_pause

PROGRESS_BYTES: Final = 2**20  # a connection that breaks after so many is no failed attempt
SNIFFED_BYTES: Final = 512
_CODES: Final = {401: "private", 403: "private", 404: "removed", 410: "removed", 451: "geo"} | {
    408: "network",
    425: "network",
    429: "rate_limited",
}
_BROKEN: Final = (
    httpcore.NetworkError,
    httpcore.TimeoutException,
    httpcore.RemoteProtocolError,
    httpcore.ProxyError,
)
_PAGES: Final = ("text/", "application/xhtml", "application/json", "application/xml")
_LISTS: Final = ("mpegurl", "dash+xml")  # streams in pieces


def download_file(
    name: str,
    url: str,
    *,
    download: Download,
    folder: Path,
    cookies: http.cookiejar.CookieJar,
    patience: Patience,
) -> Path | None:
    """Get the file at an http or https address.

    Args:
        name: of the file, without extension.
        url: where it is.
        download: the settings.
        folder: where the file and its partial state lie.
        cookies: to be sent.
        patience: how long it may take.

    Returns:
        The file; None where a page came, out of which another tool may get a video.

    Raises:
        DownloadError: `corrupt` where a page came in place of what is named as a video.
    """
    part = _Part(folder, name, url)
    try:
        while True:
            before = part.size
            try:
                answered = _one_request(part, download=download, cookies=cookies, patience=patience)
            except _BROKEN as error:
                if part.size < before + PROGRESS_BYTES:
                    raise _broken(error, url=url, download=download) from None
                continue
            if answered is None:
                return None
            if answered:
                return part.finished()
            if part.size <= before:
                raise DownloadError("a range without bytes", code="network", retryable=True)
    except DownloadError as error:
        if not error.retryable:
            part.drop()
        raise


def names_a_video(url: str) -> bool:
    """Whether an address ends in a video file's name."""
    return PurePosixPath(urllib.parse.urlsplit(url).path).suffix.lower() in VIDEO_SUFFIXES


# --- a partial file --------------------------------------------------------------------------


class _Part:
    """What there is of a file, and of which version it is."""

    def __init__(self, folder: Path, name: str, url: str) -> None:
        self.url = url
        self._name = name
        self._folder = folder
        self.path = folder / f"{name}.part"
        self._note = folder / f".{name}.part.json"
        # Signed addresses differ in their query each time.
        parts = urllib.parse.urlsplit(url)
        place = f"{parts.netloc.rpartition('@')[2]}{parts.path}"
        self._place = hashlib.sha256(place.encode(errors="replace")).hexdigest()
        self.version = self._noted()
        if self.version is None:
            self.drop()

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _noted(self) -> Version | None:
        try:
            note = json.loads(self._note.read_bytes())
            if note.pop("place") != self._place:
                return None
            version = Version(**note)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError):  # half written
            return None
        texts = isinstance(version.etag, str) and isinstance(version.modified, str)
        return version if texts else None

    def start(self, version: Version) -> None:
        """Begin with nothing of a version."""
        self.drop()
        self.version = version
        self._note.write_text(json.dumps(asdict(version) | {"place": self._place}))

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)
        self.version = None

    def request_headers(self) -> dict[str, str]:
        """What asks for the rest, if it is still the same file's."""
        if not self.size or self.version is None or self.version.total is None:
            return {}
        asked = {"Range": f"bytes={self.size}-"}
        return asked | ({"If-Range": self.version.if_range} if self.version.if_range else {})

    def finished(self) -> Path:
        """Give the file its name, by what it is."""
        with self.path.open("rb") as file:
            suffix = media_suffix(file.read(SNIFFED_BYTES))
        if suffix is None and names_a_video(self.url):
            suffix = PurePosixPath(urllib.parse.urlsplit(self.url).path).suffix.lower()
        path = self._folder / f"{self._name}{suffix or '.mp4'}"
        self.path.replace(path)
        self._note.unlink(missing_ok=True)
        return path


# --- one request -----------------------------------------------------------------------------


def _one_request(
    part: _Part, *, download: Download, cookies: http.cookiejar.CookieJar, patience: Patience
) -> bool | None:
    """Ask for what lacks and write it: whether the file is whole; None where it is a page."""
    headers = part.request_headers()
    with opened(part.url, headers, download=download, cookies=cookies, patience=patience) as answer:
        if answer.status == 416 and part.version and part.size == part.version.total:
            return True  # all of it was here, and only its name was missing
        if answer.status not in {200, 206}:
            _refuse(part, answer)
        if answer.header("content-encoding").lower() not in {"", "identity"}:
            raise DownloadError("compressed, which was not asked for", code="unsupported")
        _check_size(answer.total, download)
        if answer.status == 206:
            _check_continues(part, answer)
            chunks: Iterable[bytes] = answer.chunks()
        else:
            begun = _begun(part, answer)
            if begun is None:
                return None
            chunks = begun
        _write(part, chunks, download)
    return answer.total is None or part.size >= answer.total


def _begun(part: _Part, answer: Answer) -> Iterator[bytes] | None:
    """The file from its beginning on; None for a page."""
    chunks = answer.chunks()
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= SNIFFED_BYTES:
            break
    kind = answer.header("content-type").lower()
    if not head:
        raise DownloadError("an empty answer", code="corrupt")
    if _is_page(head, kind):
        part.drop()
        if names_a_video(part.url) or kind.startswith("video/"):
            raise DownloadError("a page came, and no video", code="corrupt")
        return None
    part.start(answer.version)
    return itertools.chain([head], chunks)


def _check_continues(part: _Part, answer: Answer) -> None:
    """Refuse a range that is not the rest of what is here."""
    start = answer.range_start
    same = part.version is not None and part.version.may_continue(answer.version)
    if not same or start != part.size:
        part.drop()
        raise DownloadError("the file changed while it was fetched", code="network", retryable=True)


def _check_size(total: int | None, download: Download) -> None:
    if total is not None and total > download.max_bytes:
        raise DownloadError(
            f"{total} bytes are announced, of at most {download.max_bytes}", code="too_large"
        )


def _write(part: _Part, chunks: Iterable[bytes], download: Download) -> None:
    throttle = Throttle(download)
    size = part.size
    with part.path.open("ab") as file:
        for chunk in chunks:
            size += len(chunk)
            if size > download.max_bytes:
                raise DownloadError(f"larger than {download.max_bytes} bytes", code="too_large")
            file.write(chunk)
            throttle.took(len(chunk))


def _refuse(part: _Part, answer: Answer) -> None:
    """Raise what an answer without a file means."""
    status = answer.status
    if status in {429, 503}:
        note_pause(answer.url, answer.header("retry-after"))
    if status == 416:
        part.drop()
    fallback = "network" if status >= 500 or status == 416 else "unsupported"
    code = _CODES.get(status, fallback)
    raise DownloadError(
        f"the host answers {status}", code=code, retryable=code in {"network", "rate_limited"}
    )


def _broken(error: Exception, *, url: str, download: Download) -> DownloadError:
    """What a connection's failure means."""
    text = clean_text(str(error), url=url, download=download)
    cause = f"{host_of(url)}: {text}" if text else f"{host_of(url)}: {type(error).__name__}"
    return DownloadError(cause, code="network", retryable=True)


# --- what files look like --------------------------------------------------------------------


def media_suffix(head: bytes) -> str | None:
    """The usual extension of a media file that begins so; None for what is not known."""
    if head[4:8] == b"ftyp":
        brands = {b"qt  ": ".mov", b"3gp4": ".3gp", b"3gp5": ".3gp", b"M4V ": ".m4v"}
        return brands.get(head[8:12], ".mp4")
    if head[:4] == b"RIFF":
        return ".avi" if head[8:12] == b"AVI " else None
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return ".webm" if b"webm" in head[:64] else ".mkv"
    if head[:1] == b"G" and head[188:189] == b"G":
        return ".ts"
    starts = {
        b"OggS": ".ogv",
        b"FLV\x01": ".flv",
        b"GIF8": ".gif",
        b"\x00\x00\x01\xba": ".mpg",
        b"\x00\x00\x01\xb3": ".mpg",
        b"\x30\x26\xb2\x75": ".wmv",
    }
    old_quicktime = head[4:8] in {b"moov", b"mdat", b"wide"}
    return starts.get(head[:4], ".mov" if old_quicktime else None)


def _is_page(head: bytes, kind: str) -> bool:
    """Whether text came: a page, or a list of a stream's pieces."""
    if media_suffix(head) is not None:
        return False
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith((b"<", b"#EXTM3U")):
        return True
    return kind.startswith(_PAGES) or any(word in kind for word in _LISTS)
