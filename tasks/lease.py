"""One run at a time at a dataset, over any store.

The lease is an object `<key>/<number>` that says who holds it and that the holder rewrites every
few seconds. A run that finds one waits. It takes over where the holder's process is dead on this
machine, or where the object has not changed for a minute of the waiter's own steady clock, so that
clocks which differ, or jump, play no part.

To take over is to create the next number, which a store grants to one writer only. Each run that
created a number then lists again, and withdraws if it finds another beside those that it saw to be
dead; of two that create at the same time at least one sees the other, so never do both stay. A
holder that finds a higher number, or its own gone, has lost the lease and says so (`Lease.check`).

What remains: a store cannot refuse the writes of a run that was frozen for a minute and does not
know yet that it lost. It looks before it goes on (`check` looks for itself when the last look is
old), and what it wrote between two looks are whole objects, which the new holder replaces.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Final

from kpmask.errors import RunFailed, StorageError
from tasks.machine import machine_id, process_lives, started_at, steady_s
from tasks.storage import ObjectStore

log = logging.getLogger(__name__)

BEAT_S: Final = 10.0
STALE_S: Final = 60.0
_jitter = random.Random()  # noqa: S311 - of its own: the caller's random state is not touched


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease. `beat` counts the renewals."""

    machine: str
    pid: int
    started: str
    token: str
    beat: int = 0

    def encoded(self, beat: int) -> bytes:
        return json.dumps(asdict(self) | {"beat": beat}).encode()

    @property
    def is_dead(self) -> bool:
        """Whether its process has ended, as far as that can be seen from here."""
        return self.machine == machine_id() and not process_lives(self.pid, self.started)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.machine.split(' ')[0]}"


def _holder(data: bytes) -> Holder | None:
    """Who wrote this; None for what no run of ours writes."""
    try:
        holder = Holder(**json.loads(data))
    except (ValueError, TypeError):
        return None
    texts = (holder.machine, holder.started, holder.token)
    valid = all(isinstance(t, str) for t in texts) and isinstance(holder.pid, int)
    return holder if valid and holder.pid > 0 else None


class Lease:
    """A lease that is held, until somebody takes it over."""

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        number: int,
        holder: Holder,
        *,
        beat_s: float,
        stale_s: float,
    ) -> None:
        self._store = store
        self._key = key
        self._number = number
        self._holder = holder
        self._beat_s = beat_s
        self._stale_s = stale_s
        self._beats = 0
        self._seen_s = steady_s()
        self._lost = threading.Event()
        self._released = threading.Event()
        self._lock = threading.Lock()

    def check(self) -> None:
        """Go on only if the lease is still held.

        Raises:
            RunFailed: code `busy`: another run has taken over.
        """
        if steady_s() - self._seen_s > 2 * self._beat_s:  # this process was frozen, or the store
            self._renew()
        if self._lost.is_set():
            raise RunFailed(
                "another run took over, since this one did not move for too long",
                subject=self._store.uri,
                code="busy",
                hint="nothing is lost: the other run goes on from what is done",
            )

    @property
    def lost(self) -> bool:
        """Whether another run is known to have taken over."""
        return self._lost.is_set()

    def _keep(self) -> None:
        """Renew until released; the work of a thread of its own."""
        while not self._released.wait(self._beat_s) and not self.lost:
            self._renew()

    def _renew(self) -> None:
        with self._lock:
            if self._released.is_set() or self.lost:
                return
            try:
                self._renew_once()
            except StorageError as error:
                log.warning("the lease was not renewed: %s", error)

    def _renew_once(self) -> None:
        """Look, write and look again, since somebody may come in between."""
        start_s = steady_s()
        if not self._is_ours():
            self._lost.set()
            return
        self._beats += 1
        self._store.put(self._own_key, self._holder.encoded(self._beats))
        # After a freeze just here, the write may have brought back what others had removed.
        frozen = steady_s() - start_s > self._stale_s
        if frozen or not self._is_ours():
            self._lost.set()
            self._store.delete(self._own_key)
            return
        self._seen_s = start_s

    @property
    def _own_key(self) -> str:
        return _numbered(self._key, self._number)

    def _is_ours(self) -> bool:
        return max(_listed(self._store, self._key), default=-1) == self._number

    def _release(self) -> None:
        self._released.set()
        with self._lock:
            if not self.lost:
                self._store.delete(self._own_key)


