"""A store that is away is asked again, less and less often, and not for ever."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest

from kpmask.errors import DownloadError, StorageError
from tasks import outage as module
from tasks.outage import Outage, patiently, pause_s, store_is_away

AWAY = StorageError("does not answer", subject="s3://b", retryable=True)


class Clock:
    """Time that passes only in sleep, and which a test can move."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept_s: list[float] = []

    def sleep(self, time_s: float) -> None:
        self.slept_s.append(time_s)
        self.now_s += time_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "steady_s", lambda: clock.now_s)
    monkeypatch.setattr(module.time, "sleep", clock.sleep)
    return clock


def refusing(*errors: Exception) -> Callable[[], str]:
    """A call that raises these in turn and then answers."""
    left = list(errors)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "answer"

    return call


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (AWAY, True),
        (StorageError("answers 400"), False),
        (StorageError("no", code="denied"), False),
        (StorageError("full", code="no_space", retryable=True), False),
        (DownloadError("slow", retryable=True), False),
        (OSError("x"), False),
    ],
)
def test_who_is_away(error: Exception, away: bool) -> None:
    assert store_is_away(error) == away


def test_pauses_double_up_to_a_limit() -> None:
    wanted_s = [0.5, 1, 2, 4, 8, 10, 10, 10]
    for refusals, wanted in enumerate(wanted_s, start=1):
        pauses_s = [pause_s(refusals) for _ in range(50)]
        assert 0.75 * wanted <= min(pauses_s) < max(pauses_s) <= wanted
    assert pause_s(1_000_000) <= 10


def test_an_answer_is_returned_at_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    assert patiently(refusing(), outage_s=10) == "answer"
    assert clock.slept_s == []
    assert caplog.records == []


def test_a_store_that_comes_back(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    assert patiently(refusing(*[AWAY] * 12), outage_s=300) == "answer"
    assert len(clock.slept_s) == 12
    assert clock.slept_s[0] <= 0.5 and 7.5 <= clock.slept_s[-1] <= 10
    said = [record.message for record in caplog.records]
    assert said[0] == "a store is away, waiting up to 300 s for it: s3://b: does not answer"
    assert said[1:] == [f"the store is back after {sum(clock.slept_s):.1f} s"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_a_store_that_stays_away(clock: Clock) -> None:
    with pytest.raises(StorageError, match="does not answer"):
        patiently(refusing(*[AWAY] * 1000), outage_s=60)
    assert 60 <= sum(clock.slept_s) <= 70


def test_other_errors_are_not_waited_for(clock: Clock) -> None:
    with pytest.raises(StorageError) as caught:
        patiently(refusing(StorageError("no", code="denied")), outage_s=60)
    assert caught.value.code == "denied"
    with pytest.raises(ZeroDivisionError):
        patiently(lambda: 1 // 0, outage_s=60)
    assert clock.slept_s == []


def test_tries_that_take_long_are_no_long_outage(clock: Clock) -> None:
    """Each try takes longer than an outage may: the second failure proves nothing yet."""
    call = refusing(AWAY, AWAY)

    def slow() -> str:
        clock.now_s += 1000
        return call()

    assert patiently(slow, outage_s=60) == "answer"
    assert len(clock.slept_s) == 2
    call = refusing(*[AWAY] * 3)
    with pytest.raises(StorageError):
        patiently(slow, outage_s=60)


def test_any_answer_ends_an_outage(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """However many were refused: the next refusal begins another one."""
    outage = Outage(10)
    outage.answered()
    assert not outage.is_on
    assert outage.refused(AWAY, 5)
    clock.now_s += 9
    assert outage.is_on and outage.refused(AWAY, 6)
    outage.answered()
    assert not outage.is_on
    clock.now_s += 9
    assert outage.refused(AWAY, 7)
    clock.now_s += 10
    assert not outage.refused(AWAY, 8)
    kinds = [re.sub(r"[\d.]+", "#", record.message)[:17] for record in caplog.records]
    assert kinds == ["a store is away, ", "the store is back", "a store is away, "]
