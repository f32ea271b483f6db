"""Pages written again from what a job left."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from kpmask.errors import StorageError
from kpmask.records import (
    AnimationRecord,
    CatalogManifest,
    ClipRecord,
    DatasetChanges,
    DatasetManifest,
    Failure,
    digest,
)
from kpmask.report import poster, poster_key, preview_key, preview_strip
from tasks.manifest import write_json, write_table
from tasks.report import rebuild_page
from tasks.storage import ObjectStore, open_store
from tests.support.pages import Page

CHANGES = DatasetChanges(7, "d", 1, 2, 3, 4, 5, 6, 7, 8, 9)
CLIP = ClipRecord(
    clip_id="",
    name="",
    partition="train",
    identity="a",
    video_id="v",
    shard="train/shard-0.arrow",
    row=0,
    num_frames=20,
    fps=25.0,
    width_px=64,
    height_px=64,
    start_s=0.0,
    end_s=0.8,
    crop_px=(0, 0, 90, 90),
    clamped=False,
    num_frames_lost=0,
    sha256="",
)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    """The tables of a dataset of 40 clips, two of which have a preview."""
    found = open_store(str(tmp_path / "set"))
    clips = [dataclasses.replace(CLIP, clip_id=digest(i), name=f"clip-{i:02d}") for i in range(40)]
    failures = [Failure(f"row {i}", "download", "private", "gone", False, 1) for i in range(3)]
    write_table(found, "manifest.parquet", clips, ClipRecord)
    write_table(found, "failures.parquet", failures, Failure)
    write_json(found, "stats.json", DatasetManifest(found.uri, "id", "s", 40, 0, 800, 3))
    strip = preview_strip(np.zeros((8, 16, 16, 3), np.uint8))
    for clip in [*clips[:2], dataclasses.replace(CLIP, clip_id="of-an-older-set")]:
        found.put(preview_key(clip.clip_id), strip)
    return found


def test_a_dataset_has_its_page_again(store: ObjectStore) -> None:
    uri = rebuild_page(store.uri)
    assert uri == f"{store.uri}/index.html"
    html = store.get("index.html").decode()
    page = Page(html)
    assert [image["src"] for image in page.of("img")] == [preview_key(digest(i)) for i in (0, 1)]
    assert page.text.count("no picture") == 38
    assert "3 items could not be done" in page.text
    assert "What the last run changed" not in page.text
    write_json(store, "changes.json", CHANGES)
    rebuild_page(store.uri)
    assert "Version 7 of the dataset." in Page(store.get("index.html").decode()).text


def test_a_dataset_without_a_table_of_failures(store: ObjectStore) -> None:
    store.delete("failures.parquet")
    rebuild_page(store.uri)
    assert "Everything that was asked for was done." in store.get("index.html").decode()


@pytest.mark.parametrize("with_posters", [False, True])
def test_a_catalog_has_its_page_again(tmp_path: Path, with_posters: bool) -> None:
    store = open_store(str(tmp_path / "made"))
    ids = [digest(index)[:32] for index in range(30)]
    records = [
        AnimationRecord(i, f"item {n}", "a.png", "b.mp4", digest("a"), digest("b"), "relative",
                        f"{i}.mp4", 10, 0, 25.0, 64, 64, 1000, digest([i]))
        for n, i in enumerate(ids)
    ]  # fmt: skip
    write_table(store, "manifest.parquet", records, AnimationRecord)
    write_json(store, "summary.json", CatalogManifest(store.uri, "s", "w", 30, 300, 0))
    if with_posters:
        store.put(poster_key(ids[0]), poster(np.zeros((8, 8, 3), np.uint8)))
    rebuild_page(store.uri)
    page = Page(store.get("index.html").decode())
    data = json.loads(page.data["gallery-data"])
    items = [dict(zip(data["columns"], row, strict=False)) for row in data["items"]]
    assert {item["result"] for item in items} == {f"{i}.mp4" for i in ids}
    assert {bool(item["poster"]) for item in items} == {with_posters}
    assert [source[1] for source in data["sources"]] == ["a.png"]
    assert "Everything that was asked for was done." in page.text  # there is no table of failures


def test_nothing_is_here(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        rebuild_page(str(tmp_path))
    assert caught.value.code == "not_found"
