"""How long a download may take, and how slow a host may be."""

from __future__ import annotations

import time
from typing import Final

from kpmask.config import Download
from kpmask.errors import DownloadError

SHORTEST_TIMEOUT_S: Final = 0.01


class Patience:
    """The time for one video, over all its connections.

    Only time in which we wait for a host's bytes counts against its speed, which is looked at
    whenever so much of it has passed as one silence may last. So a host that sends a byte now and
    then, which no timeout of single reads would ever stop, is given up.
    """

    def __init__(self, download: Download) -> None:
        self._download = download
        self._end_s = time.monotonic() + download.max_time_s
        self._waited_s = 0.0
        self._num_bytes = 0

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._end_s

    def timeout_s(self) -> float:
        """How long the next read may wait.

        Raises:
            DownloadError: no time is left.
        """
        left_s = self._end_s - time.monotonic()
        if left_s <= 0:
            raise DownloadError(
                f"not done after {self._download.max_time_s:g} s",
                code="network",
                retryable=True,
                hint="download.max_time_s",
            )
        return max(min(self._download.timeout_s, left_s), SHORTEST_TIMEOUT_S)

    def received(self, num_bytes: int, waited_s: float) -> None:
        """Note a read.

        Raises:
            DownloadError: the host is too slow.
        """
        self._waited_s += waited_s
        self._num_bytes += num_bytes
        if self._waited_s < self._download.timeout_s:
            return
        rate = self._num_bytes / self._waited_s
        self._waited_s, self._num_bytes = 0.0, 0
        if rate < self._download.min_bytes_per_s:
            raise DownloadError(
                f"the host sends {rate:.0f} bytes a second",
                code="network",
                retryable=True,
                hint=f"download.min_bytes_per_s is {self._download.min_bytes_per_s}",
            )


class Throttle:
    """Keeps our own rate below a limit, by pauses between writes."""

    def __init__(self, download: Download) -> None:
        limit = download.rate_bytes_per_s
        self._rate = limit / download.concurrency if limit else None
        self._next_s = time.monotonic()

    def took(self, num_bytes: int) -> None:
        if self._rate is None:
            return
        now_s = time.monotonic()
        self._next_s = max(self._next_s, now_s - 1.0) + num_bytes / self._rate
        if self._next_s > now_s:
            time.sleep(self._next_s - now_s)
