"""Pages written again from what a job left."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from kpmask.errors import DatasetError, StorageError
from kpmask.records import (
    AnimationRecord,
    CatalogManifest,
    ClipRecord,
    DatasetChanges,
    DatasetManifest,
    Failure,
    MetricInfo,
    RunManifest,
    ScoreSummary,
    ScoreTable,
    SetScore,
    StepMetrics,
    VideoScore,
    digest,
)
from kpmask.report import poster, poster_key, preview_key, preview_strip
from kpmask.study import (
    QUESTIONS,
    Answer,
    MethodShare,
    StudyItem,
    StudyManifest,
    StudyScores,
    make_study,
    score_answers,
)
from tasks.manifest import read_record, write_json, write_table
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


# --- several jobs in a folder ----------------------------------------------------------------


def catalog_at(store: ObjectStore) -> None:
    item = digest("x")[:32]
    record = AnimationRecord(
        item, "an item", "a.png", "b.mp4", digest("a"), digest("b"),
        "relative", f"{item}.mp4", 10, 0, 25.0, 64, 64, 1000, digest("i"),
    )  # fmt: skip
    write_table(store, "manifest.parquet", [record], AnimationRecord)
    write_json(store, "summary.json", CatalogManifest(store.uri, "s", "w", 1, 10, 2))
    store.put(poster_key(item), poster(np.zeros((8, 8, 3), np.uint8)))


def run_at(store: ObjectStore, *, finished: bool = True) -> None:
    write_json(store, "run.json", {"run_id": "abc"})
    store.put("config.toml", b"[train]\n")
    step = StepMetrics("fomm", 10, 1.0, 1e-3, 2.5, ("perceptual",), (2.5,), 20.0)
    write_table(store, "metrics.parquet", [step], StepMetrics)
    for number in (0, 10):
        store.put(f"samples/fomm-step-{number:06d}.png", b"picture")
    if finished:
        manifest = RunManifest(store.uri, "abc", "s", "d", "fomm", "vgg19", 10, 2.5, "w")
        write_json(store, "manifest.json", manifest)


def evaluation_at(store: ObjectStore) -> None:
    score = VideoScore(digest("v"), "a video", "l1", "model", 0.04, 9)
    write_table(store, "scores.parquet", [score], VideoScore)
    table = ScoreTable(
        store.uri, "s", "d", "w", "vgg19", 1, 0,
        (MetricInfo("l1", "1", None, "Apache-2.0", False),),
        (ScoreSummary("l1", "model", 0.04, 0.0, 0.04, 1, 9),),
        sets=(SetScore("fid", "model", 12.5, 1, 9),),
    )  # fmt: skip
    write_json(store, "summary.json", table)


def test_an_overview_leads_to_every_job(store: ObjectStore, tmp_path: Path) -> None:
    """Jobs at several depths; a run within a comparison is the comparison's own."""
    root = open_store(str(tmp_path))
    run_at(root.child("deep/er/run"))
    run_at(root.child("going on"), finished=False)
    catalog_at(root.child("made #1"))
    evaluation_at(root.child("scores"))
    root.put("damaged/stats.json", b"{}")
    comparison = root.child("compared")
    comparison.put("comparison.json", b"not JSON")
    run_at(comparison.child("runs/fomm"))
    uri = rebuild_page(root.uri)
    assert uri == f"{root.uri}/overview.html"
    page = Page(root.get("overview.html").decode())
    wanted = [
        "set/index.html",
        "deep/er/run/index.html",
        "going%20on/index.html",
        "made%20%231/index.html",
        "scores/index.html",
    ]
    assert [link["href"] for link in page.of("a") if link["href"] != "#main"] == wanted
    for href in wanted:
        made = tmp_path / unquote(href)
        back = Page(made.read_text()).of("a")
        (home,) = [link["href"] for link in back if link["href"].endswith("overview.html")]
        assert (made.parent / home).resolve() == (tmp_path / "overview.html").resolve()
    assert {image["src"].rpartition("/")[2] for image in page.of("img")} >= {
        "fomm-step-000010.png",
        f"{digest('x')[:32]}.jpg",
    }
    for text in ("40 training and 0 test clips", "fomm, 10 steps", "not finished", "2 failures",
                 "1 videos, reconstruction", "L1 0.0400", "It cannot be read."):  # fmt: skip
        assert text in page.text
    assert not comparison.exists("runs/fomm/index.html")
    before = root.get("overview.html")
    rebuild_page(root.uri)
    assert root.get("overview.html") == before


