"""The tables of a catalog, against the same rules over everything in memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tracemalloc
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from kpmask.data.catalog import RowDefaults, clean_name, iter_catalog, iter_grid
from kpmask.errors import MediaError, StorageError
from kpmask.records import (
    AnimationItem,
    AnimationRecord,
    CatalogRow,
    Failure,
    FeatureRecord,
    digest,
)
from tasks.catalog_book import CatalogBook, Input
from tasks.sqlite_book import full_disks
from tasks.storage import ObjectInfo
from tests.support import big_catalog


@pytest.fixture
def book(tmp_path: Path) -> Iterator[CatalogBook]:
    with CatalogBook(tmp_path / "book.sqlite") as book:
        yield book


def row_of(line: int, name: str = "", **changed: object) -> CatalogRow:
    values = {
        "source": "/s.png",
        "driving": "/d.mp4",
        "motion": "absolute",
        "adapt_scale": False,
        "best_frame": False,
        "audio": False,
    }
    return CatalogRow(line=line, name=name, **(values | changed))  # type: ignore[arg-type]


def item_of(row: CatalogRow, source_sha256: str, driving_sha256: str) -> AnimationItem:
    """As the real one, with less in it."""
    if row.fps == 13.0:
        raise MediaError("unlucky", code="too_small")
    wanted = [source_sha256, driving_sha256, row.motion, row.delivery()]
    return AnimationItem(
        item_id=digest(wanted)[:32],
        name=row.name,
        source=row.source,
        driving=row.driving,
        source_sha256=source_sha256,
        driving_sha256=driving_sha256,
        motion=row.motion,
        adapt_scale=row.adapt_scale,
        best_frame=row.best_frame,
        audio=row.audio,
        **row.delivery(),
    )


def features_of(item: AnimationItem) -> tuple[str, str]:
    return f"f{item.source_sha256}{item.crop}", f"f{item.driving_sha256}{item.driving_view}"


def found_at(uri: str, is_driving: bool) -> Input | Failure:
    """What is at a place, told by its name; files of one name are one content."""
    stem = PurePosixPath(uri).stem
    if stem.startswith("x"):
        return Failure(uri, "catalog", "not_found", f"{uri}: not found", False, 1)
    num_frames = len(stem) % 3 * 10 if is_driving else 0
    return Input(digest(stem.casefold()), num_frames)


def fill(book: CatalogBook, found: Iterable[CatalogRow | Failure]) -> None:
    """All of a plan."""
    book.add_rows(found)
    book.name_rows()
    book.refuse_motions(["absolute"])
    book.set_inputs((uri, driving, found_at(uri, driving)) for uri, driving in book.inputs())
    book.make_items(item_of, features_of)


# --- the same in memory ----------------------------------------------------------------------


def named_in_memory(rows: Sequence[CatalogRow]) -> tuple[list[CatalogRow], list[Failure]]:
    """Rows with a name each, and failures of those whose given name was taken."""
    taken: set[str] = set()
    failures, kept = [], []
    for row in rows:
        if row.name and row.name.casefold() in taken:
            cause = f"the name {row.name!r} occurs twice"
            failures.append(
                Failure(f"line {row.line}", "catalog", "duplicate_name", cause, False, 1)
            )
            continue
        kept.append(row)
        if row.name:
            taken.add(row.name.casefold())
    return [replace(row, name=row.name or made_in_memory(row, taken)) for row in kept], failures


def made_in_memory(row: CatalogRow, taken: set[str]) -> str:
    stems = (PurePosixPath(reference).stem for reference in (row.source, row.driving))
    base = "--".join(clean_name(stem) or "unnamed" for stem in stems)[:100]
    name, number = base, 1
    while name.casefold() in taken:
        number += 1
        name = f"{base}-{number}"
    taken.add(name.casefold())
    return name


def planned_in_memory(
    rows: Sequence[CatalogRow],
) -> tuple[dict[str, AnimationItem], list[Failure]]:
    items: dict[str, AnimationItem] = {}
    named, failures = named_in_memory(rows)
    for row in named:
        found = [found_at(row.source, False), found_at(row.driving, True)]
        code, cause = "", ""
        if row.motion != "absolute":
            code, cause = "bad_row", "this checkpoint supports absolute motion only"
        elif broken := [f for f in found if isinstance(f, Failure)]:
            code, cause = broken[0].code, broken[0].cause
        elif row.fps == 13.0:
            code, cause = "too_small", "unlucky"
        else:
            item = item_of(row, *(f.sha256 for f in found))  # type: ignore[union-attr]
            if item.item_id not in items:
                items[item.item_id] = item
                continue
            code, cause = "duplicate_row", f"the same result as {items[item.item_id].name}"
        failures.append(Failure(row.name, "catalog", code, cause, False, 1))
    return items, failures


def random_rows(seed: int) -> list[CatalogRow | Failure]:
    """Few names and few files, so that rows meet."""
    rng = random.Random(seed)
    given = ["", "", "", "a", "A", "a-2", "a--B", "a--b-2", "ß", "SS", "Zo\u00eb", "x" * 100]
    given = [unicodedata.normalize("NFC", name) for name in given]
    stems = ["a", "A", "b", "B", "x", "a-2", "<>", "ü", "u\u0308", "n" * 120, "n" * 121, "\u017f"]
    found: list[CatalogRow | Failure] = []
    for line in range(1, rng.choice([2, 30, 300]) + 1):
        if rng.random() < 0.1:
            found.append(Failure(f"line {line}", "catalog", "bad_row", "no sense", False, 1))
            continue
        found.append(
            row_of(
                line,
                rng.choice(given),
                source=f"/{rng.choice('pq')}/{rng.choice(stems)}.png",
                driving=f"/{rng.choice(stems)}.mp4",
                motion=rng.choice(["absolute", "absolute", "absolute", "relative"]),
                fps=rng.choice([None, None, 25.0, 13.0]),
                crop=rng.choice(["centre", "face"]),
            )
        )
    return found


# --- a plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_makes_what_the_rules_in_memory_make(
    seed: int, book: CatalogBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.catalog_book.PAGE", random.Random(seed).choice([1, 7, 1000]))
    found = random_rows(seed)
    bad = [f for f in found if isinstance(f, Failure)]
    items, failures = planned_in_memory([r for r in found if isinstance(r, CatalogRow)])
    fill(book, found)
    by = lambda f: (f.item, f.stage, f.code, f.cause)  # noqa: E731
    assert list(book.failures()) == sorted([*bad, *failures], key=by)
    frames = {i: found_at(item.driving, True).num_frames for i, item in items.items()}  # type: ignore[union-attr]
    order = lambda i: (-frames[i.item_id], *reversed(features_of(i)), i.item_id)  # noqa: E731
    made = list(book.items())
    assert {item.item_id: item for item in made} == items
    assert made == sorted(items.values(), key=order) == list(book.todo())
    assert book.counts() == (
        len(items),
        len({item.source_sha256 for item in made}),
        len({item.driving_sha256 for item in made}),
        len(bad) + len(failures),
    )
    assert (book.num_todo(), book.totals()) == (len(items), (0, 0, len(bad) + len(failures)))


def test_names_of_a_grid_of_equal_files(book: CatalogBook) -> None:
    """Every pair of file names comes often; each has to find its number at once."""
    sources = [f"/{i}/{'i' if i % 2 else 'I'}.png" for i in range(150)]
    rows = list(iter_grid(sources, [f"/{i}/v.mp4" for i in range(20)], RowDefaults()))
    book.add_rows(rows)
    book.name_rows()
    names = [row.name for page in book._row_pages("1") for _, row in page]
    expected, failures = named_in_memory([row for row in rows if isinstance(row, CatalogRow)])
    assert failures == []
    assert names == [row.name for row in expected]
    assert names[:4] == ["I--v", "i--v-2", "I--v-3", "i--v-4"]
    assert len({name.casefold() for name in names}) == 3000


NAMES = ["a/b", "../../c", "..", "", "名 前", "Zoe\u0308", "ZO\u00cb", "n" * 300, "n" * 299 + "m"]


def test_names_of_strangers(book: CatalogBook, tmp_path: Path) -> None:
    table = tmp_path / "c.csv"
    lines = [f"s.png,{i}.mp4,{name}\n" for i, name in enumerate([*NAMES, "N" * 300, "n" * 300])]
    table.write_text("source,driving,name\n" + "".join(lines))
    fill(book, list(iter_catalog(table, RowDefaults())))
    names = {item.driving: item.name for item in book.items()}
    assert [names.get(f"{tmp_path}/{i}.mp4") for i in range(6)] == [
        *("a_b", "c", None, "s--3", "名_前", "Zo\u00eb")
    ]
    long = [names[f"{tmp_path}/{i}.mp4"] for i in (7, 8, 9)]
    assert [len(name) for name in long] == [100, 100, 100]
    assert len({name.casefold() for name in long}) == 3
    assert {f.item: f.code for f in book.failures()} == {
        "line 4": "bad_row",
        "line 8": "duplicate_name",
        "line 12": "duplicate_name",
    }


def test_an_input_is_asked_for_once_in_each_role(book: CatalogBook) -> None:
    rows = [
        row_of(1, source="/a", driving="/b"),
        row_of(2, source="/b", driving="/b"),
        row_of(3, source="/a", driving="/c"),
        row_of(4, source="/A", driving="/c"),
    ]
    book.add_rows(rows)
    book.name_rows()
    wanted = [("/A", False), ("/a", False), ("/b", False), ("/b", True), ("/c", True)]
    assert list(book.inputs()) == wanted
    book.set_inputs([("/b", True, Input("b", 3)), ("/a", False, found_at("/x", False))])
    assert list(book.inputs()) == [("/A", False), ("/b", False), ("/c", True)]
    asked = list(book.inputs())
    book.set_inputs((uri, driving, Input(uri, 5)) for uri, driving in asked)
    assert list(book.inputs()) == []
    book.make_items(item_of, features_of)
    assert [(i.source, i.driving) for i in book.items()] == [("/A", "/c"), ("/b", "/b")]
    assert [(f.item, f.cause) for f in book.failures()] == [
        ("a--b", "/x: not found"),
        ("a--c", "/x: not found"),
    ]


# --- what an earlier run left ----------------------------------------------------------------


def record_of(item: AnimationItem, **changed: object) -> AnimationRecord:
    record = AnimationRecord(
        item_id=item.item_id,
        name="other name",
        source="/elsewhere/s.png",
        driving="/elsewhere/d.mp4",
        source_sha256=item.source_sha256,
        driving_sha256=item.driving_sha256,
        motion=item.motion,
        key=f"{item.item_id}.mp4",
        num_frames=7,
        num_frames_lost=0,
        fps=25.0,
        width_px=64,
        height_px=64,
        size_bytes=100,
        sha256="r",
    )
    return replace(record, **changed)  # type: ignore[arg-type]


@pytest.fixture
def items(book: CatalogBook) -> list[AnimationItem]:
    """Five items of two driving videos, the longer one's first."""
    rows = [row_of(n, source=f"/{n}.png", driving="/v.mp4") for n in range(2)]
    rows += [row_of(n, source=f"/{n}.png", driving="/vv.mp4") for n in range(2, 5)]
    fill(book, rows)
    return list(book.items())


