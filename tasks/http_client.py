"""One HTTP request for a file, through its redirects, to hosts that were checked.

Every connection, a redirect's too, goes to an address that was just checked; its name is looked up
once. Only httpcore is used, below any client that would log addresses with their queries.
"""

from __future__ import annotations

import base64
import email.message
import functools
import http.cookiejar
import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import httpcore

import kpmask
from kpmask.config import Download
from kpmask.errors import DownloadError
from tasks.hosts import addresses_of, check_url, host_of, proxy_of
from tasks.patience import Patience
from tasks.turns import wait_turn

MAX_REDIRECTS: Final = 10
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True, slots=True)
class Version:
    """What a server says by which a file can be told from its next version."""

    etag: str
    modified: str
    total: int | None

    @property
    def if_range(self) -> str:
        """What a range may be tied to. A weak ETag says nothing of single bytes."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified

    def may_continue(self, other: Version) -> bool:
        """Whether `other` may be the same file's."""
        pairs = ((self.etag, other.etag), (self.modified, other.modified))
        return self.total == other.total and all(a == b for a, b in pairs if a and b)


class Answer:
    """A response, whose body has not been read."""

    def __init__(self, url: str, response: httpcore.Response) -> None:
        self.url = url
        self.status = response.status
        self._response = response
        self.headers = email.message.Message()
        for key, value in response.headers:
            self.headers[key.decode("latin-1")] = value.decode("latin-1")

    def header(self, name: str) -> str:
        return str(self.headers.get(name, "")).strip()

    def info(self) -> email.message.Message:
        """What a cookie jar asks a response for."""
        return self.headers

    def chunks(self) -> Iterator[bytes]:
        return self._response.iter_stream()

    @property
    def total(self) -> int | None:
        """Bytes of the whole file, as announced."""
        if self.status == 206:
            return _number(self.header("content-range").rpartition("/")[2])
        return _number(self.header("content-length"))

    @property
    def range_start(self) -> int | None:
        return _number(self.header("content-range").removeprefix("bytes ").partition("-")[0])

    @property
    def version(self) -> Version:
        return Version(self.header("etag"), self.header("last-modified"), self.total)


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 30 else None


@contextmanager
def opened(
    url: str,
    headers: dict[str, str],
    *,
    download: Download,
    cookies: http.cookiejar.CookieJar,
    patience: Patience,
) -> Iterator[Answer]:
    """The answer to a request, after all redirects.

    Raises:
        DownloadError: the address, or one that it leads to, may not be opened, or there is no end
            of redirects.
        httpcore's errors: the connection failed.
    """
    for _ in range(MAX_REDIRECTS + 1):
        check_url(url, allow_private_hosts=download.allow_private_hosts, through_proxy=True)
        wait_turn(url, download)
        with (
            _client(url, download, patience) as client,
            client.stream(
                "GET",
                _target(url),
                headers=_request_headers(url, headers, cookies),
                extensions={"timeout": _timeouts(download)},
            ) as response,
        ):
            answer = Answer(url, response)
            cookies.extract_cookies(answer, urllib.request.Request(_bare(url)))  # type: ignore[arg-type]  # noqa: S310 - only asked for its parts
            location = answer.header("location")
            if answer.status not in _REDIRECTS or not location:
                yield answer
                return
        url = _joined(url, location)
    raise DownloadError(f"more than {MAX_REDIRECTS} redirects", code="unsupported")


def _joined(url: str, location: str) -> str:
    try:
        return urllib.parse.urljoin(url, location)
    except ValueError:
        raise DownloadError("a redirect to no valid address", code="unsupported") from None


def _timeouts(download: Download) -> dict[str, float]:
    return dict.fromkeys(("connect", "read", "write", "pool"), download.timeout_s)


def _bare(url: str) -> str:
    """An address without user and password."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _target(url: str) -> httpcore.URL:
    """An address as it goes over the wire: its name in ASCII, other characters quoted."""
    parts = urllib.parse.urlsplit(url)
    try:
        host = host_of(url).encode("ascii" if host_of(url).isascii() else "idna")
    except UnicodeError:
        raise DownloadError("not a valid host name", code="unsupported") from None
    safe = "!#$%&'()*+,/:;=?@[]~"
    target = urllib.parse.quote(parts.path or "/", safe=safe)
    if parts.query:
        target += "?" + urllib.parse.quote(parts.query, safe=safe)
    return httpcore.URL(
        scheme=parts.scheme.encode(), host=host, port=parts.port, target=target.encode()
    )


def _request_headers(
    url: str, headers: dict[str, str], cookies: http.cookiejar.CookieJar
) -> list[tuple[str, str]]:
    parts = urllib.parse.urlsplit(url)
    request = urllib.request.Request(_bare(url))  # noqa: S310 - only asked for its parts
    cookies.add_cookie_header(request)
    host = _target(url).host.decode()
    host = f"[{host}]" if ":" in host else host
    own = {
        "Host": host if parts.port is None else f"{host}:{parts.port}",
        "Accept": "video/*, */*;q=0.5",
        "Accept-Encoding": "identity",
        "Connection": "close",
        "User-Agent": f"kpmask/{kpmask.__version__}",
        "Cookie": request.get_header("Cookie"),
    }
    if parts.username is not None:
        user = urllib.parse.unquote(parts.username)
        password = urllib.parse.unquote(parts.password or "")
        own["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    return [(key, value) for key, value in (own | headers).items() if value]


def _client(url: str, download: Download, patience: Patience) -> httpcore.ConnectionPool:
    """Connections for one request."""
    proxy = proxy_of(url, download)
    if proxy is None:
        network = _Network(patience, allow_private_hosts=download.allow_private_hosts)
        return httpcore.ConnectionPool(ssl_context=_tls(), network_backend=network)
    parts = urllib.parse.urlsplit(proxy)
    user, password = parts.username, urllib.parse.unquote(parts.password or "")
    return httpcore.HTTPProxy(
        _target(proxy),
        proxy_auth=None if user is None else (urllib.parse.unquote(user), password),
        ssl_context=_tls(),
        # The proxy is our own choice; what lies behind it, it looks up itself.
        network_backend=_Network(patience, allow_private_hosts=True),
    )


@functools.cache
def _tls() -> ssl.SSLContext:
    context = httpcore.default_ssl_context()
    context.load_default_certs()  # the system's own authorities, too
    return context


class _Network(httpcore.SyncBackend):
    """Connects to addresses that were checked, and reads with patience."""

    def __init__(self, patience: Patience, *, allow_private_hosts: bool) -> None:
        self._patience = patience
        self._allow_private_hosts = allow_private_hosts

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = addresses_of(host, allow_private_hosts=self._allow_private_hosts)
        for number, address in enumerate(addresses, start=1):
            try:
                stream = super().connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if number == len(addresses):
                    raise
            else:
                return _PatientStream(stream, self._patience)
        raise AssertionError("unreachable")


class _PatientStream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream, patience: Patience) -> None:
        self._inner = inner
        self._patience = patience

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        start_s = time.monotonic()
        data = self._inner.read(max_bytes, self._patience.timeout_s())
        self._patience.received(len(data), time.monotonic() - start_s)
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, timeout)

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        return _PatientStream(
            self._inner.start_tls(ssl_context, server_hostname, timeout), self._patience
        )

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - as the base class has it
        return self._inner.get_extra_info(info)
