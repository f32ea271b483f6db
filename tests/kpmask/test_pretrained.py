"""Downloads from a server on loopback that misbehaves in the ways that servers do."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from kpmask import perceptual
from kpmask.errors import CheckpointError
from kpmask.perceptual import load_perceptual
from kpmask.pretrained import PublishedFile, cache_folder, fetch

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """What it serves, how it fails, and what it was asked."""

    url: str
    content: bytes = CONTENT
    status: int = 200
    stop_after: int | None = None  # bytes of the file, then the connection ends
    ranges: bool = True
    asked: list[str | None] = field(default_factory=list)

    def file(self, **changes: Any) -> PublishedFile:
        settings = {"url": self.url, "sha256_prefix": SHA256[:8], "max_bytes": 2 * 2**20}
        return PublishedFile(**(settings | changes))


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.headers["Range"])
            if state.status != 200:
                self.send_error(state.status)
                return
            match = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
            start = int(match.group(1)) if match and state.ranges else 0
            if start >= len(state.content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(state.content) - start))
            self.end_headers()
            self.wfile.write(state.content[start : state.stop_after])

        def log_message(self, *_: Any) -> None:
            """Keep the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        state = Server(f"http://127.0.0.1:{httpd.server_port}/models/weights-1234.pth")
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield state
        httpd.shutdown()
        thread.join()


def refused(action: Callable[[], object], message: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=message) as raised:
        action()
    assert raised.value.code == "weights_unavailable"
    assert "perceptual_weights" in raised.value.hint
    return raised.value


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_downloads_once(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    path = fetch(server.file(), folder)
    assert path == folder / "weights-1234.pth"
    assert path.read_bytes() == CONTENT
    assert fetch(server.file(), folder) == path
    assert server.asked == [None]
    assert visible(folder) == ["weights-1234.pth"]
    assert not [p for p in folder.iterdir() if "part" in p.name]


def test_a_wrong_checksum_is_refused_and_forgotten(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"!"
    refused(lambda: fetch(server.file(), tmp_path), "SHA-256 .* does not begin with")
    assert visible(tmp_path) == []
    server.content = CONTENT
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, None]  # from the start again


@pytest.mark.parametrize("status", [404, 403, 500])
def test_http_errors(server: Server, tmp_path: Path, status: int) -> None:
    server.status = status
    refused(lambda: fetch(server.file(), tmp_path), f"HTTP {status}")
    assert visible(tmp_path) == []


def test_a_broken_download_is_continued(server: Server, tmp_path: Path) -> None:
    server.stop_after = 300_000
    error = refused(lambda: fetch(server.file(), tmp_path), "ended after 300000 of 1048576 bytes")
    assert error.retryable
    assert visible(tmp_path) == []
    server.stop_after = 700_000
    refused(lambda: fetch(server.file(), tmp_path), "ended after 700000")
    server.stop_after = None
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=700000-"]


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.stop_after, server.ranges = 300_000, False
    refused(lambda: fetch(server.file(), tmp_path), "ended after")
    server.stop_after = None
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT


def test_a_download_that_died_before_it_was_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".part-weights-1234.pth").write_bytes(CONTENT)
    assert fetch(server.file(), tmp_path).read_bytes() == CONTENT
    assert server.asked == ["bytes=1048576-"]  # answered with 416: there is no more


def test_a_file_over_the_limit(server: Server, tmp_path: Path) -> None:
    refused(lambda: fetch(server.file(max_bytes=1000), tmp_path), "longer than 1000 bytes")
    assert visible(tmp_path) == []


def test_no_server_and_no_folder(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/weights.pth"
    gone = PublishedFile(url=url, sha256_prefix="00", max_bytes=10)
    assert refused(lambda: fetch(gone, tmp_path), "refused").retryable
    (tmp_path / "file").write_text("")
    refused(lambda: fetch(gone, tmp_path / "file" / "cache"), "Not a directory")


def test_many_at_once_download_once(server: Server, tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(server.file(), tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "weights-1234.pth"] * 4
    assert server.asked == [None]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("KPMASK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "kpmask"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "kpmask"


def test_vgg19_comes_by_download(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = perceptual.Vgg19Features((4, 4, 4, 4, 4))
    file = tmp_path / "made.pth"
    torch.save(narrow.state_dict(), file)
    server.content = file.read_bytes()
    prefix = hashlib.sha256(server.content).hexdigest()[:8]
    monkeypatch.setattr(perceptual, "VGG19_FILE", server.file(sha256_prefix=prefix))
    monkeypatch.setattr(perceptual, "Vgg19Features", lambda: type(narrow)((4, 4, 4, 4, 4)))
    features = load_perceptual("vgg19", cache_dir=tmp_path / "cache")
    assert features is not None
    image = torch.rand(1, 3, 16, 16)
    assert all(map(torch.equal, features(image), narrow(image)))
