"""Which hosts an address of strangers may lead to, and how an address is shown.

Names are looked up once: who connects to a host asks `addresses_of` and connects to what it says,
so that a name server cannot answer with a public address first and with an internal one next.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import urllib.parse
import urllib.request
from typing import Final

from kpmask.config import Download
from kpmask.errors import DownloadError

MAX_CAUSE_CHARS: Final = 300
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def check_url(url: str, *, allow_private_hosts: bool, through_proxy: bool = False) -> None:
    """Refuse an address that a table of strangers must not make us open.

    Args:
        url: the address.
        allow_private_hosts: whether it may lead into networks of our own.
        through_proxy: look at what the address itself says, and not at what its name stands for.

    Raises:
        DownloadError: `unsupported` where it is not http or https, `refused_host` where its host is
            not a public one, `network` where its host has no address.
    """
    host = host_of(url)
    if not (through_proxy and _written_address(host) is None):
        addresses_of(host, allow_private_hosts=allow_private_hosts)


def host_of(url: str) -> str:
    """The host of an http or https address.

    Raises:
        DownloadError: code `unsupported`: it is none.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:  # half an IPv6 address, or a port that is no number
        parts, host = urllib.parse.urlsplit(""), None
    if parts.scheme not in {"http", "https"} or not host:
        raise DownloadError(
            f"not an http or https address: {shown_url(url)}", code="unsupported", retryable=False
        )
    return host


def addresses_of(host: str, *, allow_private_hosts: bool) -> list[str]:
    """The addresses that a host's name stands for now, every one of which may be connected to.

    Raises:
        DownloadError: `refused_host` where one of them is not public, `network` where it has none.
    """
    written = _written_address(host)
    own = str(written) if _is_name(host) else host  # an address with its zone
    found = _looked_up(host) if written is None else [own]
    for text in found:
        address = _unwrapped(ipaddress.ip_address(text.partition("%")[0]))
        if not (allow_private_hosts or is_public(address)):
            raise DownloadError(
                f"{host} is not a public host",
                code="refused_host",
                hint="download.allow_private_hosts=true allows a mirror of your own",
            )
    return found


def is_public(address: Address) -> bool:
    """Whether anybody on the internet means the same host by this address."""
    return address.is_global and not address.is_multicast


def _is_name(host: str) -> bool:
    """Whether a host is given by a name, and not by its address."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return True
    return False


def _written_address(host: str) -> Address | None:
    """The address that a host is written as; none for a name that must be looked up."""
    if not _is_name(host):
        return ipaddress.ip_address(host.partition("%")[0])
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return ipaddress.ip_address("127.0.0.1")
    return None


def _looked_up(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise DownloadError(
            f"{host} has no address: {error}", code="network", retryable=True
        ) from error
    return list(dict.fromkeys(str(answer[4][0]) for answer in found))


def _unwrapped(address: Address) -> Address:
    """The IPv4 address within an IPv6 one, if there is one."""
    if not isinstance(address, ipaddress.IPv6Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def proxy_of(url: str, download: Download) -> str | None:
    """The proxy on the way to an address: the setting's, else the environment's."""
    if download.proxy is not None:
        return download.proxy
    parts = urllib.parse.urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


# --- what people may see ---------------------------------------------------------------------


def shown_url(url: str) -> str:
    """An address without user, password, query and fragment."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return "(no valid address)"
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))[:200]


def clean_text(text: str, *, url: str, download: Download) -> str:
    """An error text without colours, secrets and pleas to report a bug."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).replace(url, shown_url(url))
    if download.proxy:
        text = text.replace(download.proxy, "the proxy")
    text = re.sub(r"(https?://[^\s?#'\"]+)[?#][^\s'\"]*", r"\1", text)
    text = re.sub(r"(https?://)[^/\s@]+@", r"\1", text)
    text = text.removeprefix("ERROR: ").split("; please report this issue")[0]
    return text[:MAX_CAUSE_CHARS]
