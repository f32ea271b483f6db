"""Tables, JSON and the journal, in a folder and on a real S3 server."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from dataclasses import dataclass

import pyarrow.parquet as pq
import pytest

from kpmask.errors import DatasetError, RunFailed, StorageError
from kpmask.records import ClipRecord, Failure, Progress, RunManifest, SourceRow, StepMetrics
from tasks.manifest import (
    Journal,
    check_failures,
    iter_table,
    read_json,
    read_table,
    read_table_if_any,
    read_table_metadata,
    write_json,
    write_table,
)
from tasks.storage import ObjectStore, open_store

ROWS = [
    SourceRow(2, "ü/日", "train", "a", 0, 10, (1, 2, 3, 4), 29.97, (640, 480), "p", "https://x"),
    SourceRow(3, "b", "test", "b"),
]


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path) -> ObjectStore:
    if request.param == "folder":
        return open_store(str(tmp_path / "root"))
    return open_store(request.getfixturevalue("s3"))


def failure(item: str, code: str = "not_media", *, retryable: bool = False) -> Failure:
    return Failure(item, "cut", code, f"the cause of {item}", retryable, 1)


@dataclass(frozen=True, slots=True)
class Score:
    name: str
    value: float
    num_frames: int


def score(number: int) -> Score:
    return Score(f"name {number}", 1 / (3 + number), number)


# --- tables and JSON -------------------------------------------------------------------------


def test_records_come_back(store):
    write_table(store, "m.parquet", ROWS, SourceRow, metadata={"settings": "abc"})
    assert read_table(store, "m.parquet", SourceRow) == ROWS
    metadata = read_table_metadata(store, "m.parquet")
    assert metadata["settings"] == "abc"
    assert metadata["kpmask_record"] == "SourceRow"
    write_table(store, "empty.parquet", [], ClipRecord)
    assert read_table(store, "empty.parquet", ClipRecord) == []


def test_long_records_are_few_at_once(tmp_path):
    store = open_store(str(tmp_path))
    rows = [SourceRow(number, "v", "train", "a") for number in range(7)]
    write_table(store, "m.parquet", iter(rows), SourceRow, rows_at_once=3)
    metadata = pq.read_metadata(tmp_path / "m.parquet")
    groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    assert groups == [3, 3, 1]
    assert list(iter_table(store, "m.parquet", SourceRow, rows_at_once=2)) == rows


def test_another_reader_reads_them(tmp_path):
    write_table(open_store(str(tmp_path)), "m.parquet", ROWS, SourceRow)
    columns = pq.read_table(tmp_path / "m.parquet").to_pydict()
    assert columns["video_id"] == ["ü/日", "b"]
    assert columns["bbox_px"] == [[1, 2, 3, 4], None]
    assert columns["ref_fps"] == [29.97, None]


WRITE = """
import sys
from kpmask.records import SourceRow
from tasks.manifest import write_table
from tasks.storage import open_store
rows = [SourceRow(n, f"v{n}", "train", "i", bbox_px=(n, n, n, n)) for n in range(500)]
metadata = {"b": "2", "a": "1"} if sys.argv[2] == "1" else {"a": "1", "b": "2"}
write_table(open_store(sys.argv[1]), "m.parquet", rows, SourceRow, metadata=metadata)
"""


def test_equal_records_are_equal_bytes_in_every_process(tmp_path):
    for name in ["1", "2"]:
        arguments = [sys.executable, "-c", WRITE, str(tmp_path / name), name]
        subprocess.run(arguments, check=True, env={"PYTHONHASHSEED": name})
        time.sleep(0.01)
    one, two = ((tmp_path / name / "m.parquet").read_bytes() for name in ["1", "2"])
    assert one == two


def test_what_is_no_table_is_refused(store):
    store.put("text", b"not parquet at all")
    store.put("nothing", b"")
    write_table(store, "other", [score(1)], Score)
    for key in ["text", "nothing", "other"]:
        with pytest.raises(DatasetError, match=key):
            read_table(store, key, SourceRow)
    store.put("half", store.get("other")[:-20])
    with pytest.raises(DatasetError):
        read_table(store, "half", Score)


def test_a_table_that_may_be_missing(store):
    assert read_table_if_any(store, "m.parquet", Score) is None
    with pytest.raises(StorageError):
        read_table(store, "m.parquet", Score)
    write_table(store, "m.parquet", [score(1)], Score)
    assert read_table_if_any(store, "m.parquet", Score) == [score(1)]
    store.put("m.parquet", b"broken")
    with pytest.raises(DatasetError):
        read_table_if_any(store, "m.parquet", Score)


def test_json_has_one_form(store):
    write_json(store, "a.json", {"b": [1, 2.5, None], "ä": "日"})
    assert store.get("a.json").decode() == (
        '{\n  "b": [\n    1,\n    2.5,\n    null\n  ],\n  "ä": "日"\n}\n'
    )
    assert read_json(store, "a.json") == {"b": [1, 2.5, None], "ä": "日"}
    manifest = RunManifest("u", "r", "s", "d", "fomm", "none", 3, 0.25, "w")
    write_json(store, "m.json", manifest)
    assert RunManifest(**read_json(store, "m.json")) == manifest
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(store, "n.json", {"x": math.nan})
    store.put("b.json", b"{")
    with pytest.raises(DatasetError, match=r"b\.json"):
        read_json(store, "b.json")


# --- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_failed", "total", "allowed", "fails"),
    [(0, 0, 0.0, False), (0, 9, 0.0, False), (1, 9, 0.0, True), (5, 10, 0.5, False),
     (6, 10, 0.5, True), (10, 10, 1.0, False), (3, 0, 0.5, True)],
)  # fmt: skip
def test_the_fraction_that_may_fail(num_failed, total, allowed, fails):
    failures = [failure(f"item {n}") for n in range(num_failed)]
    if not fails:
        check_failures(failures, total, allowed)
        return
    with pytest.raises(RunFailed) as caught:
        check_failures(failures, total, allowed)
    assert caught.value.code == "too_many_failures"


def test_the_commonest_codes_are_named():
    codes = ["not_media"] * 2 + ["too_short"] * 5 + ["truncated"] * 3 + ["no_frames", "bad_item"]
    failures = [failure(f"item {n}", code) for n, code in enumerate(codes)]
    with pytest.raises(RunFailed) as caught:
        check_failures(failures, 20, 0.5)
    text = str(caught.value)
    assert "12 of 20 items failed: 5 x too_short, 3 x truncated, 2 x not_media" in text
    assert "and 2 other codes; for one, item 2: the cause of item 2" in text
    assert "max_failed_fraction allows 0.5" in text


# --- journal ---------------------------------------------------------------------------------


def test_a_journal_remembers(store):
    journal = Journal(store, ".journal/abc", Score)
    assert journal.done() == {}
    ids = ["plain-id_1.x", "with/slash", "ü 日", "..", "", "x" * 300, ".hidden"]
    records = {item_id: score(n) for n, item_id in enumerate(ids)}
    for item_id, record in records.items():
        journal.add(item_id, record)
    journal.add_failure("bad", failure("bad"))
    for again in [journal, Journal(store, ".journal/abc", Score)]:
        assert again.done() == records
        assert again.failures() == {"bad": failure("bad")}
    assert Journal(store, ".journal/other", Score).done() == {}


def test_floats_and_tuples_come_back_exactly(store):
    record = StepMetrics("p", 1, 0.1, 2e-4, math.pi, ("a", "b"), (1 / 3, 5e-324), 1e300)
    journal = Journal(store, "j", StepMetrics)
    journal.add("1", record)
    assert Journal(store, "j", StepMetrics).done() == {"1": record}


def test_an_item_that_failed_and_then_was_done_is_done(store):
    Journal(store, "j", Score).add_failure("a", failure("a"))
    journal = Journal(store, "j", Score)
    journal.add("a", score(1))
    for again in [journal, Journal(store, "j", Score)]:
        assert (again.done(), again.failures()) == ({"a": score(1)}, {})


def test_a_cleared_journal_is_gone(store):
    store.put("manifest.parquet", b"1")
    journal = Journal(store, "j", Score)
    for number in range(50):
        journal.add(str(number), score(number))
    journal.add_failure("bad", failure("bad"))
    journal.clear()
    assert (journal.done(), journal.failures()) == ({}, {})
    assert [info.key for info in store.list()] == ["manifest.parquet"]
    journal.clear()


def test_an_entry_that_cannot_be_read_is_done_again(store, caplog):
    journal = Journal(store, "j", Score)
    for number in range(6):
        journal.add(f"item-{number}", score(number))
    store.put("j/done/item-0.json", b"")
    store.put("j/done/item-1.json", store.get("j/done/item-1.json")[:-9])
    store.put("j/done/item-2.json", b'{"id": "item-2", "record": {"other": 1}}')
    store.put("j/done/item-3.json", b"[]")
    assert sorted(Journal(store, "j", Score).done()) == ["item-4", "item-5"]
    assert caplog.text.count("is unreadable") == 4


KILLED = """
import sys
from kpmask.records import Progress
from tasks.manifest import Journal
from tasks.storage import open_store
journal = Journal(open_store(sys.argv[1]), "j", Progress)
for number in range(100_000):
    journal.add(str(number), Progress("stage", number, 100_000))
    print(number, flush=True)
"""


def test_what_was_added_survives_a_kill(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(300)]
    process.kill()
    said += process.stdout.readlines()
    process.wait()
    process.stdout.close()
    done = Journal(open_store(str(tmp_path)), "j", Progress).done()
    assert {line.strip() for line in said if line.endswith("\n")} <= set(done)
    assert all(done[item_id].done == int(item_id) for item_id in done)
    assert [*tmp_path.rglob(".tmp-*")] == []


def test_a_long_journal_is_read_quickly(tmp_path):
    store = open_store(str(tmp_path))
    journal = Journal(store, "j", Score)
    began = time.monotonic()
    for number in range(1_000):
        journal.add(str(number), score(number))
    written = time.monotonic()
    assert len(Journal(store, "j", Score).done()) == 1_000
    read = time.monotonic()
    assert written - began < 20
    assert read - written < 5
