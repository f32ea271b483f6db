"""Writes to a store that may be gone for a while.

A training is worth more than its storage's bad hour: what cannot be written now waits, is tried
again after a pause that grows, and only the end of the work insists on it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from kpmask.errors import StorageError

log = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 60.0
PATIENCE_S: Final = 900.0

Write = Callable[[], object]  # what it returns does not matter


class Outbox:
    """Writes by name, done in the order in which they were first sent.

    A write is a function, so that one that waits may write what is newest when its time comes. One
    of the same name takes the place of one that waits.
    """

    def __init__(self, *, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._waiting: dict[str, Write] = {}
        self._pause_s = FIRST_PAUSE_S
        self._next_s = 0.0

    def send(self, name: str, write: Write) -> None:
        """Do the write now; or later, where others wait or the store is gone."""
        self._waiting[name] = write
        self.poll()

    def poll(self) -> None:
        """Do what waits, if its pause is over."""
        if self._waiting and time.monotonic() >= self._next_s:
            self._try()

    def drain(self) -> None:
        """Do all that waits, however long the pauses.

        Raises:
            StorageError: the store was gone for all of `patience_s`.
        """
        end_s = time.monotonic() + self._patience_s
        while self._waiting:
            error = self._try()
            if error is not None and time.monotonic() + self._pause_s > end_s:
                raise error
            if error is not None:
                time.sleep(self._pause_s)

    def _try(self) -> StorageError | None:
        """Do what waits, up to the first that fails; its error."""
        for name, write in list(self._waiting.items()):
            try:
                write()
            except StorageError as error:
                self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
                self._next_s = time.monotonic() + self._pause_s
                log.warning("could not write %s (%s): again in %.0f s", name, error, self._pause_s)
                return error
            del self._waiting[name]
        self._pause_s = FIRST_PAUSE_S
        return None
