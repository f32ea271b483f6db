"""Metadata tables: what is read, and which row is refused for what."""

from __future__ import annotations

import collections
import csv
import gzip
import io
import itertools
import os
import time
import tracemalloc
from pathlib import Path

import pytest

from kpmask.data import metadata
from kpmask.data.metadata import clip_name, iter_metadata
from kpmask.errors import ConfigError
from kpmask.records import Failure, SourceRow
from tests.support.metadata import read_metadata

HEADER = "video_id,start,end,bbox,fps,width,height,partition"
ROW = "abc,0,64,10-20-110-120,25,640,480,train"


def table(tmp_path: Path, *lines: str, header: str = HEADER) -> Path:
    path = tmp_path / "table.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def codes(tmp_path: Path, *lines: str, header: str = HEADER) -> list[str]:
    return [f.code for f in read_metadata(table(tmp_path, *lines, header=header))[1]]


def test_row_of_the_published_columns(tmp_path: Path) -> None:
    rows, failures = read_metadata(table(tmp_path, ROW))
    assert failures == []
    assert rows == [
        SourceRow(
            line=2,
            video_id="abc",
            partition="train",
            identity="abc",
            start_frame=0,
            end_frame=64,
            bbox_px=(10, 20, 110, 120),
            ref_fps=25.0,
            ref_size_px=(640, 480),
        )
    ]


def test_person_is_the_identity(tmp_path: Path) -> None:
    (row,), _ = read_metadata(table(tmp_path, ROW + ",id10001,", header=HEADER + ",person_id,url"))
    assert (row.identity, row.person_id, row.url) == ("id10001", "id10001", None)
    assert clip_name(row, start_frame=0, end_frame=64) == "id10001#abc#000000#000064"


def test_name_reverses_the_parts_of_the_id(tmp_path: Path) -> None:
    (row,), _ = read_metadata(table(tmp_path, "vid#001," + ROW.partition(",")[2]))
    assert clip_name(row, start_frame=5, end_frame=1234567) == "001#vid#000005#1234567"
    assert row.identity == "vid"


def test_columns_may_come_in_any_order_with_others_between(tmp_path: Path) -> None:
    header = "partition,comment,height,width,fps,bbox,end,start,video_id"
    (row,), failures = read_metadata(
        table(tmp_path, 'test,"a, b",480,640,25.0,1-2-3-4,9.0,0,x y', header=header)
    )
    assert (row.video_id, row.partition, row.end_frame, failures) == ("x y", "test", 9, [])


