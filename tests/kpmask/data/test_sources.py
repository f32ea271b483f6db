"""Kinds of sources: rows by kind, identities by name, splits by name."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest

from kpmask.config import ANNOTATED_SOURCES, SourceKind
from kpmask.data.sources import SOURCES, identity_of, source_rows
from kpmask.records import Failure, SourceRow

HEADER = "video_id,start,end,bbox,fps,width,height,partition,person_id"
BOX = "0,64,10-20-110-120,25,640,480"


def test_every_kind_is_in_the_register() -> None:
    assert set(SOURCES) == set(typing.get_args(SourceKind))
    for kind, info in SOURCES.items():
        assert info.needs.partition(":")[0] == (
            "metadata" if kind in ANNOTATED_SOURCES else "videos"
        )


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
