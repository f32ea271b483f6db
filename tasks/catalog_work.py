"""What the workers of a catalog do next.

- Animations are drawn by driving video, the longest first, so that nothing long is left for the
  end. States are made a little ahead of what needs them and removed when nothing does, so that
  what is stored grows with the catalog's width and not with its length.
- Animations go out in bundles: enough to keep a worker busy for some seconds, and fewer towards
  the end, so that all workers end together.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

from kpmask.errors import StorageError
from kpmask.records import AnimationItem, Failure, FeatureRecord
from tasks.catalog_book import CatalogBook
from tasks.cluster import PENDING, Pending
from tasks.render import (
    FeatureItem,
    RenderItem,
    Work,
    features_of,
    remove_feature,
    stored_features,
)
from tasks.storage import ObjectStore

log = logging.getLogger(__name__)

WINDOW: Final = 512  # animations that are looked at, at once
BUNDLE_S: Final = 10.0  # what a bundle should take
MAX_ANIMATIONS: Final = 64  # in a bundle
MAX_IMAGES: Final = 16  # in a bundle of features
DELETE_THREADS: Final = 4

OnLost = Callable[[AnimationItem, Failure], None]


@dataclass(slots=True, eq=False)
class _Feature:
    """A state that animations in the window need; `num_users` is how many of them. `is_sent`: it is
    with a worker.
    """

    item: FeatureItem
    is_sent: bool = False
    record: FeatureRecord | None = None
    failure: Failure | None = None
    num_users: int = 0

    def settle(self, found: FeatureRecord | Failure | None) -> None:
        if isinstance(found, Failure):
            self.failure = found
        else:
            self.record = found

    @property
    def is_todo(self) -> bool:
        return not self.is_sent and self.record is None and self.failure is None


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """An animation that is not yet with a worker."""

    item: AnimationItem
    source: _Feature
    driving: _Feature

    @property
    def is_ready(self) -> bool:
        return self.source.record is not None and self.driving.record is not None

    @property
    def failure(self) -> Failure | None:
        """Why it cannot be made: the image's failure comes first."""
        return self.source.failure or self.driving.failure

    @property
    def num_frames(self) -> int:
        return self.driving.record.num_frames if self.driving.record is not None else 0

    def work(self) -> RenderItem:
        assert self.source.record is not None and self.driving.record is not None
        return RenderItem(self.item, self.source.record, self.driving.record)