def test_utf8_mark_crlf_quotes_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    text = f'\ufeff{HEADER}\r\n\r\n"-abc",0,64,1-2-3-4,29.97,640,480,test\r\n\r\n'
    path.write_bytes(text.encode("utf-8"))
    (row,), failures = read_metadata(path)
    assert (row.video_id, row.line, failures) == ("-abc", 3, [])


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("abc,64,64,10-20-110-120,25,640,480,train", "span is empty"),
        ("abc,64,10,10-20-110-120,25,640,480,train", "span is empty"),
        ("abc,-1,10,10-20-110-120,25,640,480,train", "start '-1'"),
        ("abc,0,1.5,10-20-110-120,25,640,480,train", "end '1.5'"),
        ("abc,0,nan,10-20-110-120,25,640,480,train", "end 'nan' is out of range"),
        ("abc,0,1e30,10-20-110-120,25,640,480,train", "out of range"),
        ("abc,x,64,10-20-110-120,25,640,480,train", "start 'x' is not a number"),
        ("abc,0,64,110-20-10-120,25,640,480,train", "no area"),
        ("abc,0,64,10-20-110,25,640,480,train", "left-top-right-bottom"),
        ("abc,0,64,-10-20-110-120,25,640,480,train", "left-top-right-bottom"),
        ("abc,0,64,600-20-900-120,25,640,480,train", "mostly outside"),
        ("abc,0,64,10-20-110-120,0,640,480,train", "fps '0'"),
        ("abc,0,64,10-20-110-120,inf,640,480,train", "fps 'inf'"),
        ("abc,0,64,10-20-110-120,1e-9,640,480,train", "fps '1e-9' is out of range"),
        ("abc,0,64,10-20-110-120," + "0" * 5000 + "25,640,480,train", "out of range"),
        ("abc,0,2147483647,10-20-110-120,25,640,480,train", "the span has 2147483647 frames"),
        ("abc,0,64,10-20-110-120,25,0,480,train", "width is 0"),
        ("abc,0,64,10-20-110-120,25,640,480,validation", "neither train nor test"),
        ("abc,0,64,10-20-110-120,25,640,480", "fewer cells"),
        ("abc,0,64,10-20-110-120,25,640,480,train,more", "more or fewer cells"),
        (",0,64,10-20-110-120,25,640,480,train", "video_id is empty"),
        ("#1,0,64,10-20-110-120,25,640,480,train", "before '#' is empty"),
        ("é" * 91 + ",0,64,10-20-110-120,25,640,480,train", "longer than"),
    ],
)
def test_bad_row_is_a_failure_and_the_others_go_on(tmp_path: Path, line: str, cause: str) -> None:
    rows, (failure,) = read_metadata(table(tmp_path, line, ROW))
    assert len(rows) == 1
    assert (failure.item, failure.stage, failure.code) == ("table.csv:2", "metadata", "bad_row")
    assert cause in failure.cause
    assert not failure.retryable


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a\\b", "..", ".", ".hidden", "a\x00b"])
@pytest.mark.parametrize("column", ["video_id", "person_id"])
def test_name_that_is_not_plain_escapes(tmp_path: Path, name: str, column: str) -> None:
    cells = ROW.split(",")
    line = ",".join([name, *cells[1:], "p"]) if column == "video_id" else ",".join([*cells, name])
    assert codes(tmp_path, line, header=HEADER + ",person_id") == ["path_escape"]


def test_repeated_row_and_repeated_name(tmp_path: Path) -> None:
    other_box = ROW.replace("10-20", "11-21")
    rows, failures = read_metadata(table(tmp_path, ROW, other_box, ROW))
    assert [row.line for row in rows] == [2]
    assert [(f.item, f.code) for f in failures] == [
        ("table.csv:3", "duplicate_name"),
        ("table.csv:4", "duplicate_row"),
    ]
    assert failures[1].cause == "repeats line 2"


def test_identity_in_both_splits_is_only_tested_on(tmp_path: Path) -> None:
    lines = [ROW, ROW.replace("0,64", "64,128").replace("train", "test"), "z" + ROW]
    rows, failures = read_metadata(table(tmp_path, *lines))
    assert [(row.line, row.partition) for row in rows] == [(3, "test"), (4, "train")]
    assert [(f.item, f.code) for f in failures] == [("table.csv:2", "bad_row")]
    assert "both splits" in failures[0].cause


@pytest.mark.parametrize("missing", HEADER.split(","))
def test_missing_column_is_named(tmp_path: Path, missing: str) -> None:
    header = ",".join(name for name in HEADER.split(",") if name != missing)
    with pytest.raises(ConfigError, match=f"column missing: {missing}"):
        read_metadata(table(tmp_path, header=header))


def test_no_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_metadata(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match="no rows") as empty:
        read_metadata(table(tmp_path))
    assert empty.value.code == "nothing_to_do"
    (tmp_path / "binary.csv").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_metadata(tmp_path / "binary.csv")
    (tmp_path / "empty.csv").write_bytes(b"")
    with pytest.raises(ConfigError, match="column missing"):
        read_metadata(tmp_path / "empty.csv")


def found(path: Path) -> list[str]:
    """What a table gives, in order: a row's video, or a failure's line and cause."""
    return [
        f"{r.item.rpartition(':')[2]}: {r.cause}" if isinstance(r, Failure) else r.video_id
        for r in iter_metadata(path)
    ]


