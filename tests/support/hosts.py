"""An HTTP server on this machine that misbehaves in every way that servers do."""

from __future__ import annotations

import gc
import http.server
import ssl
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Server(http.server.ThreadingHTTPServer):
    """`requests` holds (method, path, Range, Cookie) of each request."""

    daemon_threads = True

    def __init__(
        self, video: bytes, host: str, port: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        super().__init__((host, port), Handler)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.video = video
        self.requests: list[tuple[str, str, str | None, str | None]] = []
        self.counts: Counter[str] = Counter()
        self.port = self.server_address[1]
        self.url = f"http://{host}:{self.port}"
        self.stopping = threading.Event()
        self.authorizations: list[str | None] = []
        self.targets: list[str] = []
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0
        self.extra: dict[str, str] = {}  # more headers, for whole files and ranges
        self.other = ""  # where `to_other` leads


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        self.server.targets.append(self.path)
        self.server.authorizations.append(self.headers["Authorization"])
        self.server.counts[path] += 1
        headers = self.headers
        self.server.requests.append((self.command, path, headers["Range"], headers["Cookie"]))
        getattr(self, path.strip("/").split(".")[0].replace("-", "_"), self.missing)()

    def reply(
        self, status: int, body: bytes = b"", kind: str = "video/mp4", **headers: object
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in ({"Content_Length": len(body)} | headers).items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def ok(self) -> None:
        video, asked, extra = self.server.video, self.headers["Range"], self.server.extra
        condition = self.headers["If-Range"]
        if not asked or (condition and condition not in extra.values()):
            self.reply(200, video, Accept_Ranges="bytes", **extra)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        if int(first) >= len(video):
            self.reply(416, Content_Range=f"bytes */{len(video)}")
            return
        part = video[int(first) : int(last) + 1 if last else len(video)]
        end = int(first) + len(part) - 1
        self.reply(206, part, Content_Range=f"bytes {first}-{end}/{len(video)}", **extra)

    def moved(self) -> None:
        self.reply(302, Location="/ok.mp4")

    def missing(self) -> None:
        self.reply(404, b"no", "text/html")

    def denied(self) -> None:
        self.reply(403, b"no", "text/html")

    def busy(self) -> None:
        self.reply(429, b"slow down", "text/html")

    def flaky(self) -> None:
        statuses = {1: 503, 2: 429}
        status = statuses.get(self.server.counts["/flaky.mp4"])
        if status:
            self.reply(status, b"later", "text/html")
        else:
            self.ok()

    def cut(self) -> None:
        """Half of what is announced; all of it from the fifth request on."""
        if self.server.counts["/cut.mp4"] > 4:
            self.ok()
            return
        half = self.server.video[: len(self.server.video) // 2]
        self.reply(200, half, Content_Length=len(self.server.video), Accept_Ranges="bytes")
        self.close_connection = True

    def always_cut(self) -> None:
        half = self.server.video[: len(self.server.video) // 2]
        self.reply(200, half, Content_Length=len(self.server.video))
        self.close_connection = True

    def page(self) -> None:
        self.reply(200, b"<html><body>Accept our cookies</body></html>", "text/html")

    def empty(self) -> None:
        self.reply(200)

    def liar(self) -> None:
        self.reply(200, b"<html>no video at all</html>")

    def hang(self) -> None:
        self.reply(200, b"x" * 100, Content_Length=10_000)
        self.server.stopping.wait(20)

    def endless(self) -> None:
        self.reply(200, self.server.video * 20, Content_Length=None)
        self.close_connection = True

    def to_ftp(self) -> None:
        self.reply(302, Location="ftp://ftp.example.org/x.mp4")

    def to_other(self) -> None:
        self.reply(302, Location=f"{self.server.other}/ok.mp4")

    def for_ever(self) -> None:
        """Redirects to another address each time."""
        number = len(self.server.requests)
        self.reply(302, Location=f"/for_ever.mp4?{number}")

    def huge(self) -> None:
        """Says that 10 TB follow, and has them."""
        self.reply(200, b"\0\0\0\x18ftypmp42" + b"x" * 2000, Content_Length=10 * 2**40)
        self.server.stopping.wait(20)

    def drip(self) -> None:
        """A byte at a time, so that no single read is late."""
        self.reply(200, b"\0\0\0\x18ftypmp42", Content_Length=1_000_000)
        self._slowly()

    def drip_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Padding: ")
        self._slowly()

    def _slowly(self) -> None:
        self.close_connection = True
        try:
            while not self.server.stopping.wait(0.05):
                self.wfile.write(b"x")
        except OSError:
            return  # the client gave up

    def html(self) -> None:
        self.reply(200, b"<!doctype html><html>Sign in</html>", "text/html; charset=utf-8")

    def feed(self) -> None:
        """A playlist of 10,000."""
        item = "<item><title>{0}</title><enclosure url='/ok.mp4?{0}' type='video/mp4'/></item>"
        items = "".join(item.format(number) for number in range(10_000))
        feed = f"<?xml version='1.0'?><rss version='2.0'><channel>{items}</channel></rss>"
        self.reply(200, feed.encode(), "application/rss+xml")

    def paused(self) -> None:
        """Asks for a pause, once."""
        if self.server.counts["/paused.mp4"] == 1:
            self.reply(429, b"later", "text/html", Retry_After=self.server.extra["retry"])
        else:
            self.ok()

    def gone_after_half(self) -> None:
        """Half; and then it is another file of the same length."""
        video = self.server.video
        if self.server.counts["/gone_after_half.mp4"] > 1:
            self.server.video = video[:-1] + bytes([video[-1] ^ 1])
            self.server.extra = {"ETag": '"second"'}
            self.ok()
            return
        self.reply(200, video[: len(video) // 2], Content_Length=len(video), ETag='"first"')
        self.close_connection = True

    def wrong_range(self) -> None:
        """Half; and then a range that was not asked for."""
        video, half = self.server.video, len(self.server.video) // 2
        if self.server.counts["/wrong_range.mp4"] == 1:
            self.reply(200, video[:half], Content_Length=len(video), ETag='"1"')
            self.close_connection = True
        elif self.headers["Range"]:
            content_range = f"bytes 0-{len(video) - 1}/{len(video)}"
            self.reply(206, video, Content_Range=content_range, ETag='"1"')
        else:
            self.ok()

    def no_ranges(self) -> None:
        """Half of it twice, and it knows no ranges."""
        video = self.server.video
        whole = self.server.counts["/no_ranges.mp4"] > 2
        self.reply(200, video if whole else video[: len(video) // 2], Content_Length=len(video))
        self.close_connection = True

    def pieces(self) -> None:
        """Ranges of a quarter at most, whatever is asked for."""
        video = self.server.video
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        part = video[start : start + len(video) // 4 + 1]
        end = start + len(part) - 1
        self.reply(206, part, Content_Range=f"bytes {start}-{end}/{len(video)}")

    def counted(self) -> None:
        with self.server.lock:
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        time.sleep(0.1)
        with self.server.lock:
            self.server.at_once -= 1
        self.ok()

    def zipped(self) -> None:
        self.reply(200, b"\x1f\x8b" + bytes(1000), Content_Encoding="gzip")

    def fifth(self) -> None:
        """One request in five fails, each in another way."""
        number = self.server.counts["/fifth.mp4"]
        if number % 5:
            self.ok()
        elif number % 2:
            self.reply(503, b"later", "text/html")
        else:
            half = self.server.video[: len(self.server.video) // 2]
            self.reply(200, half, Content_Length=len(self.server.video))
            self.close_connection = True

    def hls(self) -> None:
        """A list of pieces that only FFmpeg could decrypt, on a private host."""
        text = '#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-KEY:METHOD=SAMPLE-AES,URI="k"\n'
        text += f"#EXTINF:1,\n{self.server.other}/ok.mp4\n#EXT-X-ENDLIST\n"
        self.reply(200, text.encode(), "application/vnd.apple.mpegurl")

    def plain_hls(self) -> None:
        """A list of pieces on a private host."""
        text = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{self.server.other}/ok.mp4\n"
        self.reply(200, (text + "#EXT-X-ENDLIST\n").encode(), "application/vnd.apple.mpegurl")


@contextmanager
def serving(
    video: bytes, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> Iterator[Server]:
    """A server of `video`, for the duration."""
    with Server(video, host, port, tls) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.stopping.set()
            server.shutdown()
            thread.join()
    gc.collect()
