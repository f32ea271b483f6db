"""Plans: made from what is asked for, found again by it, and shared by runs side by side."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kpmask.config import PreprocessJob, validated
from kpmask.errors import ConfigError, StorageError
from kpmask.records import Failure
from tasks import plan
from tasks.plan import KEPT_PLANS, planned
from tasks.storage import open_store
from tasks.workbook import VideoItem, Workbook

HEADER = "video_id,start,end,bbox,fps,width,height,partition,person_id"
BOX = "0-0-9-9,25,9,9"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, of this test alone; the folder of plans in it."""
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


def write_table(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    lines = [f"{v},0,9,{BOX},{s},p{v}" for v, s in (("a", "train"), ("b", "train"), ("c", "test"))]
    return write_table(tmp_path / "table.csv", lines)


def job(tmp_path: Path, **settings: object) -> PreprocessJob:
    tree = {"out": str(tmp_path / "out"), "raw": str(tmp_path / "raw")}
    return validated(PreprocessJob, tree | {k: _plain(v) for k, v in settings.items()})


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


@contextmanager
def opened(one: PreprocessJob, tmp_path: Path) -> Iterator[Workbook]:
    folder = tmp_path / f"run-{os.urandom(4).hex()}"
    folder.mkdir()
    with planned(one, folder) as (book, _):
        yield book


def items_of(one: PreprocessJob, tmp_path: Path) -> tuple[dict[str, VideoItem], list[Failure]]:
    with opened(one, tmp_path) as book:
        book.begin()
        book.choose()
        return {item.name: item for item in book.todo()}, list(book.failures())


# --- the cache -------------------------------------------------------------------------------


def test_a_plan_is_made_once_and_again_when_the_table_changes(
    table: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    make = plan._make_plan

    def counting(path: Path, one: PreprocessJob, source: Path) -> None:
        made.append(path)
        make(path, one, source)

    monkeypatch.setattr(plan, "_make_plan", counting)
    one = job(tmp_path, metadata=table)
    first = items_of(one, tmp_path)
    assert items_of(one, tmp_path) == first
    table.touch()  # by content, not by time
    assert items_of(one, tmp_path) == first
    elsewhere = job(tmp_path, metadata=table, clips={"size_px": 64})  # nothing to rows
    assert items_of(elsewhere, tmp_path) == first
    assert len(made) == 1
    write_table(table, [f"d,0,9,{BOX},train,p"])
    assert set(items_of(one, tmp_path)[0]) == {"d"}
    tested = job(tmp_path, metadata=table, clips={"test_identities": ["p"]})
    (row,) = items_of(tested, tmp_path)[0]["d"].rows
    assert row.partition == "test"
    assert len(made) == 3
    assert sorted(path.suffix for path in cache.iterdir()) == [".sqlite"] * 3


def test_a_run_leaves_its_plan_as_it_was(table: Path, tmp_path: Path, cache: Path) -> None:
    """What a run writes goes to its own copy."""
    with opened(job(tmp_path, metadata=table), tmp_path) as book:
        (path,) = cache.iterdir()
        before = path.read_bytes()
        book.begin()
        book.set_earlier([("0" * 32, "", False)], place="journal")
        book.choose()
    assert path.read_bytes() == before


def test_failures_are_part_of_a_kept_plan(tmp_path: Path) -> None:
    lines = [f"a,0,9,{BOX},train,p", f"a,0,9,{BOX},train,p", "a,9,0,0-0-9-9,0,9,9,train,p"]
    one = job(tmp_path, metadata=write_table(tmp_path / "t.csv", lines))
    found = [items_of(one, tmp_path)[1] for _ in range(2)]
    assert found[0] == found[1]
    assert [(f.item, f.code) for f in found[0]] == [
        ("t.csv:3", "duplicate_row"),
        ("t.csv:4", "bad_row"),
    ]


def test_the_oldest_plans_are_forgotten(tmp_path: Path, cache: Path) -> None:
    for number in range(KEPT_PLANS + 3):
        table = write_table(tmp_path / "t.csv", [f"v{number},0,9,{BOX},train,p"])
        items_of(job(tmp_path, metadata=table), tmp_path)
    assert len(list(cache.iterdir())) == KEPT_PLANS


def test_a_clock_that_went_back_loses_no_plan_in_use(
    table: Path, tmp_path: Path, cache: Path
) -> None:
    cache.mkdir(parents=True)
    for number in range(KEPT_PLANS + 3):
        other = cache / f"{number}.sqlite"
        other.touch()
        os.utime(other, (4e9, 4e9))  # used in the year 2096
    assert set(items_of(job(tmp_path, metadata=table), tmp_path)[0]) == {"a", "b", "c"}


PLAN = """
import json, sys, tempfile
from pathlib import Path
from kpmask.config import PreprocessJob
from tasks.plan import planned
sys.stdin.readline()
job, folder = PreprocessJob.model_validate_json(sys.argv[1]), tempfile.mkdtemp(dir=sys.argv[2])
with planned(job, Path(folder)) as (book, _):
    book.begin(); book.choose()
    print(json.dumps([item.item_id for item in book.todo()]))
"""


def test_two_processes_plan_at_once(tmp_path: Path, cache: Path) -> None:
    lines = [f"v{i % 500},{i},{i + 9},{BOX},train,p" for i in range(5000)]
    one = job(tmp_path, metadata=write_table(tmp_path / "t.csv", lines))
    argv = [sys.executable, "-c", PLAN, one.model_dump_json(), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(argv, cwd=plan.__file__.rpartition("/tasks")[0], **pipes) for _ in "ab"
    ]  # type: ignore[call-overload]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    found = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert found[0] == found[1] and len(found[0]) == 500
    assert [path.name[0] != "." for path in cache.iterdir()] == [True]


# --- what is asked for -----------------------------------------------------------------------


def test_tables_in_an_object_store_keep_their_names(table: Path, tmp_path: Path, s3: str) -> None:
    store = open_store(s3)
    lines = [f"a,0,9,{BOX},train,p", f"a,9,0,{BOX},train,p"]
    store.put_file("in/mine.csv", write_table(table, lines))
    items, failures = items_of(job(tmp_path, metadata=f"{s3}/in/mine.csv"), tmp_path)
    assert set(items) == {"a"}
    assert [f.item for f in failures] == ["mine.csv:3"]


def test_annotations_that_are_no_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        items_of(job(tmp_path, metadata=tmp_path / "none.csv"), tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="not a file"):
        items_of(job(tmp_path, metadata=tmp_path / "folder"), tmp_path)


def utterance(person: str, video: str, start: int) -> str:
    """A box file of VoxCeleb 2's: boxes as fractions, at 25 frames a second."""
    head = f"Identity  : \t{person}\nReference : \t{video}\nOffset    : \t0\n"
    head += "FV Conf   : \t20.0\t(1)\nASD Conf  : \t5.0\n\nFRAME \tX \tY \tW \tH \n"
    boxes = [f"{i:06d} \t0.25 \t0.25 \t0.5 \t0.5 \n" for i in range(start, start + 20)]
    return head + "".join(boxes)


@pytest.mark.parametrize("as_zip", [False, True])
def test_voxceleb_annotations(as_zip: bool, tmp_path: Path) -> None:
    files = {
        f"{p}/{v}/0000{n}.txt": utterance(p, v, 30 * n)
        for p, v in (("id1", "va"), ("id1", "vb"), ("id2", "vc"))
        for n in (1, 2)
    }
    source = tmp_path / ("txt.zip" if as_zip else "txt")
    if as_zip:
        with zipfile.ZipFile(source, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
    else:
        for name, text in files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text(text)
    settings = {"source": "voxceleb2", "clips": {"test_identities": ["id2"]}}
    items, failures = items_of(job(tmp_path, metadata=source, **settings), tmp_path)
    assert failures == []
    assert {name: len(item.rows) for name, item in items.items()} == {"va": 2, "vb": 2, "vc": 2}
    assert {r.partition for r in items["vc"].rows} == {"test"}
    if not as_zip:  # a file more is another plan
        (source / "id2/vd").mkdir()
        (source / "id2/vd/00001.txt").write_text(utterance("id2", "vd", 3))
        again = items_of(job(tmp_path, metadata=source, **settings), tmp_path)[0]
        assert set(again) == {"va", "vb", "vc", "vd"}


def test_raw_videos_are_those_of_the_folder_itself(table: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    (raw / "deep").mkdir(parents=True)
    for name in ("a.mp4", "b.WEBM", "c.txt", "deep/c.mp4", "x.mp4", ".c.mp4"):
        (raw / name).write_bytes(b"x")
    items, _ = items_of(job(tmp_path, metadata=table), tmp_path)
    assert {name: item.keys for name, item in items.items()} == {
        "a": ("a.mp4",),
        "b": ("b.WEBM",),
        "c": (),
    }


def test_videos_by_folder_pattern_and_name(tmp_path: Path) -> None:
    for name in ("v/train/a#1.mp4", "v/test/b.mp4", "v/c.mp4", "v/x/0.png", "v/x/1.png", "v/n.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    items, _ = items_of(job(tmp_path, videos=tmp_path / "v"), tmp_path)
    assert {i.name: (i.rows[0].identity, i.is_folder, len(i.keys)) for i in items.values()} == {
        "a#1": ("a", False, 1),
        "b": ("b", False, 1),
        "c": ("c", False, 1),
        "x": ("x", True, 2),
    }
    assert items["a#1"].rows[0].partition == "train" and items["b"].rows[0].partition == "test"
    one, _ = items_of(job(tmp_path, videos=tmp_path / "v/c.mp4"), tmp_path)
    assert set(one) == {"c"}
    some, _ = items_of(job(tmp_path, videos=f"{tmp_path}/v/*.mp4"), tmp_path)
    assert set(some) == {"c"}


def test_people_in_both_folders_stay_in_test(tmp_path: Path) -> None:
    for name in ("train/ann#1.mp4", "test/ann#2.mp4", "train/bob#1.mp4"):
        (tmp_path / "v" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "v" / name).write_bytes(b"x")
    items, failures = items_of(job(tmp_path, videos=tmp_path / "v"), tmp_path)
    assert set(items) == {"ann#2", "bob#1"}
    assert [(f.item, f.code) for f in failures] == [("train/ann#1.mp4", "bad_row")]


def test_names_of_nemo_and_test_persons(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    for name in ("001_deliberate_1", "001_spontaneous_2", "002_deliberate_1"):
        (tmp_path / "v" / f"{name}.mp4").write_bytes(b"x")
    settings = {"source": "nemo", "clips": {"test_identities": ["002"]}}
    items, _ = items_of(job(tmp_path, videos=tmp_path / "v", **settings), tmp_path)
    assert {i.name: (i.rows[0].identity, i.rows[0].partition) for i in items.values()} == {
        "001_deliberate_1": ("001", "train"),
        "001_spontaneous_2": ("001", "train"),
        "002_deliberate_1": ("002", "test"),
    }


def test_names_that_are_no_names(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / f"{'x' * 200}.mp4").write_bytes(b"x")
    (tmp_path / "v" / "good.mp4").write_bytes(b"x")
    items, failures = items_of(job(tmp_path, videos=tmp_path / "v"), tmp_path)
    assert set(items) == {"good"}
    assert [f.code for f in failures] == ["bad_row"]


# --- disks -----------------------------------------------------------------------------------


def test_a_full_disk_under_the_plan(
    table: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite has a page limit, which it meets as it does a disk's end."""
    connect = sqlite3.connect

    def small(*args: object, **kwargs: object) -> sqlite3.Connection:
        connection = connect(*args, **kwargs)  # type: ignore[call-overload]
        connection.execute("PRAGMA max_page_count = 12")
        return connection

    lines = [f"v{i},0,9,{BOX},train,p" for i in range(5000)]
    one = job(tmp_path, metadata=write_table(table, lines))
    monkeypatch.setattr(sqlite3, "connect", small)
    with pytest.raises(StorageError) as full:
        items_of(one, tmp_path)
    assert (full.value.code, full.value.subject) == ("no_space", str(cache))
    assert "free some space" in full.value.hint
    assert list(cache.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))
    assert len(items_of(one, tmp_path)[0]) == 5000
    monkeypatch.setattr(sqlite3, "connect", small)  # and under the run's own tables
    with pytest.raises(StorageError) as full, opened(one, tmp_path) as book:
        book.begin()
        book.set_earlier(((f"{i:032x}", "", False) for i in range(9000)), place="journal")
    assert full.value.code == "no_space"
