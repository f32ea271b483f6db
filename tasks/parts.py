"""What workers finished, in small Parquet files that each writes for itself.

One object an item costs a request each, and some seconds of a rerun for every ten thousand. So a
worker gathers what it finished for up to a second: that much is lost with it when it is killed, and
is made again. Nobody overwrites another's part, and parts that run together need no order.
"""

from __future__ import annotations

import io
import logging
import secrets
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from kpmask.records import from_table, to_table
from tasks.storage import ObjectStore

log = logging.getLogger(__name__)

R = TypeVar("R")

MAX_PENDING: Final = 256
MAX_AGE_S: Final = 1.0  # of what is pending, when more comes
READ_THREADS: Final = 8
READ_AHEAD: Final = 16  # parts that wait to be taken


class PartWriter(Generic[R]):
    """The parts `<prefix>/<name>-<number>.parquet` of one process; no other writer has its name."""

    def __init__(self, store: ObjectStore, prefix: str, record_type: type[R]) -> None:
        self._store = store
        self._record_type = record_type
        self._stem = f"{prefix}/{secrets.token_hex(8)}"
        self._number = 0
        self._pending: list[R] = []
        self._since_s = 0.0  # when the oldest of them came, by time.monotonic()

    def add(self, record: R) -> None:
        """Take a record; store what is pending once it is old or much.

        Raises:
            StorageError: the store denies or does not answer; the records are still pending.
        """
        if not self._pending:
            self._since_s = time.monotonic()
        self._pending.append(record)
        if len(self._pending) >= MAX_PENDING or time.monotonic() - self._since_s >= MAX_AGE_S:
            self.flush()

    def flush(self) -> None:
        """Store what is pending as one object; raises as `add`."""
        if not self._pending:
            return
        buffer = io.BytesIO()
        table = to_table(self._pending, self._record_type)
        pq.write_table(table, buffer, compression="zstd", version="2.6")
        self._store.put(f"{self._stem}-{self._number:06d}.parquet", buffer.getvalue())
        self._number += 1
        self._pending.clear()


def read_parts(store: ObjectStore, prefix: str, record_type: type[R]) -> Iterator[R]:
    """The records of all parts under a prefix, in the order of the parts' names, a few parts ahead.

    A part that cannot be read is logged and counts as not there: its items are done again.

    Raises:
        StorageError: the store denies or does not answer.
    """

    def load(key: str) -> list[R]:
        data = store.get(key)
        try:
            return from_table(pq.read_table(pa.BufferReader(data)), record_type)
        except (pa.ArrowException, ValueError, TypeError, OSError) as error:
            log.warning("%s/%s is unreadable and left out: %s", store.uri, key, error)
            return []

    keys = (info.key for info in store.list(f"{prefix}/") if info.key.endswith(".parquet"))
    waiting: deque[Future[list[R]]] = deque()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        try:
            for key in keys:
                waiting.append(pool.submit(load, key))
                if len(waiting) > READ_AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:  # of a reader who takes no more
                future.cancel()
