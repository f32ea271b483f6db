"""Catalogs: formats, references, names and what is refused."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kpmask.data.catalog import RowDefaults, clean_name, grid_rows, read_catalog, resolve
from kpmask.errors import ConfigError, RowError


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
    assert first.name == "a--b"
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
        "a.jpg,b.mp4,good,,\n"
        "a.jpg,c.mp4,GOOD,,\n",
    )
    rows, failures = read_catalog(table, RowDefaults())
    assert [(row.line, row.name) for row in rows] == [(12, "good")]
    assert codes(failures) == {
        "line 2": "path_escape",
        "line 3": "path_escape",
        "line 4": "path_escape",
        "line 13": "duplicate_name",
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


def test_made_names_are_unique_and_spare_given_ones(tmp_path: Path) -> None:
    table = write(
        tmp_path / "c.csv",
        "source,driving,name\na/i.jpg,v.mp4,\nb/i.jpg,v.mp4,\nc/i.jpg,v.mp4,i--v-2\n",
    )
    rows, failures = read_catalog(table, RowDefaults())
    assert failures == []
    assert [row.name for row in rows] == ["i--v", "i--v-3", "i--v-2"]


def test_a_grid_keeps_a_driving_videos_rows_together() -> None:
    rows = grid_rows(["/a.jpg", "/b.jpg"], ["/x.mp4", "/y.mp4"], RowDefaults(audio=True))
    assert [(r.source, r.driving) for r in rows] == [
        ("/a.jpg", "/x.mp4"),
        ("/b.jpg", "/x.mp4"),
        ("/a.jpg", "/y.mp4"),
        ("/b.jpg", "/y.mp4"),
    ]
    assert len({r.name for r in rows}) == 4
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
    assert [row.name for row in rows] == [composed]
    assert codes(failures) == {"line 3": "duplicate_name"}


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
    assert [len(row.name) for row in rows] == [100, 100]
    assert codes(failures) == {"line 4": "duplicate_name"}
    made = "f" * 300
    text = f"source,driving\n{made}.jpg,b.mp4\n{made}2.jpg,b.mp4\n"
    rows, failures = read_catalog(write(tmp_path / "d.csv", text), RowDefaults())
    assert failures == []
    assert len({row.name for row in rows}) == 2
