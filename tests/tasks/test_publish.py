"""Publishing a dataset over another one, and being killed at every write of it."""

from __future__ import annotations

import functools
import hashlib
import shutil
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kpmask.errors import DatasetError
from kpmask.records import ClipRecord, DatasetChanges, DatasetManifest, Failure, digest
from kpmask.report.dataset import DatasetSummary
from tasks.dataset import open_dataset
from tasks.manifest import read_json, read_table
from tasks.publish import Content, ListDigest, complete, publish, published, remove_old
from tasks.shard_worker import PreviewedClip
from tasks.storage import LocalStore

COUNTS = {
    "clips_added": 1,
    "clips_removed": 2,
    "clips_kept": 3,
    "videos_added": 4,
    "videos_removed": 5,
    "failures_new": 6,
    "failures_gone": 7,
    "retried": 8,
    "waiting": 9,
}


def clip(number: int, shard: str) -> ClipRecord:
    name = f"v{number:03d}"
    return ClipRecord(
        clip_id=hashlib.sha256(name.encode()).hexdigest()[:32],
        name=name,
        partition="test" if shard.startswith("test") else "train",
        identity=f"p{number % 3}",
        video_id=name,
        shard=shard,
        row=0,
        num_frames=10 + number,
        fps=25.0,
        width_px=32,
        height_px=32,
        start_s=0.0,
        end_s=1.0,
        crop_px=(0, 0, 32, 32),
        clamped=False,
        num_frames_lost=0,
        sha256="0" * 64,
    )


# Which clip is in which shard; a version changes shards, adds and removes some.
VERSIONS: list[dict[int, str]] = [
    {},
    {0: "test/shard-a0.arrow", 1: "train/shard-b0.arrow", 2: "train/shard-c0.arrow"},
    {0: "test/shard-a0.arrow", 2: "train/shard-c1.arrow", 3: "train/shard-d0.arrow"},
    {3: "train/shard-d0.arrow", 4: "test/shard-e0.arrow"},
]


class Draw:
    """Draws strips into a store, without pictures."""

    def __init__(self, store: LocalStore) -> None:
        self.store = store
        self.drawn: list[str] = []

    def __call__(self, clips: Sequence[PreviewedClip]) -> None:
        for one in clips:
            self.drawn.append(one.clip_id)
            self.store.put(f"previews/{one.clip_id}.jpg", one.clip_id.encode())


def content(version: int, *, keep: int = 0, num_failures: int | None = None) -> Content:
    clips = [clip(number, shard) for number, shard in sorted(VERSIONS[version].items())]
    count = version if num_failures is None else num_failures
    failures = [Failure(f"x{i}", "cut", "too_short", f"{i}", False, 1) for i in range(count)]
    return Content(
        clips=lambda: clips,
        failures=lambda: failures,
        settings_digest="s" * 64,
        changes=COUNTS | {"clips_added": version},
        metadata={"content": digest([version, count])},
        keep_versions=keep,
    )


def place(store: LocalStore, version: int) -> None:
    """What lies in place before a dataset is published."""
    for shard in VERSIONS[version].values():
        store.put(shard, shard.encode())


def put(store: LocalStore, version: int, **settings: int) -> tuple[DatasetManifest, DatasetChanges]:
    place(store, version)
    what = content(version, **settings)
    return publish(store, what, draw_previews=Draw(store))


def run(store: LocalStore, version: int, **settings: int) -> None:
    """What a run does at its end."""
    complete(store)
    what = content(version, **settings)
    done = published(store, content=what.metadata["content"], settings_digest="s" * 64)
    if done is None:
        put(store, version, **settings)
    else:
        remove_old(store, what)


def tree_of(folder: Path) -> dict[str, bytes]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "data")


# --- what is written -------------------------------------------------------------------------


def test_what_a_dataset_has(store: LocalStore) -> None:
    manifest, changes = put(store, 1)
    assert (manifest.num_train, manifest.num_test, manifest.num_failures) == (2, 1, 1)
    assert manifest.num_frames == 10 + 11 + 12
    assert manifest.dataset_id == digest(
        [[c.clip_id, c.partition, c.identity] for c in content(1).clips()]
    )
    assert changes == DatasetChanges(1, manifest.dataset_id, **(COUNTS | {"clips_added": 1}))
    assert read_json(store, "stats.json")["dataset_id"] == manifest.dataset_id
    assert read_json(store, "changes.json")["waiting"] == 9
    assert list(open_dataset(store.uri).records) == list(content(1).clips())
    assert read_table(store, "failures.parquet", Failure) == list(content(1).failures())
    assert "v002" in store.get("index.html").decode()
    assert {key for key in tree_of(store.root) if "/" not in key} == {
        "changes.json",
        "failures.parquet",
        "index.html",
        "manifest.parquet",
        "stats.json",
        "versions.json",
    }