def test_an_overview_leaves_another_front_page_alone(tmp_path: Path) -> None:
    root = open_store(str(tmp_path))
    run_at(root.child("run"))
    root.put("index.html", b"a demonstration's")
    assert rebuild_page(root.uri).endswith("/overview.html")
    assert root.get("index.html") == b"a demonstration's"
    root.put("run/samples/index.html", b"not a front page")
    root.put("elsewhere/index.html", b"has no jobs")
    rebuild_page(root.uri)
    links = [a["href"] for a in Page(root.get("overview.html").decode()).of("a")]
    assert links[1:] == ["index.html", "run/index.html"]


def test_an_evaluation_has_its_page_again(tmp_path: Path) -> None:
    evaluation_at(open_store(str(tmp_path)))
    rebuild_page(str(tmp_path))
    assert "0.0400" in Page((tmp_path / "index.html").read_text()).text


def test_a_study_and_its_scores_have_their_pages_again(tmp_path: Path) -> None:
    shown = make_study(
        "Which?",
        ["a", "b"],
        [
            StudyItem("i1", "one", "key", "d.mp4", "", ("v1", "v2"), ("a", "b"), 64, 64),
            StudyItem("i2", "two", "key", "e.mp4", "", ("v3", "v4"), ("b", "a"), 64, 64),
        ],
    )
    store = open_store(str(tmp_path / "study"))
    write_json(store, "key.json", shown)
    manifest = StudyManifest(store.uri, "", shown.study_id, shown.methods, 2, 0, 0)
    write_json(store, "study.json", manifest)
    assert rebuild_page(store.uri) == f"{store.uri}/public/index.html"
    html = store.get("public/index.html").decode()
    assert shown.study_id in html
    scored = open_store(str(tmp_path / "scored"))
    answers = [
        Answer("p1", item.item_id, item.name, question, "a", screen, False, 1, 3.0)
        for screen, item in enumerate(shown.items, 1)
        for question in QUESTIONS
    ]
    scores = score_answers(shown, answers, uri=scored.uri, num_failures=0)
    write_table(scored, "shares.parquet", scores.shares, MethodShare)
    write_json(scored, "summary.json", scores)
    rebuild_page(scored.uri)
    assert read_record(scored, "summary.json", StudyScores) == scores
    assert "1participants" in Page(scored.get("index.html").decode()).text
    rebuild_page(str(tmp_path))
    links = [a["href"] for a in Page((tmp_path / "overview.html").read_text()).of("a")]
    assert links[1:] == ["study/public/index.html", "scored/index.html"]
    back = [a["href"] for a in Page(scored.get("index.html").decode()).of("a")]
    assert back[1] == "../overview.html"
    assert "overview" not in store.get("public/index.html").decode()


def test_a_record_comes_back_from_its_json(store: ObjectStore) -> None:
    clip = dataclasses.replace(CLIP, crop_px=(1, 2, 3, 4))
    write_json(store, "clip.json", clip)
    assert read_record(store, "clip.json", ClipRecord) == clip
    write_json(store, "clip.json", {"clip_id": "x", "no such": 1})
    with pytest.raises(DatasetError, match="not a ClipRecord"):
        read_record(store, "clip.json", ClipRecord)
    write_json(store, "clip.json", [1])
    with pytest.raises(DatasetError, match="not a ClipRecord"):
        read_record(store, "clip.json", ClipRecord)
