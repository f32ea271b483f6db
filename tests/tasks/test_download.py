"""Downloads from a server on this machine that misbehaves in every way that servers do."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kpmask.config import Download, MediaLimits, PreprocessJob, validated
from kpmask.errors import ConfigError, DownloadError
from kpmask.media.encode import encode
from tasks import hosts, page_download
from tasks.dataset import open_dataset
from tasks.download import fetch, video_url
from tasks.hosts import check_url
from tasks.preprocess import preprocess
from tasks.storage import open_store
from tests.support.hosts import Server, serving
from tests.support.weed import Weed

LIMITS = MediaLimits()

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
    """No other process on this machine takes a place, or pauses a host, of ours."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("places")))


def settings(**changes: object) -> Download:
    tree = {"allow_private_hosts": True, "backoff_s": 0.02, "timeout_s": 5.0, "max_attempts": 3}
    return validated(Download, tree | changes)


def get(url: str, folder: Path, name: str = "-vid", **changes: object) -> Path:
    return fetch(name, url, download=settings(**changes), limits=LIMITS, folder=folder)


def code_of(url: str, folder: Path, **changes: object) -> str:
    with pytest.raises(DownloadError) as failed:
        get(url, folder, **changes)
    return failed.value.code


@pytest.mark.parametrize("path", ["/ok.mp4", "/ok.mp4?token=secret", "/moved.mp4"])
def test_video_is_named_by_our_key(server: Server, video: bytes, tmp_path: Path, path: str) -> None:
    got = get(server.url + path, tmp_path, name="a b#%(title)s.x")
    assert got == tmp_path / "a b#%(title)s.x.mp4"
    assert got.read_bytes() == video
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == [got.name]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/none.mp4", "removed"),
        ("/denied.mp4", "private"),
        ("/page.html", "unsupported"),
        ("/empty.mp4", "corrupt"),
        ("/liar.mp4", "corrupt"),
        ("/to_ftp.mp4", "unsupported"),
    ],
)
def test_what_no_retry_helps_is_tried_once(
    server: Server, tmp_path: Path, path: str, code: str
) -> None:
    with pytest.raises(DownloadError) as failed:
        get(server.url + path, tmp_path)
    assert (failed.value.code, failed.value.retryable) == (code, False)
    assert server.counts[path] <= 3  # a look, the file, and yt-dlp's own second try
    assert list(tmp_path.glob("[!.]*")) == []


def test_busy_server_is_tried_again_and_then_given_up(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError) as failed:
        get(server.url + "/busy.mp4", tmp_path)
    assert (failed.value.code, failed.value.retryable) == ("rate_limited", True)
    assert server.counts["/busy.mp4"] >= 3


def test_busy_server_that_recovers(server: Server, video: bytes, tmp_path: Path) -> None:
    assert get(server.url + "/flaky.mp4", tmp_path).read_bytes() == video
    assert server.counts["/flaky.mp4"] > 2


def test_lost_connection_is_resumed(server: Server, video: bytes, tmp_path: Path) -> None:
    assert get(server.url + "/cut.mp4", tmp_path, max_attempts=5).read_bytes() == video
    ranges = [r for _, path, r, _ in server.requests if path == "/cut.mp4" and r]
    assert f"bytes={len(video) // 2}-" in ranges


def test_partial_file_serves_the_next_run(server: Server, video: bytes, tmp_path: Path) -> None:
    assert code_of(server.url + "/cut.mp4", tmp_path, max_attempts=1) == "network"
    (partial,) = tmp_path.glob("*.part")
    assert partial.stat().st_size == len(video) // 2
    server.counts["/cut.mp4"] = 9
    assert get(server.url + "/cut.mp4?signed=again", tmp_path).read_bytes() == video
    assert ("GET", "/cut.mp4", f"bytes={len(video) // 2}-", None) in server.requests


def test_hanging_server_is_left(server: Server, tmp_path: Path) -> None:
    start = time.monotonic()
    assert code_of(server.url + "/hang.mp4", tmp_path, timeout_s=0.3, max_attempts=2) == "network"
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("path", ["/ok.mp4", "/endless.mp4"])
def test_too_large_is_refused(server: Server, video: bytes, tmp_path: Path, path: str) -> None:
    assert code_of(server.url + path, tmp_path, max_bytes=len(video) - 1) == "too_large"
    assert list(tmp_path.glob("[!.]*")) == []


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v.mp4"
        assert code_of(url, tmp_path) == "network"
        assert code_of("http://198.51.100.1/v.mp4", tmp_path, proxy=url) == "network"


