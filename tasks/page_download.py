"""A video out of a page, with yt-dlp as a library.

- Only its YouTube and plain-URL extractors, no plugins, no external program but a JavaScript
  runtime, no playlists; the file is named by our key and never by a title.
- Each request, those that follow a redirect included, is looked at, and each connection goes to an
  address that was just checked.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import os
import re
import shutil
import socket
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from kpmask.config import Download
from kpmask.errors import DownloadError, StorageError
from tasks.hosts import addresses_of, check_url, clean_text
from tasks.patience import Patience
from tasks.turns import note_pause, wait_turn

# Before yt-dlp is imported, which then looks for none.
os.environ.setdefault("YTDLP_NO_PLUGINS", "1")

EXTRACTORS: Final = ["youtube", "generic"]
MAX_HOPS: Final = 5  # from one page to the next
_SITES: Final = ("youtube.com", "youtu.be", "youtube-nocookie.com")
_LISTS: Final = re.compile(r"/(playlist|channel/|c/|user/|@|feed|results|hashtag/|show/)")
# What it can read by itself, through our handler.
_PROTOCOLS: Final = frozenset(
    {"http", "https", "m3u8", "m3u8_native", "http_dash_segments", "http_dash_segments_generator"}
)

# What sites and yt-dlp say, most specific first.
_MESSAGES: Final = (
    ("bot_check", r"not a bot|captcha"),
    ("age_gate", r"confirm your age|age.restricted|inappropriate for some users"),
    ("private", r"private video|video is private|members.only|join this channel|login required"),
    ("geo", r"not (?:made this video )?available (?:in|from) your (?:country|location)|geo.?restr"),
    ("rate_limited", r"rate.?limited|too many requests|HTTP Error 429"),
    (
        "removed",
        r"video unavailable|has been removed|been terminated|no longer available"
        r"|does not exist|HTTP Error (?:404|410)",
    ),
    ("private", r"HTTP Error (?:401|403)"),
    ("network", r"HTTP Error (?:408|5\d\d)|timed out|timeout|connection|unable to connect"),
    ("corrupt", r"did not get any data blocks|unsafe extension|unusual and will be skipped"),
    ("unsupported", r"unsupported url|no video formats|requested format|HTTP Error 4\d\d"),
    ("unsupported", r"no suitable extractor|is not a valid url"),
)
_RETRYABLE: Final = frozenset({"rate_limited", "network"})


def is_video_site(url: str) -> bool:
    """Whether an address is that of a site whose videos are found only through its pages."""
    host = (urllib.parse.urlsplit(url).hostname or "").lower()
    return any(host == site or host.endswith(f".{site}") for site in _SITES)


def download_page(
    name: str,
    url: str,
    *,
    download: Download,
    folder: Path,
    cookies: Path | None,
    patience: Patience,
) -> Path:
    """Get the video of a page. yt-dlp's exceptions become ours.

    Args:
        name: of the file, without extension.
        url: of the page.
        download: the settings.
        folder: where the file and its partial state lie.
        cookies: a file of our own with cookies; it is written to.
        patience: how long it may take.

    Raises:
        DownloadError: it could not be had.
    """
    if is_video_site(url) and _LISTS.match(urllib.parse.urlsplit(url).path):
        raise _a_list()
    import yt_dlp  # a heavy import, for those who need it only

    too_large: list[int] = []

    def watch(status: dict[str, Any]) -> None:
        # `max_filesize` looks at the size that the server announces, which may be none.
        if status.get("downloaded_bytes", 0) > download.max_bytes:
            too_large.append(1)
            raise DownloadError("larger than the limit", code="too_large")

    options = _options(name, download=download, folder=folder, cookies=cookies)
    options["progress_hooks"] = [watch]
    try:
        with _downloader(options, download, patience) as downloader:
            info = _one_video(downloader, url)
            info = downloader.process_ie_result(info, download=True)
            if info.get("_type") in {"playlist", "multi_video"}:  # a page within the page
                raise _a_list()
    except DownloadError:
        for partial in folder.glob(f"{_globbed(name)}.*") if too_large else []:
            partial.unlink(missing_ok=True)
        raise
    except (yt_dlp.utils.YoutubeDLError, yt_dlp.networking.exceptions.RequestError) as error:
        raise _translated(error, url=url, download=download) from None
    return _written_file(info, name, download=download, folder=folder)


def _one_video(downloader: Any, url: str) -> dict[str, Any]:  # noqa: ANN401 - untyped
    """What a page says of its video. A list's entries are not even asked for."""
    info: dict[str, Any] | None = {"_type": "url", "url": url}
    for _ in range(MAX_HOPS):
        if info is None or info.get("_type", "video") != "url":
            break
        info = downloader.extract_info(
            info["url"], ie_key=info.get("ie_key"), download=False, process=False
        )
    if info is None or info.get("_type", "video") not in {"video", "url_transparent"}:
        raise _a_list()
    return info


