"""yt-dlp held to our rules: where it connects, how long it waits, and what it may run."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kpmask.config import Download, validated
from kpmask.errors import DownloadError
from kpmask.media.encode import encode
from tasks import hosts
from tasks.page_download import download_page, is_video_site
from tasks.patience import Patience
from tests.support.hosts import Server, serving

# yt-dlp leaves the connection of a download that it breaks off to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    encode(path, (noise[i % 4] for i in range(32)), fps=25)
    return path.read_bytes()


@pytest.fixture
def server(video: bytes) -> Iterator[Server]:
    with serving(video) as server:
        yield server


@pytest.fixture(autouse=True)
def _own_places(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("places")))


def get(url: str, folder: Path, **changes: object) -> Path:
    tree = {"allow_private_hosts": True, "backoff_s": 0.02, "timeout_s": 5.0} | changes
    download = validated(Download, tree)
    patience = Patience(download)
    return download_page(
        "vid", url, download=download, folder=folder, cookies=None, patience=patience
    )


def failure(url: str, folder: Path, **changes: object) -> DownloadError:
    with pytest.raises(DownloadError) as failed:
        get(url, folder, **changes)
    return failed.value


def test_a_playlist_of_10000(server: Server, tmp_path: Path) -> None:
    start_s = time.monotonic()
    error = failure(server.url + "/feed", tmp_path)
    assert (error.code, error.retryable) == ("unsupported", False)
    assert "list" in error.cause
    assert server.counts["/ok.mp4"] == 0
    assert time.monotonic() - start_s < 20


@pytest.mark.parametrize(
    "path", ["playlist?list=PL123", "@somebody/videos", "channel/UC1", "c/x", "results?q=x"]
)
def test_lists_of_the_site_itself_are_not_opened(tmp_path: Path, path: str) -> None:
    error = failure(f"https://www.youtube.com/{path}", tmp_path)  # no network is there to open it
    assert (error.code, error.retryable) == ("unsupported", False)


@pytest.mark.parametrize(
    ("url", "known"),
    [
        ("https://www.youtube.com/watch?v=x", True),
        ("https://youtu.be/x", True),
        ("https://m.YouTube.com/watch?v=x", True),
        ("https://notyoutube.com/x", False),
        ("https://youtube.com.example/x", False),
        ("https://example.org/youtube.com", False),
    ],
)
def test_sites(url: str, known: bool) -> None:
    assert is_video_site(url) is known


@pytest.mark.parametrize("path", ["/drip.mp4", "/drip_headers.mp4"])
def test_a_byte_now_and_then(server: Server, tmp_path: Path, path: str) -> None:
    start_s = time.monotonic()
    error = failure(server.url + path, tmp_path, timeout_s=0.5)
    assert (error.code, error.retryable) == ("network", True)
    assert "bytes a second" in error.cause
    assert time.monotonic() - start_s < 10


def test_redirects_for_ever(server: Server, tmp_path: Path) -> None:
    failure(server.url + "/for_ever.mp4", tmp_path)
    assert server.counts["/for_ever.mp4"] < 30


def test_a_name_that_changes_its_address(
    server: Server, video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each connection goes to what was checked for it: here the second one is refused."""
    answers = ["127.0.0.1", "127.0.0.2"]
    asked = []

    def look_up(host: str, port: object, *args: object, **kwargs: object) -> list[tuple]:
        address = host
        if host == "rebind.example":
            asked.append(host)
            address = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port or 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(hosts, "is_public", lambda address: str(address) == "127.0.0.1")
    with serving(video, "127.0.0.2", server.port) as inner:
        url = f"http://rebind.example:{server.port}/ok.mp4"
        assert failure(url, tmp_path, allow_private_hosts=False).code == "refused_host"
        assert inner.requests == []
    assert 1 <= len(server.requests) < 3
    assert len(asked) >= 2


def test_ffmpeg_is_not_let_loose(
    server: Server, video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of pieces that yt-dlp would hand to FFmpeg, which opens whatever address it names."""
    monkeypatch.setattr(hosts, "is_public", lambda address: str(address) == "127.0.0.1")
    ran = tmp_path / "ran"
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ffmpeg", "ffprobe"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {ran}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    with serving(video, "127.0.0.2") as inner:
        server.other = inner.url
        for path in ("/hls.m3u8", "/plain_hls.m3u8"):
            failure(server.url + path, tmp_path / "out", allow_private_hosts=False)
            assert inner.requests == []
    assert not ran.exists(), ran.read_text()


def test_a_pause_is_noted(server: Server, tmp_path: Path) -> None:
    server.extra = {"retry": "3600"}
    for _ in range(2):
        error = failure(server.url + "/paused.mp4", tmp_path, max_pause_s=1)
        assert (error.code, error.retryable) == ("rate_limited", True)
    assert len(server.requests) == 1