class CatalogWork:
    """The bundles of one run. `num_features` counts the states that have to be made."""

    def __init__(
        self,
        book: CatalogBook,
        store: ObjectStore,
        *,
        settings_digest: str,
        num_workers: int,
        first_bundle: int,
        on_lost: OnLost,
    ) -> None:
        """Args:
        book: what is to be made; its tables are read and written here.
        store: of the catalog.
        settings_digest: of all that shapes every state.
        num_workers: how many share the work.
        first_bundle: animations in a bundle, as long as nobody knows how long one takes.
        on_lost: told of an animation whose image or driving video has no state.
        """
        self._book = book
        self._store = store
        self._settings_digest = settings_digest
        self._num_workers = num_workers
        self._first_bundle = first_bundle
        self._on_lost = on_lost
        self._window: list[_Waiting] = []
        self._features: dict[str, _Feature] = {}
        self._num_frames_left = book.num_frames_todo()
        self._pace = _Pace(num_workers)
        self._remover = ThreadPoolExecutor(DELETE_THREADS)
        book.begin_features(stored_features(store))
        self.num_features = book.num_features_todo()
        self._fresh = book.todo()

    def close(self) -> None:
        """Wait for what is being removed."""
        self._remover.shutdown()

    # --- what is next

    def bundles(self) -> Iterator[tuple[Work, ...] | Pending]:
        """Bundles of states or of animations, each to be worked on by one worker; `PENDING` where
        the next one has to wait for a state."""
        while self._refill():
            yield self._next()

    def _refill(self) -> bool:
        """Fill the window; whether there is anything in it."""
        self._drop_lost()
        while len(self._window) < WINDOW and (item := next(self._fresh, None)):
            source, driving = (
                self._feature(feature) for feature in features_of(item, self._settings_digest)
            )
            self._window.append(_Waiting(item, source, driving))
        self._drop_lost()
        return bool(self._window)

    def _feature(self, item: FeatureItem) -> _Feature:
        feature = self._features.get(item.feature_id)
        if feature is None:
            feature = _Feature(item)
            feature.settle(self._book.feature(item.feature_id))
            self._features[item.feature_id] = feature
        feature.num_users += 1
        return feature

    def _next(self) -> tuple[Work, ...] | Pending:
        ready = [waiting for waiting in self._window if waiting.is_ready]
        num_ready = sum(waiting.num_frames for waiting in ready)
        enough = 2 * self._num_workers * self._pace.frames_of(BUNDLE_S)
        if (not ready or num_ready < enough) and (features := self._next_features()):
            return features
        return self._next_animations(ready) if ready else PENDING

    def _next_features(self) -> tuple[FeatureItem, ...]:
        """A driving video, or a few images: what the first animation lacks that lacks one."""
        wanted = itertools.chain.from_iterable((w.driving, w.source) for w in self._window)
        todo = [feature for feature in wanted if feature.is_todo]
        if not todo:
            return ()
        chosen = todo[:1]
        if chosen[0].item.kind == "source":
            images = dict.fromkeys(f for f in todo if f.item.kind == "source")
            chosen = list(images)[:MAX_IMAGES]
        for feature in chosen:
            feature.is_sent = True
        return tuple(feature.item for feature in chosen)

    def _next_animations(self, ready: list[_Waiting]) -> tuple[RenderItem, ...]:
        chosen: list[_Waiting] = []
        room = self._bundle_frames()
        for waiting in ready[: MAX_ANIMATIONS if self._pace.is_known else self._first_bundle]:
            room -= waiting.num_frames
            if chosen and room < 0:
                break
            chosen.append(waiting)
        self._leave(chosen)
        self._pace.start()
        self._num_frames_left -= sum(waiting.num_frames for waiting in chosen)
        return tuple(waiting.work() for waiting in chosen)

    def _bundle_frames(self) -> float:
        share = max(self._num_frames_left, 0) / (2 * self._num_workers)
        return min(self._pace.frames_of(BUNDLE_S), share)

    def _leave(self, gone: list[_Waiting]) -> None:
        """Take animations out of the window, and states that nothing in it needs."""
        if not gone:
            return
        leaving = set(map(id, gone))
        self._window = [waiting for waiting in self._window if id(waiting) not in leaving]
        for feature in itertools.chain.from_iterable((w.source, w.driving) for w in gone):
            feature.num_users -= 1
            self._forget(feature)

    def _forget(self, feature: _Feature) -> None:
        """Forget a state that nothing in the window needs, unless it is being made."""
        if not feature.num_users and not feature.is_sent:
            self._features.pop(feature.item.feature_id, None)

    def _drop_lost(self) -> None:
        lost = [waiting for waiting in self._window if waiting.failure is not None]
        self._leave(lost)
        for waiting in lost:
            failure = waiting.failure
            assert failure is not None
            cause = f"{failure.item}: {failure.cause}"
            self._on_lost(waiting.item, replace(failure, item=waiting.item.name, cause=cause))
            self._release(waiting.source.item.feature_id, waiting.driving.item.feature_id)

    # --- what became of it

    def feature_over(self, item: FeatureItem, found: FeatureRecord | Failure) -> None:
        """Note a state, or why there is none."""
        self._book.set_feature(item.feature_id, found)
        feature = self._features.get(item.feature_id)
        if feature is not None:
            feature.settle(found)
            feature.is_sent = False
            self._forget(feature)

    def animation_over(self, work: RenderItem, *, made: bool) -> None:
        """Note that an animation needs its states no more, and remove those that none needs."""
        if made:
            self._pace.add(work.driving.num_frames)
        self._release(work.source.feature_id, work.driving.feature_id)

    def _release(self, *feature_ids: str) -> None:
        for record in self._book.release_features(feature_ids):
            self._remover.submit(_remove, self._store, record)


def _remove(store: ObjectStore, record: FeatureRecord) -> None:
    try:
        remove_feature(store, record)
    except StorageError as error:  # it goes with all the others at the end
        log.warning("%s: %s", record.feature_id, error)


class _Pace:
    """How fast a worker draws, by what was drawn so far."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._start_s: float | None = None
        self._num_frames = 0

    @property
    def is_known(self) -> bool:
        return self._num_frames > 0

    def start(self) -> None:
        self._start_s = self._start_s or time.monotonic()

    def add(self, num_frames: int) -> None:
        self._num_frames += num_frames

    def frames_of(self, seconds: float) -> float:
        """How many frames a worker draws in so many seconds; 0 while nobody knows."""
        if self._start_s is None or not self._num_frames:
            return 0.0
        elapsed_s = max(time.monotonic() - self._start_s, 1e-3)
        return seconds * self._num_frames / elapsed_s / self._num_workers
