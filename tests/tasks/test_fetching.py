"""Downloads ahead of the cutting: what comes when, how many lie about, and how it ends."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from kpmask.config import PreprocessJob, validated
from kpmask.errors import StorageError
from kpmask.media.encode import encode
from kpmask.records import Failure, SourceRow
from tasks.clip_worker import listed_results, read_result
from tasks.cluster import Pending
from tasks.fetching import MAX_AHEAD, fetched_ahead
from tasks.storage import open_store
from tasks.workbook import VideoItem, item_id, state_of
from tests.support.hosts import Server, serving
from tests.support.inline import inline_stages

WORK = ".work/0"


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    encode(path, np.full((8, 32, 32, 3), 99, np.uint8), fps=Fraction(25))
    return path.read_bytes()


@pytest.fixture
def server(video: bytes) -> Iterator[Server]:
    with serving(video) as server:
        yield server


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))


def job(tmp_path: Path, server: Server, **download: object) -> PreprocessJob:
    settings = {
        "url_template": f"{server.url}/ok.mp4?{{video_id}}",
        "allow_private_hosts": True,
        "backoff_s": 0.01,
        "max_attempts": 1,
        "concurrency": 3,
        "per_host": 3,
    }
    tree = {"out": str(tmp_path / "out"), "metadata": "t.csv", "download": settings | download}
    return validated(PreprocessJob, tree)


def item(name: str, *, url: str | None = None, key: str | None = None) -> VideoItem:
    row = SourceRow(line=1, video_id=name, partition="train", identity=name)
    return VideoItem(
        name=name,
        item_id=item_id(name, [row], is_folder=False),
        rows=(row,),
        keys=(key,) if key else (),
        is_folder=False,
        url=url,
        state="s" if key else "",
    )


class Reading:
    """What is read, and what was lost."""

    def __init__(self, tmp_path: Path, job: PreprocessJob, items: list[VideoItem]) -> None:
        self.raw = tmp_path / "raw"
        self.asked: list[str] = []
        self.lost: dict[str, Failure] = {}
        self.threads: set[str] = set()
        self.context = fetched_ahead(
            self._todo(items), len(items), job, str(self.raw), WORK, on_lost=self._on_lost
        )

    def _todo(self, items: list[VideoItem]) -> Iterator[VideoItem]:
        for one in items:
            self.asked.append(one.name)
            self.threads.add(threading.current_thread().name)
            yield one

    def _on_lost(self, one: VideoItem, failure: Failure) -> None:
        self.lost[one.name] = failure
        self.threads.add(threading.current_thread().name)

    def next(self, items: Iterator[VideoItem | Pending]) -> VideoItem | None:
        """The next that is there; None at the end."""
        for one in items:
            if not isinstance(one, Pending):
                return one
            time.sleep(0.005)
        return None

    def all(self) -> list[VideoItem]:
        with self.context as items:
            return list(iter(lambda: self.next(items), None))

    def num_files(self) -> int:
        return len([p for p in self.raw.glob("*") if p.suffix == ".mp4"])


def no_thread() -> bool:
    return not [t for t in threading.enumerate() if t.name == "kpmask-fetch"]


# --- what comes ------------------------------------------------------------------------------


def test_without_downloads_items_come_as_they_are(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.fetching.run_items", None)  # no worker is started
    items = [item("a", key="a.mp4"), item("b"), item("c", key="c.mp4")]
    assert Reading(tmp_path, job(tmp_path, server, enabled=False), items).all() == items
    there = [item("a", key="a.mp4"), item("c", key="c.mp4")]
    assert Reading(tmp_path, job(tmp_path, server), there).all() == there
    assert no_thread()


def test_every_item_comes_once_or_is_lost(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline_stages(monkeypatch)
    items = [item(f"{i:02d}", key=f"{i:02d}.mp4" if i % 3 == 0 else None) for i in range(20)]
    items[4] = item("04", url=f"{server.url}/missing.mp4")
    items[5] = item("05", url=f"{server.url}/busy.mp4")
    items[7] = item("07", url="http://127.0.0.1:9/refused.mp4")
    items[8] = item("08", url=f"{server.url}/html.mp4")
    reading = Reading(tmp_path, job(tmp_path, server), items)
    found = {one.name: one for one in reading.all()}
    assert sorted([*found, *reading.lost]) == [one.name for one in items]
    assert {n: (f.code, f.retryable) for n, f in reading.lost.items()} == {
        "04": ("removed", False),
        "05": ("rate_limited", True),
        "07": ("network", True),
        "08": ("corrupt", False),
    }
    store = open_store(str(tmp_path / "raw"))
    for one in items:
        if one.keys:
            assert found[one.name] == one
        elif one.name in found:
            key = f"{one.name}.mp4"
            assert (found[one.name].keys, found[one.name].fetched) == ((key,), True)
            assert found[one.name].state == state_of([store.info(key)])
            assert store.get(key) == server.video
    # What is lost has its result, for this run and later ones.
    out = open_store(str(tmp_path / "out"))
    results = {i: retry for i, _, retry in listed_results(out, WORK)}
    assert results == {
        one.item_id: reading.lost[one.name].retryable for one in items if one.name in reading.lost
    }
    for info in out.list(f"{WORK}/"):
        (failure,) = read_result(out.get(info.key)).failure_records()
        assert failure.stage == "download" and failure.item in reading.lost
    # Both the items and the losses are handled where the run's tables are.
    assert reading.threads == {threading.current_thread().name}
    assert no_thread()


def test_what_is_there_does_not_wait_for_downloads(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline_stages(monkeypatch)
    items = [item("a", url=f"{server.url}/hang.mp4"), item("b", key="b.mp4")]
    reading = Reading(tmp_path, job(tmp_path, server, timeout_s=0.3), items)
    with reading.context as found:
        first = reading.next(found)
        assert first is not None and first.name == "b" and not reading.lost
        assert reading.next(found) is None
    assert reading.lost["a"].code == "network"


# --- with processes --------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_cluster")
def test_downloads_stay_few_ahead_of_a_slow_reader(tmp_path: Path, server: Server) -> None:
    one = job(tmp_path, server)
    items = [item(f"{i:03d}") for i in range(40)]
    most = MAX_AHEAD + one.download.concurrency
    reading = Reading(tmp_path, one, items)
    with reading.context as found:
        names: list[str] = []
        for _ in range(4):
            taken = reading.next(found)
            assert taken is not None
            names.append(taken.name)
            time.sleep(0.4)  # as a cutter that is busy
            assert reading.num_files() <= len(names) + most
        assert reading.num_files() >= MAX_AHEAD  # and they did not wait for us
        names += [one.name for one in iter(lambda: reading.next(found), None)]
    assert sorted(names) == [one.name for one in items]
    assert reading.num_files() == 40


def hosts() -> list[int]:
    """The processes of this test's workers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"ray::_Host" in (folder / "cmdline").read_bytes() and os.getpid() in above(folder):
                found.append(int(folder.name))
    return found


