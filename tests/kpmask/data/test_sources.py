"""Kinds of sources: rows by kind, identities by name, splits by name."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest

from kpmask.config import PreprocessJob, SourceKind, resolve_job
from kpmask.data.sources import identity_of, source_rows
from kpmask.errors import ConfigError
from kpmask.records import Failure, SourceRow

HEADER = "video_id,start,end,bbox,fps,width,height,partition,person_id"
BOX = "0,64,10-20-110-120,25,640,480"


def test_tables_say_their_split_unless_identities_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"{HEADER}\na,{BOX},train,p1\nb,{BOX},test,p2\nbad\nc,{BOX},train,\n")
    for kind in ("table", "taichi"):
        assert _splits(source_rows(kind, path)) == ["train", "test", "bad_row", "train"]
    named = source_rows("table", path, test_identities=["p1", "c"])
    assert _splits(named) == ["test", "train", "bad_row", "test"]


def _splits(rows: typing.Iterator[SourceRow | Failure]) -> list[str]:
    return [row.code if isinstance(row, Failure) else row.partition for row in rows]


@pytest.mark.parametrize("kind", ["voxceleb1", "voxceleb2"])
def test_voxceleb(tmp_path: Path, kind: SourceKind) -> None:
    (tmp_path / "id1/v").mkdir(parents=True)
    box = "1 10 20 30 40" if kind == "voxceleb1" else "1 0.1 0.2 0.3 0.4"
    (tmp_path / "id1/v/1.txt").write_text(f"FRAME X Y W H\n{box}\n")
    (row,) = source_rows(kind, tmp_path, test_identities=["id1"])
    assert isinstance(row, SourceRow)
    assert (row.partition, row.ref_size_px) == (
        "test",
        (0, 360) if kind == "voxceleb1" else (1_000_000, 1_000_000),
    )


@pytest.mark.parametrize("kind", ["nemo", "robonet", "videos"])
def test_videos_have_no_rows(tmp_path: Path, kind: SourceKind) -> None:
    with pytest.raises(ValueError, match="has no rows"):
        source_rows(kind, tmp_path)


def test_identities() -> None:
    assert identity_of("nemo", "001_deliberate_smile_2") == "001"
    assert identity_of("nemo", "_odd") == "_odd"
    assert identity_of("videos", "me#walk_1") == "me"
    assert identity_of("videos", "me_walk") == "me_walk"
    assert identity_of("robonet", "sawyer_traj12#cam0") == identity_of(
        "robonet", "sawyer_traj12#cam3"
    )


def job(preset: str | None = None, **flags: str) -> PreprocessJob:
    return resolve_job(PreprocessJob, preset=preset, flags={"out": "out", **flags})


def test_source_that_is_not_named_follows_from_the_input() -> None:
    assert job(metadata="t.csv").source_kind == "table"
    assert job(videos="v").source_kind == "videos"
    assert job(videos="v", source="nemo").source_kind == "nemo"
    for preset in ("taichi256", "vox256", "nemo256", "robonet256"):
        assert job(preset, metadata="t.csv").source_kind == "table"
        assert job(preset, videos="v").source_kind == "videos"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"source": "nemo", "metadata": "t.csv"}, "source nemo takes videos, not metadata"),
        ({"source": "voxceleb1", "videos": "v"}, "source voxceleb1 takes metadata, not videos"),
        ({"source": "mpii", "videos": "v"}, "'robonet' or 'videos', not 'mpii'"),
        ({"source": "taichi"}, "exactly one of metadata and videos"),
    ],
)
def test_source_and_input_that_do_not_go_together(flags: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(**flags)


def test_presets_of_annotations() -> None:
    first, second = job("voxceleb1", metadata="a.zip"), job("voxceleb2", metadata="b.zip")
    assert (first.source, second.source) == ("voxceleb1", "voxceleb2")
    for clips in (first.clips, second.clips):
        assert (clips.increase, clips.min_box_px) == (0.1, 256)
        assert (clips.min_frames, clips.max_frames) == (64, 1024)
    assert len(set(first.clips.test_identities)) == 40
    assert second.clips.test_identities == ()


def test_test_persons_of_the_published_table_are_those_of_the_preset(dev_data: Path) -> None:
    """But for two, of which it has clips in both splits."""
    table = dev_data.parent / "published-metadata/vox-metadata.csv"
    if not table.is_file():
        pytest.skip("the published tables are not there")
    rows = [row for row in source_rows("table", table) if isinstance(row, SourceRow)]
    named = set(job("voxceleb1", metadata="a.zip").clips.test_identities)
    tested = {row.identity for row in rows if row.partition == "test"}
    trained = {row.identity for row in rows if row.partition == "train"}
    assert tested <= named
    assert trained & named == trained & tested
