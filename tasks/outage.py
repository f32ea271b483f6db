"""A store that is away for a while: waited for, and given up after a time."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from kpmask.errors import StorageError
from tasks.machine import steady_s

log = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 0.5  # doubles with every refusal
MAX_PAUSE_S: Final = 10.0
MIN_REFUSALS: Final = 3  # fewer prove no long outage, where one try takes longer than its limit
_jitter = random.Random()  # noqa: S311 - of its own: the caller's random state is not touched

X = TypeVar("X")


def store_is_away(error: BaseException) -> bool:
    """Whether an error is a store's that does not answer now and may do so later."""
    return isinstance(error, StorageError) and error.retryable and error.code == "unavailable"


def pause_s(refusals: int) -> float:
    """How long to wait after so many refusals in a row (from 1); at most `MAX_PAUSE_S`."""
    doublings = min(refusals - 1, 10)  # no overflow, however long it lasts
    pause = min(FIRST_PAUSE_S * 2.0**doublings, MAX_PAUSE_S)
    return pause * _jitter.uniform(0.75, 1.0)  # so that not all come back at once


class Outage:
    """Whether a store is away, and for how long it has been.

    An outage begins with a refusal and ends with the first success, whoever has it.

    Args:
        limit_s: how long it may last.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._began_s: float | None = None

    @property
    def is_on(self) -> bool:
        return self._began_s is not None

    def refused(self, error: BaseException, refusals: int) -> bool:
        """Take note that the store did not answer; whether it is worth asking again.

        Args:
            error: what it said.
            refusals: how often the same call was refused, this time included.
        """
        now_s = steady_s()
        if self._began_s is None:
            self._began_s = now_s
            log.warning("a store is away, waiting up to %g s for it: %s", self._limit_s, error)
        return now_s - self._began_s < self._limit_s or refusals < MIN_REFUSALS

    def answered(self) -> None:
        """Take note of a success."""
        if self._began_s is not None:
            log.warning("the store is back after %.1f s", steady_s() - self._began_s)
            self._began_s = None


def patiently(call: Callable[[], X], *, outage_s: float) -> X:
    """What `call` returns, once its store answers; it is called again for as long as it does not.

    Args:
        call: can be called again after it failed.
        outage_s: how long the store may be away.

    Raises:
        StorageError: the store was away for longer; or it refuses for another reason, at once.
    """
    outage = Outage(outage_s)
    refusals = 0
    while True:
        try:
            result = call()
        except StorageError as error:
            refusals += 1
            if not (store_is_away(error) and outage.refused(error, refusals)):
                raise
        else:
            outage.answered()
            return result
        time.sleep(pause_s(refusals))