def _a_list() -> DownloadError:
    return DownloadError("a list of videos, not one", code="unsupported")


def _options(
    name: str, *, download: Download, folder: Path, cookies: Path | None
) -> dict[str, Any]:
    height = download.max_height_px
    rate = download.rate_bytes_per_s
    options: dict[str, Any] = {
        # The sound is not used here, so the best picture alone will do. A plain file's height is
        # not known beforehand, which `?` lets pass.
        "format": f"bv*[height<=?{height}]/b[height<=?{height}]/b",
        "outtmpl": {"default": f"{name.replace('%', '%%')}.%(ext)s"},
        "paths": {"home": str(folder)},
        "quiet": True,
        "noprogress": True,
        "no_color": True,
        "logger": _Silence(),
        "noplaylist": True,
        "playlist_items": "1",
        "allowed_extractors": EXTRACTORS,
        "retries": 1,
        "fragment_retries": 3,
        "file_access_retries": 2,
        "retry_sleep_functions": {"http": lambda n: min(download.backoff_s * 2**n, 30.0)},
        "socket_timeout": download.timeout_s,
        "continuedl": True,
        "overwrites": True,
        "max_filesize": download.max_bytes,
        # FFmpeg would open whatever address a list of pieces names.
        "external_downloader": "native",
        "hls_prefer_native": True,
        "ffmpeg_location": str(folder / ".none"),
        "fixup": "never",
        "ratelimit": rate / download.concurrency if rate else None,
        "proxy": download.proxy,
        "cookiefile": str(cookies) if cookies else None,
        "cachedir": False,
        "updatetime": False,
        "writeinfojson": False,
    }
    if runtime := _javascript_runtime():
        options["js_runtimes"] = {"deno": {"path": runtime}}
    return options


class _Silence:
    """yt-dlp's logger: what matters comes as an exception."""

    def debug(self, message: str) -> None: ...

    def warning(self, message: str) -> None: ...

    def error(self, message: str) -> None: ...


def _javascript_runtime() -> str | None:
    """Deno, which YouTube's extractor needs: on the path, or as a package of this environment."""
    beside = Path(sys.prefix) / "bin" / "deno"
    return shutil.which("deno") or (str(beside) if beside.exists() else None)