def above(folder: Path) -> Iterator[int]:
    """The ids of the processes that a process comes from."""
    while (folder / "stat").exists():
        parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        yield parent
        folder = Path(f"/proc/{parent}")


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_that_ends_early_leaves_no_thread_and_no_process(
    tmp_path: Path, server: Server
) -> None:
    """Though the host says nothing for ten minutes."""
    one = job(tmp_path, server, timeout_s=600.0, max_time_s=600.0)
    items = [item(f"{i}", url=f"{server.url}/hang.mp4?{i}") for i in range(9)]
    reading = Reading(tmp_path, one, items)
    with pytest.raises(ZeroDivisionError), reading.context as found:
        until = time.monotonic() + 30
        while server.counts["/hang.mp4"] < 3:
            assert isinstance(next(found), Pending) and time.monotonic() < until
            time.sleep(0.02)
        assert hosts()
        start_s = time.monotonic()
        raise ZeroDivisionError
    assert time.monotonic() - start_s < 3
    assert no_thread()
    until = time.monotonic() + 5
    while hosts() and time.monotonic() < until:
        time.sleep(0.05)
    assert hosts() == []


@pytest.mark.usefixtures("ray_cluster")
def test_trouble_with_our_own_disk_ends_the_run(tmp_path: Path, server: Server) -> None:
    (tmp_path / "raw").write_text("a file in the way")
    reading = Reading(tmp_path, job(tmp_path, server), [item("a"), item("b")])
    with pytest.raises(StorageError) as trouble:
        reading.all()
    assert trouble.value.code in {"not_found", "denied"}
    assert reading.lost == {} and no_thread()
