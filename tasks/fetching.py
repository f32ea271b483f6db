"""Downloads ahead of the cutting: a stage of its own, with few videos between the two."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from kpmask.config import Cluster, PreprocessJob
from kpmask.records import Failure
from tasks.clip_worker import Fetcher
from tasks.cluster import PENDING, Outcome, Pending, run_items
from tasks.workbook import VideoItem

POLL_S: Final = 0.2
MAX_AHEAD: Final = 8  # downloaded, and not yet being cut: what bounds the disk that a run needs

OnLost = Callable[[VideoItem, Failure], None]


@contextmanager
def fetched_ahead(
    todo: Iterable[VideoItem],
    total: int,
    job: PreprocessJob,
    raw_uri: str,
    work: str,
    *,
    on_lost: OnLost,
) -> Iterator[Iterator[VideoItem | Pending]]:
    """The items with their files: those that have none are downloaded, as the others are used.

    Args:
        todo: the items; read from one thread at a time.
        total: how many they are at most.
        job: the settings.
        raw_uri: the store of raw videos.
        work: the prefix, in the dataset's store, of what is unfinished.
        on_lost: called, in the thread that reads the items, with what could not be downloaded.

    Yields:
        The items, and `PENDING` where none is there yet; to be read within the context.
    """
    stage = _Downloads(todo, total, job, raw_uri, work)
    try:
        yield stage.items(on_lost)
    finally:
        stage.stop()


class _Downloads:
    """The stage: a thread that hands items on, through a pool of workers where it must."""

    def __init__(
        self, todo: Iterable[VideoItem], total: int, job: PreprocessJob, raw_uri: str, work: str
    ) -> None:
        self._todo = iter(todo)
        self._total = total
        self._job = job
        self._args = (job, raw_uri, work)
        self._ready: queue.Queue[VideoItem] = queue.Queue(MAX_AHEAD)
        self._lost: queue.SimpleQueue[tuple[VideoItem, Failure]] = queue.SimpleQueue()
        self._wanted: queue.Queue[VideoItem] = queue.Queue(MAX_AHEAD)
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # --- the reader's side

    def items(self, on_lost: OnLost) -> Iterator[VideoItem | Pending]:
        """Items with files at once; what was downloaded as it comes."""
        num_out = 0  # with the downloaders
        held: VideoItem | None = None  # has no place with them yet
        exhausted = False
        while True:
            num_out -= self._report(on_lost)
            try:
                found = self._ready.get_nowait()
                num_out -= 1
                yield found
                continue
            except queue.Empty:
                pass
            if held is None and not exhausted:
                held = next(self._todo, None)
                exhausted = held is None
            if held is not None and not self._needs(held):
                yield held
                held = None
                continue
            if held is not None and self._offer(held):
                num_out, held = num_out + 1, None
                continue
            if exhausted and not num_out:
                return
            yield PENDING

    def _needs(self, item: VideoItem) -> bool:
        return not item.keys and not item.is_folder and self._job.download.enabled

    def _offer(self, item: VideoItem) -> bool:
        """Hand an item to the downloaders, if they have room for it."""
        if self._error is not None:
            raise self._error
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kpmask-fetch", daemon=True)
            self._thread.start()
        try:
            self._wanted.put_nowait(item)
        except queue.Full:
            return False
        return True

    def _report(self, on_lost: OnLost) -> int:
        """Tell of what could not be had; how many that were."""
        if self._error is not None:
            raise self._error
        count = 0
        while not self._lost.empty():
            on_lost(*self._lost.get())
            count += 1
        return count

    def stop(self) -> None:
        """End the downloads, whatever they are doing."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    # --- the thread

    def _run(self) -> None:
        outcomes = run_items(
            self._source(),
            Fetcher,
            self._args,
            key=lambda item: item.name,
            stage="download",
            cluster=self._cluster(),
            total=self._total,
            stop=self._stop,
        )
        try:
            for outcome in outcomes:
                self._hand_on(outcome)
                if self._stop.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - raised again by the reader
            self._error = error
        finally:
            outcomes.close()  # type: ignore[attr-defined]

    def _cluster(self) -> Cluster:
        """Workers that wait for servers: they take no processor of the cutters'."""
        settings = {
            "num_workers": self._job.download.concurrency,
            "cpus_per_worker": 0.0,
            "gpus_per_worker": 0.0,
        }
        return self._job.cluster.model_copy(update=settings)

    def _source(self) -> Iterator[VideoItem | Pending]:
        while not self._stop.is_set():
            try:
                item = self._wanted.get_nowait()
            except queue.Empty:
                yield PENDING
                continue
            yield item

    def _hand_on(self, outcome: Outcome[VideoItem, VideoItem | Failure]) -> None:
        found = outcome.failure if outcome.failure is not None else outcome.result
        if isinstance(found, Failure):
            self._lost.put((outcome.item, found))
            return
        assert found is not None
        while not self._stop.is_set():
            try:
                self._ready.put(found, timeout=POLL_S)
                return
            except queue.Full:
                continue
