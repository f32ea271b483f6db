"""Writes that wait for a store to come back."""

from __future__ import annotations

import pytest

from kpmask.errors import StorageError
from tasks import outbox
from tasks.outbox import Outbox


class Clock:
    def __init__(self) -> None:
        self.now_s, self.slept_s = 100.0, 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(outbox, "time", clock)
    return clock


class Store:
    """Takes texts, but for the first `failures` attempts."""

    def __init__(self, failures: int) -> None:
        self.failures, self.attempts = failures, 0
        self.texts: list[str] = []

    def put(self, text: str) -> None:
        self.attempts += 1
        if self.attempts <= self.failures:
            raise StorageError("gone", code="unavailable")
        self.texts.append(text)


def test_what_can_be_written_is_written_at_once(clock: Clock) -> None:
    store, box = Store(0), Outbox()
    box.send("a", lambda: store.put("a"))
    box.send("b", lambda: store.put("b"))
    assert store.texts == ["a", "b"]
    box.poll()
    box.drain()
    assert store.attempts == 2


def test_pauses_grow_and_nothing_is_lost_or_out_of_order(clock: Clock) -> None:
    store, box = Store(3), Outbox()
    box.send("a", lambda: store.put("a"))
    box.send("b", lambda: store.put("b"))
    assert store.attempts == 1
    tried_at = []
    while not store.texts:
        clock.now_s += 0.5
        before = store.attempts
        box.poll()
        if store.attempts > before:
            tried_at.append(clock.now_s - 100)
    assert store.texts == ["a", "b"]
    assert tried_at == [2, 6, 14]


def test_a_newer_write_takes_the_place_of_one_that_waits(clock: Clock) -> None:
    store, box = Store(1), Outbox()
    for text in ("old", "new"):
        box.send("checkpoint", lambda text=text: store.put(text))
    box.send("other", lambda: store.put("other"))
    box.drain()
    assert store.texts == ["new", "other"]


def test_the_end_waits_for_the_store_but_not_for_ever(clock: Clock) -> None:
    store, box = Store(4), Outbox(patience_s=100)
    box.send("a", lambda: store.put("a"))
    box.drain()
    assert store.texts == ["a"]
    gone, box = Store(1000), Outbox(patience_s=100)
    box.send("a", lambda: gone.put("a"))
    before_s = clock.slept_s
    with pytest.raises(StorageError, match="gone"):
        box.drain()
    assert clock.slept_s - before_s <= 100
    assert gone.attempts > 3


def test_other_errors_are_not_waited_for(clock: Clock) -> None:
    def broken() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        Outbox().send("a", broken)
