"""Pauses and places of downloads, by files that any process may find in any state."""

from __future__ import annotations

import email.utils
import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from kpmask.config import Download, validated
from kpmask.errors import StorageError
from tasks import turns
from tasks.machine import boot_id, steady_s
from tasks.turns import HostPaused, download_place, note_pause, pause_of, wait_turn

URL = "http://videos.example/x.mp4"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"kpmask-download-slots-{os.getuid()}"


def settings(**changes: object) -> Download:
    return validated(Download, changes)


def test_interval_between_requests() -> None:
    download = settings(host_interval_s=0.2)
    start_s = time.monotonic()
    for _ in range(4):
        wait_turn(URL, download)
    assert 0.6 <= time.monotonic() - start_s < 1.5
    start_s = time.monotonic()
    wait_turn("http://another.example/x.mp4", download)
    assert time.monotonic() - start_s < 0.1


def test_no_file_where_nothing_is_limited(places: Path) -> None:
    wait_turn(URL, settings())
    assert list(places.iterdir()) == []
    note_pause(URL, "1")
    wait_turn(URL, settings())
    wait_turn(URL, settings())  # finds that the pause is over
    assert list(places.iterdir()) == []


def test_a_pause_binds_all_of_a_site() -> None:
    note_pause("https://www.videos.example/a", "300")
    with pytest.raises(HostPaused) as paused:
        wait_turn("http://videos.example/b", settings(max_pause_s=10))
    assert (paused.value.code, paused.value.retryable) == ("rate_limited", True)
    wait_turn("http://videos.example:8080/b", settings(max_pause_s=10))


@pytest.mark.parametrize(
    "text",
    ["", "x", f"{boot_id()} x", f"{boot_id()} nan", f"{boot_id()} 1e300", f"{boot_id()} -5", "\xff",
     f"another-boot {10**6}"],
)  # fmt: skip
def test_a_note_that_means_nothing_holds_nobody_up(places: Path, text: str) -> None:
    wait_turn(URL, settings(host_interval_s=0.01))
    (note,) = places.iterdir()
    note.write_bytes(text.encode("latin-1"))
    start_s = time.monotonic()
    wait_turn(URL, settings(host_interval_s=0.01))
    assert time.monotonic() - start_s < 0.5
    assert steady_s() < float(note.read_text().split()[1]) + 1


@pytest.mark.parametrize(
    ("text", "low_s", "high_s"),
    [
        (None, 0, 0),
        ("", 0, 0),
        ("soon", 0, 0),
        ("-5", 0, 0),
        ("1.5", 0, 0),
        (" 120 ", 120, 120),
        ("9" * 5000, 86400, 86400),
        ("²", 0, 0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0, 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86400, 86400),
        ("Fri, 31 Dec 99999 23:59:59 GMT", 0, 86400),
    ],
)
def test_what_retry_after_asks_for(text: str | None, low_s: float, high_s: float) -> None:
    assert low_s <= pause_of(text) <= high_s


def test_retry_after_may_be_a_date() -> None:
    """Counted from when it is read, and not from when tests are collected."""
    text = email.utils.formatdate(time.time() + 100, usegmt=True)
    test_what_retry_after_asks_for(text, 90, 101)


def _hold(ready: multiprocessing.synchronize.Event, folder: str) -> None:
    tempfile.tempdir = folder
    with download_place(URL, settings(per_host=1)):
        ready.set()
        time.sleep(60)


def test_a_killed_process_leaves_its_place(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(ready, str(tmp_path)))
    process.start()
    try:
        assert ready.wait(60)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.join()
    start_s = time.monotonic()
    with download_place(URL, settings(per_host=1)):
        assert time.monotonic() - start_s < 5


def test_a_folder_of_another_user_is_refused(tmp_path: Path, places: Path) -> None:
    (tmp_path / "theirs").mkdir()
    places.symlink_to(tmp_path / "theirs")
    with pytest.raises(StorageError) as refused:
        wait_turn(URL, settings())
    assert refused.value.code == "denied"


def test_hosts_without_number_leave_files_by_number(places: Path) -> None:
    for number in range(300):
        url = f"http://h{number}.example/"
        wait_turn(url, settings())
        with download_place(url, settings(per_host=1, concurrency=1)):
            pass
    names = {path.name for path in places.iterdir()}
    assert all(len(name) <= 6 for name in names)
    assert turns._site("http://a.example/") != turns._site("http://b.example/")
