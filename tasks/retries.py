"""What failed for a passing reason, and when a later run may try it again.

The state is one small object of the dataset's store. It is a help and no record: without it, or
with a damaged one, everything is tried again at once.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kpmask.errors import StorageError
from tasks.storage import ObjectStore

log = logging.getLogger(__name__)

KEY: Final = ".state/retries.json"
VERSION: Final = 1
FORGOTTEN_AFTER_S: Final = 90 * 86400.0  # an item that no run has asked about for so long
_MAX_DOUBLINGS: Final = 60


@dataclass(frozen=True, slots=True)
class _Waiting:
    code: str
    attempts: int
    not_before_s: int  # seconds since 1970


class Retries:
    """Failures over all runs, by item.

    The first failure may be tried again by the next run, so that who mends something and runs
    again by hand need not wait. From the second on the pause is `backoff_s`, doubled with every
    further one up to `max_backoff_s`.

    Args:
        store: the dataset's.
        backoff_s: the first pause; 0: everything may be tried now.
        max_backoff_s: the longest pause. What claims to wait for longer was written under a wrong
            clock, and may be tried now.
        max_attempts: an item that failed in so many runs is given up; 0: never.
        clock: seconds since 1970.

    Raises:
        StorageError: the store does not answer.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        backoff_s: float,
        max_backoff_s: float,
        max_attempts: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._backoff_s = backoff_s
        self._max_backoff_s = max_backoff_s
        self._max_attempts = max_attempts
        self._clock = clock
        self._items = _loaded(store)
        self._changed = False

    def due(self, item_id: str) -> bool:
        """Whether an item may be tried now; one that never failed may."""
        item = self._items.get(item_id)
        if item is None:
            return True
        if self._gave_up(item):
            return False
        pause_s = item.not_before_s - self._clock()
        return self._backoff_s == 0 or not 0 < pause_s <= self._max_backoff_s

    def given_up(self, item_id: str) -> bool:
        """Whether an item failed as often as it may."""
        item = self._items.get(item_id)
        return item is not None and self._gave_up(item)

    def _gave_up(self, item: _Waiting) -> bool:
        return 0 < self._max_attempts <= item.attempts

    def failed(self, item_id: str, code: str) -> None:
        """Note one more run in which an item failed for a passing reason."""
        attempts = self.attempts(item_id) + 1
        pause_s = self._backoff_s * 2.0 ** min(attempts - 2, _MAX_DOUBLINGS) if attempts > 1 else 0
        # Down to the second: what waits for exactly the longest pause must not seem too long.
        not_before_s = int(self._clock() + min(pause_s, self._max_backoff_s))
        self._items[item_id] = _Waiting(code, attempts, not_before_s)
        self._changed = True

    def done(self, item_id: str) -> None:
        """Forget an item: it succeeded, or failed for a lasting reason."""
        self._changed |= self._items.pop(item_id, None) is not None

    def attempts(self, item_id: str) -> int:
        """In how many runs an item has failed."""
        item = self._items.get(item_id)
        return 0 if item is None else item.attempts

    def code(self, item_id: str) -> str:
        """Why an item failed last; empty for one that did not."""
        item = self._items.get(item_id)
        return "" if item is None else item.code

    def save(self) -> None:
        """Write the state, if it changed; nothing is left where nothing waits.

        Raises:
            StorageError: it cannot be written.
        """
        oldest_s = self._clock() - FORGOTTEN_AFTER_S
        kept = {i: item for i, item in self._items.items() if item.not_before_s >= oldest_s}
        if not self._changed and len(kept) == len(self._items):
            return
        self._items = kept
        if kept:
            items = {i: [t.code, t.attempts, t.not_before_s] for i, t in sorted(kept.items())}
            text = json.dumps({"version": VERSION, "items": items}, separators=(",", ":"))
            self._store.put(KEY, text.encode())
        else:
            self._store.delete(KEY)
        self._changed = False


def _loaded(store: ObjectStore) -> dict[str, _Waiting]:
    try:
        data = store.get(KEY)
    except StorageError as error:
        if error.code == "not_found":
            return {}
        raise
    try:
        return _parsed(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.warning("%s/%s is unreadable (%s): all is tried again", store.uri, KEY, error)
        return {}


def _parsed(data: bytes) -> dict[str, _Waiting]:
    tree = json.loads(data)
    if tree["version"] != VERSION:
        raise ValueError(f"version {tree['version']!r}")
    items = {}
    for item_id, (code, attempts, not_before_s) in tree["items"].items():
        if not (isinstance(code, str) and type(attempts) is int and type(not_before_s) is int):
            raise ValueError(f"item {item_id!r}")
        items[item_id] = _Waiting(code, attempts, not_before_s)
    return items
