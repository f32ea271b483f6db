"""A loopback HTTP proxy that spoils the first requests that match, for real."""

from __future__ import annotations

import http.client
import http.server
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

Fault = Literal["500", "503", "reset", "slow", "truncated", "lost-answer"]


@dataclass
class Flaky:
    """What the proxy does and what it saw. `matches` picks the requests that get a fault."""

    upstream: str
    faults: list[Fault] = field(default_factory=list)
    matches: Callable[[str, str], bool] = lambda method, path: True
    slow_s: float = 0.0
    seen: list[tuple[str, str]] = field(default_factory=list)
    endpoint: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.seen.append((method, path))
            return self.faults.pop(0) if self.faults and self.matches(method, path) else None


@contextmanager
def flaky_proxy(upstream: str) -> Iterator[Flaky]:
    """The proxy before `upstream`, for the duration."""
    flaky = Flaky(upstream)

    class Handler(_Handler):
        state = flaky

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    flaky.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield flaky
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Flaky

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.state.next_fault(self.command, self.path)
        if fault in {"500", "503"}:
            self.send_response_only(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "reset":
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(self.state.slow_s)
        status, headers, answer = self._forward(body)
        if fault == "lost-answer":
            self.close_connection = True
            return
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if fault == "truncated":
            answer = answer[: len(answer) // 2]
            self.close_connection = True
        try:
            self.wfile.write(answer)
        except OSError:  # the client gave up, as a slow answer makes it
            self.close_connection = True

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        host = urllib.parse.urlsplit(self.state.upstream).netloc
        connection = http.client.HTTPConnection(host, timeout=30)
        try:
            # The Host header stays the client's: it is part of what the client signed.
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in {"connection", "expect"}:
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            response = connection.getresponse()
            answer = response.read()
            hop = {"connection", "transfer-encoding", "content-length"}
            headers = [(k, v) for k, v in response.getheaders() if k.lower() not in hop]
            is_head = self.command == "HEAD"
            length = response.getheader("Content-Length", "0") if is_head else str(len(answer))
            return response.status, [*headers, ("Content-Length", length)], answer
        finally:
            connection.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve
