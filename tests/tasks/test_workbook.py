"""The tables of a run, against the same rules over everything in memory."""

from __future__ import annotations

import gzip
import random
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kpmask.data.metadata import clip_name, iter_metadata, raw_stem
from kpmask.records import ClipRecord, Failure, SourceRow
from tasks.storage import ObjectInfo
from tasks.workbook import NO_STATE, VideoItem, Workbook, item_id, state_of
from tests.support.metadata import read_metadata

HEADER = "video_id,start,end,bbox,fps,width,height,partition,person_id,url"
PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "published-metadata"


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Workbook]:
    with Workbook(tmp_path / "book.sqlite") as book:
        book.create()
        yield book


def planned(book: Workbook, path: Path) -> list[VideoItem]:
    """The items of a table."""
    book.add_rows(iter_metadata(path))
    book.check_rows(path.name)
    book.group_rows()
    book.begin()
    book.choose()
    return list(book.todo())


def by_line(failures: list[Failure]) -> list[Failure]:
    return sorted(failures, key=lambda f: int(f.item.rpartition(":")[2]))


# --- rows against each other -----------------------------------------------------------------


def random_table(path: Path, seed: int) -> Path:
    """A table in which rows repeat, leak and collide, and some make no sense at all."""
    rng = random.Random(seed)
    lines = [HEADER]
    for _ in range(rng.choice([3, 40, 400])):
        video = rng.choice(["a", "b", "b#2", "ü", "-c", "d d", "e#f#g", "H"])
        start = rng.choice([0, 0, 5, 10])
        end = start + rng.choice([4, 5, 0])
        box = rng.choice(["0-0-9-9", "0-0-8-9", "1-0-0-9", "5-5-9"])
        fps = rng.choice(["25", "25.0", "29.97", "0", "nan"])
        person = rng.choice(["", "p1", "p2", "../p", "P1"])
        url = rng.choice(["", "", "http://x/1", "http://x/2"])
        split = rng.choice(["train", "train", "test", "valid"])
        lines.append(f"{video},{start},{end},{box},{fps},9,9,{split},{person},{url}")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("seed", range(12))
def test_refuses_what_the_checks_in_memory_refuse(
    seed: int, book: Workbook, tmp_path: Path
) -> None:
    path = random_table(tmp_path / "table.csv", seed)
    rows, failures = read_metadata(path)
    items = planned(book, path)
    assert by_line(list(book.failures())) == failures
    videos: dict[str, list[SourceRow]] = {}
    for row in rows:
        videos.setdefault(raw_stem(row.video_id), []).append(row)
    assert {item.name: list(item.rows) for item in items} == videos
    assert [item.name for item in items] == sorted(videos, key=str.encode)
    for item in items:
        assert item.url == next((row.url for row in item.rows if row.url), None)
        assert (item.keys, item.state, item.is_folder) == ((), NO_STATE, False)
    splits = Counter(row.partition for row in rows)
    assert book.counts() == dict(splits) | {"failures": len(failures)}


@pytest.mark.parametrize(
    ("name", "num_rows", "num_videos", "codes"),
    [
        ("taichi", 3334, 280, {}),
        ("vox", 20075, 3442, {"duplicate_row": 308}),
    ],
)
def test_published_tables(
    name: str,
    num_rows: int,
    num_videos: int,
    codes: dict[str, int],
    book: Workbook,
    tmp_path: Path,
) -> None:
    path = PUBLISHED / f"{name}-metadata.csv"
    if not path.exists():
        pytest.skip("the published tables are not beside this checkout")
    rows, failures = read_metadata(path)
    items = planned(book, path)
    assert by_line(list(book.failures())) == failures
    assert len(rows) + len(failures) == num_rows
    assert sum(len(item.rows) for item in items) == len(rows)
    found = Counter(failure.code for failure in failures)
    assert {code: found[code] for code in codes} == codes
    everyone = {raw_stem(r.video_id) for r in iter_metadata(path) if isinstance(r, SourceRow)}
    assert len(everyone) == num_videos


def test_items_are_known_by_what_is_wanted(book: Workbook, tmp_path: Path) -> None:
    """Not by the place in the table: rows that move, or are added elsewhere, change no item."""
    one, two = "a,0,9,0-0-9-9,25,9,9,train,,", "a,9,18,0-0-9-9,25,9,9,train,,"
    other, third = "b,0,9,0-0-9-9,25,9,9,train,,", "a,18,20,0-0-9-9,25,9,9,train,,"
    ids = []
    for number, lines in enumerate([[one, two], ["", other, one, two], [one, two, third]]):
        path = tmp_path / f"{number}.csv"
        path.write_text("\n".join([HEADER, *lines]))
        with Workbook(tmp_path / f"{number}.sqlite") as own:
            own.create()
            ids.append(next(i.item_id for i in planned(own, path) if i.name == "a"))
    assert ids[0] == ids[1] != ids[2]
    row = SourceRow(line=1, video_id="v", partition="train", identity="v")
    assert item_id("v", [row], is_folder=False) != item_id("v", [row], is_folder=True)
    assert item_id("v", [row], is_folder=False) == item_id(
        "v", [replace(row, line=9)], is_folder=False
    )


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """20,000 rows of 2,000 videos; what is held is SQLite's cache and one batch."""
    path = tmp_path / "table.csv.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.write(f"{HEADER}\n")
        for i in range(20_000):
            start = i // 2_000 * 100
            file.write(f"v{i % 2_000:05d},{start},{start + 64},0-0-9-9,25,9,9,train,p{i % 99},\n")
    with Workbook(tmp_path / "book.sqlite") as book:
        book.create()
        book.add_rows(iter_metadata(path))
        tracemalloc.start()  # what is Python's; it slows reading down, which is alike for all rows
        try:
            book.check_rows(path.name)
            book.group_rows()
            book.begin()
            book.set_files((f"v{i:05d}", ObjectInfo(f"v{i:05d}.mp4", 1, "e")) for i in range(900))
            book.choose()
            assert sum(len(item.rows) for item in book.todo()) == 20_000
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert book.num_todo() == 2_000
        assert book.counts() == {"train": 20_000, "failures": 0}
    assert peak_bytes < 4 * 2**20  # the rows alone are ten times that


# --- files and results -----------------------------------------------------------------------

TABLE = [
    "a,0,9,0-0-9-9,25,9,9,train,p1,",
    "b,0,9,0-0-9-9,25,9,9,train,p2,",
    "c,0,9,0-0-9-9,25,9,9,test,p3,",
]


@pytest.fixture
def items(book: Workbook, tmp_path: Path) -> dict[str, VideoItem]:
    path = tmp_path / "table.csv"
    path.write_text("\n".join([HEADER, *TABLE]))
    return {item.name: item for item in planned(book, path)}


def info(key: str, etag: str = "1") -> ObjectInfo:
    return ObjectInfo(key, 10, etag)


def todo(book: Workbook) -> list[str]:
    return [item.name for item in book.todo()]


def test_files_are_found_by_the_video(book: Workbook, items: dict[str, VideoItem]) -> None:
    book.set_files([("a", info("a.mkv")), ("a", info("a.mp4")), ("zzz", info("zzz.mp4"))])
    found = {item.name: item for item in book.todo()}
    assert found["a"].keys == ("a.mkv",)  # the first of them
    assert found["a"].state == state_of([info("a.mkv")]) != state_of([info("a.mkv", "2")])
    assert (found["b"].keys, found["b"].state) == ((), NO_STATE)
    assert {item.item_id for item in found.values()} == {i.item_id for i in items.values()}


def test_results_hold_for_the_files_that_they_are_of(
    book: Workbook, items: dict[str, VideoItem]
) -> None:
    book.set_files([("a", info("a.mp4")), ("b", info("b.mp4"))])
    old, new = state_of([info("a.mp4", "0")]), state_of([info("a.mp4")])
    a, b, c = (items[name].item_id for name in "abc")
    book.set_earlier([(a, old, False), (b, old, False), (c, old, False)], place="ledger")
    book.choose()
    assert todo(book) == ["a", "b"]  # c has no files any more: its result stands
    book.set_earlier([(a, new, False)], place="journal")
    book.choose()
    assert todo(book) == ["b"]
    assert (book.is_chosen(a, "journal"), book.is_chosen(a, "ledger")) == (True, False)
    assert book.is_chosen(c, "ledger")
    assert list(book.chosen()) == [(a, new, False)]


def test_passing_failures_hold_for_those_that_wait(
    book: Workbook, items: dict[str, VideoItem]
) -> None:
    a, b, c = (items[name].item_id for name in "abc")
    book.set_earlier([(a, "", True), (b, "", True), (c, "", False)], place="ledger")
    book.choose()
    assert todo(book) == ["a", "b"]
    assert sorted(book.retryable()) == sorted([a, b])
    book.choose(waiting=[a])
    assert todo(book) == ["b"]
    assert list(book.retryable()) == [b]
    book.set_earlier([(b, "", False)], place="journal")
    book.choose()
    assert todo(book) == ["a"]


def clip(name: str, part: str = "", **values: object) -> ClipRecord:
    record = ClipRecord(
        clip_id=f"id-{name}",
        name=name,
        partition="test" if name.startswith("c") else "train",
        identity=name,
        video_id=name[0],
        shard=part,
        row=0,
        num_frames=9,
        fps=25.0,
        width_px=8,
        height_px=8,
        start_s=0.0,
        end_s=1.0,
        crop_px=(0, 0, 8, 8),
        clamped=False,
        num_frames_lost=0,
        sha256=f"sha-{name}",
    )
    return replace(record, **values)  # type: ignore[arg-type]


def test_images_are_in_parts_in_the_dataset_or_nowhere(
    book: Workbook, items: dict[str, VideoItem]
) -> None:
    ids = {name: items[name].item_id for name in "abc"}
    book.set_earlier([(ids["a"], "", False)], place="journal")
    book.set_earlier([(ids["b"], "", False), (ids["c"], "", False)], place="ledger")
    book.choose()
    book.add_before([clip("b", "train/shard-1.arrow", row=7)], [])
    book.add_results(
        [
            (ids["a"], "A", [clip("a", "w/parts/a.arrow")], []),
            (ids["b"], "B", [clip("b")], []),
            (ids["c"], "C", [clip("c", "w/parts/gone.arrow")], []),
        ]
    )
    book.place_clips(["w/parts/a.arrow"], as_folders=False)
    book.index_clips()
    assert [row[2:] for row in book.sources()] == [
        ("c", None, None),
        ("a", "w/parts/a.arrow", 0),
        ("b", "train/shard-1.arrow", 7),
    ]
    assert book.redo_homeless() == []  # c's was in the ledger, which stays
    book.choose()
    assert todo(book) == ["c"]
    assert list(book.results()) == ["A", "B", "C"]


def test_a_homeless_clip_that_repeats_another_is_not_wanted(
    book: Workbook, items: dict[str, VideoItem]
) -> None:
    a, c = items["a"].item_id, items["c"].item_id
    book.set_earlier([(a, "", False), (c, "", False)], place="ledger")
    book.choose()
    book.add_before([clip("c", "test/shard-1.arrow")], [])
    same = {"sha256": "same"}
    book.add_results([(a, "", [clip("a", **same)], []), (c, "", [clip("c", **same)], [])])
    book.place_clips([], as_folders=False)
    book.mark_repeats()
    assert list(book.twins()) == [("a", "c")]  # test clips come first
    assert book.redo_homeless() == []
    assert (book.num_clips(), book.num_clips("train"), book.num_clips("test")) == (1, 0, 1)
    assert todo(book) == ["b"]


def test_folders_serve_as_what_they_are_only(book: Workbook, items: dict[str, VideoItem]) -> None:
    a = items["a"].item_id
    for as_folders, key, expected in (
        (True, "train/a", "train/a"),
        (True, "test/a", None),
        (False, "train/a", None),
    ):
        book.clear_results()
        book._db.execute("DELETE FROM before")
        book.add_before([clip("a", key)], [])
        book.add_results([(a, "", [clip("a")], [])])
        book.place_clips([], as_folders=as_folders)
        assert [row[3] for row in book.sources()] == [expected]


def test_lost_shards_cut_their_videos_again(book: Workbook, items: dict[str, VideoItem]) -> None:
    book.set_earlier([(i.item_id, "", False) for i in items.values()], place="ledger")
    book.add_before([clip("a", "train/shard-1.arrow"), clip("b", "train/shard-2.arrow")], [])
    assert list(book.before_shards()) == ["train/shard-1.arrow", "train/shard-2.arrow"]
    book.lose_shards(["train/shard-2.arrow"])
    book.choose()
    assert todo(book) == ["b"]
    assert list(book.before_shards()) == ["train/shard-1.arrow"]


def failure(item: str, code: str = "too_short", stage: str = "cut") -> Failure:
    return Failure(item, stage, code, "why", False, 1)


def test_changes_are_counted(book: Workbook, items: dict[str, VideoItem]) -> None:
    book.add_before(
        [clip("a1"), clip("a2"), clip("d")], [failure("x"), failure("y"), failure("y", "dark")]
    )
    book.add_results([(items["a"].item_id, "", [clip("a2"), clip("a3"), clip("b")], [])])
    book.add_failures([failure("y"), failure("z")])
    assert book.changes() == {
        "clips_kept": 1,
        "clips_added": 2,
        "clips_removed": 2,
        "videos_added": 1,
        "videos_removed": 1,
        "failures_new": 1,
        "failures_gone": 2,
    }


def test_what_is_lost_is_what_was_asked_for(book: Workbook, items: dict[str, VideoItem]) -> None:
    """Not what was there twice, is not wanted, or was kept in part."""
    book.add_results([(items["a"].item_id, "", [clip("a1")], [])])
    book.add_failures(
        [
            failure("t.csv:3", "duplicate_row", "metadata"),
            failure("t.csv:4", "bad_row", "metadata"),
            failure("a1", "truncated"),
            failure("a", "truncated"),
            failure("b1", "dark", "quality"),
            failure("b2"),
            failure("b3"),
            failure("r", "filtered", "source"),
        ]
    )
    counts, first = book.lost(by_video=False)
    assert counts == {"bad_row": 1, "truncated": 1, "too_short": 2}
    assert first is not None and first.item == "b2"
    assert book.lost(by_video=True)[0] == {"bad_row": 1, "too_short": 2}


def test_clips_come_in_one_order_whenever_they_came_in(
    book: Workbook, items: dict[str, VideoItem]
) -> None:
    names = ["a2", "b", "c9", "a10", "c1", "a1"]
    book.add_results([(f"{n}", "", [clip(n, "p", look=n)], []) for n in names])
    book.index_clips()
    assert [c.name for c in book.clips()] == ["c1", "c9", "a1", "a10", "a2", "b"]
    assert list(book.looks()) == ["c1", "c9", "a1", "a10", "a2", "b"]
    assert book.clips_at([0, 4]) == {0: ("c1", "c1"), 4: ("a2", "a2")}
    book.mark_twins({"c9": "c1"})
    book.set_places((f"id-{n}", "train/shard-9.arrow", i) for i, n in enumerate(["c1", "a1"]))
    found = [(c.name, c.shard, c.row) for c in book.clips()]
    assert found[:3] == [
        ("c1", "train/shard-9.arrow", 0),
        ("a1", "train/shard-9.arrow", 1),
        ("a10", "", 0),
    ]
    assert next(iter(book.clips())) == clip("c1", "train/shard-9.arrow", look="c1")


def test_names_of_clips_are_those_of_the_rows(book: Workbook, tmp_path: Path) -> None:
    path = random_table(tmp_path / "table.csv", seed=5)
    planned(book, path)
    names = {name for (name,) in book._db.execute("SELECT name FROM row")}
    rows = read_metadata(path)[0]
    assert names == {
        clip_name(row, start_frame=row.start_frame, end_frame=row.end_frame) for row in rows
    }
