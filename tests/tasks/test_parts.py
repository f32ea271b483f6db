"""Parts of finished records: none is lost, none is another's, and a broken one harms no other."""

from __future__ import annotations

import dataclasses
import io
import itertools
import logging
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from kpmask.errors import StorageError
from kpmask.records import EncodedVideo, FeatureRecord
from tasks import parts
from tasks.manifest import read_table, write_table
from tasks.parts import PartWriter, read_parts
from tasks.storage import LocalStore

PREFIX = "journal/render"


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(parts, "time", clock)
    return clock


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def record(number: int) -> FeatureRecord:
    return FeatureRecord(f"id-{number}", "driving", "0" * 64, 1, number, 0, 25.0 + number)


def stored(store: LocalStore) -> list[int]:
    """How many rows each part has, by a reader of its own."""
    return [pq.read_metadata(store.local(i.key)).num_rows for i in store.list(f"{PREFIX}/")]


def test_what_is_pending_goes_out_when_it_is_old_or_much(store: LocalStore, clock: Clock) -> None:
    writer = PartWriter(store, PREFIX, FeatureRecord)
    writer.flush()
    assert stored(store) == [], "nothing makes no part"
    for number in range(255):
        writer.add(record(number))
    assert stored(store) == []
    writer.add(record(255))
    assert stored(store) == [256]
    writer.add(record(256))
    clock.now_s += 0.9
    writer.add(record(257))
    assert stored(store) == [256], "the second is counted from the first that is pending"
    clock.now_s += 0.1
    writer.add(record(258))
    assert stored(store) == [256, 3]
    writer.add(record(259))
    writer.flush()
    writer.flush()
    assert stored(store) == [256, 3, 1]
    assert list(read_parts(store, PREFIX, FeatureRecord)) == [record(n) for n in range(260)]


def test_records_come_back_as_those_of_a_table(store: LocalStore) -> None:
    rng = np.random.default_rng(5)
    made = [
        FeatureRecord(
            feature_id=f"{n}-é\N{SNOWMAN}",
            kind="source" if n % 2 else "driving",
            sha256=rng.bytes(32).hex(),
            num_parts=int(rng.integers(2**62)),
            num_frames=n,
            num_frames_lost=0,
            fps=float(rng.normal()),
        )
        for n in range(40)
    ]
    write_table(store, "table.parquet", made, FeatureRecord)
    writer = PartWriter(store, PREFIX, FeatureRecord)
    for one in made:
        writer.add(one)
    writer.flush()
    table = read_table(store, "table.parquet", FeatureRecord)
    assert list(read_parts(store, PREFIX, FeatureRecord)) == table == made


def test_writers_of_one_prefix_keep_apart(store: LocalStore) -> None:
    def work(first: int) -> None:
        writer = PartWriter(store, PREFIX, FeatureRecord)
        for number in range(first, first + 100):
            writer.add(record(number))
            if number % 7 == 0:
                writer.flush()
        writer.flush()

    threads = [threading.Thread(target=work, args=(100 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = sorted(r.num_frames for r in read_parts(store, PREFIX, FeatureRecord))
    assert found == list(range(400))
    names = [Path(info.key).stem.rpartition("-")[0] for info in store.list(f"{PREFIX}/")]
    assert len(set(names)) == 4


def test_a_store_that_is_away_loses_no_record(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = PartWriter(store, PREFIX, FeatureRecord)
    writer.add(record(0))
    with monkeypatch.context() as away:

        def put(self: LocalStore, key: str, data: bytes, **_: bool) -> bool:
            raise StorageError("away", code="unavailable", retryable=True)

        away.setattr(LocalStore, "put", put)
        with pytest.raises(StorageError, match="away"):
            writer.flush()
    writer.add(record(1))
    writer.flush()
    assert list(read_parts(store, PREFIX, FeatureRecord)) == [record(0), record(1)]


def test_a_broken_part_is_left_out_and_named(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(40):  # more than are read ahead
        writer = PartWriter(store, PREFIX, FeatureRecord)
        writer.add(record(number))
        writer.flush()
    cut, other, wrong = itertools.islice((i.key for i in store.list(f"{PREFIX}/")), 5, 8)
    lost = {read_one(store, key).num_frames for key in (cut, other, wrong)}
    store.put(cut, store.get(cut)[:-20])
    store.put(other, b"")
    write_table(store, wrong, [EncodedVideo(1, 25.0, 8, 8, 9, "0", False)], EncodedVideo)
    store.put(f"{PREFIX}/note.txt", b"no part")
    with caplog.at_level(logging.WARNING):
        found = {r.num_frames for r in read_parts(store, PREFIX, FeatureRecord)}
    assert found == set(range(40)) - lost
    assert len(caplog.messages) == 3
    assert all(any(key in text for text in caplog.messages) for key in (cut, other, wrong))


def read_one(store: LocalStore, key: str) -> FeatureRecord:
    (row,) = pq.read_table(io.BytesIO(store.get(key))).to_pylist()
    return FeatureRecord(**{f.name: row[f.name] for f in dataclasses.fields(FeatureRecord)})


def test_parts_are_read_as_they_are_wanted(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(60):
        writer = PartWriter(store, PREFIX, FeatureRecord)
        writer.add(record(number))
        writer.flush()
    asked = []
    get = LocalStore.get

    def counted(self: LocalStore, key: str) -> bytes:
        asked.append(key)
        return get(self, key)

    monkeypatch.setattr(LocalStore, "get", counted)
    stream = read_parts(store, PREFIX, FeatureRecord)
    assert next(stream).feature_id.startswith("id-")
    stream.close()
    assert len(asked) <= parts.READ_AHEAD + 1


def test_a_store_that_fails_is_no_broken_part(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = PartWriter(store, PREFIX, FeatureRecord)
    writer.add(record(0))
    writer.flush()

    def get(self: LocalStore, key: str) -> bytes:
        raise StorageError("away", code="unavailable", retryable=True)

    monkeypatch.setattr(LocalStore, "get", get)
    with pytest.raises(StorageError, match="away"):
        list(read_parts(store, PREFIX, FeatureRecord))


def test_no_part_is_no_record(store: LocalStore) -> None:
    assert list(read_parts(store, PREFIX, FeatureRecord)) == []
