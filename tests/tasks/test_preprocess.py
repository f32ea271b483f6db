"""The preprocess job, end to end on small videos: what is made, resumed, refused and left alone."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import time
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from kpmask.data.dataset import Dataset
from kpmask.errors import ConfigError, RunFailed, StorageError
from kpmask.media.encode import encode
from kpmask.media.images import encode_png
from kpmask.records import DatasetManifest, Progress
from tasks.dataset import open_dataset
from tasks.preprocess import preprocess
from tasks.storage import open_store
from tasks.workbook import Workbook
from tests.support.factory import (
    HEADER,
    codes_of,
    failures_of,
    film,
    filmed,
    job,
    line,
    recorded_cuts,
    started,
    tree_of,
    write_table,
)
from tests.support.inline import inline_stages


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos of 48 frames at 24 frames/s."""
    return filmed(tmp_path_factory.mktemp("raw"), ["aaa", "bbb", "-cc", "d d"])


LINES = [
    line("aaa", 0, 24, "train", "p1"),
    line("aaa", 24, 48, "train", "p1"),
    line("bbb", 8, 40, "train", "p2"),
    line("-cc", 0, 48, "test", "p3"),
    line("d d", 10, 30, "test", "p4"),
]
NAMES = [
    "p3#-cc#000000#000048",
    "p4#d d#000010#000030",
    "p1#aaa#000000#000024",
    "p1#aaa#000024#000048",
    "p2#bbb#000008#000040",
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "table.csv", LINES)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages in this process: for what does not depend on there being others."""
    inline_stages(monkeypatch)


pytestmark = pytest.mark.usefixtures("ray_cluster")


# --- what is made ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(
    raw: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> tuple[Path, DatasetManifest]:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("made")
    metadata = write_table(folder / "table.csv", LINES)
    two = {"num_workers": 2}
    return folder / "out", preprocess(job(folder / "out", metadata=metadata, raw=raw, cluster=two))


def test_dataset_has_every_clip(made: tuple[Path, DatasetManifest]) -> None:
    out, manifest = made
    dataset = open_dataset(str(out))
    assert [clip.name for clip in dataset.records] == NAMES
    assert [len(dataset.partition(p)) for p in ("train", "test")] == [3, 2]
    assert (manifest.num_train, manifest.num_test, manifest.num_failures) == (3, 2, 0)
    assert manifest.num_frames == 24 + 24 + 32 + 48 + 20
    assert manifest.uri == str(out)
    assert len({clip.clip_id for clip in dataset.records}) == 5
    for clip in dataset.records:
        frames_THWC = dataset.read(clip)
        assert frames_THWC.shape == (clip.num_frames, 32, 32, 3)
        assert (clip.fps, clip.num_frames_lost, clip.clamped) == (24.0, 0, True)
        assert clip.identity == clip.name[:2]


def test_frames_are_those_of_the_video(made: tuple[Path, DatasetManifest]) -> None:
    dataset = open_dataset(str(made[0]))
    clip = next(clip for clip in dataset.records if clip.video_id == "bbb")
    # The largest square of a 96x64 frame, 64 px from the 16th on, at half the size.
    expected = [frame[::2, 16:80:2] for frame in film(1)[8:40]]
    error = np.abs(dataset.read(clip).astype(int) - np.stack(expected))
    assert error.mean() < 3


def test_files_of_a_dataset(made: tuple[Path, DatasetManifest]) -> None:
    out, manifest = made
    names = sorted(tree_of(out))
    shards = [name for name in names if name.endswith(".arrow")]
    assert {shard.split("-")[0] for shard in shards} == {"test/shard", "train/shard"}
    records = open_dataset(str(out)).records
    assert sorted({clip.shard for clip in records}) == shards
    previews = [f"previews/{clip.clip_id}.jpg" for clip in records]
    assert sorted(set(names) - set(shards) - set(previews)) == [
        "changes.json",
        "failures.parquet",
        "index.html",
        "manifest.parquet",
        "stats.json",
        "versions.json",
        "videos.parquet",
    ]
    assert set(previews) <= set(names)
    assert json.loads((out / "stats.json").read_text())["dataset_id"] == manifest.dataset_id
    assert "p4#d d#000010#000030" in (out / "index.html").read_text()


def test_rerun_changes_nothing(
    made: tuple[Path, DatasetManifest], raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, manifest = made
    before = tree_of(out)
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    monkeypatch.setattr("tasks.preprocess.run_items", None)  # nothing is cut
    again = preprocess(job(out, metadata=out.parent / "table.csv", raw=raw))
    assert again == manifest
    assert tree_of(out) == before
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == times


def test_same_input_gives_the_same_bytes_anywhere(
    made: tuple[Path, DatasetManifest], raw: Path, table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "elsewhere"
    progress: list[Progress] = []
    preprocess(job(out, metadata=table, raw=raw), on_progress=progress.append)
    mine, theirs = tree_of(out), tree_of(made[0])
    for name in ("stats.json", "index.html"):  # these hold the place
        assert mine.pop(name) != theirs.pop(name) or name == "index.html"
    assert mine == theirs
    assert [(p.done, p.total) for p in progress if p.stage == "preprocess"] == [
        (i, 4) for i in range(1, 5)
    ]
    last = {p.stage: (p.done, p.total) for p in progress}
    assert last == {"plan": (1, 1), "preprocess": (4, 4), "shards": (5, 5), "previews": (5, 5)}


# --- incremental -----------------------------------------------------------------------------


@pytest.mark.usefixtures("inline")
def test_more_rows_cut_only_their_videos(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = write_table(tmp_path / "some.csv", LINES[:3])
    more = write_table(tmp_path / "more.csv", LINES)
    out = tmp_path / "out"
    preprocess(job(out, metadata=some, raw=raw))
    shards = {p.name for p in out.rglob("*.arrow")}
    cut = recorded_cuts(monkeypatch)
    preprocess(job(out, metadata=more, raw=raw))
    assert sorted(cut) == ["-cc", "d d"]
    assert shards <= {p.name for p in out.rglob("*.arrow")}
    full = tmp_path / "full"
    preprocess(job(full, metadata=more, raw=raw))
    assert (out / "manifest.parquet").read_bytes() == (full / "manifest.parquet").read_bytes()
    # And back again: what is no longer asked for goes.
    cut.clear()
    preprocess(job(out, metadata=some, raw=raw))
    assert cut == []
    assert {p.name for p in out.rglob("*.arrow")} == shards
    assert len(open_dataset(str(out)).records) == 3


@pytest.mark.usefixtures("inline")
def test_missing_video_is_had_as_soon_as_it_is_there(
    raw: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some, out = tmp_path / "raw", tmp_path / "out"
    shutil.copytree(raw, some)
    (some / "bbb.mp4").rename(tmp_path / "bbb.mp4")
    assert preprocess(job(out, metadata=table, raw=some)).num_failures == 1
    (failure,) = failures_of(out)
    assert (failure.item, failure.code) == ("p2#bbb#000008#000040", "missing_raw")
    assert "bbb" in failure.cause
    (tmp_path / "bbb.mp4").rename(some / "bbb.webm")  # any extension will do
    cut = recorded_cuts(monkeypatch)
    assert preprocess(job(out, metadata=table, raw=some)).num_failures == 0
    assert cut == ["bbb"]


@pytest.mark.usefixtures("inline")
def test_changed_video_is_cut_again(
    raw: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some, out = tmp_path / "raw", tmp_path / "out"
    shutil.copytree(raw, some)
    preprocess(job(out, metadata=table, raw=some))
    before = {clip.name: clip.clip_id for clip in open_dataset(str(out)).records}
    encode(some / "bbb.mp4", film(9), fps=Fraction(24))
    cut = recorded_cuts(monkeypatch)
    preprocess(job(out, metadata=table, raw=some))
    assert cut == ["bbb"]
    after = {clip.name: clip.clip_id for clip in open_dataset(str(out)).records}
    assert {name for name in NAMES if before[name] != after[name]} == {"p2#bbb#000008#000040"}
    assert not (out / ".work").exists()


# --- killed and crowded ----------------------------------------------------------------------


def test_killed_half_way_and_run_again(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL once the first videos are in the journal; a rerun ends where none was killed."""
    many, lines = tmp_path / "raw", []
    many.mkdir()
    for i in range(24):
        shutil.copy(raw / "aaa.mp4", many / f"v{i:02d}.mp4")
        lines += [line(f"v{i:02d}", s, s + 12, "train", f"p{i}") for s in (0, 12, 24, 36)]
    metadata = write_table(tmp_path / "many.csv", lines)
    settings = {"clips": {"size_px": 128}}
    one = job(tmp_path / "killed", metadata=metadata, raw=many, **settings)
    process = started(one)
    journal = tmp_path / "killed" / ".work"
    deadline = time.monotonic() + 120
    while len(list(journal.glob("*/results/*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(journal.glob("*/results/*.json")))
    assert not (tmp_path / "killed" / "manifest.parquet").exists()
    cut = recorded_cuts(monkeypatch)
    preprocess(one)
    assert len(cut) == 24 - done
    preprocess(job(tmp_path / "whole", metadata=metadata, raw=many, **settings))
    killed, whole = tree_of(tmp_path / "killed"), tree_of(tmp_path / "whole")
    killed.pop("stats.json"), whole.pop("stats.json")
    assert killed.keys() == whole.keys()
    assert [name for name in killed if killed[name] != whole[name]] in ([], ["index.html"])


def test_two_runs_at_once(raw: Path, table: Path, tmp_path: Path) -> None:
    import threading

    one = job(tmp_path / "out", metadata=table, raw=raw)
    results: list[DatasetManifest] = []
    threads = [threading.Thread(target=lambda: results.append(preprocess(one))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 and results[0] == results[1]
    assert [clip.name for clip in open_dataset(one.out).records] == NAMES
    for clip in open_dataset(one.out).records:
        open_dataset(one.out).read(clip, [0])


@pytest.mark.usefixtures("inline")
def test_what_somebody_removed_is_made_again(
    raw: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that results promise are gone: before they lie in shards, and after."""
    calls = []

    def placed(book: Workbook, parts: Iterable[str], *, as_folders: bool) -> None:
        if not calls:
            calls.append(1)
            next((tmp_path / "out").glob(".work/*/parts/*.arrow")).unlink()
        place_clips(book, parts, as_folders=as_folders)

    place_clips = Workbook.place_clips
    monkeypatch.setattr(Workbook, "place_clips", placed)
    assert preprocess(job(tmp_path / "out", metadata=table, raw=raw)).num_train == 3
    assert [clip.name for clip in open_dataset(str(tmp_path / "out")).records] == NAMES
    next((tmp_path / "out" / "train").glob("*.arrow")).unlink()
    assert preprocess(job(tmp_path / "out", metadata=table, raw=raw)).num_train == 3
    for clip in open_dataset(str(tmp_path / "out")).records:
        open_dataset(str(tmp_path / "out")).read(clip, [0])


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.usefixtures("inline")
def test_bad_rows_are_failures_and_the_rest_is_made(raw: Path, tmp_path: Path) -> None:
    bad = [
        line("aaa", 30, 10, "train", "p1"),
        line("../aaa", 0, 10, "train", "p1"),
        line("zzz", 0, 10, "train", "p9"),
        line("aaa", 44, 100, "train", "p1"),
        LINES[0],
    ]
    metadata = write_table(tmp_path / "table.csv", [*LINES, *bad])
    manifest = preprocess(job(tmp_path / "out", metadata=metadata, raw=raw))
    assert codes_of(tmp_path / "out") == {
        "table.csv:7": "bad_row",
        "table.csv:8": "path_escape",
        "p9#zzz#000000#000010": "missing_raw",
        "p1#aaa#000044#000100": "too_short",
        "table.csv:11": "duplicate_row",
    }
    assert (manifest.num_train, manifest.num_test, manifest.num_failures) == (3, 2, 5)


@pytest.mark.usefixtures("inline")
def test_too_many_failures_end_the_run_and_keep_what_is_done(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [LINES[0], *(line(f"gone{i}", 0, 10, "train", "p") for i in range(2))]
    metadata = write_table(tmp_path / "table.csv", lines)
    out = tmp_path / "out"
    with pytest.raises(RunFailed, match="2 of 3 items failed: 2 x missing_raw") as failed:
        preprocess(job(out, metadata=metadata, raw=raw))
    assert failed.value.code == "too_many_failures"
    assert len(failures_of(out)) == 2
    assert not (out / "manifest.parquet").exists()
    monkeypatch.setattr("tasks.preprocess.fetched_ahead", None)  # nothing is cut again
    manifest = preprocess(job(out, metadata=metadata, raw=raw, max_failed_fraction=0.7))
    assert (manifest.num_train, manifest.num_failures) == (1, 2)


@pytest.mark.usefixtures("inline")
def test_no_clip_at_all_fails_whatever_is_allowed(raw: Path, tmp_path: Path) -> None:
    metadata = write_table(tmp_path / "table.csv", [line("gone", 0, 10, "train", "p")])
    with pytest.raises(RunFailed, match="not one clip") as failed:
        preprocess(job(tmp_path / "o", metadata=metadata, raw=raw, max_failed_fraction=1.0))
    assert failed.value.code == "no_output"


def test_wrong_input_says_so_before_any_work(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        preprocess(job(tmp_path / "out", metadata=tmp_path / "none.csv", raw=raw))
    no_fps = write_table(tmp_path / "bad.csv", LINES, header=HEADER.replace("fps", "rate"))
    with pytest.raises(ConfigError, match="column missing: fps"):
        preprocess(job(tmp_path / "out", metadata=no_fps, raw=raw))
    (tmp_path / "empty").mkdir()
    for videos in (tmp_path / "empty", tmp_path / "none", tmp_path / "*.mp4"):
        with pytest.raises(ConfigError, match="no video") as nothing:
            preprocess(job(tmp_path / "out", videos=videos))
        assert nothing.value.code == "nothing_to_do"
    with pytest.raises(ConfigError, match="PNG images only"):
        storage = {"layout": "folders", "image_format": "jpeg"}
        preprocess(job(tmp_path / "out", videos=raw, storage=storage))
    assert not (tmp_path / "out").exists()


def test_dry_run_writes_nothing(raw: Path, table: Path, tmp_path: Path) -> None:
    plan = preprocess(job(tmp_path / "out", metadata=table, raw=raw), dry_run=True)
    assert (plan.num_train, plan.num_test, plan.num_frames) == (3, 2, 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("inline")
def test_video_that_goes_away_while_we_work(
    raw: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import preprocess as module

    some = tmp_path / "raw"
    shutil.copytree(raw, some)
    original = module.fetched_ahead

    def late(*args: object, **kwargs: object) -> object:
        (some / "bbb.mp4").unlink(missing_ok=True)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "fetched_ahead", late)
    preprocess(job(tmp_path / "out", metadata=table, raw=some))
    assert codes_of(tmp_path / "out") == {"p2#bbb#000008#000040": "missing_raw"}


@pytest.mark.usefixtures("inline")
def test_full_disk_ends_the_run(raw: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".work").write_text("in the way")  # as good as any error of the disk
    with pytest.raises(StorageError):
        preprocess(job(out, metadata=table, raw=raw))


# --- videos without a table ------------------------------------------------------------------


@pytest.mark.usefixtures("inline")
def test_folder_of_videos_of_every_kind(raw: Path, tmp_path: Path) -> None:
    from PIL import Image

    videos = tmp_path / "videos"
    (videos / "walk").mkdir(parents=True)
    (videos / "nothing").mkdir()
    shutil.copy(raw / "aaa.mp4", videos / "ann#1.mp4")
    shutil.copy(raw / "bbb.mp4", videos / "ann#2.mp4")
    (videos / "broken.mp4").write_text("<html>")
    (videos / "notes.txt").write_text("not a video")
    for i, frame in enumerate(film(5, 20)):
        (videos / "walk" / f"{i}.png").write_bytes(encode_png(frame))
    stack = np.concatenate([frame[:, :64] for frame in film(6, 12)], axis=1)
    (videos / "stack.png").write_bytes(encode_png(stack))
    images = [Image.fromarray(frame) for frame in film(7, 16)]
    images[0].save(videos / "wave.gif", save_all=True, append_images=images[1:], duration=100)
    out = tmp_path / "out"
    preprocess(job(out, videos=videos, clips={"max_frames": 24, "test_fraction": 0.4}))
    dataset = open_dataset(str(out))
    assert {clip.name: (clip.num_frames, clip.identity, clip.fps) for clip in dataset.records} == {
        "ann#1#000000#000024": (24, "ann", 24.0),
        "ann#1#000024#000048": (24, "ann", 24.0),
        "ann#2#000000#000024": (24, "ann", 24.0),
        "ann#2#000024#000048": (24, "ann", 24.0),
        "walk": (20, "walk", 25.0),
        "stack": (12, "stack", 25.0),
        "wave": (16, "wave", 10.0),
    }
    assert codes_of(out) == {"broken": "not_media", "nothing": "no_frames"}
    split = {clip.identity: clip.partition for clip in dataset.records}
    assert set(split.values()) == {"train", "test"}
    again = tmp_path / "again"
    preprocess(job(again, videos=f"{videos}/*", clips={"max_frames": 24, "test_fraction": 0.4}))
    assert (out / "manifest.parquet").read_bytes() == (again / "manifest.parquet").read_bytes()


@pytest.mark.usefixtures("inline")
def test_folders_of_the_original_code_go_out_and_come_back(
    made: tuple[Path, DatasetManifest], raw: Path, table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "folders"
    manifest = preprocess(job(out, metadata=table, raw=raw, storage={"layout": "folders"}))
    assert sorted(p.name for p in (out / "train").iterdir()) == NAMES[2:]
    assert sorted(p.name for p in (out / "test").iterdir()) == NAMES[:2]
    images = sorted((out / "train" / NAMES[2]).iterdir())
    assert [p.name for p in images][:2] == ["0000000.png", "0000001.png"]
    folders, shards = open_dataset(str(out)), open_dataset(str(made[0]))
    assert manifest.dataset_id == made[1].dataset_id
    for mine, theirs in zip(folders.records, shards.records, strict=True):
        assert (mine.name, mine.sha256, mine.num_frames) == (
            theirs.name,
            theirs.sha256,
            theirs.num_frames,
        )
        np.testing.assert_array_equal(folders.read(mine), shards.read(theirs))
    # Read again as a folder of videos with its splits.
    back = tmp_path / "back"
    preprocess(job(back, videos=out))
    dataset = open_dataset(str(back))
    assert [(c.name, c.partition, c.identity) for c in dataset.records] == [
        (c.name, c.partition, c.identity) for c in shards.records
    ]
    for mine, theirs in zip(dataset.records, shards.records, strict=True):
        np.testing.assert_array_equal(dataset.read(mine), shards.read(theirs))


@pytest.mark.usefixtures("inline")
def test_folders_are_completed_and_changed_in_place(
    raw: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    some = write_table(tmp_path / "some.csv", LINES[:3])
    folders = {"layout": "folders"}
    preprocess(job(out, metadata=some, raw=raw, storage=folders))
    first = out / "train" / NAMES[2] / "0000000.png"
    time_ns = first.stat().st_mtime_ns
    cut = recorded_cuts(monkeypatch)
    preprocess(job(out, metadata=table, raw=raw, storage=folders))
    assert sorted(cut) == ["-cc", "d d"]
    assert first.stat().st_mtime_ns == time_ns
    preprocess(job(out, metadata=some, raw=raw, storage=folders, clips={"size_px": 16}))
    dataset = Dataset.from_folder(out)
    assert [dataset.read(clip).shape[1] for clip in dataset.records] == [16, 16, 16]
    assert not (out / "test").exists()


@pytest.mark.usefixtures("inline")
def test_change_of_layout(raw: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifests = [
        preprocess(job(out, metadata=table, raw=raw, storage={"layout": layout}))
        for layout in ("shards", "folders", "shards")
    ]
    assert len({manifest.dataset_id for manifest in manifests}) == 1
    assert [clip.name for clip in open_dataset(str(out)).records] == NAMES
    assert list(out.rglob("*.png")) == []


# --- the internal media ----------------------------------------------------------------------


def test_dev_table_becomes_the_expected_clips(dev_data: Path, tmp_path: Path) -> None:
    with (dev_data / "metadata/expected_chunks.csv").open() as file:
        expected = [e for e in csv.DictReader(file) if e["table"] == "taichi"]
    metadata = dev_data / "metadata/taichi-like-metadata.csv"
    clips = {"size_px": 64, "min_frames": 16, "fit": "stretch"}
    manifest = preprocess(
        job(tmp_path / "out", metadata=metadata, raw=dev_data / "raw", clips=clips)
    )
    assert (manifest.num_train + manifest.num_test, manifest.num_failures) == (18, 0)
    assert manifest.num_frames == sum(int(e["n_frames"]) for e in expected)


def test_bad_folder_of_the_dev_data(dev_data: Path, tmp_path: Path) -> None:
    """One row for each bad file, with its code, and the good ones are made."""
    with (dev_data / "bad/cases.csv").open() as file:
        cases = {
            Path(c["file"]).name.removesuffix(".mp4").removesuffix(".gif"): c
            for c in csv.DictReader(file)
            if c["kind"] in {"video", "folder"}
        }
    out = tmp_path / "out"
    settings = {"clips": {"min_frames": 16}, "max_failed_fraction": 0.9}
    preprocess(job(out, videos=dev_data / "bad", **settings))
    codes, names = codes_of(out), {clip.name for clip in open_dataset(str(out)).records}
    for name, case in cases.items():
        verdict = case["expected_verdict"]
        if verdict == "accept":
            assert name in names and name not in codes
        elif verdict == "accept_partial" or (verdict == "either" and name in codes):
            assert codes[name] == case["reason_code"]
        elif verdict == "reject":
            assert (codes[name], name in names) == (case["reason_code"], False)
    assert len(codes) == len(failures_of(out))


# --- object storage --------------------------------------------------------------------------


def test_everything_in_object_storage(
    made: tuple[Path, DatasetManifest], raw: Path, table: Path, s3: str
) -> None:
    """Table, raw videos and dataset in S3: the same bytes as in folders."""
    store = open_store(s3)
    store.put_file("table.csv", table)
    for video in raw.iterdir():
        store.put_file(f"raw/{video.name}", video)
    one = job(f"{s3}/data", metadata=f"{s3}/table.csv", raw=f"{s3}/raw")
    manifest = preprocess(one)
    assert manifest.dataset_id == made[1].dataset_id
    there = {info.key: store.get(f"data/{info.key}") for info in store.child("data").list()}
    here = tree_of(made[0])
    assert there.keys() == here.keys()
    places = {"stats.json", "index.html", "videos.parquet"}  # these know where they are
    assert [key for key in here if here[key] != there[key] and key not in places] == []
    assert preprocess(one) == manifest
    dataset = open_dataset(f"{s3}/data")
    for clip, same in zip(dataset.records, open_dataset(str(made[0])).records, strict=True):
        assert clip == same
        np.testing.assert_array_equal(dataset.read(clip, [0, -1]).shape[1:], (32, 32, 3))


def test_videos_and_folders_in_object_storage(raw: Path, s3: str) -> None:
    store = open_store(s3)
    store.put_file("in/train/aaa.mp4", raw / "aaa.mp4")
    for i, frame in enumerate(film(5, 12)):
        store.put(f"in/test/walk/{i}.png", encode_png(frame))
    preprocess(job(f"{s3}/out", videos=f"{s3}/in", storage={"layout": "folders"}))
    dataset = open_dataset(f"{s3}/out")
    assert {c.name: (c.partition, c.num_frames) for c in dataset.records} == {
        "walk": ("test", 12),
        "aaa": ("train", 48),
    }
    for clip in dataset.records:
        assert dataset.read(clip, [-1]).shape == (1, 32, 32, 3)


def test_bucket_that_is_not_there(raw: Path, table: Path, s3: str) -> None:
    with pytest.raises(StorageError) as missing:
        preprocess(job("s3://no-such-bucket/data", metadata=table, raw=raw))
    assert missing.value.code == "no_bucket"