def test_results_are_this_catalogs(book: CatalogBook, items: list[AnimationItem]) -> None:
    a, b, *rest = items
    stranger = replace(a, item_id="0" * 32)
    book.add_records(
        [record_of(a), record_of(stranger), record_of(b), record_of(a, fps=12.5, num_frames=2)]
    )
    expected = {
        a.item_id: record_of(a, fps=12.5, num_frames=2),
        b.item_id: record_of(b),
    }
    expected = {
        i.item_id: replace(expected[i.item_id], name=i.name, source=i.source, driving=i.driving)
        for i in (a, b)
    }
    assert list(book.records()) == [expected[key] for key in sorted(expected)]
    assert list(book.todo()) == rest
    assert (book.num_todo(), book.totals()) == (3, (2, 9, 0))
    assert list(book.items()) == items


def test_results_that_are_not_there_are_forgotten(
    book: CatalogBook, items: list[AnimationItem], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.catalog_book.PAGE", 2)
    whole, cut, gone, unshown, never = items

    def needs(record: AnimationRecord) -> list[str]:
        return [f"media/{record.item_id}", "media/all"]

    def objects() -> Iterator[ObjectInfo]:
        for item in (whole, cut, unshown, never):
            yield ObjectInfo(f"{item.item_id}.mp4", 99 if item is cut else 100, "e")
        for item in (whole, cut, gone):
            yield ObjectInfo(f"media/{item.item_id}", 3, "e")
        yield ObjectInfo("media/all", 3, "e")

    def untouched() -> Iterator[ObjectInfo]:
        raise AssertionError("listed for nothing")
        yield

    assert book.check_present(untouched(), needs) == 0
    book.add_records(record_of(item) for item in (whole, cut, gone, unshown))
    assert book.check_present(objects(), needs) == 3
    assert [record.item_id for record in book.records()] == [whole.item_id]
    assert list(book.todo()) == [cut, gone, unshown, never]
    assert book.totals() == (1, 7, 0)
    assert book.check_present(objects(), needs) == 0
    assert book.check_present([], needs) == 1
    assert book.totals() == (0, 0, 0)


def test_a_listing_that_breaks_off_can_be_tried_again(
    book: CatalogBook, items: list[AnimationItem]
) -> None:
    def broken() -> Iterator[ObjectInfo]:
        yield ObjectInfo(f"{items[0].item_id}.mp4", 100, "e")
        raise StorageError("away", code="unavailable", retryable=True)

    book.add_records(record_of(item) for item in items[:2])
    with pytest.raises(StorageError):
        book.check_present(broken(), lambda record: [])
    infos = [ObjectInfo(f"{items[1].item_id}.mp4", 100, "e")]
    assert book.check_present(infos, lambda record: []) == 1
    assert [record.item_id for record in book.records()] == [items[1].item_id]


# --- the work --------------------------------------------------------------------------------


def failure(item: str, code: str = "too_short", stage: str = "render") -> Failure:
    return Failure(item, stage, code, "why", False, 1)


def test_the_first_word_on_an_item_counts(book: CatalogBook, items: list[AnimationItem]) -> None:
    a, b, c, *_ = items
    assert book.set_done(record_of(a))
    assert not book.set_failed(a.item_id, failure(a.name))
    assert book.set_failed(b.item_id, failure(b.name))
    assert not book.set_failed(b.item_id, failure(b.name, "too_small"))
    assert not book.set_done(record_of(b))
    assert not book.set_failed("0" * 32, failure("nobody"))
    assert not book.set_done(record_of(replace(a, item_id="0" * 32)))
    assert book.set_done(record_of(a, num_frames=5))  # made anew: the same again
    assert [f.item for f in book.failures()] == [b.name]
    assert [r.item_id for r in book.records()] == [a.item_id]
    assert next(book.todo()) == c
    assert (book.num_todo(), book.totals()) == (3, (1, 5, 1))


def test_items_are_worked_on_while_they_are_read(
    book: CatalogBook, items: list[AnimationItem], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.catalog_book.PAGE", 1)
    seen = []
    for item in book.todo():
        seen.append(item)
        book.set_done(record_of(item))
        if item == items[1]:
            book.set_failed(items[2].item_id, failure("x"))
    assert seen == [*items[:2], *items[3:]]
    assert list(book.todo()) == []
    assert [r.item_id for r in book.records()] == sorted(item.item_id for item in seen)


def test_states_are_kept_for_as_long_as_items_need_them(
    book: CatalogBook, items: list[AnimationItem]
) -> None:
    def state(feature_id: str) -> FeatureRecord:
        return FeatureRecord(feature_id, "source", "s", 1, 1, 0, 25.0)

    done, a, b, c, d = items
    book.set_done(record_of(done))
    long, short = features_of(a)[1], features_of(c)[1]
    book.begin_features([state(long), state("of another catalog")])
    assert (book.num_features_todo(), book.num_frames_todo()) == (5, 2 * 20 + 2 * 10)
    assert (book.feature(long), book.feature(short)) == (state(long), None)
    book.set_feature(short, failure("/v.mp4"))
    assert book.feature(short) == failure("/v.mp4")
    for item in (a, b, c, d):
        book.set_feature(features_of(item)[0], state(features_of(item)[0]))
    assert book.num_features_todo() == 0
    assert book.release_features(features_of(a)) == [state(features_of(a)[0])]
    assert book.release_features(features_of(b)) == [state(features_of(b)[0]), state(long)]
    assert book.release_features(features_of(c)) == [state(features_of(c)[0])]


def test_what_is_lost_is_counted_by_code(book: CatalogBook) -> None:
    assert book.lost() == (Counter(), None)
    book.add_failures(
        [failure("b"), failure("c", "not_found"), failure("a", stage="x"), failure("a")]
    )
    counts, first = book.lost()
    assert counts == {"too_short": 3, "not_found": 1}
    assert first == failure("a")
    assert [(f.item, f.stage) for f in book.failures()] == [
        *(("a", "render"), ("a", "x"), ("b", "render"), ("c", "render"))
    ]


def test_a_full_disk_is_said_to_be_full(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError) as caught,
        full_disks(tmp_path / "book.sqlite"),
        CatalogBook(tmp_path / "book.sqlite") as book,
    ):
        book._db.execute("PRAGMA max_page_count = 60")
        fill(book, iter_grid([f"/{i}.png" for i in range(9000)], ["/v.mp4"], RowDefaults()))
    assert (caught.value.code, caught.value.subject) == ("no_space", str(tmp_path))


def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows = 3000
    for name in ("tasks.catalog_book.PAGE", "tasks.catalog_book.BATCH", "tasks.sqlite_book.BATCH"):
        monkeypatch.setattr(name, 50)
    sources = [f"/{'long-name-' * 5}{i}.png" for i in range(num_rows // 10)]
    with CatalogBook(tmp_path / "book.sqlite") as book:
        tracemalloc.start()  # what is Python's; SQLite's cache is bounded
        try:
            rows = iter_grid(sources, [f"/{i}.mp4" for i in range(10)], RowDefaults())
            fill(book, rows)
            book.add_records(record_of(item) for item in book.items())
            infos = (ObjectInfo(f"{i.item_id}.mp4", 100, "e") for i in book.items())
            assert book.check_present(infos, lambda record: []) == 0
            assert sum(1 for _ in book.records()) == num_rows
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert book.totals() == (num_rows, num_rows * 7, 0)
    assert peak_bytes < 2**20  # the rows alone are three times that, and the records again


# --- a whole plan ----------------------------------------------------------------------------


def check_big_catalog(folder: Path, num_rows: int) -> None:
    """In a process of its own, whose memory is its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.big_catalog", str(folder), str(num_rows)],
        env=os.environ | {"KPMASK_CACHE": str(folder / "cache"), "TMPDIR": str(folder)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = big_catalog.expected_codes(num_rows)
    assert found["codes"] == expected
    num_items = num_rows - sum(expected.values())
    assert found["counts"] == [num_items, 8, 4, num_rows - num_items]
    assert found["num_lost"] == found["num_todo"] == len(range(0, num_items, 1000))
    assert found["totals"] == [num_items, 3 * num_items, num_rows - num_items]
    assert found["num_names"] == num_items
    assert found["growth_bytes"] < 300 * 2**20


def test_twenty_thousand_rows(tmp_path: Path) -> None:
    check_big_catalog(tmp_path, 20_000)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_million_rows(tmp_path: Path) -> None:
    check_big_catalog(tmp_path, 1_000_000)