def _downloader(options: dict[str, Any], download: Download, patience: Patience) -> Any:  # noqa: ANN401 - untyped
    """A YoutubeDL that opens addresses through one handler, which checks every one of them."""
    import yt_dlp
    from yt_dlp.networking._urllib import HTTPHandler, UrllibRH
    from yt_dlp.postprocessor.ffmpeg import FFmpegPostProcessor

    # Where yt-dlp looks when it asks whether there is an FFmpeg at all, as its command line does.
    FFmpegPostProcessor._ffmpeg_location.set(options["ffmpeg_location"])

    class CheckingRH(UrllibRH):  # type: ignore[misc]
        _SUPPORTED_URL_SCHEMES = ("http", "https")

        def _create_instance(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - untyped
            opener = super()._create_instance(*args, **kwargs)
            opener.add_handler(_CheckAddress(download))
            (handler,) = (h for h in opener.handlers if isinstance(h, HTTPHandler))
            handler._make_conn_class = functools.partial(
                _checked_class, handler._make_conn_class, download, patience
            )
            return opener

    class Downloader(yt_dlp.YoutubeDL):  # type: ignore[misc]
        def build_request_director(self, handlers: Any, preferences: Any = None) -> Any:  # noqa: ANN401
            del handlers, preferences
            return super().build_request_director([CheckingRH])

        def dl(self, name: str, info: dict[str, Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            protocols = set(str(info.get("protocol")).split("+"))
            if not protocols <= _PROTOCOLS or info.get("is_live"):
                raise DownloadError("a stream of a kind that is not fetched", code="unsupported")
            return super().dl(name, info, *args, **kwargs)

    return Downloader(options)


class _CheckAddress(urllib.request.BaseHandler):
    """Looks at each request before it is sent, those that follow a redirect included."""

    handler_order = 10

    def __init__(self, download: Download) -> None:
        self._download = download

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        with _ours_let_through():
            check_url(
                request.full_url,
                allow_private_hosts=self._download.allow_private_hosts,
                through_proxy=True,  # without one, the connection looks the name up
            )
            wait_turn(request.full_url, self._download)
        return request

    https_request = http_request
    ftp_request = http_request


def _checked_class(
    make: Callable[[type, urllib.request.Request], type],
    download: Download,
    patience: Patience,
    base: type,
    request: urllib.request.Request,
) -> type:
    """A connection's class that goes to a checked address and reads with patience."""
    proxied = request.has_proxy() or getattr(request, "_tunnel_host", None)
    proxied = proxied or request.has_header("Ytdl-socks-proxy")
    found_class = make(base, request)
    # Else the lines below would check nothing.
    assert issubclass(found_class, http.client.HTTPConnection)
    made: Any = found_class

    def create(
        address: tuple[str, int], timeout: float, source_address: tuple[str, int] | None = None
    ) -> socket.socket:
        with _ours_let_through():
            found = addresses_of(address[0], allow_private_hosts=download.allow_private_hosts)
        for number, each in enumerate(found, start=1):
            try:
                return socket.create_connection((each, address[1]), timeout, source_address)
            except OSError:
                if number == len(found):
                    raise
        raise AssertionError("unreachable")

    class Checked(made):  # type: ignore[misc]
        sock: Any

        def connect(self) -> None:
            if not proxied:
                self._create_connection = create
            super().connect()
            self.sock = _PatientSocket(self.sock, patience)

    return Checked


class _PatientSocket:
    """A socket that is read from with patience."""

    def __init__(self, inner: socket.socket, patience: Patience) -> None:
        self._inner = inner
        self._patience = patience

    def makefile(self, mode: str, *args: object, **kwargs: object) -> io.BufferedReader:
        assert mode == "rb"
        return io.BufferedReader(_PatientReader(self._inner, self._patience))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the socket has
        return getattr(self._inner, name)


class _PatientReader(io.RawIOBase):
    def __init__(self, inner: socket.socket, patience: Patience) -> None:
        self._inner = inner
        self._file = inner.makefile("rb", buffering=0)
        self._patience = patience

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:  # noqa: ANN401 - any writable buffer
        with _ours_let_through():
            self._inner.settimeout(self._patience.timeout_s())
        start_s = time.monotonic()
        count = self._file.readinto(buffer)
        with _ours_let_through():
            self._patience.received(count or 0, time.monotonic() - start_s)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def _ours_let_through() -> Iterator[None]:
    """Our errors as yt-dlp's, which lets only its own through."""
    from yt_dlp.networking.exceptions import RequestError

    try:
        yield
    except DownloadError as error:
        raise RequestError(error.cause, cause=error) from error


# --- what came back --------------------------------------------------------------------------


def _written_file(
    info: dict[str, Any] | None, name: str, *, download: Download, folder: Path
) -> Path:
    """The file that yt-dlp says it wrote."""
    written = (info or {}).get("requested_downloads") or [{}]
    path = Path(written[0].get("filepath") or folder / name)
    if path.parent.resolve() != folder.resolve() or not path.is_file():
        # It returns no error and no file when the server announces more than `max_filesize`.
        raise DownloadError(f"larger than {download.max_bytes} bytes", code="too_large")
    return path


def _translated(error: Exception, *, url: str, download: Download) -> DownloadError:
    """One of yt-dlp's exceptions as ours, by its class and its text."""
    import yt_dlp

    inner = (getattr(error, "exc_info", None) or (None, error))[1] or error
    if own := _own_error(inner):
        return own
    text = clean_text(str(error), url=url, download=download)
    if "No space left" in text:
        raise StorageError("no space left for a download", code="no_space") from None
    status = getattr(inner, "status", None)
    if status in {429, 503}:
        headers: Any = getattr(getattr(inner, "response", None), "headers", {})
        note_pause(url, headers.get("Retry-After"))
    text += f" (HTTP Error {status})" if status and str(status) not in text else ""
    utils, networking = yt_dlp.utils, yt_dlp.networking.exceptions
    if isinstance(inner, utils.GeoRestrictedError):
        code = "geo"
    elif isinstance(inner, utils.UnsupportedError):
        code = "unsupported"
    else:
        matched = (c for c, pattern in _MESSAGES if re.search(pattern, text, re.IGNORECASE))
        fallback = "network" if _is_transport(inner, networking) else "unsupported"
        code = next(matched, fallback)
    return DownloadError(text, code=code, retryable=code in _RETRYABLE)


def _own_error(error: BaseException | None) -> DownloadError | None:
    """The error of ours that one of yt-dlp's was made from."""
    while error is not None and not isinstance(error, DownloadError):
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return error


def _is_transport(error: BaseException, networking: Any) -> bool:  # noqa: ANN401 - untyped
    # Without a cause: the connection ended before the announced length.
    return isinstance(error, networking.TransportError | OSError) or "bytes" in str(error)


def _globbed(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)
