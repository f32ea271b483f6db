"""Catalogs: formats, references, names and what is refused. Unique names are `CatalogBook`'s."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kpmask.data.catalog import (
    MAX_CELL_CHARS,
    MAX_LINE_CHARS,
    RowDefaults,
    clean_name,
    iter_catalog,
    iter_grid,
    made_name,
    resolve,
)
from kpmask.errors import ConfigError, RowError
from kpmask.records import CatalogRow, Failure

Read = tuple[list[CatalogRow], list[Failure]]


def split(found: Iterable[CatalogRow | Failure]) -> Read:
    """Rows and failures."""
    everything = list(found)
    rows = [row for row in everything if isinstance(row, CatalogRow)]
    return rows, [failure for failure in everything if isinstance(failure, Failure)]


def read_catalog(path: Path, defaults: RowDefaults) -> Read:
    return split(iter_catalog(path, defaults))


def grid_rows(sources: list[str], drivings: list[str], defaults: RowDefaults) -> list[CatalogRow]:
    rows, failures = split(iter_grid(sources, drivings, defaults))
    assert failures == []
    return rows


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def codes(failures: list) -> dict[str, str]:
    return {failure.item: failure.code for failure in failures}


def test_rows_take_defaults_and_their_own_cells(tmp_path: Path) -> None:
    table = write(
        tmp_path / "c.csv",
        "\ufeffsource,driving,name,motion,adapt_scale,best_frame,audio\r\n"
        "a.jpg,b.mp4,,,,,\r\n"
        "\r\n"
        '"x, y.jpg",/abs/b.mp4,Second one,relative,TRUE,0,yes\r\n'
        "s3://bucket/a.png,b.mp4,third,absolute,,,no\r\n",
    )
    defaults = RowDefaults(motion="relative", adapt_scale=True, best_frame=True, audio=False)
    rows, failures = read_catalog(table, defaults)
    assert failures == []
    first, second, third = rows
    assert first.source == f"{tmp_path}/a.jpg"
    assert (first.motion, first.adapt_scale, first.best_frame) == ("relative", True, True)
    assert (first.name, made_name(first)) == ("", "a--b")
    assert second.source == f"{tmp_path}/x, y.jpg"
    assert second.driving == "/abs/b.mp4"
    assert (second.name, second.adapt_scale, second.best_frame) == ("Second_one", True, False)
    assert second.audio
    assert third.source == "s3://bucket/a.png"
    # the job's wishes for relative rows do not reach an absolute one
    assert (third.motion, third.adapt_scale, third.best_frame) == ("absolute", False, False)


def test_parquet_says_the_same_as_csv(tmp_path: Path) -> None:
    csv = write(tmp_path / "c.csv", "source,driving,audio\na.jpg,b.mp4,true\nc.jpg,d.mp4,\n")
    columns = {
        "source": ["a.jpg", "c.jpg"],
        "driving": ["b.mp4", "d.mp4"],
        "audio": [True, None],
    }
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    from_csv, _ = read_catalog(csv, RowDefaults())
    from_parquet, _ = read_catalog(tmp_path / "c.parquet", RowDefaults())
    strip = lambda rows: [(r.name, r.source, r.driving, r.audio) for r in rows]  # noqa: E731
    assert strip(from_csv) == strip(from_parquet)


def test_bad_rows_become_failures_and_the_others_go_on(tmp_path: Path) -> None:
    table = write(
        tmp_path / "c.csv",
        "source,driving,name,motion,best_frame\n"
        "../a.jpg,b.mp4,,,\n"  # line 2
        "a.jpg,x/../../b.mp4,,,\n"
        "s3://bucket/../a.jpg,b.mp4,,,\n"
        ",b.mp4,,,\n"
        "a.jpg,b.mp4,,sideways,\n"
        "a.jpg,b.mp4,,relative,maybe\n"
        "a.jpg,b.mp4,,absolute,true\n"
        "a.jpg,b.mp4,...,,\n"
        "a.jpg,b.mp4,n,relative,true,extra\n"
        "ftp://host/a.jpg,b.mp4,,,\n"
        "a.jpg,b.mp4,good,,\n",
    )
    rows, failures = read_catalog(table, RowDefaults())
    assert [(row.line, row.name) for row in rows] == [(12, "good")]
    assert codes(failures) == {
        "line 2": "path_escape",
        "line 3": "path_escape",
        "line 4": "path_escape",
        **{f"line {n}": "bad_row" for n in range(5, 12)},
    }
    assert all(f.stage == "catalog" and f.cause for f in failures)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("", "nothing_to_do", "empty"),
        ("source,driving\n", "nothing_to_do", "no rows"),
        ("source,name\na,b\n", "config_invalid", "'driving'"),
        ("source,driving,motoin\na,b,c\n", "config_invalid", "'motoin'"),
        ("source,driving,source\na,b,c\n", "config_invalid", "twice"),
        ('source,driving\n"a,b\n', "config_invalid", "not a CSV"),
    ],
)
def test_tables_that_are_no_catalog(tmp_path: Path, text: str, code: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read_catalog(write(tmp_path / "c.csv", text), RowDefaults())
    assert caught.value.code == code


def test_files_that_are_no_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such catalog"):
        read_catalog(tmp_path / "absent.csv", RowDefaults())
    with pytest.raises(ConfigError, match="not a Parquet"):
        read_catalog(write(tmp_path / "c.parquet", "source,driving\n"), RowDefaults())
    (tmp_path / "latin.csv").write_bytes("source,driving\né,b\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="not a CSV"):
        read_catalog(tmp_path / "latin.csv", RowDefaults())


def test_names_are_made_of_the_files(tmp_path: Path) -> None:
    row = grid_rows(["/x/Ana López.1.jpg"], ["s3://b/../<b>.mp4"], RowDefaults())[0]
    assert (row.name, made_name(row)) == ("", "Ana_López.1--b")
    assert made_name(replace(row, source="/....jpg")) == "unnamed--b"
    assert made_name(replace(row, source="/" + "n" * 300)) == "n" * 100


def test_a_grid_keeps_a_driving_videos_rows_together() -> None:
    rows = grid_rows(["/a.jpg", "/b.jpg"], ["/x.mp4", "/y.mp4"], RowDefaults(audio=True))
    assert [(r.source, r.driving) for r in rows] == [
        ("/a.jpg", "/x.mp4"),
        ("/b.jpg", "/x.mp4"),
        ("/a.jpg", "/y.mp4"),
        ("/b.jpg", "/y.mp4"),
    ]
    assert [(r.line, r.name) for r in rows] == [(1, ""), (2, ""), (3, ""), (4, "")]
    with pytest.raises(ConfigError) as caught:
        grid_rows(["/a.jpg"], [], RowDefaults())
    assert (caught.value.code, caught.value.subject) == ("nothing_to_do", "drivings")


@pytest.mark.parametrize(
    ("reference", "base", "expected"),
    [
        ("a/b.png", "/root", "/root/a/b.png"),
        ("a..b.png", "/root/", "/root/a..b.png"),
        ("a.png", "s3://bucket/prefix", "s3://bucket/prefix/a.png"),
        ("/a.png", "s3://bucket/prefix", "/a.png"),
        ("a.png", "/", "/a.png"),
        ("file:///x/a.png", "/root", "file:///x/a.png"),
    ],
)
def test_references_resolve(reference: str, base: str, expected: str) -> None:
    assert resolve(reference, base) == expected


@pytest.mark.parametrize("reference", ["..", "a/..", "..\\a", "s3://b/a/../c", "file:///../etc"])
def test_references_never_climb(reference: str) -> None:
    with pytest.raises(RowError) as caught:
        resolve(reference, "/root")
    assert caught.value.code == "path_escape"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ana López", "Ana_López"),
        ("../../etc/passwd", "etc_passwd"),
        ("<script>x</script>", "script_x_script"),
        ("a" * 300, "a" * 100),
        ("..", ""),
    ],
)
def test_names_are_cleaned(text: str, expected: str) -> None:
    assert clean_name(text) == expected


# --- how results are cut and delivered -------------------------------------------------------


def test_rows_say_how_they_are_cut_and_delivered(tmp_path: Path) -> None:
    columns = "source,driving,crop,driving_crop,format,fps,paste_back,side_by_side,audio"
    table = write(
        tmp_path / "c.csv",
        f"{columns}\n"
        "a.jpg,b.mp4,,,,,,,\n"
        "a.jpg,b.mp4,10-20-266-276,motion,webm,12.5,no,yes,\n"
        "a.jpg,b.mp4,auto,0-0-9-9,mp4,,,,\n",
    )
    defaults = RowDefaults(crop="face", format="gif", fps=20, paste_back=True, audio=True)
    rows, failures = read_catalog(table, defaults)
    assert failures == []
    first, second, third = rows
    assert first.delivery() == defaults.delivery()
    assert not first.audio, "a gif has none, whatever the job says"
    assert second.audio
    assert second.delivery() == {
        "crop": "10-20-266-276",
        "driving_crop": "motion",
        "format": "webm",
        "fps": 12.5,
        "paste_back": False,
        "side_by_side": True,
    }
    assert (third.crop, third.driving_crop, third.format) == ("auto", "0-0-9-9", "mp4")
    assert (third.fps, third.paste_back) == (20, True)
    grid = grid_rows(["/a.jpg"], ["/b.mp4"], defaults)
    assert (grid[0].delivery(), grid[0].audio) == (defaults.delivery(), False)


@pytest.mark.parametrize(
    ("column", "cell", "said"),
    [
        ("crop", "motion", "crop must be"),
        ("crop", "10-20-10-30", "no area"),
        ("crop", "10;20;30;40", "crop must be"),
        ("driving_crop", "nose", "driving_crop must be"),
        ("format", "avi", "format must be one of mp4, webm, gif, png"),
        ("fps", "fast", "fps must be 0.1 to 240"),
        ("fps", "nan", "fps must be"),
        ("fps", "inf", "fps must be"),
        ("fps", "0", "fps must be"),
        ("paste_back", "maybe", "paste_back must be true or false"),
    ],
)
def test_cells_that_make_no_sense(tmp_path: Path, column: str, cell: str, said: str) -> None:
    table = write(tmp_path / "c.csv", f"source,driving,{column}\na.jpg,b.mp4,{cell}\n")
    rows, failures = read_catalog(table, RowDefaults())
    assert rows == []
    assert codes(failures) == {"line 2": "bad_row"}
    assert said in failures[0].cause


def test_cells_that_do_not_go_together(tmp_path: Path) -> None:
    text = "source,driving,format,fps,audio\na.jpg,b.mp4,gif,60,\na.jpg,b.mp4,png,60,true\n"
    rows, failures = read_catalog(write(tmp_path / "c.csv", text), RowDefaults())
    assert rows == []
    assert [f.cause for f in failures] == [
        "fps: a gif has at most 50 frames/s, not 60",
        "audio: a png has no sound",
    ]


def test_names_that_differ_only_in_how_an_accent_is_written_are_one(tmp_path: Path) -> None:
    composed, apart = "Zo\u00eb", "Zoe\u0308"
    assert clean_name(composed) == clean_name(apart) == composed
    text = f"source,driving,name\na.jpg,b.mp4,{composed}\na.jpg,c.mp4,{apart}\n"
    rows, failures = read_catalog(write(tmp_path / "c.csv", text), RowDefaults())
    assert [row.name for row in rows] == [composed, composed]
    assert failures == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a/b\\c", "a_b_c"), ("../../x", "x"), ("\u6f22\u5b57 \U0001f600", "\u6f22\u5b57")],
)
def test_names_of_strangers(tmp_path: Path, name: str, expected: str) -> None:
    text = f"source,driving,name\na.jpg,b.mp4,{name}\n"
    rows, _ = read_catalog(write(tmp_path / "c.csv", text), RowDefaults())
    assert [row.name for row in rows] == [expected]
    long = "n" * 300
    text = f"source,driving,name\na.jpg,b.mp4,{long}1\na.jpg,b.mp4,{long}2\na.jpg,b.mp4,{long}1\n"
    rows, failures = read_catalog(write(tmp_path / "l.csv", text), RowDefaults())
    assert [len(row.name) for row in rows] == [100, 100, 100]
    assert rows[0].name == rows[2].name != rows[1].name
    assert failures == []


# --- tables of strangers ---------------------------------------------------------------------

HEADER = "source,driving,name\n"


def test_long_cells_and_lines_are_failures_of_their_rows(tmp_path: Path) -> None:
    fits, long = "x" * MAX_CELL_CHARS, "x" * (MAX_CELL_CHARS + 1)
    endless = "y" * (2 * MAX_LINE_CHARS + 17)
    text = (
        f"{HEADER}a.jpg,b.mp4,{fits}\na.jpg,b.mp4,{long}\r\n{endless}\n"
        f'a.jpg,"b.mp4,{endless}\na.jpg,b.mp4,\n"a,\nb.jpg",b.mp4,\n{endless}'
    )
    rows, failures = read_catalog(write(tmp_path / "c.csv", text), RowDefaults())
    assert [row.line for row in rows] == [2, 6, 8]
    assert rows[2].source == f"{tmp_path}/a,\nb.jpg"
    assert codes(failures) == {f"line {n}": "bad_row" for n in (3, 4, 5, 9)}
    said = [failure.cause for failure in failures]
    assert "name has more than 8192" in said[0]
    assert all("131072 characters" in cause for cause in said[1:])
    pq.write_table(
        pa.table({"source": [long, "a.jpg"], "driving": ["b.mp4"] * 2}), tmp_path / "c.parquet"
    )
    rows, failures = read_catalog(tmp_path / "c.parquet", RowDefaults())
    assert ([row.line for row in rows], codes(failures)) == ([2], {"line 1": "bad_row"})


def test_an_open_quote_hides_rows_and_is_refused(tmp_path: Path) -> None:
    """Soon, and not after all of what follows was held in memory."""
    row = "a.jpg,b.mp4,\n"
    path = write(tmp_path / "c.csv", f'{HEADER}{row}"a.jpg,b.mp4,\n{row * 1_000_000}')
    found = iter_catalog(path, RowDefaults())
    assert isinstance(next(found), CatalogRow)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="not a CSV table: the quoted text before line"):
            next(found)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_what_is_no_table_any_more_is_said_when_it_is_reached(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_bytes(HEADER.encode() + b"a.jpg,b.mp4,\n" * 2000 + b"\xff,b.mp4,\n")
    found = iter_catalog(path, RowDefaults())
    assert isinstance(next(found), CatalogRow)
    with pytest.raises(ConfigError, match="not a CSV table"):
        list(found)
    path.write_text(f'{HEADER}a.jpg,b.mp4,\na.jpg,"b"c.mp4,\n')
    found = iter_catalog(path, RowDefaults())
    assert isinstance(next(found), CatalogRow)
    with pytest.raises(ConfigError, match="not a CSV table"):
        next(found)
    path.write_text("y" * (MAX_LINE_CHARS + 1) + f"\n{HEADER}a.jpg,b.mp4,\n")
    with pytest.raises(ConfigError, match="not a CSV table"):
        next(iter_catalog(path, RowDefaults()))


def test_lines_may_end_in_any_way(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        text = end.join(["source,driving", "a.jpg,b.mp4", "", "z" * 300_000, "c.jpg,d.mp4"])
        rows, failures = read_catalog(write(tmp_path / "c.csv", text), RowDefaults())
        assert [(row.line, row.source) for row in rows] == [
            (2, f"{tmp_path}/a.jpg"),
            (5, f"{tmp_path}/c.jpg"),
        ]
        assert codes(failures) == {"line 4": "bad_row"}


def test_a_damaged_parquet_table_is_no_table(tmp_path: Path) -> None:
    columns = {"source": [f"{i}.jpg" for i in range(50_000)], "driving": ["b.mp4"] * 50_000}
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False)
    rows, _ = read_catalog(path, RowDefaults())
    assert [row.line for row in rows] == list(range(1, 50_001))
    data = bytearray(path.read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="not a Parquet table"):
        read_catalog(path, RowDefaults())


def test_file_names_of_stray_bytes_are_failures(tmp_path: Path) -> None:
    stray = b"/x/\xff.jpg".decode(errors="surrogateescape")
    rows, failures = split(iter_grid(["/a.jpg", stray], ["/b.mp4", "/c.mp4"], RowDefaults()))
    assert [(row.line, row.source) for row in rows] == [(1, "/a.jpg"), (3, "/a.jpg")]
    assert codes(failures) == {"line 2": "path_escape", "line 4": "path_escape"}
    with pytest.raises(RowError, match="not Unicode"):
        resolve("a.jpg", stray)


def test_tables_are_read_in_flat_memory(tmp_path: Path) -> None:
    num_rows = 40_000
    path = tmp_path / "c.csv"
    with path.open("w") as file:
        file.write(HEADER)
        file.writelines(f"{i}.jpg,b.mp4,{'n' * 80}{i}\n" for i in range(num_rows))
    columns = {"source": [f"{i}.jpg" for i in range(num_rows)], "driving": ["b.mp4"] * num_rows}
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    del columns
    for table in (path, tmp_path / "c.parquet"):
        tracemalloc.start()
        try:
            assert sum(1 for _ in iter_catalog(table, RowDefaults())) == num_rows
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak_bytes < 4 * 2**20, table  # the rows take ten times that