# --- addresses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x.mp4",
        "http://localhost:8080/x.mp4",
        "http://a.localhost/x.mp4",
        "http://10.1.2.3/x.mp4",
        "http://192.168.0.1/x.mp4",
        "http://169.254.169.254/latest/meta-data",
        "http://0.0.0.0/x.mp4",
        "http://100.64.0.1/x.mp4",
        "http://224.0.0.1/x.mp4",
        "http://[::1]/x.mp4",
        "http://[fe80::1%25eth0]/x.mp4",
        "http://[fd00::1]/x.mp4",
        "http://[::ffff:127.0.0.1]/x.mp4",
        "http://[2002:7f00:1::]/x.mp4",
        "http://[64:ff9b::7f00:1]/x.mp4",
    ],
)
def test_private_hosts_are_refused(url: str) -> None:
    for through_proxy in (False, True):
        with pytest.raises(DownloadError) as refused:
            check_url(url, allow_private_hosts=False, through_proxy=through_proxy)
        assert refused.value.code == "refused_host"
    check_url(url, allow_private_hosts=True)


def test_name_of_a_private_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(socket.AF_INET, 1, 6, "", (a, 0)) for a in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: answers)
    with pytest.raises(DownloadError, match="not a public host"):
        check_url("https://example.org/x.mp4", allow_private_hosts=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: answers[:1])
    check_url("https://example.org/x.mp4", allow_private_hosts=False)


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "ftp://example.org/x", "javascript:1", "x.mp4", "http:///x"]
)
def test_other_schemes_are_refused(url: str, tmp_path: Path) -> None:
    assert code_of(url, tmp_path) == "unsupported"