def test_rows_and_failures_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    lines = ["a" + ROW, ROW.replace("0,64", "64,0"), "b" + ROW, "a" + ROW]
    assert found(table(tmp_path, *lines)) == [
        "aabc",
        "3: the span is empty: start 64, end 0",
        "babc",
        "aabc",
    ]


def test_packed_table(tmp_path: Path) -> None:
    plain = table(tmp_path, ROW, "x", ROW.replace("abc", "äbc"))
    packed = tmp_path / "table.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert found(packed) == found(plain)
    cut = tmp_path / "cut.csv"  # what it is, its first bytes say
    cut.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(ConfigError, match="damaged"):
        found(cut)
    cut.write_bytes(packed.read_bytes()[:14] + b"\xff" * 40)
    with pytest.raises(ConfigError, match="damaged"):
        found(cut)


def test_bytes_that_are_not_utf8_cost_their_row(tmp_path: Path) -> None:
    path = table(tmp_path, ROW)
    latin, nul = ROW.replace("abc", "é").encode("latin-1"), ROW.replace("abc", "a\0b").encode()
    path.write_bytes(path.read_bytes() + latin + b"\n" + nul + b"\n" + ROW.encode())
    name = r"video_id 'a\x00b' is not a plain name"
    assert found(path) == ["abc", "3: not UTF-8 text", f"4: {name}", "abc"]
    path.write_text(f"{HEADER}\n{ROW}\n", encoding="utf-16")
    with pytest.raises(ConfigError, match="not UTF-8"):
        found(path)


def test_line_without_end_costs_itself_only(tmp_path: Path) -> None:
    path = table(tmp_path, ROW, "a" * 5_000_000, '"' + "a" * 200_000 + '"', ROW)
    cause = f"the line is longer than {metadata.MAX_LINE_CHARS} characters"
    assert found(path) == ["abc", f"3: {cause}", f"4: {cause}", "abc"]
    path.write_bytes(b"\0" * 5_000_000)
    with pytest.raises(ConfigError, match="longer than"):
        found(path)


def test_quote_that_is_not_closed_costs_its_line_only(tmp_path: Path) -> None:
    others = [f"v{i}{ROW}" for i in range(200)]
    names = [f"v{i}abc" for i in range(200)]
    got = found(table(tmp_path, '"' + ROW, *others))
    assert got[1:] == names
    assert got[0].startswith("2: not CSV")
    # Two of them close each other, over the good rows between.
    half_open = ROW.replace("10-20-110-120", '"10-20-110-120')
    half_shut = ROW.replace("10-20-110-120", '10-20-110-120"')
    got = found(table(tmp_path, half_open, *others[:5], half_shut, *others[5:]))
    assert [text for text in got if text in names] == names
    assert [text.partition(":")[0] for text in got if text not in names] == ["2", "8"]


def test_quoted_cell_may_hold_line_breaks(tmp_path: Path) -> None:
    path = table(tmp_path, f'"one\ntwo, ""2""",{ROW}', f"x,{ROW}", header="title," + HEADER)
    (first, second) = iter_metadata(path)
    assert isinstance(first, SourceRow) and isinstance(second, SourceRow)
    assert (first.video_id, first.line, second.line) == ("abc", 2, 4)


def test_cells_are_those_of_the_csv_module(tmp_path: Path) -> None:
    """Lines without quotes are split here."""
    for text in ("a,b,,c", " a , b", ",", "a", "a\tb,c", "é,\u2028,x"):
        (expected,) = csv.reader([text])
        lines = metadata._Lines(io.StringIO())
        assert metadata._cells(text + "\n", lines) == expected