def test_versions_are_counted_and_old_files_go(store: LocalStore) -> None:
    for version in (1, 2, 3):
        changes = put(store, version)[1]
        assert changes.version == version
        shards = {key for key in tree_of(store.root) if key.endswith(".arrow")}
        assert shards == set(VERSIONS[version].values())
    history = read_json(store, "versions.json")
    assert [(v["version"], v["num_clips"], v["clips_added"]) for v in history] == [
        (1, 3, 1),
        (2, 3, 2),
        (3, 2, 3),
    ]
    assert len({v["dataset_id"] for v in history}) == 3
    with pytest.raises(DatasetError):
        open_dataset(store.uri, version=2)


@pytest.mark.parametrize("keep", [1, 2])
def test_versions_that_are_kept_stay_whole(store: LocalStore, keep: int) -> None:
    for version in (1, 2, 3):
        put(store, version, keep=keep)
        for old in range(1, version):
            if old < version - keep:
                with pytest.raises(DatasetError):
                    open_dataset(store.uri, version=old)
                continue
            records = open_dataset(store.uri, version=old).records
            assert list(records) == list(content(old).clips())
            assert all(store.exists(record.shard) for record in records)
    shards = {key for key in tree_of(store.root) if key.endswith(".arrow")}
    assert shards == {s for v in range(3 - keep, 4) for s in VERSIONS[v].values()}
    put(store, 1)  # keep none from here on
    assert {k for k in tree_of(store.root) if k.endswith(".arrow")} == set(VERSIONS[1].values())
    assert not list(store.list("versions/"))


def test_only_new_previews_are_drawn(store: LocalStore) -> None:
    put(store, 1)
    draw = Draw(store)
    place(store, 2)
    publish(store, content(2), draw_previews=draw)
    assert draw.drawn == [clip(3, "").clip_id]
    assert {key for key in tree_of(store.root) if key.startswith("previews/")} == {
        f"previews/{c.clip_id}.jpg" for c in content(2).clips()
    }


def test_files_that_are_not_ours_stay(store: LocalStore) -> None:
    put(store, 1)
    theirs = ["train/notes.txt", "train/shard-mine.arrow", "readme.md", "train/x/0000000.png"]
    for key in theirs:
        store.put(key, b"x")
    put(store, 2)
    assert all(store.exists(key) for key in theirs)


def test_folders_of_removed_clips_go(store: LocalStore) -> None:
    for key in ("train/old/0000000.png", "train/old/notes.txt", "train/kept/0000000.png"):
        store.put(key, b"x")
    what = content(1)
    before = ["train/old", "train/kept"]
    clips = [clip(0, "train/kept")]
    folders = Content(lambda: clips, what.failures, "s", COUNTS, folders_before=before)
    publish(store, folders, draw_previews=Draw(store))
    keys = {key for key in tree_of(store.root) if key.startswith("train/")}
    assert keys == {"train/old/notes.txt", "train/kept/0000000.png"}


def test_what_is_published_is_known_again(store: LocalStore) -> None:
    what = content(1)
    known = {"content": what.metadata["content"], "settings_digest": "s" * 64}
    assert published(store, **known) is None
    manifest, _ = put(store, 1)
    found = published(store, **known)
    assert found is not None and found[0] == manifest
    assert (found[1].clips_added, found[1].clips_kept, found[1].version) == (0, 3, 1)
    assert published(store, content="other", settings_digest="s" * 64) is None
    assert published(store, content=known["content"], settings_digest="t" * 64) is None
    for key in ("stats.json", "failures.parquet", "index.html", "changes.json", "manifest.parquet"):
        data = store.get(key)
        store.delete(key)
        assert published(store, **known) is None
        store.put(key, data)
    shutil.copytree(store.root, store.root.parent / "moved")
    assert published(LocalStore(store.root.parent / "moved"), **known) is None


def test_a_version_that_is_mended_keeps_its_number(store: LocalStore) -> None:
    put(store, 1, keep=1)
    put(store, 2, keep=1)
    before = tree_of(store.root)
    store.delete("index.html")
    put(store, 2, keep=1)
    assert tree_of(store.root) == before
    assert put(store, 3, keep=1)[1].version == 3


def test_list_digest_is_that_of_the_list() -> None:
    for values in ([], [1], [["ü", None, 0.5], {"b": 1, "a": [2]}, "x"]):
        found = ListDigest()
        for value in values:
            found.add(value)
        assert found.hexdigest() == digest(values)


