"""Files by HTTP from hosts of every bad kind, on this machine."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kpmask.config import Download, MediaLimits, validated
from kpmask.errors import DownloadError, StorageError
from kpmask.media.encode import encode
from tasks import hosts, http_client, http_download
from tasks.download import fetch
from tasks.http_download import media_suffix
from tests.support.hosts import Server, serving

LIMITS = MediaLimits()


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


def settings(**changes: object) -> Download:
    tree = {"allow_private_hosts": True, "backoff_s": 0.02, "timeout_s": 5.0, "max_attempts": 3}
    return validated(Download, tree | changes)


def get(url: str, folder: Path, name: str = "vid", **changes: object) -> Path:
    return fetch(name, url, download=settings(**changes), limits=LIMITS, folder=folder)


def failure(url: str, folder: Path, **changes: object) -> DownloadError:
    with pytest.raises(DownloadError) as failed:
        get(url, folder, **changes)
    return failed.value


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- the bad hosts ---------------------------------------------------------------------------


def test_html_in_place_of_a_video(server: Server, tmp_path: Path) -> None:
    error = failure(server.url + "/html.mp4", tmp_path)
    assert (error.code, error.retryable) == ("corrupt", False)
    assert server.counts["/html.mp4"] == 1
    assert left_in(tmp_path) == []


def test_closes_half_way_and_goes_on(server: Server, video: bytes, tmp_path: Path) -> None:
    """Where the server says which version it is, the rest is asked for on that condition."""
    server.extra = {"ETag": '"v1"', "Last-Modified": "Sun, 06 Nov 1994 08:49:37 GMT"}
    url = server.url + "/cut.mp4"
    assert failure(url, tmp_path, max_attempts=1).code == "network"
    assert left_in(tmp_path) == [".vid.part.json", "vid.part"]
    server.counts["/cut.mp4"] = 9
    assert get(url, tmp_path).read_bytes() == video
    assert left_in(tmp_path) == ["vid.mp4"]


@pytest.mark.parametrize("path", ["/drip.mp4", "/drip_headers.mp4"])
def test_a_byte_now_and_then(server: Server, tmp_path: Path, path: str) -> None:
    """No single read is late, so only the speed gives the host away."""
    start_s = time.monotonic()
    error = failure(server.url + path, tmp_path, timeout_s=0.5, max_attempts=2)
    assert (error.code, error.retryable) == ("network", True)
    assert "bytes a second" in error.cause
    assert time.monotonic() - start_s < 5


def test_all_attempts_together_have_an_end(server: Server, tmp_path: Path) -> None:
    start_s = time.monotonic()
    changes = {"max_time_s": 0.6, "max_attempts": 100, "min_bytes_per_s": 0}
    error = failure(server.url + "/drip.mp4", tmp_path, **changes)
    assert (error.code, error.retryable) == ("network", True)
    assert time.monotonic() - start_s < 3


def test_redirects_for_ever(server: Server, tmp_path: Path) -> None:
    error = failure(server.url + "/for_ever.mp4", tmp_path)
    assert (error.code, error.retryable) == ("unsupported", False)
    assert server.counts["/for_ever.mp4"] == http_client.MAX_REDIRECTS + 1


def test_ten_terabytes_are_refused_at_once(server: Server, tmp_path: Path) -> None:
    start_s = time.monotonic()
    error = failure(server.url + "/huge.mp4", tmp_path)
    assert (error.code, error.retryable) == ("too_large", False)
    assert time.monotonic() - start_s < 2
    assert left_in(tmp_path) == []


def test_a_fifth_of_the_requests_fail(server: Server, video: bytes, tmp_path: Path) -> None:
    for number in range(12):
        path = get(server.url + "/fifth.mp4", tmp_path, name=str(number))
        assert path.read_bytes() == video
    assert server.counts["/fifth.mp4"] == 14


# --- ranges ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "condition"),
    [
        ({"ETag": '"v1"', "Last-Modified": "Sun, 06 Nov 1994 08:49:37 GMT"}, '"v1"'),
        (
            {"ETag": 'W/"v1"', "Last-Modified": "Sun, 06 Nov 1994 08:49:37 GMT"},
            "Sun, 06 Nov 1994 08:49:37 GMT",
        ),
        ({"ETag": 'W/"v1"'}, None),
        ({}, None),
    ],
)
def test_what_a_range_is_tied_to(
    server: Server, video: bytes, tmp_path: Path, extra: dict[str, str], condition: str | None
) -> None:
    server.extra = extra
    part = http_download._Part(tmp_path, "vid", server.url + "/ok.mp4")
    version = http_client.Version(extra.get("ETag", ""), extra.get("Last-Modified", ""), len(video))
    part.start(version)
    part.path.write_bytes(video[:100])
    expected = {"Range": "bytes=100-"} | ({"If-Range": condition} if condition else {})
    assert part.request_headers() == expected
    assert get(server.url + "/ok.mp4", tmp_path).read_bytes() == video
    assert [r[2] for r in server.requests] == ["bytes=100-"]


@pytest.mark.parametrize("same_length", [True, False])
def test_a_new_version_is_fetched_whole(
    server: Server, video: bytes, tmp_path: Path, same_length: bool
) -> None:
    """By an honest server (If-Range fails: 200), and by one that answers a range all the same."""
    part = http_download._Part(tmp_path, "vid", server.url + "/ok.mp4")
    etag = '"old"' if same_length else ""
    part.start(http_client.Version(etag, "", len(video) - (not same_length)))
    part.path.write_bytes(b"x" * 100)
    server.extra = {"ETag": '"new"'}
    assert get(server.url + "/ok.mp4", tmp_path).read_bytes() == video


def test_a_file_that_changes_meanwhile(server: Server, video: bytes, tmp_path: Path) -> None:
    got = get(server.url + "/gone_after_half.mp4", tmp_path).read_bytes()
    assert got == server.video
    assert got != video


def test_a_range_that_was_not_asked_for(server: Server, video: bytes, tmp_path: Path) -> None:
    assert get(server.url + "/wrong_range.mp4", tmp_path).read_bytes() == video
    assert server.counts["/wrong_range.mp4"] == 3


def test_a_server_without_ranges(server: Server, video: bytes, tmp_path: Path) -> None:
    assert get(server.url + "/no_ranges.mp4", tmp_path).read_bytes() == video


def test_a_server_that_gives_pieces_only(server: Server, video: bytes, tmp_path: Path) -> None:
    """Each is asked for in turn, within one attempt."""
    url = server.url + "/pieces.mp4"
    part = http_download._Part(tmp_path, "vid", url)
    part.start(http_client.Version("", "", len(video)))
    part.path.write_bytes(video[:10])
    assert get(url, tmp_path, max_attempts=1).read_bytes() == video
    assert server.counts["/pieces.mp4"] == 4


def test_whole_and_only_not_renamed(server: Server, video: bytes, tmp_path: Path) -> None:
    """Killed between the last byte and the new name."""
    part = http_download._Part(tmp_path, "vid", server.url + "/ok.mp4")
    part.start(http_client.Version("", "", len(video)))
    part.path.write_bytes(video)
    assert get(server.url + "/ok.mp4", tmp_path).read_bytes() == video
    assert len(server.requests) == 1


@pytest.mark.parametrize("note", ["", "{", "[]", '{"place": 1}', '{"etag": [], "place": "x"}'])
def test_a_part_without_its_note_is_nothing(
    server: Server, video: bytes, tmp_path: Path, note: str
) -> None:
    (tmp_path / "vid.part").write_bytes(b"x" * 100)
    (tmp_path / ".vid.part.json").write_text(note)
    assert get(server.url + "/ok.mp4", tmp_path).read_bytes() == video
    assert [r[2] for r in server.requests] == [None]


def test_another_address_starts_again(server: Server, video: bytes, tmp_path: Path) -> None:
    part = http_download._Part(tmp_path, "vid", server.url + "/other.mp4")
    part.start(http_client.Version("", "", len(video)))
    part.path.write_bytes(b"x" * 100)
    note = json.loads((tmp_path / ".vid.part.json").read_text())
    assert server.url not in str(note)
    assert get(server.url + "/ok.mp4", tmp_path).read_bytes() == video


def test_a_break_after_progress_is_no_failed_attempt(
    server: Server, video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_download, "PROGRESS_BYTES", len(video) // 4)
    server.counts["/cut.mp4"] = 3  # one more half, and then the rest
    assert get(server.url + "/cut.mp4", tmp_path, max_attempts=1).read_bytes() == video
    assert failure(server.url + "/always_cut.mp4", tmp_path, max_attempts=1).code == "network"
    assert server.counts["/always_cut.mp4"] == 2


def test_compressed_is_refused(server: Server, tmp_path: Path) -> None:
    assert failure(server.url + "/zipped.mp4", tmp_path).code == "unsupported"


def test_own_rate_is_kept(server: Server, video: bytes, tmp_path: Path) -> None:
    start_s = time.monotonic()
    get(server.url + "/ok.mp4", tmp_path, rate_bytes_per_s=len(video), concurrency=1)
    assert 0.5 < time.monotonic() - start_s < 3


def test_a_full_disk_is_not_the_hosts_fault(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(http_download, "_write", full)
    with pytest.raises(StorageError) as failed:
        get(server.url + "/ok.mp4", tmp_path)
    assert failed.value.code == "no_space"


# --- names and addresses ---------------------------------------------------------------------


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A name server: each name's answers in turn, the last one for ever. 127.0.0.1 is public."""
    answers: dict[str, list[str]] = {}

    def look_up(host: str, port: object, *args: object, **kwargs: object) -> list[tuple]:
        left = answers.get(host, [host])
        address = left.pop(0) if len(left) > 1 else left[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port or 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(hosts, "is_public", lambda address: str(address) == "127.0.0.1")
    return answers


def test_a_name_that_changes_its_address(
    server: Server, video: bytes, tmp_path: Path, names: dict[str, list[str]]
) -> None:
    """Public when it is looked at, internal when it is connected to: there is one look only."""
    with inner_at(server.port, video) as inner:
        for first in ("127.0.0.1", "127.0.0.2"):
            names["rebind.example"] = [first, "127.0.0.2"]
            url = f"http://rebind.example:{server.port}/ok.mp4"
            if first == "127.0.0.1":
                assert get(url, tmp_path, allow_private_hosts=False).read_bytes() == video
            else:
                error = failure(url, tmp_path, allow_private_hosts=False)
                assert error.code == "refused_host"
        assert inner.requests == []
    assert len(server.requests) == 1


def inner_at(port: int, video: bytes) -> Server:
    """A server at the same port of another address, as an attacker would choose it."""
    return serving(video, "127.0.0.2", port)


def test_a_redirect_to_an_internal_name(
    server: Server, video: bytes, tmp_path: Path, names: dict[str, list[str]]
) -> None:
    with serving(video, "127.0.0.2") as inner:
        names["public.example"] = ["127.0.0.1"]
        names["internal.example"] = ["127.0.0.2"]
        server.other = f"http://internal.example:{inner.port}"
        url = f"http://public.example:{server.port}/to_other.mp4"
        assert failure(url, tmp_path, allow_private_hosts=False).code == "refused_host"
        assert inner.requests == []
        assert get(url, tmp_path).read_bytes() == video


def test_the_next_address_is_tried(
    server: Server, video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(socket.AF_INET, 1, 6, "", (a, 0)) for a in ("127.0.0.9", "127.0.0.1")]
    original = socket.getaddrinfo

    def look_up(host: str, *args: object, **kwargs: object) -> list:
        return found if host == "two.example" else original(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    url = f"http://two.example:{server.port}/ok.mp4"
    assert get(url, tmp_path).read_bytes() == video


def test_encrypted_and_the_name_must_be_the_certificates(
    video: bytes, tmp_path: Path, names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection goes to an address, and the certificate is still held against the name."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=video.example", "-addext", "subjectAltName=DNS:video.example", "-keyout", key,
         "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(http_client, "_tls", lambda: trusting)
    names["video.example"] = names["other.example"] = ["127.0.0.1"]
    with serving(video, tls=context) as server:
        url = f"https://video.example:{server.port}/ok.mp4"
        assert get(url, tmp_path / "out").read_bytes() == video
        other = f"https://other.example:{server.port}/ok.mp4"
        error = failure(other, tmp_path / "out", max_attempts=1)
        assert error.code == "network"
        assert "certificate verify failed" in error.cause


def test_user_and_password_go_to_their_host_only(
    server: Server, video: bytes, tmp_path: Path
) -> None:
    with serving(video) as other:
        server.other = other.url
        host = server.url.removeprefix("http://")
        get(f"http://me:p%40ss@{host}/to_other.mp4", tmp_path)
        assert server.authorizations == ["Basic bWU6cEBzcw=="]  # me:p@ss
        assert other.authorizations == [None]


def test_through_a_proxy(server: Server, video: bytes, tmp_path: Path) -> None:
    """A plain-HTTP proxy is asked for the whole address; it looks the name up itself."""
    url = "http://name.of.elsewhere.example/ok.mp4"
    proxy = server.url.replace("http://", "http://me:hidden@")
    assert get(url, tmp_path, proxy=proxy, allow_private_hosts=False).read_bytes() == video
    assert server.targets == [url]


def test_addresses_with_other_letters(server: Server, video: bytes, tmp_path: Path) -> None:
    assert get(server.url + "/ok.mp4?q=ä b", tmp_path).read_bytes() == video
    assert server.targets == ["/ok.mp4?q=%C3%A4%20b"]
    for url in ("http://[::1/x.mp4", "http://h:99999/x.mp4", "http://h:x/x.mp4", "http://\ud800/"):
        assert failure(url, tmp_path).code in {"unsupported", "network"}


# --- pauses and places -----------------------------------------------------------------------


def test_a_pause_is_kept(server: Server, tmp_path: Path) -> None:
    server.extra = {"retry": "1"}
    start_s = time.monotonic()
    get(server.url + "/paused.mp4", tmp_path)
    assert time.monotonic() - start_s >= 1


def test_a_pause_that_is_too_long_is_left_to_a_later_run(server: Server, tmp_path: Path) -> None:
    server.extra = {"retry": "3600"}
    for _ in range(2):  # the second does not even ask
        error = failure(server.url + "/paused.mp4", tmp_path, max_pause_s=10)
        assert (error.code, error.retryable) == ("rate_limited", True)
    assert len(server.requests) == 1


def test_places_at_a_host(server: Server, tmp_path: Path) -> None:
    """Eight downloads at two a host, while another host's have places left."""
    changes = {"per_host": 2, "concurrency": 8}
    threads = [
        threading.Thread(
            target=get, args=(server.url + "/counted.mp4", tmp_path, str(n)), kwargs=changes
        )
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.most_at_once == 2
    assert server.counts["/counted.mp4"] == 8


# --- what files look like --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".mp4", []), (".mov", []), (".mkv", []), (".avi", []), (".webm", ["-c:v", "libvpx"]),
     (".flv", ["-c:v", "flv"]), (".ts", []), (".mpg", ["-r", "25"]), (".gif", []),
     (".wmv", ["-c:v", "wmv2"]), (".3gp", ["-c:v", "mpeg4"]), (".m4v", []),
     (".ogv", ["-c:v", "libtheora"])],
)  # fmt: skip
def test_suffix_by_content(tmp_path: Path, suffix: str, options: list[str]) -> None:
    """Against FFmpeg's own muxers."""
    import imageio_ffmpeg

    path = tmp_path / f"v{suffix}"
    done = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi", "-i",
         "testsrc=s=176x144:d=0.4:r=10", *options, path], capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"this ffmpeg does not write {suffix}")
    found = media_suffix(path.read_bytes()[:512])
    assert found == suffix or {found, suffix} <= {".mp4", ".m4v", ".3gp"}


@pytest.mark.parametrize("head", [b"", b"<html>", b"GET", b"\x00" * 600, b"RIFF1234WAVE"])
def test_no_suffix_of_other_things(head: bytes) -> None:
    assert media_suffix(head) is None
