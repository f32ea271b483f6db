"""What the workers of a catalog do next, told by workers that only pretend."""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from kpmask.records import AnimationItem, AnimationRecord, CatalogRow, Failure, FeatureRecord
from tasks.catalog import feature_ids, item_of
from tasks.catalog_book import CatalogBook, Input
from tasks.catalog_work import MAX_ANIMATIONS, MAX_IMAGES, WINDOW, CatalogWork
from tasks.cluster import Pending
from tasks.render import FEATURES, FeatureItem, RenderItem, Work, part_key, record_key
from tasks.storage import LocalStore

SETTINGS = "s" * 64


@pytest.fixture
def book(tmp_path: Path) -> Iterator[CatalogBook]:
    with CatalogBook(tmp_path / "book.sqlite") as book:
        yield book


def fill(book: CatalogBook, pairs: Sequence[tuple[str, str]], lengths: dict[str, int]) -> None:
    """Animations of images by videos, all named by their content."""
    book.add_rows(
        CatalogRow(line, "", source, driving, "absolute", False, False, False)
        for line, (source, driving) in enumerate(pairs, start=1)
    )
    book.name_rows()
    book.set_inputs((uri, d, Input(uri, lengths[uri] if d else 0)) for uri, d in book.inputs())
    book.make_items(partial(item_of, settings=SETTINGS), partial(feature_ids, settings=SETTINGS))


class Workers:
    """Workers that take bundles and answer in any order, as a pool's do."""

    def __init__(self, book: CatalogBook, store: LocalStore, *, count: int, seed: int = 0) -> None:
        self.lost: dict[str, Failure] = {}
        self.sent: list[tuple[Work, ...]] = []
        self.stored: list[int] = []  # states in the store, whenever an animation is over
        self._book, self._store, self._count = book, store, count
        self._random = random.Random(seed)
        self.work = CatalogWork(
            book,
            store,
            settings_digest=SETTINGS,
            num_workers=count,
            first_bundle=1,
            on_lost=self._lose,
        )

    def _lose(self, item: AnimationItem, failure: Failure) -> None:
        self.lost[item.name] = failure
        self._book.set_failed(item.item_id, failure)

    def run(self, lengths: dict[str, int], *, broken: frozenset[str] = frozenset()) -> None:
        busy: deque[tuple[Work, ...]] = deque()
        for bundle in self.work.bundles():
            if not isinstance(bundle, Pending):
                self.sent.append(bundle)
                busy.append(bundle)
            assert busy, "it waits for nothing"
            if isinstance(bundle, Pending) or len(busy) == self._count:
                busy.rotate(self._random.randrange(len(busy)))
                self._settle(busy.popleft(), lengths, broken)
        while busy:
            self._settle(busy.popleft(), lengths, broken)
        self.work.close()

    def _settle(
        self, bundle: tuple[Work, ...], lengths: dict[str, int], broken: frozenset[str]
    ) -> None:
        for work in bundle:
            if isinstance(work, FeatureItem):
                self.work.feature_over(work, self._feature(work, lengths, broken))
            else:
                self._book.set_done(record_of(work))
                self.work.animation_over(work, made=True)
                self.stored.append(sum(1 for _ in self._store.list(f"{FEATURES}/")))

    def _feature(
        self, item: FeatureItem, lengths: dict[str, int], broken: frozenset[str]
    ) -> FeatureRecord | Failure:
        if item.uri in broken:
            return Failure(item.uri, "features", "not_media", "broken", False, 1)
        num_frames = lengths[item.uri] if item.kind == "driving" else 1
        record = FeatureRecord(item.feature_id, item.kind, item.sha256, 1, num_frames, 0, 25.0)
        self._store.put(part_key(item.feature_id, 0), b"state")
        self._store.put(record_key(item.feature_id), b"{}")
        return record

    @property
    def animations(self) -> list[RenderItem]:
        return [work for bundle in self.sent for work in bundle if isinstance(work, RenderItem)]

    @property
    def features(self) -> list[FeatureItem]:
        return [work for bundle in self.sent for work in bundle if isinstance(work, FeatureItem)]


def record_of(work: RenderItem) -> AnimationRecord:
    item, n = work.item, work.driving.num_frames
    sha256s = (item.source_sha256, item.driving_sha256)
    return AnimationRecord(
        *(item.item_id, item.name, item.source, item.driving, *sha256s, item.motion),
        *(f"{item.item_id}.mp4", n, 0, 25.0, 32, 32, 100, "0" * 64),
    )


@pytest.mark.parametrize("seed", range(3))
def test_everything_once_and_the_longest_first(
    book: CatalogBook, tmp_path: Path, seed: int
) -> None:
    lengths = {f"/{n}.mp4": 10 + 7 * n for n in range(9)}
    pairs = [(f"/{n}.png", driving) for driving in lengths for n in range(40)]
    fill(book, pairs, lengths)
    workers = Workers(book, LocalStore(tmp_path / "out"), count=3, seed=seed)
    assert workers.work.num_features == 49
    workers.run(lengths)
    assert sorted((w.item.source, w.item.driving) for w in workers.animations) == sorted(pairs)
    assert set(Counter(f.uri for f in workers.features).values()) == {1}
    assert len(workers.features) == 49
    drawn = [lengths[work.item.driving] for work in workers.animations]
    longest = max(lengths.values())
    assert drawn[0] == longest
    assert sum(a < b for a, b in itertools.pairwise(drawn)) <= len(lengths)
    assert book.num_todo() == 0