def test_redirect_to_a_private_host_is_refused(
    server: Server, video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first address passes as public; the one that it leads to does not."""
    monkeypatch.setattr(hosts, "is_public", lambda address: str(address) == "127.0.0.1")
    with serving(video, "127.0.0.2") as inner:
        server.other = inner.url
        url = f"{server.url}/to_other.mp4"
        assert code_of(url, tmp_path, allow_private_hosts=False) == "refused_host"
        assert server.counts["/to_other.mp4"] == 1
        assert inner.requests == []


def test_refused_without_a_request(server: Server, tmp_path: Path) -> None:
    assert code_of(server.url + "/ok.mp4", tmp_path, allow_private_hosts=False) == "refused_host"
    assert server.requests == []


# --- S3 --------------------------------------------------------------------------------------


def test_object_of_a_named_prefix(s3: str, video: bytes, tmp_path: Path) -> None:
    open_store(s3).put("raw/a b%20c.mov", video)
    for prefix in (f"{s3}/raw", f"{s3}/raw/", s3):
        path = get(f"{s3}/raw/a b%20c.mov", tmp_path, s3_prefixes=[prefix])
        assert path == tmp_path / "-vid.mov"
        assert path.read_bytes() == video
    assert [p.name for p in tmp_path.glob("[!.]*") if p.is_file()] == ["-vid.mov"]


@pytest.mark.parametrize("path", ["rawer/x.mp4", "x.mp4", "raw/../x.mp4", "raw//../x.mp4", "raw/"])
def test_other_objects_are_refused(s3: str, video: bytes, tmp_path: Path, path: str) -> None:
    open_store(s3).put("x.mp4", video)
    open_store(s3).put("rawer/x.mp4", video)
    assert code_of(f"{s3}/{path}", tmp_path, s3_prefixes=[f"{s3}/raw"]) in {
        "refused_host",
        "unsupported",
    }
    assert code_of(f"{s3}/{path}", tmp_path) == "refused_host"


def test_template_opens_its_own_folder(s3: str, video: bytes, tmp_path: Path) -> None:
    open_store(s3).put("raw/a#1 b.mkv", video)
    template = settings(url_template=f"{s3}/raw/{{video_id}}.*")
    url = video_url("a#1 b", download=template)
    path = fetch("n", url, download=template, limits=LIMITS, folder=tmp_path)
    assert path == tmp_path / "n.mkv"
    for video_id, code in (("none", "removed"), ("../x", "unsupported")):
        with pytest.raises(DownloadError) as failed:
            url = video_url(video_id, download=template)
            fetch("n", url, download=template, limits=LIMITS, folder=tmp_path)
        assert (failed.value.code, failed.value.retryable) == (code, False)
    open_template = settings(url_template="s3://{video_id}")
    with pytest.raises(DownloadError) as failed:
        fetch("n", "s3://b/k", download=open_template, limits=LIMITS, folder=tmp_path)
    assert failed.value.code == "refused_host"


def test_object_that_is_no_video_or_too_large(s3: str, video: bytes, tmp_path: Path) -> None:
    open_store(s3).put("raw/text.mp4", b"no video at all")
    open_store(s3).put("raw/v.mp4", video)
    prefixes = {"s3_prefixes": [s3]}
    assert code_of(f"{s3}/raw/text.mp4", tmp_path, **prefixes) == "corrupt"
    changes = prefixes | {"max_bytes": len(video) - 1}
    assert code_of(f"{s3}/raw/v.mp4", tmp_path, **changes) == "too_large"
    assert open_store(s3).get("raw/text.mp4") == b"no video at all"


def test_store_that_refuses_us(
    s3: str, s3_server: Weed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-hidden5")
    with pytest.raises(DownloadError) as failed:
        get(f"{s3}/raw/v.mp4", tmp_path, s3_prefixes=[s3])
    assert (failed.value.code, failed.value.retryable) == ("private", False)
    assert "hidden" not in str(failed.value)


# --- secrets ---------------------------------------------------------------------------------


def test_cookies_are_sent_and_the_file_is_left_alone(server: Server, tmp_path: Path) -> None:
    cookies = tmp_path / "cookies.txt"
    cookies.write_text(
        "# Netscape HTTP Cookie File\n127.0.0.1\tFALSE\t/\tFALSE\t0\tsession\tsecret\n"
    )
    before = cookies.read_bytes()
    get(server.url + "/ok.mp4", tmp_path / "out", cookies_file=str(cookies))
    assert {cookie for *_, cookie in server.requests} == {"session=secret"}
    assert cookies.read_bytes() == before
    with pytest.raises(ConfigError, match="No such file"):
        get(server.url + "/ok.mp4", tmp_path / "out", cookies_file=str(tmp_path / "none"))


def test_cause_names_no_secret(server: Server, tmp_path: Path) -> None:
    host = server.url.removeprefix("http://")
    for path in ("/none.mp4", "/page.html", "/busy.mp4"):
        with pytest.raises(DownloadError) as failed:
            get(f"http://user:hidden1@{host}{path}?key=hidden2#hidden3", tmp_path)
        assert "hidden" not in str(failed.value)
    with pytest.raises(DownloadError) as failed:
        get("http://198.51.100.1/v.mp4", tmp_path, proxy="http://me:hidden4@127.0.0.1:1")
    assert "hidden" not in str(failed.value)
    assert "hidden" not in repr(settings(proxy="http://me:hidden4@127.0.0.1:1"))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[youtube] x: Private video. Sign in if you've been granted access", "private"),
        ("[youtube] x: Join this channel to get access to members-only content", "private"),
        ("[youtube] x: Video unavailable", "removed"),
        ("[youtube] x: Video unavailable. This video has been removed by the uploader", "removed"),
        (
            "[youtube] x: Video unavailable. This video is no longer available because the YouTube "
            "account associated with this video has been terminated.",
            "removed",
        ),
        ("[youtube] x: The uploader has not made this video available in your country", "geo"),
        ("[youtube] x: Sign in to confirm your age. This video may be inappropriate", "age_gate"),
        ("[youtube] x: Sign in to confirm you’re not a bot. Use --cookies", "bot_check"),
        (
            "[youtube] x: This content isn't available, try again later. Your account has been "
            "rate-limited by YouTube for up to an hour",
            "rate_limited",
        ),
        ("unable to download webpage: HTTP Error 503: Service Unavailable", "network"),
        ("Unable to connect to proxy", "network"),
        ("[youtube] x: Requested format is not available", "unsupported"),
    ],
)
def test_what_sites_say(text: str, code: str) -> None:
    import yt_dlp

    error = yt_dlp.utils.DownloadError(f"ERROR: {text}; please report this issue on the web")
    translated = page_download._translated(error, url="https://y.org/x", download=settings())
    assert (translated.code, translated.cause) == (code, text)
    assert translated.retryable == (code in {"network", "rate_limited"})


def test_address_of_an_id() -> None:
    assert video_url("-a b/c", download=Download()).endswith("watch?v=-a%20b%2Fc")
    with pytest.raises(ConfigError, match="url_template"):
        video_url("x", download=Download(url_template="https://{host}/"))


# --- within a job ----------------------------------------------------------------------------


def test_job_downloads_what_is_not_at_hand(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))
    header = "video_id,start,end,bbox,fps,width,height,partition,url"
    box = "0,30,0-0-64-64,25,64,64,train"
    lines = [f"one,{box},{server.url}/ok.mp4", f"two,{box},", f"gone,{box},{server.url}/none.mp4"]
    table = tmp_path / "table.csv"
    table.write_text("\n".join([header, *lines]) + "\n")
    job = validated(
        PreprocessJob,
        {
            "metadata": str(table),
            "out": str(tmp_path / "out"),
            "clips": {"size_px": 32},
            "download": settings(url_template=server.url + "/ok.mp4?v={video_id}").model_dump(),
            "cluster": {"num_workers": 1},
        },
    )
    manifest = preprocess(job)
    assert (manifest.num_train, manifest.num_failures) == (2, 1)
    assert [clip.video_id for clip in open_dataset(job.out).records] == ["one", "two"]
    raw = tmp_path / "out" / "raw"
    assert sorted(p.name for p in raw.iterdir()) == ["one.mp4", "two.mp4"]
    num_requests = len(server.requests)
    assert preprocess(job) == manifest
    assert len(server.requests) == num_requests  # not even for the one that is gone