def test_neither_pipe_nor_folder_nor_repeated_column(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(ConfigError, match="not a file"):
            found(tmp_path / name)
    with pytest.raises(ConfigError, match="column there twice: start"):
        found(table(tmp_path, ROW + ",1", header=HEADER + ",start"))


def test_a_strangers_text_does_not_blow_up_a_cause(tmp_path: Path) -> None:
    long = "x" * 60_000
    for line in (f"{long},0,64", ROW.replace("train", long), ROW.replace("10-20", long)):
        (text,) = found(table(tmp_path, line))
        assert len(text) < 300


def test_a_million_rows_in_flat_memory(tmp_path: Path) -> None:
    num_rows = 1_000_000
    path = tmp_path / "million.csv"
    with path.open("w") as file:
        file.write(HEADER + ",person_id\n")
        file.writelines(
            f"v{i // 8:09d},{i % 8 * 200},{i % 8 * 200 + 150},{i % 300}-9-{i % 300 + 256}-265,25,"
            f"1280,720,train,id{i // 200:05d}\n"
            for i in range(num_rows)
        )
    rows = iter_metadata(path)
    tracemalloc.start()  # makes it many times slower
    collections.deque(itertools.islice(rows, 100_000), maxlen=0)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    began_s = time.process_time()
    assert 100_000 + sum(isinstance(row, SourceRow) for row in rows) == num_rows
    assert (time.process_time() - began_s) / num_rows < 30e-6  # 4e-6 on a quiet machine
    assert peak_bytes < 4_000_000  # which the memory of 100,000 rows is not


def test_dev_tables(dev_data: Path) -> None:
    for name, count in (("vox", 26), ("taichi", 18)):
        rows, failures = read_metadata(dev_data / "metadata" / f"{name}-like-metadata.csv")
        assert (len(rows), failures) == (count, [])
    rows, failures = read_metadata(dev_data / "bad/metadata/quirks.csv")
    assert (len(rows), [f.code for f in failures]) == (2, ["duplicate_row"])
    rows, failures = read_metadata(dev_data / "bad/metadata/bad_rows.csv")
    assert [row.line for row in rows] == [9]  # past the end of its video, as only that can tell
    assert [f.code for f in failures] == ["bad_row"] * 7 + ["path_escape"]


def _all_rows(path: Path) -> list[SourceRow]:
    rows = list(iter_metadata(path))
    assert all(isinstance(row, SourceRow) for row in rows)
    return [row for row in rows if isinstance(row, SourceRow)]


def test_published_tables(dev_data: Path) -> None:
    folder = dev_data.parent / "published-metadata"
    if not folder.is_dir():
        pytest.skip("the published tables are not there")
    taichi = _all_rows(folder / "taichi-metadata.csv")
    assert (len(taichi), len({r.video_id for r in taichi})) == (3334, 280)
    assert collections.Counter(r.partition for r in taichi) == {"train": 3049, "test": 285}
    assert len({r.ref_fps for r in taichi}) == 13
    assert read_metadata(folder / "taichi-metadata.csv") == (taichi, [])

    vox = _all_rows(folder / "vox-metadata.csv")
    assert (len(vox), len({r.video_id for r in vox})) == (20075, 3442)
    boxes = [(r.bbox_px or (0, 0, 0, 0), r.ref_size_px or (0, 0)) for r in vox]
    assert sum(b[2] > size[0] or b[3] > size[1] for b, size in boxes) == 866
    assert sum(abs((b[2] - b[0]) / (b[3] - b[1]) - 1) > 0.02 for b, _ in boxes) == 19284
    splits = collections.defaultdict(set)
    for row in vox:
        splits[row.video_id].add(row.partition)
    assert {name for name, both in splits.items() if len(both) == 2} == {
        "ST2JZXcyYkE",
        "hgB5ziAudzU",
    }
    rows, failures = read_metadata(folder / "vox-metadata.csv")
    counted = collections.Counter(f.code for f in failures)
    assert counted == {"duplicate_row": 308, "bad_row": 3}
    assert len(rows) + len(failures) == 20075
    split = {p: {r.identity for r in rows if r.partition == p} for p in ("train", "test")}
    assert not split["train"] & split["test"]
