"""Failures that wait for a later run."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import pytest

from tasks.retries import KEY, Retries
from tasks.storage import open_store


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


def retries(folder: Path | str, clock: Clock, **changes: float) -> Retries:
    settings: dict = {"backoff_s": 100.0, "max_backoff_s": 1000.0} | changes
    return Retries(open_store(str(folder)), clock=clock, **settings)


def test_pauses_double_up_to_the_longest(tmp_path: Path) -> None:
    clock = Clock()
    pauses = []
    for run in range(1, 8):
        state = retries(tmp_path, clock)
        assert state.due("item")
        state.failed("item", "network")
        state.save()
        state = retries(tmp_path, clock)
        assert (state.attempts("item"), state.code("item")) == (run, "network")
        start_s = clock.now_s
        while not state.due("item"):
            clock.now_s += 1
        pauses.append(clock.now_s - start_s)
    assert pauses == [0, 100, 200, 400, 800, 1000, 1000]


@pytest.fixture
def waiting(tmp_path: Path) -> Path:
    """A state in which "bad" waits for 100 s."""
    state = retries(tmp_path, Clock())
    for _ in range(2):
        state.failed("bad", "timeout")
    state.save()
    return tmp_path


def test_what_was_done_is_forgotten(waiting: Path) -> None:
    state = retries(waiting, Clock())
    assert not state.due("bad")
    assert state.due("other")
    state.done("other")
    state.done("bad")
    assert state.due("bad")
    state.save()
    assert list(waiting.iterdir()) == []


@pytest.mark.parametrize("moved_s", [-3600.0, -1e9, 3600.0, 1e9])
def test_a_clock_that_moved_keeps_nobody_waiting(waiting: Path, moved_s: float) -> None:
    """Back by more than the longest pause, or forward past the end of the pause."""
    clock = Clock()
    clock.now_s += moved_s
    assert retries(waiting, clock).due("bad")


def test_retry_now(waiting: Path) -> None:
    assert not retries(waiting, Clock(), max_attempts=2).due("bad")
    assert not retries(waiting, Clock(), backoff_s=0, max_attempts=2).due("bad")
    assert retries(waiting, Clock(), backoff_s=0).due("bad")


def test_given_up_after_so_many_runs(tmp_path: Path) -> None:
    clock = Clock()
    state = retries(tmp_path, clock, max_attempts=3)
    for _ in range(3):
        assert not state.given_up("item")
        state.failed("item", "network")
    clock.now_s += 10_000
    assert state.given_up("item")
    assert not state.due("item")


def test_old_items_are_dropped(waiting: Path) -> None:
    clock = Clock()
    clock.now_s += 91 * 86400
    state = retries(waiting, clock)
    state.failed("new", "network")
    state.save()
    items = json.loads((waiting / KEY).read_text())["items"]
    assert list(items) == ["new"]


def test_only_what_changed_is_written(waiting: Path) -> None:
    before = (waiting / KEY).stat()
    state = retries(waiting, Clock())
    state.done("unknown")
    state.save()
    assert (waiting / KEY).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"version": 2, "items": {}}', '{"version": 1, "items": {"a": [1]}}',
     '{"version": 1, "items": {"a": ["network", 1, "soon"]}}', "[" * 100_000,
     '{"version": 1, "items": {"a": [{}, 1, 1]}}'],
)  # fmt: skip
def test_a_damaged_state_is_as_none(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    open_store(str(tmp_path)).put(KEY, text.encode())
    state = retries(tmp_path, Clock())
    assert state.due("a")
    assert "all is tried again" in caplog.text
    state.failed("a", "network")
    state.save()
    assert retries(tmp_path, Clock()).attempts("a") == 1


def test_on_s3(s3: str) -> None:
    state = retries(s3, Clock())
    state.failed("a", "network")
    state.save()
    state = retries(s3, Clock())
    assert state.attempts("a") == 1
    state.done("a")
    state.save()
    assert list(open_store(s3).list()) == []


def test_many_items(tmp_path: Path) -> None:
    """All of a list of 150,000 videos fail, as behind a dead network."""
    ids = [f"{number:032x}" for number in range(150_000)]
    start_s = time.monotonic()
    state = retries(tmp_path, Clock())
    for item_id in ids:
        state.failed(item_id, "network")
        state.failed(item_id, "network")
    state.save()
    tracemalloc.start()
    state = retries(tmp_path, Clock())
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not any(map(state.due, ids))
    assert (tmp_path / KEY).stat().st_size < 16e6
    assert peak_bytes < 150e6
    assert time.monotonic() - start_s < 60
