"""Fetching one video with yt-dlp, as a library.

- Only its YouTube and plain-URL extractors, no plugins, no external program but a JavaScript
  runtime, no playlists; the file is named by our key and never by a title.
- Addresses come from tables that others wrote: only http and https, and no private, loopback or
  link-local host unless it is allowed, checked again at every redirect. (A name that changes its
  address between the check and the connection gets through: on a hostile network use a proxy.)
- yt-dlp does not retry what fails before the first byte, so retries with back-off are out here,
  and only for errors that they can help.
- A partial file stays and is resumed, by the next attempt or the next run. A lock keeps two runs
  from writing it at once; another set of locks bounds how many downloads a machine has in flight.
- Every failure is a `DownloadError` with one of its codes. Causes name no proxy, no cookie and no
  query string.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import tenacity

from kpmask.config import Download, MediaLimits
from kpmask.errors import ConfigError, DownloadError, MediaError, StorageError
from kpmask.media import probe

# Before yt-dlp is imported, which then looks for none.
os.environ.setdefault("YTDLP_NO_PLUGINS", "1")

EXTRACTORS: Final = ["youtube", "generic"]
MAX_BACKOFF_S: Final = 120.0
MAX_CAUSE_CHARS: Final = 300

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


def fetch(name: str, url: str, *, download: Download, limits: MediaLimits, folder: Path) -> Path:
    """Download one video and check that it is one.

    Args:
        name: the file's name without extension; a plain name.
        url: where it is.
        download: the settings.
        limits: what the file may be.
        folder: where the file and its partial state lie; kept between attempts and runs.

    Returns:
        The file, in `folder`.

    Raises:
        DownloadError: it could not be had.
        ConfigError: the cookies file cannot be read.
    """
    with _storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{name}.lock"), _slot(download.concurrency):
            return _with_retries(name, url, download=download, limits=limits, folder=folder)


def video_url(video_id: str, *, download: Download) -> str:
    """The address of a video that is known by its id alone."""
    quoted = urllib.parse.quote(video_id, safe="")
    try:
        return download.url_template.format(video_id=quoted)
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"a template with {{video_id}} is needed: {error}", subject="download.url_template"
        ) from error


def check_url(url: str, *, allow_private_hosts: bool, through_proxy: bool = False) -> None:
    """Refuse an address that a table of strangers must not make us open.

    Raises:
        DownloadError: `unsupported` where it is not http or https, `refused_host` where its host is
            not a public one, `network` where its host has no address.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise DownloadError(
            f"not an http or https address: {_shown(url)}", code="unsupported", retryable=False
        )
    if allow_private_hosts:
        return
    for address in _addresses(parts.hostname, through_proxy=through_proxy):
        if not address.is_global or address.is_multicast:
            raise DownloadError(
                f"{parts.hostname} is not a public host",
                code="refused_host",
                hint="download.allow_private_hosts=true allows a mirror of your own",
            )


def _addresses(
    host: str, *, through_proxy: bool
) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """What a host name stands for. Behind a proxy, only what the name itself says."""
    try:
        return [_unwrapped(ipaddress.ip_address(host.partition("%")[0]))]
    except ValueError:
        pass  # a name
    if host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost"):
        return [ipaddress.ip_address("127.0.0.1")]
    if through_proxy:
        return []
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise DownloadError(
            f"{host} has no address: {error}", code="network", retryable=True
        ) from error
    return [_unwrapped(ipaddress.ip_address(str(a[4][0]).partition("%")[0])) for a in found]