def test_memory_does_not_grow_with_the_clips(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is held is bounded; by bounds that are met early here."""
    monkeypatch.setattr("tasks.manifest.ROWS_PER_GROUP", 200)
    monkeypatch.setattr("kpmask.report.dataset.MAX_DISTINCT", 200)
    summary = functools.partial(DatasetSummary, max_searched=200)
    monkeypatch.setattr("tasks.publish.DatasetSummary", summary)
    peaks = []
    for count in (1_000, 1_000, 5_000):  # the first imports what it needs
        what = Content(
            clips=lambda count=count: (clip(i, "train/shard-0.arrow") for i in range(count)),
            failures=lambda count=count: (
                Failure(f"x{i}", "cut", "too_short", "why", False, 1) for i in range(count)
            ),
            settings_digest="s",
            changes=COUNTS,
        )
        tracemalloc.start()
        publish(store, what, draw_previews=Draw(store))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.3 * peaks[1]


# --- killed ----------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is no more: nothing of it is written from here on."""


class Dying(LocalStore):
    """A store whose process dies before its write number `at`."""

    def __init__(self, root: Path, at: int) -> None:
        super().__init__(root)
        self.left = at

    def _tick(self) -> None:
        if self.left <= 0:
            raise Killed
        self.left -= 1

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        self._tick()
        return super().put(key, data, if_absent=if_absent)

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> bool:
        self._tick()
        return super().put_file(key, path, if_absent=if_absent)

    def delete(self, key: str) -> None:
        self._tick()
        super().delete(key)


def each_death(base: Path, work: Callable[[LocalStore], None]) -> Iterator[LocalStore]:
    """The store, as `base` with some work done in it, for each of its writes at which to die."""
    root = base.parent / "killed" / base.name
    for at in range(100):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(base, root)
        try:
            work(Dying(root, at))
        except Killed:
            yield LocalStore(root)
            continue
        return
    raise AssertionError("so many writes?")


def readable(store: LocalStore, *allowed: int) -> int:
    """Which version a reader has before it; all of it is there."""
    if not store.exists("manifest.parquet"):
        return 0
    records = list(open_dataset(store.uri).records)
    assert all(store.get(record.shard) == record.shard.encode() for record in records)
    (found,) = [v for v in allowed if records == list(content(v).clips())]
    return found


def same(store: LocalStore, expected: Path) -> None:
    """Byte for byte, but for the place that two files name."""
    trees = []
    for root in (store.root, expected):
        tree = tree_of(root)
        for key in ("stats.json", "index.html"):
            tree[key] = tree[key].replace(str(root).encode(), b"here")
        trees.append(tree)
    found, wanted = trees
    assert found.keys() == wanted.keys()
    assert [key for key in found if found[key] != wanted[key]] == []


@pytest.fixture
def histories(tmp_path: Path) -> dict[str, Path]:
    """Trees that came about undisturbed, by the versions published one after another."""
    found = {}
    for history in ("", "1", "12", "123", "13"):
        store = LocalStore(tmp_path / history.rjust(4, "_") / "data")
        store.root.mkdir(parents=True)
        for version in history:
            put(store, int(version), keep=1)
        found[history] = store.root
    return found


def test_killed_at_any_write_of_the_first_version(histories: dict[str, Path]) -> None:
    deaths = 0
    for store in each_death(histories[""], lambda store: run(store, 1, keep=1)):
        readable(store, 1)
        run(store, 1, keep=1)
        same(store, histories["1"])
        deaths += 1
    assert deaths > 10


def test_killed_at_any_write_of_the_second_version(histories: dict[str, Path]) -> None:
    seen = []
    for store in each_death(histories["1"], lambda store: run(store, 2, keep=1)):
        seen.append(readable(store, 1, 2))
        run(store, 2, keep=1)
        same(store, histories["12"])
    assert seen == sorted(seen) and set(seen) == {1, 2}


def test_killed_twice(histories: dict[str, Path]) -> None:
    """Killed at a write, and the run after it at each of its own."""
    for at, first in enumerate(each_death(histories["1"], lambda store: run(store, 2, keep=1))):
        if at % 3:
            continue
        base = first.root.parent / f"{at}" / "data"
        shutil.copytree(first.root, base)
        for store in each_death(base, lambda store: run(store, 2, keep=1)):
            run(store, 2, keep=1)
            same(store, histories["12"])


def test_what_was_wanted_changed_after_the_kill(histories: dict[str, Path]) -> None:
    """The next run publishes something else: version 2 was never there, or was."""
    for store in each_death(histories["1"], lambda store: run(store, 2, keep=1)):
        was_there = readable(store, 1, 2) == 2
        run(store, 3, keep=1)
        same(store, histories["123" if was_there else "13"])


def test_what_was_wanted_changed_back_after_the_kill(histories: dict[str, Path]) -> None:
    for store in each_death(histories["1"], lambda store: run(store, 2, keep=1)):
        if readable(store, 1, 2) == 1:
            run(store, 1, keep=1)
            same(store, histories["1"])


def test_killed_where_only_failures_change(histories: dict[str, Path], tmp_path: Path) -> None:
    undisturbed = LocalStore(tmp_path / "undisturbed" / "data")
    shutil.copytree(histories["1"], undisturbed.root)
    run(undisturbed, 1, num_failures=5)
    for store in each_death(histories["1"], lambda store: run(store, 1, num_failures=5)):
        run(store, 1, num_failures=5)
        same(store, undisturbed.root)
