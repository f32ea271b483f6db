"""One run at a time: with real processes that wait, die and freeze."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kpmask.errors import RunFailed, StorageError
from tasks import lease as module
from tasks.lease import Holder, lease
from tasks.machine import machine_id, process_lives, started_at
from tasks.storage import open_store

ROOT = Path(__file__).parents[2]
KEY = ".state/lease"
BEAT_S = 0.2
STALE_S = 2.0

# Says "waits" and "holds"; then goes on until its input ends, and says what became of the lease.
RUN = """
import sys
from kpmask.errors import RunFailed
from tasks import lease as module, machine
from tasks.storage import open_store
uri, key, beat_s, stale_s, elsewhere = sys.argv[1:]
if elsewhere:
    module.machine_id = lambda: elsewhere
with module.lease(open_store(uri), key, on_wait=lambda text: print("waits", text, flush=True),
                  beat_s=float(beat_s), stale_s=float(stale_s)) as held:
    print("holds", flush=True)
    sys.stdin.read()
    try:
        held.check()
    except RunFailed as error:
        print("lost", error.code, flush=True)
    else:
        print("kept", flush=True)
"""


class Run:
    """A process that takes the lease of `uri`; `elsewhere`: as if on another machine."""

    def __init__(self, uri: str, *, elsewhere: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, uri, KEY, str(BEAT_S), str(STALE_S), elsewhere],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def finish(self) -> str:
        """Let it end; its last words."""
        return self.process.communicate(timeout=30)[0].strip()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def run() -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(uri: str, **changes: str) -> Run:
        runs.append(Run(uri, **changes))
        return runs[-1]

    yield start
    for each in runs:
        each.close()


@pytest.fixture(params=["folder", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("s3") if request.param == "s3" else str(tmp_path / "data")


def hold(uri: str, waits: list[str], **changes: float) -> module.contextmanager:
    settings: dict = {"beat_s": BEAT_S, "stale_s": STALE_S} | changes
    return lease(open_store(uri), KEY, on_wait=waits.append, **settings)


def test_nothing_stays(uri: str) -> None:
    waits: list[str] = []
    for _ in range(2):
        with hold(uri, waits) as held:
            assert [info.key for info in open_store(uri).list()] == [f"{KEY}/00000001"]
            held.check()
    assert waits == []
    assert list(open_store(uri).list()) == []


def test_the_second_waits_while_the_first_works(uri: str, run: Callable[..., Run]) -> None:
    first = run(uri)
    assert first.says() == "holds"
    second = run(uri)
    assert f"process {first.process.pid} on " in second.says()
    said, _, _ = select.select([second.process.stdout], [], [], STALE_S * 1.5)
    assert said == []  # still waits, since the first renews
    assert first.finish() == "kept"
    assert second.says() == "holds"
    assert second.finish() == "kept"
    assert list(open_store(uri).list()) == []


def test_a_killed_holder_is_followed_at_once(uri: str, run: Callable[..., Run]) -> None:
    first = run(uri)
    assert first.says() == "holds"
    first.process.kill()
    first.process.wait()
    waits: list[str] = []
    start_s = time.monotonic()
    with hold(uri, waits, stale_s=60.0) as held:
        assert time.monotonic() - start_s < 5
        held.check()
    assert waits == []
    assert list(open_store(uri).list()) == []


def test_a_zombie_is_dead(tmp_path: Path, run: Callable[..., Run]) -> None:
    """Killed, and its parent has not looked yet."""
    first = run(str(tmp_path))
    assert first.says() == "holds"
    first.process.kill()
    os.waitid(os.P_PID, first.process.pid, os.WEXITED | os.WNOWAIT)
    waits: list[str] = []
    with hold(str(tmp_path), waits, stale_s=60.0):
        pass
    assert waits == []


def test_a_frozen_holder_elsewhere_is_followed_and_notices(
    uri: str, run: Callable[..., Run]
) -> None:
    first = run(uri, elsewhere="another-host")
    assert first.says() == "holds"
    first.process.send_signal(signal.SIGSTOP)
    waits: list[str] = []
    start_s = time.monotonic()
    with hold(uri, waits) as held:
        assert STALE_S * 0.9 < time.monotonic() - start_s < STALE_S + 10
        first.process.send_signal(signal.SIGCONT)
        assert first.finish() == "lost busy"
        time.sleep(3 * BEAT_S)
        held.check()
    assert "another-host" in waits[0]
    assert list(open_store(uri).list()) == []


def test_a_frozen_holder_notices_after_the_other_is_through(
    tmp_path: Path, run: Callable[..., Run]
) -> None:
    first = run(str(tmp_path), elsewhere="another-host")
    assert first.says() == "holds"
    first.process.send_signal(signal.SIGSTOP)
    with hold(str(tmp_path), []):
        pass
    first.process.send_signal(signal.SIGCONT)
    assert first.finish() == "lost busy"


def test_one_of_many_at_once(uri: str) -> None:
    """Threads of one process stand for runs on many machines."""
    inside: list[int] = []
    most: list[int] = []
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(3):
                with hold(uri, [], stale_s=60.0) as held:
                    inside.append(number)
                    most.append(len(inside))
                    time.sleep(0.02)
                    held.check()
                    inside.remove(number)
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert max(most) == 1
    assert len(most) == 12


def test_of_two_that_follow_a_dead_one_one_withdraws(tmp_path: Path) -> None:
    """One saw number 5 dead and creates 6; meanwhile 5 was removed, and another created 1."""
    store = open_store(str(tmp_path))
    own = Holder(machine_id(), os.getpid(), started_at(os.getpid()), "own")
    assert module._created(store, KEY, 1, own, over=set())
    assert not module._created(store, KEY, 6, own, over={5})
    assert [info.key for info in store.list()] == [f"{KEY}/00000001"]
    assert not module._created(store, KEY, 1, own, over=set())


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'{"pid": -1}', b'{"pid": "x"}'])
def test_what_cannot_be_read_goes_stale(tmp_path: Path, data: bytes) -> None:
    store = open_store(str(tmp_path))
    store.put(f"{KEY}/00000007", data)
    waits: list[str] = []
    start_s = time.monotonic()
    with hold(str(tmp_path), waits, stale_s=0.3):
        assert time.monotonic() - start_s >= 0.3
    assert "unknown kind" in waits[0]
    assert list(store.list()) == []


def test_a_lease_that_was_removed_is_lost(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with hold(str(tmp_path), []) as held:
        store.delete(f"{KEY}/00000001")
        until_s = time.monotonic() + 10
        while not held.lost and time.monotonic() < until_s:
            time.sleep(BEAT_S / 2)
        with pytest.raises(RunFailed) as lost:
            held.check()
        assert lost.value.code == "busy"
        store.put(f"{KEY}/00000001", b"another's")
    assert store.get(f"{KEY}/00000001") == b"another's"  # not ours to remove


def test_a_store_that_is_away_for_a_while_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*args: object) -> dict[int, str]:
        raise StorageError("does not answer", code="unavailable", retryable=True)

    with hold(str(tmp_path), []) as held:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_listed", away)
            time.sleep(4 * BEAT_S)
            held.check()
        assert "was not renewed" in caplog.text
        before = (tmp_path / KEY / "00000001").read_bytes()
        time.sleep(3 * BEAT_S)
        held.check()
        assert (tmp_path / KEY / "00000001").read_bytes() != before


def test_a_number_given_away_again_is_another_process() -> None:
    assert process_lives(os.getpid(), started_at(os.getpid()))
    assert not process_lives(os.getpid(), "1")
    assert process_lives(os.getpid(), "")
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert not process_lives(done.pid, "1")
    assert process_lives(1, started_at(1))  # another user's, perhaps