@contextmanager
def lease(
    store: ObjectStore,
    key: str,
    *,
    on_wait: Callable[[str], None],
    beat_s: float = BEAT_S,
    stale_s: float = STALE_S,
) -> Iterator[Lease]:
    """Hold the lease `key` of a store; wait for it while another run renews it.

    Args:
        store: of the dataset, shared by all who work at it.
        key: a key of its own; what lies under it belongs to this lease.
        on_wait: told, once for each holder, whom we wait for.
        beat_s: how often it is renewed.
        stale_s: how long an unchanged lease is respected; the same for all runs, and at least
            three times `beat_s`.

    Raises:
        StorageError: the store refuses or does not answer.
    """
    own = Holder(machine_id(), os.getpid(), started_at(os.getpid()), secrets.token_hex(16))
    number = _acquired(store, key, own, on_wait=on_wait, pause_s=beat_s / 5, stale_s=stale_s)
    held = Lease(store, key, number, own, beat_s=beat_s, stale_s=stale_s)
    thread = threading.Thread(target=held._keep, name="lease", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        try:
            held._release()
        except StorageError as error:  # it goes stale by itself; the run's outcome matters more
            log.warning("the lease was not removed: %s", error)
        thread.join()


def _acquired(
    store: ObjectStore,
    key: str,
    own: Holder,
    *,
    on_wait: Callable[[str], None],
    pause_s: float,
    stale_s: float,
) -> int:
    """Wait for our turn; the number that we then hold."""
    watch = _Watch(store, key, stale_s)
    told: int | None = None
    while True:
        found = _listed(store, key)
        living = {number: etag for number, etag in found.items() if not watch.is_over(number, etag)}
        if not living:
            number = max(found, default=0) + 1
            if _created(store, key, number, own, over=set(found)):
                return number
        elif told != max(living):
            told = max(living)
            on_wait(f"waiting for another run at {store.uri}: {watch.name(told)}")
        time.sleep(pause_s * (0.5 + _jitter.random()))


def _created(store: ObjectStore, key: str, number: int, own: Holder, *, over: set[int]) -> bool:
    """Whether the next number became ours, alone; those that it follows are then removed."""
    name = _numbered(key, number)
    if not store.put(name, own.encoded(0), if_absent=True):
        return False
    if not set(_listed(store, key)) <= over | {number}:
        store.delete(name)
        return False
    for old in over:
        store.delete(_numbered(key, old))
    return True


class _Watch:
    """When a waiter saw each number last change."""

    def __init__(self, store: ObjectStore, key: str, stale_s: float) -> None:
        self._store = store
        self._key = key
        self._stale_s = stale_s
        self._changed: dict[int, tuple[str, float]] = {}
        self._holders: dict[int, Holder | None] = {}

    def is_over(self, number: int, etag: str) -> bool:
        """Whether its holder is dead, or has not renewed it for too long."""
        if self._changed.get(number, ("", 0.0))[0] != etag:
            self._changed[number] = (etag, steady_s())
            self._holders[number] = self._read(number)
        holder = self._holders[number]
        if holder is not None and holder.is_dead:
            return True
        return steady_s() - self._changed[number][1] > self._stale_s

    def _read(self, number: int) -> Holder | None:
        with contextlib.suppress(StorageError):  # released just now, or to be read next time
            return _holder(self._store.get(_numbered(self._key, number)))
        return None

    def name(self, number: int) -> str:
        return str(self._holders.get(number) or "one of unknown kind")


def _numbered(key: str, number: int) -> str:
    return f"{key}/{number:08d}"


def _listed(store: ObjectStore, key: str) -> dict[int, str]:
    """The numbers that there are, with their objects' etags."""
    found = {}
    for info in store.list(f"{key}/"):
        name = info.key.removeprefix(f"{key}/")
        if re.fullmatch(r"\d{8}", name):
            found[int(name)] = info.etag
    return found
