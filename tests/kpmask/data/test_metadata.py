"""Metadata tables: what is read, and which row is refused for what."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

from kpmask.data.metadata import clip_name, read_metadata
from kpmask.errors import ConfigError
from kpmask.records import SourceRow

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


def test_dev_tables(dev_data: Path) -> None:
    for name, count in (("vox", 26), ("taichi", 18)):
        rows, failures = read_metadata(dev_data / "metadata" / f"{name}-like-metadata.csv")
        assert (len(rows), failures) == (count, [])
    rows, failures = read_metadata(dev_data / "bad/metadata/quirks.csv")
    assert (len(rows), [f.code for f in failures]) == (2, ["duplicate_row"])
    rows, failures = read_metadata(dev_data / "bad/metadata/bad_rows.csv")
    assert [row.line for row in rows] == [9]  # past the end of its video, as only that can tell
    assert [f.code for f in failures] == ["bad_row"] * 7 + ["path_escape"]


def test_published_tables(dev_data: Path) -> None:
    folder = dev_data.parent / "published-metadata"
    rows, failures = read_metadata(folder / "taichi-metadata.csv")
    assert (len(rows), len({row.video_id for row in rows}), failures) == (3334, 280, [])
    rows, failures = read_metadata(folder / "vox-metadata.csv")
    counted = collections.Counter(f.code for f in failures)
    assert counted["duplicate_row"] == 308
    assert len(rows) + len(failures) == 20075
    split = {p: {r.identity for r in rows if r.partition == p} for p in ("train", "test")}
    assert not split["train"] & split["test"]