def test_bundles_are_of_one_kind_and_get_smaller(book: CatalogBook, tmp_path: Path) -> None:
    lengths = {f"/{n}.mp4": 8 for n in range(20)}
    fill(book, [(f"/{n}.png", d) for d in lengths for n in range(100)], lengths)
    workers = Workers(book, LocalStore(tmp_path / "out"), count=2)
    workers.run(lengths)
    for bundle in workers.sent:
        kinds = {work.kind if isinstance(work, FeatureItem) else "animation" for work in bundle}
        assert len(kinds) == 1
        limit = {"driving": 1, "source": MAX_IMAGES, "animation": MAX_ANIMATIONS}[kinds.pop()]
        assert 1 <= len(bundle) <= limit
    sizes = [len(b) for b in workers.sent if isinstance(b[0], RenderItem)]
    assert sizes[0] == 1, "nobody knows yet how long one takes"
    assert max(sizes) == MAX_ANIMATIONS
    assert sizes[-1] <= 2
    tail = 2000 - sum(sizes[:-8])
    assert tail <= 200, "the last ones are small"


def test_states_do_not_pile_up(book: CatalogBook, tmp_path: Path) -> None:
    """Of a thousand videos, few have a state in the store at a time, and at the end none."""
    lengths = {f"/{n}.mp4": 5 for n in range(1000)}
    fill(book, [(f"/{d[1:]}.png", d) for d in lengths], lengths)
    store = LocalStore(tmp_path / "out")
    workers = Workers(book, store, count=2)
    workers.work._pace.frames_of = lambda seconds: 10.0  # type: ignore[method-assign]
    workers.run(lengths)
    assert len(workers.animations) == 1000
    assert max(workers.stored) <= 4 * 64  # two objects a state, of an image and of a video
    assert not list(store.list(f"{FEATURES}/"))
    assert len(workers.work._features) == 0
    assert len(workers.work._window) <= WINDOW


def test_what_needs_a_broken_input_is_lost_and_the_rest_is_made(
    book: CatalogBook, tmp_path: Path
) -> None:
    lengths = {"/a.mp4": 9, "/b.mp4": 5, "/c.mp4": 7}
    pairs = [(f"/{n}.png", d) for d in lengths for n in range(4)]
    fill(book, pairs, lengths)
    workers = Workers(book, LocalStore(tmp_path / "out"), count=2)
    workers.run(lengths, broken=frozenset({"/1.png", "/b.mp4"}))
    lost = {p for p in pairs if p[0] == "/1.png" or p[1] == "/b.mp4"}
    assert {(w.item.source, w.item.driving) for w in workers.animations} == set(pairs) - lost
    assert len(workers.lost) == len(lost)
    both = workers.lost["1--b"]
    assert (both.item, both.code, both.cause) == ("1--b", "not_media", "/1.png: broken")
    assert len(workers.features) == 7, "each is tried once"


def test_states_that_are_there_are_not_made_again(book: CatalogBook, tmp_path: Path) -> None:
    lengths = {"/a.mp4": 9, "/b.mp4": 5}
    fill(book, [(f"/{n}.png", d) for d in lengths for n in range(3)], lengths)
    store = LocalStore(tmp_path / "out")
    first = Workers(book, store, count=1)
    made = first.work._book.todo()
    item = next(made)
    source, driving = feature_ids(item, SETTINGS)
    for feature_id, kind, count in ((source, "source", 1), (driving, "driving", 9)):
        store.put(part_key(feature_id, 0), b"state")
        text = (
            f'{{"feature_id": "{feature_id}", "kind": "{kind}", "sha256": "x", "num_parts": 1,'
            f' "num_frames": {count}, "num_frames_lost": 0, "fps": 25.0}}'
        )
        store.put(record_key(feature_id), text.encode())
    book._db.execute("DELETE FROM feature")
    second = Workers(book, store, count=1)
    assert second.work.num_features == 3
    second.run(lengths)
    assert len(second.features) == 3
    assert len(second.animations) == 6


def test_a_state_that_is_being_made_is_not_asked_for_twice(
    book: CatalogBook, tmp_path: Path
) -> None:
    """Its only animation so far is lost; another that needs it comes into the window."""
    lengths = {"/a.mp4": 9}
    num_images = WINDOW + 1
    fill(book, [(f"/{n:04d}.png", "/a.mp4") for n in range(num_images)], lengths)
    workers = Workers(book, LocalStore(tmp_path / "out"), count=2)
    broken = frozenset(f"/{n:04d}.png" for n in range(num_images - 1))
    bundles = workers.work.bundles()
    first = next(bundles)
    assert not isinstance(first, Pending)
    (video,) = first
    images = []
    while not isinstance(bundle := next(bundles), Pending):
        images.extend(bundle)
    for image in images:
        assert isinstance(image, FeatureItem)
        workers._settle((image,), lengths, broken)
    later = []
    for bundle in bundles:
        if isinstance(bundle, Pending):
            assert isinstance(video, FeatureItem)
            workers._settle((video,), lengths, broken)
            break
        later.extend(bundle)
    assert "/a.mp4" not in [f.uri for f in later if isinstance(f, FeatureItem)]
