"""Fetching one video: a file by HTTP, the video of a page by yt-dlp, an object of an S3 store.

- Addresses come from tables that others wrote: only http and https, and no private, loopback or
  link-local host unless it is allowed, checked at every redirect and connected to as checked. An
  s3:// address is read with our own keys, so only below the prefixes that the settings name.
- What fails for a passing reason is tried again with back-off, but no longer than `max_time_s`; a
  host that asks for a pause gets it.
- A partial file stays and is resumed, by the next attempt or the next run. A lock keeps two runs
  from writing it at once; other locks bound how many downloads a machine has in flight, in all and
  from one host. Several machines each keep to these limits by themselves.
- Every failure is a `DownloadError` with one of its codes. Causes name no proxy, no cookie and no
  query string.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.cookiejar
import os
import shutil
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

import tenacity

from kpmask.config import Download, MediaLimits
from kpmask.errors import ConfigError, DownloadError, MediaError, StorageError
from kpmask.media import probe
from tasks.hosts import check_url, proxy_of, shown_url
from tasks.http_download import download_file
from tasks.page_download import download_page, is_video_site
from tasks.patience import Patience
from tasks.storage import open_object
from tasks.turns import HostPaused, download_place

MAX_BACKOFF_S: Final = 120.0


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
        if not url.startswith("s3://"):
            check_url(url, allow_private_hosts=download.allow_private_hosts, through_proxy=True)
        place = None if url.startswith("s3://") else url
        with _locked(folder / f".{name}.lock"), download_place(place, download):
            return _with_retries(name, url, download=download, limits=limits, folder=folder)


def video_url(video_id: str, *, download: Download) -> str:
    """The address of a video that is known by its id alone."""
    in_store = download.url_template.startswith("s3://")  # whose keys are not quoted
    quoted = video_id if in_store else urllib.parse.quote(video_id, safe="")
    try:
        return download.url_template.format(video_id=quoted)
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"a template with {{video_id}} is needed: {error}", subject="download.url_template"
        ) from error


# --- attempts --------------------------------------------------------------------------------


def _with_retries(
    name: str, url: str, *, download: Download, limits: MediaLimits, folder: Path
) -> Path:
    patience = Patience(download)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda e: _passes(e) and not patience.is_over),
        stop=tenacity.stop_after_attempt(download.max_attempts),
        wait=tenacity.wait_exponential(multiplier=download.backoff_s, max=MAX_BACKOFF_S)
        + tenacity.wait_random(0, download.backoff_s / 2),
        reraise=True,
    )
    for attempt in retrying:
        with attempt:
            path = _attempt(name, url, download=download, folder=folder, patience=patience)
    return _checked(path, limits)


def _passes(error: BaseException) -> bool:
    """Whether an error may be gone after a pause of ours."""
    return (
        isinstance(error, DownloadError) and error.retryable and not isinstance(error, HostPaused)
    )


def _attempt(name: str, url: str, *, download: Download, folder: Path, patience: Patience) -> Path:
    """One try, by the tool for the kind of address."""
    if url.startswith("s3://"):
        return _from_store(name, url, download=download, folder=folder)
    with _private_cookies(download.cookies_file) as cookies:
        # A SOCKS proxy is what only yt-dlp knows how to use.
        socks = (proxy_of(url, download) or "").startswith("socks")
        if not is_video_site(url) and not socks:
            path = download_file(
                name,
                url,
                download=download,
                folder=folder,
                cookies=_cookie_jar(cookies),
                patience=patience,
            )
            if path is not None:
                return path
        return download_page(
            name, url, download=download, folder=folder, cookies=cookies, patience=patience
        )


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


# --- S3 --------------------------------------------------------------------------------------


def _from_store(name: str, url: str, *, download: Download, folder: Path) -> Path:
    """An object, below one of the prefixes that the settings allow; `.*` stands for any suffix."""
    _check_prefix(url, download)
    try:
        store, key = open_object(url)
        if key.endswith(".*"):
            key = _any_suffix([info.key for info in store.list(key.removesuffix("*"))])
        size = store.info(key).size_bytes
        if size > download.max_bytes:
            raise DownloadError(f"{size} bytes, of at most {download.max_bytes}", code="too_large")
        source = store.local(key)
    except (StorageError, ConfigError) as error:
        raise _store_trouble(error) from error
    path = folder / f"{name}{PurePosixPath(key).suffix}"
    path.unlink(missing_ok=True)
    try:
        path.hardlink_to(source)
    except OSError:  # the cache is on another disk
        shutil.copyfile(source, path)
    return path


def _any_suffix(keys: list[str]) -> str:
    files = [key for key in keys if "/" not in key]
    if not files:
        raise StorageError("there is no such object", code="not_found")
    return files[0]


def _check_prefix(url: str, download: Download) -> None:
    """Refuse to read with our own keys what the settings do not name.

    Raises:
        DownloadError: code `refused_host`.
    """
    template, placeholder, _ = download.url_template.partition("{")
    own = [template.rpartition("/")[0]] if placeholder and template.startswith("s3://") else []
    # A template without a bucket of its own ("s3://{video_id}") opens none.
    allowed = [p.rstrip("/") for p in (*download.s3_prefixes, *own) if p.rstrip("/") != "s3:"]
    if not any(url.startswith(f"{prefix}/") for prefix in allowed):
        raise DownloadError(
            f"{shown_url(url)} is below none of the prefixes that may be read",
            code="refused_host",
            hint="download.s3_prefixes names them",
        )


def _store_trouble(error: StorageError | ConfigError) -> Exception:
    """What a store's error means for one video. Trouble with our own disk stays what it is."""
    codes = {"not_found": "removed", "no_bucket": "removed", "denied": "private"} | {
        "path_escape": "unsupported",
        "config_invalid": "unsupported",
        "too_large": "too_large",
        "unavailable": "network",
    }
    if error.code not in codes:
        return error
    code = codes[error.code]
    return DownloadError(error.cause, code=code, retryable=code == "network" and error.retryable)


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


def _cookie_jar(path: Path | None) -> http.cookiejar.CookieJar:
    """The cookies of a file, read as yt-dlp reads it."""
    if path is None:
        return http.cookiejar.CookieJar()
    from yt_dlp.cookies import YoutubeDLCookieJar

    jar: http.cookiejar.MozillaCookieJar = YoutubeDLCookieJar(str(path))
    try:
        jar.load(ignore_discard=True, ignore_expires=True)
    except (http.cookiejar.LoadError, UnicodeDecodeError):  # whose text may hold a cookie
        raise ConfigError(
            "not in the format of Netscape's cookie files", subject="download.cookies_file"
        ) from None
    return jar


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone at a name. The file goes with its lock, so that a folder does not fill with them."""
    while True:
        with path.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(path, file.fileno()):  # removed by who had it before us
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    """Trouble with our own disk ends the run; it is no fault of the video."""
    try:
        yield
    except OSError as error:
        code = "no_space" if error.errno in {28, 122} else "unavailable"
        raise StorageError(error.strerror or str(error), subject=str(folder), code=code) from error