def _unwrapped(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IPv4 address within an IPv6 one, if there is one."""
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address.sixtofour or address
    return address


# --- attempts --------------------------------------------------------------------------------


def _with_retries(
    name: str, url: str, *, download: Download, limits: MediaLimits, folder: Path
) -> Path:
    check_url(
        url,
        allow_private_hosts=download.allow_private_hosts,
        through_proxy=download.proxy is not None,
    )
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, DownloadError) and e.retryable),
        stop=tenacity.stop_after_attempt(download.max_attempts),
        wait=tenacity.wait_exponential(multiplier=download.backoff_s, max=MAX_BACKOFF_S)
        + tenacity.wait_random(0, download.backoff_s / 2),
        reraise=True,
    )
    for attempt in retrying:
        with attempt:
            path = _attempt(name, url, download=download, folder=folder)
    return _checked(path, limits)


def _attempt(name: str, url: str, *, download: Download, folder: Path) -> Path:
    """One try. yt-dlp's exceptions become ours."""
    import yt_dlp  # a heavy import, for those who download only

    too_large: list[int] = []

    def watch(status: dict[str, Any]) -> None:
        # `max_filesize` looks at the size that the server announces, which may be none.
        if status.get("downloaded_bytes", 0) > download.max_bytes:
            too_large.append(1)
            raise DownloadError("larger than the limit", code="too_large")

    with _private_cookies(download.cookies_file) as cookies:
        options = _options(name, download=download, folder=folder, cookies=cookies)
        options["progress_hooks"] = [watch]
        try:
            with _downloader(options, download) as downloader:
                info = downloader.extract_info(url, download=False, process=False)
                if info is None or info.get("_type", "video") in {"playlist", "multi_video"}:
                    raise DownloadError("a list of videos, not one", code="unsupported")
                info = downloader.process_ie_result(info, download=True)
        except DownloadError:
            for partial in folder.glob(f"{_globbed(name)}.*") if too_large else []:
                partial.unlink(missing_ok=True)
            raise
        except (yt_dlp.utils.YoutubeDLError, yt_dlp.networking.exceptions.RequestError) as error:
            raise _translated(error, url=url, download=download) from None
    return _written_file(info, name, download=download, folder=folder)


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


def _downloader(options: dict[str, Any], download: Download) -> Any:  # noqa: ANN401 - untyped
    """A YoutubeDL that opens addresses through one handler, which checks every one of them."""
    import yt_dlp
    from yt_dlp.networking._urllib import UrllibRH

    class CheckingRH(UrllibRH):  # type: ignore[misc]
        _SUPPORTED_URL_SCHEMES = ("http", "https")

        def _create_instance(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - untyped
            opener = super()._create_instance(*args, **kwargs)
            opener.add_handler(_CheckAddress(download))
            return opener

    class Downloader(yt_dlp.YoutubeDL):  # type: ignore[misc]
        def build_request_director(self, handlers: Any, preferences: Any = None) -> Any:  # noqa: ANN401
            del handlers, preferences
            return super().build_request_director([CheckingRH])

    return Downloader(options)


class _CheckAddress(urllib.request.BaseHandler):
    """Looks at each request before it is sent, those that follow a redirect included."""

    handler_order = 10

    def __init__(self, download: Download) -> None:
        self._download = download

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        from yt_dlp.networking.exceptions import RequestError

        try:
            check_url(
                request.full_url,
                allow_private_hosts=self._download.allow_private_hosts,
                through_proxy=self._download.proxy is not None,
            )
        except DownloadError as error:  # yt-dlp lets only its own through
            raise RequestError(error.cause, cause=error) from error
        return request

    https_request = http_request
    ftp_request = http_request


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


def _checked(path: Path, limits: MediaLimits) -> Path:
    """The file, if it is media: servers send pages of text as video/mp4."""
    try:
        probe.probe(path, limits)
    except MediaError as error:
        path.unlink(missing_ok=True)
        raise DownloadError(
            f"what came is no usable video: {error.cause}", code="corrupt"
        ) from error
    return path


def _translated(error: Exception, *, url: str, download: Download) -> DownloadError:
    """One of yt-dlp's exceptions as ours, by its class and its text."""
    import yt_dlp

    inner = (getattr(error, "exc_info", None) or (None, error))[1] or error
    if own := _own_error(inner):
        return own
    text = _clean(str(error), url=url, download=download)
    if "No space left" in text:
        raise StorageError("no space left for a download", code="no_space") from None
    status = getattr(inner, "status", None)
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


def _clean(text: str, *, url: str, download: Download) -> str:
    """An error text without colours, secrets and pleas to report a bug."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).replace(url, _shown(url))
    if download.proxy:
        text = text.replace(download.proxy, "the proxy")
    text = re.sub(r"(https?://[^\s?#'\"]+)[?#][^\s'\"]*", r"\1", text)
    text = re.sub(r"(https?://)[^/\s@]+@", r"\1", text)
    text = text.removeprefix("ERROR: ").split("; please report this issue")[0]
    return text[:MAX_CAUSE_CHARS]


def _shown(url: str) -> str:
    """An address without user, password, query and fragment."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))[:200]


# --- files and locks -------------------------------------------------------------------------


@contextlib.contextmanager
def _private_cookies(path: str | None) -> Iterator[Path | None]:
    """A copy that only we can read, since yt-dlp writes back to the file that it is given."""
    if path is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="kpmask-") as folder:  # mode 0700
        copy = Path(folder) / "cookies.txt"
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                error.strerror or "cannot be read", subject="download.cookies_file"
            ) from error
        copy.touch(mode=0o600)
        copy.write_bytes(data)
        yield copy


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _slot(count: int) -> Iterator[None]:
    """One of `count` places among this user's downloads on this machine."""
    folder = Path(tempfile.gettempdir()) / f"kpmask-download-slots-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise StorageError("belongs to another user", subject=str(folder), code="denied")
    while True:
        for number in range(count):
            with (folder / str(number)).open("wb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield
                return
        time.sleep(0.2)


@contextlib.contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    """Trouble with our own disk ends the run; it is no fault of the video."""
    try:
        yield
    except OSError as error:
        code = "no_space" if error.errno in {28, 122} else "unavailable"
        raise StorageError(error.strerror or str(error), subject=str(folder), code=code) from error


def _globbed(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)
