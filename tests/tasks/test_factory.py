"""The dataset factory over many runs, as its users have it: more rows, fewer, other settings, bad
tables, hosts that fail, disks that fill, clocks that jump, and kills at any moment.
"""

from __future__ import annotations

import dataclasses
import functools
import http.server
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from kpmask.config import PreprocessJob
from kpmask.errors import ConfigError, DatasetError, StorageError
from kpmask.media.encode import encode
from kpmask.media.images import encode_png
from kpmask.records import DatasetChanges
from tasks.dataset import open_dataset
from tasks.preprocess import preprocess, preprocess_with_changes
from tasks.retries import Retries
from tests.support.factory import (
    HEADER,
    codes_of,
    failures_of,
    filmed,
    job,
    line,
    placeless,
    recorded_cuts,
    started,
    tree_of,
    write_table,
)
from tests.support.hosts import Server, serving
from tests.support.inline import inline_stages

LINES = [
    line("aaa", 0, 24, "train", "p1"),
    line("aaa", 24, 48, "train", "p1"),
    line("bbb", 8, 40, "train", "p2"),
    line("ccc", 0, 48, "test", "p3"),
]
A1, A2 = "p1#aaa#000000#000024", "p1#aaa#000024#000048"
B, C = "p2#bbb#000008#000040", "p3#ccc#000000#000048"


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filmed(tmp_path_factory.mktemp("films"), ["aaa", "bbb", "ccc", "ddd"])


@pytest.fixture
def raw(films: Path, tmp_path: Path) -> Path:
    """A folder of videos of our own."""
    return Path(shutil.copytree(films, tmp_path / "raw"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    inline_stages(monkeypatch)


@pytest.fixture
def cuts(inline: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the videos that are cut, here and not in processes."""
    return recorded_cuts(monkeypatch)


def taken(names: list[str]) -> list[str]:
    """What was recorded since the last look."""
    found = sorted(names)
    names.clear()
    return found


def run(one: PreprocessJob) -> DatasetChanges:
    return preprocess_with_changes(one)[1]


def names_of(out: Path, version: int | None = None) -> list[str]:
    """The clips of a dataset, all of which can be read."""
    dataset = open_dataset(str(out), version=version)
    for clip in dataset.records:
        assert dataset.read(clip).shape == (clip.num_frames, clip.height_px, clip.width_px, 3)
    return [clip.name for clip in dataset.records]


def counts(changes: DatasetChanges) -> tuple[int, int, int, int, int, int, int]:
    """Clips added, removed and kept; videos added and removed; failures new and gone."""
    return dataclasses.astuple(changes)[2:9]


# --- more, less and other --------------------------------------------------------------------


def test_what_each_day_changes(raw: Path, tmp_path: Path, cuts: list[str]) -> None:
    out, table = tmp_path / "out", tmp_path / "table.csv"
    one = job(out, metadata=table, raw=raw, storage={"keep_versions": 1})
    (raw / "bbb.mp4").rename(tmp_path / "bbb.mp4")
    write_table(table, LINES[:3])
    assert counts(run(one)) == (2, 0, 0, 1, 0, 1, 0)
    assert (taken(cuts), codes_of(out)) == (["aaa", "bbb"], {B: "missing_raw"})
    before = tree_of(out)
    assert counts(run(one)) == (0, 0, 2, 0, 0, 0, 0)  # nothing new
    assert (cuts, tree_of(out)) == ([], before)
    # A file that lacked, a row more, a row that makes no sense, a row less.
    (tmp_path / "bbb.mp4").rename(raw / "bbb.mp4")
    write_table(table, [*LINES[1:], line("aaa", 5, 5, "train", "p1")])
    changes = run(one)
    assert counts(changes) == (2, 1, 1, 2, 0, 1, 1)
    assert taken(cuts) == ["aaa", "bbb", "ccc"]  # another row is asked of aaa
    assert json.loads((out / "changes.json").read_text()) == dataclasses.asdict(changes)
    assert names_of(out) == [C, A2, B]
    assert names_of(out, version=1) == [A1, A2]
    # Nobody wants aaa any more.
    write_table(table, LINES[2:])
    assert counts(run(one)) == (0, 1, 2, 0, 1, 0, 1)
    assert cuts == []
    assert names_of(out) == [C, B] and names_of(out, version=2) == [C, A2, B]
    with pytest.raises(DatasetError):
        open_dataset(str(out), version=1)
    history = json.loads((out / "versions.json").read_text())
    assert [(v["version"], v["num_clips"], v["num_failures"]) for v in history] == [
        (1, 2, 1),
        (2, 3, 1),
        (3, 2, 0),
    ]
    # As if there had never been anything else.
    again = tmp_path / "again"
    preprocess(one.model_copy(update={"out": str(again)}))
    assert (again / "manifest.parquet").read_bytes() == (out / "manifest.parquet").read_bytes()


def test_a_touched_file_is_cut_once_more_and_not_for_ever(
    raw: Path, tmp_path: Path, cuts: list[str]
) -> None:
    one = job(tmp_path / "out", metadata=write_table(tmp_path / "t.csv", LINES), raw=raw)
    run(one)
    before = tree_of(tmp_path / "out")
    for name in ("aaa", "bbb"):
        shutil.copyfile(raw / f"{name}.mp4", raw / "new")
        (raw / "new").replace(raw / f"{name}.mp4")
    assert sorted(set(taken(cuts))) == ["aaa", "bbb", "ccc"]
    assert counts(run(one))[:3] == (0, 0, 4)
    assert taken(cuts) == ["aaa", "bbb"]
    assert run(one).version == 1
    assert cuts == []
    after = tree_of(tmp_path / "out")
    assert [key for key in before | after if before.get(key) != after.get(key)] == [
        "videos.parquet"
    ]


def test_a_table_written_otherwise_changes_nothing(
    raw: Path, tmp_path: Path, cuts: list[str]
) -> None:
    out = tmp_path / "out"
    run(job(out, metadata=write_table(tmp_path / "t.csv", LINES), raw=raw))
    before, _ = tree_of(out), taken(cuts)
    (tmp_path / "other.csv").write_text(
        "\r\n".join([f"{HEADER},note", "", *(f"{row},x" for row in LINES[2:] + LINES[:2])])
    )
    # Rows of one video in another order would be another item; these are not.
    assert counts(run(job(out, metadata=tmp_path / "other.csv", raw=raw)))[:3] == (0, 0, 4)
    assert (cuts, tree_of(out)) == ([], before)


@pytest.mark.parametrize(
    "settings",
    [
        {"storage": {"image_format": "jpeg"}},
        {"clips": {"size_px": 48}},
        {"clips": {"max_frames": 12}},
        {"clips": {"test_identities": ["p1"]}},
        {"limits": {"max_frames": 1000}},
    ],
    ids=str,
)
def test_other_settings_make_what_they_would_have_made(
    settings: dict[str, object], raw: Path, tmp_path: Path, inline: None
) -> None:
    """Over the old dataset, and back again: no image of the other settings is left."""
    table = write_table(tmp_path / "t.csv", LINES)
    none: dict[str, object] = {}
    histories = {"a": [none], "b": [settings, none], "c": [settings], "d": [none, settings]}
    trees = []
    for part, history in histories.items():
        out = tmp_path / part / "out"
        for each in history:
            preprocess(job(out, metadata=table, raw=raw, **each))  # type: ignore[arg-type]
        tree = tree_of(out)
        trees.append({k: tree[k] for k in tree if k.endswith((".arrow", ".parquet", ".jpg"))})
    assert trees[0] == trees[1] and trees[2] == trees[3]


def test_settings_that_shape_no_clip_cut_nothing(
    raw: Path, tmp_path: Path, cuts: list[str]
) -> None:
    out, table = tmp_path / "out", write_table(tmp_path / "t.csv", LINES)
    run(job(out, metadata=table, raw=raw))
    taken(cuts)
    for settings in (
        {"storage": {"clips_per_shard": 3}},
        {"quality": {"duplicates": "drop"}},
        {"max_failed_fraction": 0.9},
        {"cluster": {"num_workers": 2}},
        {"retry": {"backoff_s": 1}},
    ):
        run(job(out, metadata=table, raw=raw, **settings))  # type: ignore[arg-type]
        assert cuts == [], settings
        assert len(names_of(out)) == 4


def test_downloads_switched_on_cut_once_more_and_not_for_ever(
    raw: Path, tmp_path: Path, cuts: list[str]
) -> None:
    out, table = tmp_path / "out", write_table(tmp_path / "t.csv", LINES)
    on = {"download": {"enabled": True}}
    run(job(out, metadata=table, raw=raw))
    taken(cuts)
    run(job(out, metadata=table, raw=raw, **on))
    taken(cuts)
    run(job(out, metadata=table, raw=raw, **on))
    assert cuts == []


def test_raw_videos_may_go_once_they_are_cut(raw: Path, tmp_path: Path, cuts: list[str]) -> None:
    out, table = tmp_path / "out", write_table(tmp_path / "t.csv", LINES)
    run(job(out, metadata=table, raw=raw))
    before = tree_of(out)
    shutil.rmtree(raw)
    taken(cuts)
    assert run(job(out, metadata=table, raw=raw)).version == 1
    assert (cuts, tree_of(out)) == ([], before)


def test_a_dataset_among_its_videos_is_none_of_them(
    films: Path, tmp_path: Path, cuts: list[str]
) -> None:
    """Previews and clips of the layout of folders are pictures, too."""
    for layout in ("shards", "folders"):
        videos = tmp_path / layout
        shutil.copytree(films, videos)
        one = job(videos / "out", videos=videos, storage={"layout": layout})
        first = run(one)
        assert taken(cuts) == ["aaa", "bbb", "ccc", "ddd"]
        assert (run(one).clips_added, first.version, cuts) == (0, 1, [])
        assert len(names_of(videos / "out")) == 4
        with pytest.raises(ConfigError, match="in one folder"):
            run(job(videos, videos=videos))


def test_clips_of_one_name_are_one_and_a_failure(raw: Path, tmp_path: Path, inline: None) -> None:
    """A piece of a long row may have the name of a short one; a video that of another's piece."""
    long, short = line("aaa", 0, 48, "train", "p1"), "aaa,0,24,0-0-64-64,24,96,64,train,p1"
    out, table = tmp_path / "out", write_table(tmp_path / "t.csv", [long, short, LINES[2]])
    for layout in ("shards", "folders"):
        storage = {"layout": layout}
        preprocess(job(out, metadata=table, raw=raw, clips={"max_frames": 24}, storage=storage))
        assert names_of(out) == [A1, A2, "p2#bbb#000008#000024", "p2#bbb#000024#000040"]
        assert codes_of(out) == {A1: "duplicate_name"}
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(raw / "aaa.mp4", videos / "v.mp4")
    shutil.copy(raw / "bbb.mp4", videos / "v#000000#000024.mp4")
    clips = {"max_frames": 24, "test_identities": ["nobody"]}
    preprocess(job(tmp_path / "own", videos=videos, clips=clips))
    names = names_of(tmp_path / "own")
    assert len(names) == len(set(names)) == 4


# --- what repeats ----------------------------------------------------------------------------


def test_of_repeated_clips_the_tested_one_stays_and_others_come_back(
    raw: Path, tmp_path: Path, cuts: list[str]
) -> None:
    shutil.copy(raw / "aaa.mp4", raw / "zzz.mp4")
    out, table = tmp_path / "out", tmp_path / "t.csv"
    one = job(out, metadata=table, raw=raw, quality={"duplicates": "drop"})
    train, test = line("aaa", 0, 24, "train", "p1"), line("zzz", 0, 24, "test", "p9")
    write_table(table, [train, test, LINES[2]])
    run(one)
    assert names_of(out) == ["p9#zzz#000000#000024", B]
    (failure,) = failures_of(out)
    assert (failure.item, failure.stage, failure.code) == (A1, "quality", "duplicate")
    assert "p9#zzz#000000#000024" in failure.cause
    taken(cuts)
    assert run(one).version == 1  # a clip that lies nowhere is no reason to do anything
    assert cuts == []
    write_table(table, [train, LINES[2]])
    assert counts(run(one)) == (1, 1, 1, 1, 1, 0, 1)
    assert taken(cuts) == ["aaa"]
    assert names_of(out) == [A1, B]
    # And back; then without the raw video of the one that would come back.
    write_table(table, [train, test, LINES[2]])
    run(one)
    assert (taken(cuts), names_of(out)) == (["zzz"], ["p9#zzz#000000#000024", B])
    (raw / "aaa.mp4").unlink()
    write_table(table, [train, LINES[2]])
    run(one)
    assert names_of(out) == [B] and codes_of(out) == {A1: "missing_raw"}


def pattern(seed: int) -> list[np.ndarray]:
    """Blocks of colour that move to the right."""
    colours = np.random.default_rng(seed).integers(0, 255, (8, 12, 3))
    blocks = np.kron(colours, np.ones((8, 8, 1))).astype(np.uint8)
    return [np.roll(blocks, i, axis=1) for i in range(48)]


def test_near_repeats_are_found_across_videos(raw: Path, tmp_path: Path, inline: None) -> None:
    """Also where one is tested on, which then stays."""
    for name, seed, crf in (("mmm", 0, 18), ("nnn", 0, 30), ("ooo", 1, 18)):
        encode(raw / f"{name}.mp4", pattern(seed), fps=Fraction(24), crf=crf)
    splits = {"mmm": "train", "nnn": "test", "ooo": "train"}
    rows = [line(name, 0, 24, split, name) for name, split in splits.items()]
    table, out = write_table(tmp_path / "t.csv", rows), tmp_path / "out"
    drop = job(out, metadata=table, raw=raw, quality={"duplicates": "drop"})
    preprocess(drop)
    (failure,) = failures_of(out)
    assert (failure.item, failure.code) == ("mmm#mmm#000000#000024", "near_duplicate")
    assert "nnn#nnn#000000#000024" in failure.cause
    assert failure.value is not None and 0 < failure.value <= drop.quality.max_hash_bits
    assert len(names_of(out)) == 2
    preprocess(
        job(out, metadata=table, raw=raw, quality={"duplicates": "drop", "max_hash_bits": 0})
    )
    assert len(names_of(out)) == 3 and codes_of(out) == {}


# --- bad tables ------------------------------------------------------------------------------


def test_a_table_as_strangers_write_it(raw: Path, tmp_path: Path, inline: None) -> None:
    """Byte-order mark, CRLF, quotes, blank lines, and every wrong row there is."""
    (raw / "bbb.mp4").rename(raw / "b,b.mp4")
    rows = [
        '"aaa","0","24",0-0-96-64,24,96,64,train,p1',
        '"b,b",8,40,0-0-96-64,24.0,96,64,train,"p,2"',
        "",
        '"b,b",8,40,0-0-96-64,24.0,96,64,train,"p,2"',  # 5
        "aaa,40,400,0-0-96-64,24,96,64,train,p1",  # 6: 8 frames, past the end
        "aaa,44,90,0-0-96-64,24,96,64,train,p1",  # 7: 4 frames, past the end
        "aaa,900,990,0-0-96-64,24,96,64,train,p1",  # 8
        "aaa,0,24,80-0-176-64,24,96,64,train,p1",  # 9: mostly outside
        "aaa,0,24,20-0-116-64,24,96,64,train,p1",  # 10: partly outside, and 2's name
        "ccc,0,24,20-0-116-64,24,96,64,train,p3",  # 11: partly outside
        "aaa,0,24,0-0-96-64,0,96,64,train,p1",  # 12
        "aaa,0,24,0-0-96-64,-24,96,64,train,p1",  # 13
        "aaa,0,24,0-0-96-64,24,96,64,test,p2x,too,many",  # 14
        "aaa,24,0,0-0-96-64,24,96,64,train,p1",  # 15
        "../aaa,0,24,0-0-96-64,24,96,64,train,p1",  # 16
        "gone,0,24,0-0-96-64,24,96,64,train,p7",  # 17
        'aaa,0,24,0-0-96-64,24,96,64,train,"p1',  # 18: never closed
        "ddd,0,48,0-0-96-64,24,96,64,test,p4",  # 19
    ]
    table = tmp_path / "table.csv"
    table.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([HEADER, *rows]).encode())
    out = tmp_path / "out"
    manifest = preprocess(job(out, metadata=table, raw=raw, max_failed_fraction=0.8))
    assert names_of(out) == [
        "p4#ddd#000000#000048",
        "p,2#b,b#000008#000040",
        A1,
        "p1#aaa#000040#000400",
        "p3#ccc#000000#000024",
    ]
    assert codes_of(out) == {
        "table.csv:5": "duplicate_row",
        "p1#aaa#000044#000090": "too_short",
        "p1#aaa#000900#000990": "too_short",
        "table.csv:9": "bad_row",
        "table.csv:10": "duplicate_name",
        "table.csv:12": "bad_row",
        "table.csv:13": "bad_row",
        "table.csv:14": "bad_row",
        "table.csv:15": "bad_row",
        "table.csv:16": "path_escape",
        "p7#gone#000000#000024": "missing_raw",
        "table.csv:18": "bad_row",
    }
    clips = {clip.name: clip for clip in open_dataset(str(out)).records}
    assert clips["p1#aaa#000040#000400"].num_frames == 8
    assert clips["p1#aaa#000040#000400"].num_frames_lost > 0
    assert clips["p3#ccc#000000#000024"].clamped
    assert manifest.num_failures == 12


@pytest.mark.parametrize(
    ("name", "num_clips", "codes"),
    [
        ("quirks.csv", 2, {"quirks.csv:3": "duplicate_row"}),
        ("missing_raw.csv", 1, {"AAAAAAAAAAA#000000#000090": "missing_raw"}),
        (
            "bad_rows.csv",
            0,
            {f"bad_rows.csv:{n}": "bad_row" for n in range(2, 9)}
            | {"bad_rows.csv:10": "path_escape"},
        ),
    ],
)
def test_bad_tables_of_the_dev_data(
    name: str,
    num_clips: int,
    codes: dict[str, str],
    dev_data: Path,
    tmp_path: Path,
    inline: None,
) -> None:
    rows = (dev_data / "bad/metadata" / name).read_bytes()
    table = tmp_path / name
    if not num_clips:  # one good row, without which there is no dataset
        rows += b"H-qCkneNGrZ,0,32,91-133-430-472,25,512,512,train\n"
    table.write_bytes(rows)
    out = tmp_path / "out"
    one = job(out, metadata=table, raw=dev_data / "raw", max_failed_fraction=0.95)
    preprocess(one)
    found = codes_of(out)
    clips = open_dataset(str(out)).records
    late = "H-qCkneNGrZ#000070#000200"  # of a video of 78 frames
    assert {item: code for item, code in found.items() if item != late} == codes
    assert len(clips) == max(num_clips, 1) + (name == "bad_rows.csv")
    if name == "bad_rows.csv":
        assert next(c for c in clips if c.name == late).num_frames == 8


# --- hosts that fail -------------------------------------------------------------------------


class Clock:
    """Seconds since 1970, as this machine has it."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tasks.preprocess.Retries", functools.partial(Retries, clock=clock))
    return clock


@pytest.fixture
def server(films: Path) -> Iterator[Server]:
    with serving((films / "aaa.mp4").read_bytes()) as server:
        yield server


def downloading(server: Server, **more: object) -> dict[str, object]:
    return {
        "enabled": True,
        "url_template": f"{server.url}/ok.mp4?{{video_id}}",
        "allow_private_hosts": True,
        "max_attempts": 1,
        "backoff_s": 0.01,
    } | more


@pytest.fixture
def failing(raw: Path, tmp_path: Path, server: Server) -> Callable[..., PreprocessJob]:
    """A job of two videos that are there and one whose host is busy for ever."""
    row = f"{line('zzz', 0, 24, 'train', 'p7')},{server.url}/busy.mp4"
    table = write_table(
        tmp_path / "t.csv", [*(f"{row}," for row in LINES), row], header=f"{HEADER},url"
    )

    def make(**retry: object) -> PreprocessJob:
        return job(
            tmp_path / "out",
            metadata=table,
            raw=raw,
            download=downloading(server),
            retry={"backoff_s": 100, "max_backoff_s": 1000} | retry,
        )

    return make


ZZZ = "p7#zzz#000000#000024"


def test_what_fails_twice_is_tried_again_when_its_time_has_come(
    failing: Callable[..., PreprocessJob],
    server: Server,
    clock: Clock,
    inline: None,
    tmp_path: Path,
) -> None:
    asked = server.counts
    changes = run(failing())
    assert (asked["/busy.mp4"], changes.retried, changes.waiting) == (1, 0, 0)
    assert codes_of(tmp_path / "out") == {ZZZ: "rate_limited"}
    changes = run(failing())  # at once
    assert (asked["/busy.mp4"], changes.retried, changes.waiting) == (2, 1, 0)
    before = tree_of(tmp_path / "out")
    for seconds in (0, 50, 99):
        clock.now_s = 1_700_000_000.0 + seconds
        changes = run(failing())
        assert (asked["/busy.mp4"], changes.retried, changes.waiting) == (2, 0, 1)
        assert tree_of(tmp_path / "out") == before
    clock.now_s += 2
    run(failing())
    assert asked["/busy.mp4"] == 3
    clock.now_s += 150  # the pause has doubled
    assert run(failing()).waiting == 1
    run(failing(backoff_s=0, max_attempts=0))  # --retry-now
    assert asked["/busy.mp4"] == 4
    # Until it is there.
    Path(tmp_path / "raw/zzz.mp4").write_bytes(server.video)
    changes = run(failing())
    assert (changes.clips_added, changes.failures_gone, changes.waiting) == (1, 1, 0)
    assert ZZZ in names_of(tmp_path / "out") and asked["/busy.mp4"] == 4
    assert not (tmp_path / "out/.state/retries.json").exists()


def test_what_fails_too_often_is_given_up(
    failing: Callable[..., PreprocessJob],
    server: Server,
    clock: Clock,
    inline: None,
) -> None:
    for _ in range(6):
        changes = run(failing(max_attempts=3))
        clock.now_s += 5000
    assert (server.counts["/busy.mp4"], changes.waiting) == (3, 1)
    run(failing(max_attempts=4))
    assert server.counts["/busy.mp4"] == 4


@pytest.mark.parametrize("jump_s", [-40e6, -500, 500, 40e6, 4e9])
def test_clocks_that_jump_stop_nothing(
    jump_s: float,
    failing: Callable[..., PreprocessJob],
    server: Server,
    clock: Clock,
    inline: None,
    tmp_path: Path,
) -> None:
    """Back or forth: what waits is tried at once or soon, and nothing else is done again."""
    run(failing())
    run(failing())
    before = placeless(tmp_path / "out")
    clock.now_s += jump_s
    tries = [(run(failing()), server.counts["/busy.mp4"])[1] for _ in range(2)]
    if jump_s == -500:  # it will be due as soon as by the old clock
        assert tries == [2, 2]
        clock.now_s += 700
        run(failing())
    assert server.counts["/busy.mp4"] in {3, 4}
    after = placeless(tmp_path / "out")
    before.pop(".state/retries.json"), after.pop(".state/retries.json")
    assert after == before


def test_a_round_that_mends_tries_no_host_again(
    failing: Callable[..., PreprocessJob],
    server: Server,
    clock: Clock,
    cuts: list[str],
    raw: Path,
    tmp_path: Path,
) -> None:
    """Where a kept clip goes, its twin's video is cut again, in a second round of the run."""
    shutil.copy(raw / "aaa.mp4", raw / "yyy.mp4")
    table, one = tmp_path / "t.csv", failing()
    one = one.model_copy(update={"quality": one.quality.model_copy(update={"duplicates": "drop"})})
    rows = table.read_text()
    table.write_text(rows + f"{line('yyy', 0, 24, 'test', 'p8')},\n")
    run(one)
    table.write_text(rows)
    taken(cuts), server.counts.clear()
    assert run(one).clips_added == 1
    assert taken(cuts) == ["aaa"] and server.counts["/busy.mp4"] == 1
    assert run(one).waiting == 1


# --- raw videos that are not kept ------------------------------------------------------------


def test_downloads_go_once_they_are_cut(server: Server, tmp_path: Path, cuts: list[str]) -> None:
    rows = [line(f"v{i:02d}", 0, 24, "train", f"p{i}") for i in range(12)]
    table, out = write_table(tmp_path / "t.csv", rows), tmp_path / "out"
    one = job(out, metadata=table, download=downloading(server, keep=False))
    assert run(one).clips_added == 12
    assert tree_of(out / "raw") == {} and len(names_of(out)) == 12
    assert len(taken(cuts)) == 12
    before, asked = tree_of(out), server.counts["/ok.mp4"]
    run(one)
    assert (cuts, tree_of(out), server.counts["/ok.mp4"]) == ([], before, asked)
    # What is lost is downloaded again, and nothing else.
    lost = next((out / "train").glob("*.arrow"))
    records = open_dataset(str(out)).records
    gone = [c.video_id for c in records if c.shard == f"train/{lost.name}"]
    lost.unlink()
    run(one)
    assert taken(cuts) == sorted(gone) and len(names_of(out)) == 12
    assert tree_of(out).keys() == before.keys()


def test_downloads_are_kept_beside_the_dataset(
    server: Server, tmp_path: Path, inline: None
) -> None:
    rows = [line(f"v{i}", 0, 24, "train", f"p{i}") for i in range(3)]
    out = tmp_path / "out"
    one = job(out, metadata=write_table(tmp_path / "t.csv", rows), download=downloading(server))
    run(one)
    assert sorted(p.name for p in (out / "raw").iterdir()) == ["v0.mp4", "v1.mp4", "v2.mp4"]
    server.counts.clear()
    for path in out.iterdir():  # a new dataset of the same videos
        if path.name != "raw":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(one)
    assert not server.counts and len(names_of(out)) == 3


# --- sources ---------------------------------------------------------------------------------


def utterance(person: str, video: str, boxes: dict[int, tuple[float, float, float, float]]) -> str:
    """A box file of VoxCeleb 2's: x, y, width and height as fractions, by frame at 25 a second."""
    head = f"Identity  : \t{person}\nReference : \t{video}\nOffset    : \t0\n"
    head += "FV Conf   : \t20.0\t(1)\nASD Conf  : \t5.0\n\nFRAME \tX \tY \tW \tH \n"
    lines = [" \t".join([f"{i:06d}", *map(str, box)]) + " \n" for i, box in boxes.items()]
    return head + "".join(lines)


def dotted(left: int, top: int, side: int) -> np.ndarray:
    """A grey frame of 96x64 px with a red square."""
    frame = np.full((64, 96, 3), 60, np.uint8)
    frame[top : top + side, left : left + side] = (230, 20, 20)
    return frame


def test_voxceleb_annotations_and_drawn_videos(tmp_path: Path, inline: None) -> None:
    """The clip is what is in the box: at another rate and with a hash among the persons."""
    raw, source, out = tmp_path / "raw", tmp_path / "txt", tmp_path / "out"
    raw.mkdir()
    frames = [dotted(24, 16, 32) if i < 50 else dotted(48, 16, 32) for i in range(100)]
    encode(raw / "vid.mp4", frames, fps=Fraction(50))  # two seconds
    quarter, half = 24 / 96, 48 / 96
    files = {
        "id1/vid/00001.txt": {i: (quarter, 0.25, 32 / 96, 0.5) for i in range(24)},
        "id1/vid/00002.txt": {i: (half, 0.25, 32 / 96, 0.5) for i in range(26, 50)},
        "id2/gone/00001.txt": {i: (0.1, 0.1, 0.3, 0.3) for i in range(20)},
        "id3/vid/00001.txt": {i: (quarter, 0.25, 32 / 96, 0.5) for i in range(2)},
    }
    for name, boxes in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        person, video, _ = name.split("/")
        (source / name).write_text(utterance(person, video, boxes))
    one = job(out, source="voxceleb2", metadata=source, raw=raw, clips={"test_identities": ["id3"]})
    preprocess(one)
    dataset = open_dataset(str(out))
    assert [(c.name, c.identity, c.partition, c.num_frames) for c in dataset.records] == [
        ("id1#vid#000000#000024", "id1", "train", 48),
        ("id1#vid#000026#000050", "id1", "train", 48),
    ]
    for clip in dataset.records:
        red_THW = dataset.read(clip)[..., 0]
        assert red_THW.mean() > 200  # nothing but the square
    assert codes_of(out) == {
        "id2#gone#000000#000020": "missing_raw",
        "id3#vid#000000#000002": "too_short",
    }


def test_nemo_videos_by_person(films: Path, tmp_path: Path, inline: None) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    for name, film_of in (("001_smile_1", "aaa"), ("001_smile_2", "bbb"), ("002_smile_1", "ccc")):
        shutil.copy(films / f"{film_of}.mp4", videos / f"{name}.mp4")
    preprocess(job(out, source="nemo", videos=videos, clips={"test_identities": ["002"]}))
    records = open_dataset(str(out)).records
    assert [(c.name, c.identity, c.partition) for c in records] == [
        ("002_smile_1", "002", "test"),
        ("001_smile_1", "001", "train"),
        ("001_smile_2", "001", "train"),
    ]


def trajectory(
    path: Path, *, robot: str = "sawyer", cameras: int = 2, num_frames: int = 31
) -> Path:
    """A file of RoboNet's, as h5py writes it; blue-green-red, as its attribute says."""
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_group("metadata").attrs.update({"robot": robot, "image_format": "BGR"})
        for camera in range(cameras):
            group = file.create_group(f"env/cam{camera}_video")
            for number in range(num_frames):
                frame = dotted(number + 18, 16 + 8 * camera, 16)[..., ::-1]
                group[f"frame{number}"] = np.frombuffer(encode_png(np.array(frame)), np.uint8)
    return path


def test_robonet_trajectories(tmp_path: Path, cuts: list[str]) -> None:
    """Of the wanted robot; cameras are clips; names repeat over folders and have a hash."""
    videos, out = tmp_path / "hdf5", tmp_path / "out"
    trajectory(videos / "a/traj0.hdf5")
    trajectory(videos / "b/traj0.hdf5", cameras=1)
    trajectory(videos / "lab#1_traj1.hdf5", cameras=1, num_frames=60)
    trajectory(videos / "kuka_traj2.hdf5", robot="kuka")
    trajectory(videos / "short.hdf5", num_frames=12, cameras=1)
    (videos / "broken.hdf5").write_bytes(b"\x89HDF\r\n\x1a\nbroken")
    (videos / "page.hdf5").write_text("<html>")
    settings = {"clips": {"max_frames": 30, "test_identities": ["lab"]}}
    one = job(out, source="robonet", videos=videos, max_failed_fraction=0.9, **settings)
    preprocess(one)
    records = open_dataset(str(out)).records
    assert [(c.name, c.partition, c.num_frames) for c in records] == [
        ("lab#1_traj1#cam0#000000#000030", "test", 30),
        ("lab#1_traj1#cam0#000030#000060", "test", 30),
        ("a__traj0.hdf5#cam0", "train", 30),
        ("a__traj0.hdf5#cam1", "train", 30),
        ("b__traj0.hdf5#cam0", "train", 30),
    ]
    red_TC = open_dataset(str(out)).read(records[0]).max(axis=(1, 2))
    assert (red_TC[:, 0] > 200).all() and (red_TC[:, 2] < 120).all()
    assert codes_of(out) == {
        "kuka_traj2": "filtered",
        "short#cam0": "too_short",
        "broken": "container_unreadable",
        "page": "not_media",
    }
    assert len(taken(cuts)) == 7
    assert run(one).version == 1 and cuts == []
    # What somebody removed is cut again, under whatever name.
    for shard in (out / "test").iterdir():
        shard.unlink()
    run(one)
    assert taken(cuts) == ["lab#1_traj1"] and len(names_of(out)) == 5


def test_a_moving_thing_is_followed(tmp_path: Path, inline: None) -> None:
    """No boxes: what moves is found, cut and shown in the middle of its clip."""
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    noise = np.random.default_rng(1).integers(0, 60, (128, 192, 3)).astype(np.uint8)
    frames = []
    for i in range(60):
        frame = noise.copy()
        frame[40:80, 50 + i // 2 : 90 + i // 2] = (240, 40, 40)
        frames.append(frame)
    encode(videos / "moves.mp4", frames, fps=Fraction(25))
    encode(videos / "still.mp4", [noise] * 60, fps=Fraction(25))
    subject = {"detector": "motion", "border": "move"}
    preprocess(job(out, videos=videos, subject=subject, max_failed_fraction=0.5))
    assert codes_of(out) == {"still": "no_subject"}
    (clip,) = open_dataset(str(out)).records
    left, top, right, bottom = clip.crop_px
    assert left <= 60 and right >= 105 and top <= 42 and bottom >= 78
    assert (right - left) < 120 and clip.num_frames > 40
    frames_THWC = open_dataset(str(out)).read(clip)
    assert (frames_THWC[:, 12:20, 12:20, 0].mean(axis=(1, 2)) > 150).mean() > 0.8


# --- disks -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no `mount` here")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def leave(folder: Path, free_bytes: int) -> None:
    """Fill a disk up to some free bytes."""
    filler = folder / "filler"
    filler.unlink(missing_ok=True)
    status = os.statvfs(folder)
    filler.write_bytes(bytes(max(status.f_bavail * status.f_frsize - free_bytes, 0)))


def no_space(error: StorageError) -> None:
    assert (error.code, error.retryable) == ("no_space", False)
    assert "no space left" in str(error) or "full" in str(error)
    assert "free some space" in error.hint  # the way out


def test_a_full_disk_under_the_dataset(
    raw: Path, tmp_path: Path, small_disk: Path, inline: None
) -> None:
    """Wherever it fills up: no space, and the way out; and then it goes on."""
    table = write_table(tmp_path / "t.csv", LINES)
    out = small_disk / "out"
    one = job(out, metadata=table, raw=raw)
    preprocess(one.model_copy(update={"out": str(tmp_path / "whole/out")}))
    whole = placeless(tmp_path / "whole/out")
    failed = 0
    for free_kib in (4, 24, 48, 72, 100, 128, 160, 200, 250, 300, 400):
        shutil.rmtree(out, ignore_errors=True)
        leave(small_disk, free_kib * 1024)
        try:
            preprocess(one)
        except StorageError as error:
            no_space(error)
            failed += 1
            assert not (out / "manifest.parquet").exists() or names_of(out)
            (small_disk / "filler").unlink()
            preprocess(one)
        assert placeless(out) == whole
    assert 5 <= failed < 11


def test_a_full_disk_under_temporary_files(
    raw: Path,
    tmp_path: Path,
    small_disk: Path,
    inline: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table, out = write_table(tmp_path / "t.csv", LINES), tmp_path / "out"
    one = job(out, metadata=table, raw=raw, storage={"image_format": "png"})
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    failed = 0
    for free_kib in (8, 40, 80, 100, 120, 140, 160, 200, 400):
        leave(small_disk, free_kib * 1024)
        try:
            preprocess(one)
        except StorageError as error:
            no_space(error)
            failed += 1
    assert 3 <= failed < 9 and len(names_of(out)) == 4
    (small_disk / "filler").unlink()
    assert list(small_disk.iterdir()) == []


@pytest.mark.usefixtures("ray_cluster")
def test_a_full_disk_found_by_a_worker(raw: Path, tmp_path: Path, small_disk: Path) -> None:
    """In a process of its own, which says so and is not blamed on the video."""
    table, out = write_table(tmp_path / "t.csv", LINES), small_disk / "out"
    leave(small_disk, 24 * 1024)
    with pytest.raises(StorageError) as full:
        preprocess(job(out, metadata=table, raw=raw))
    no_space(full.value)
    assert full.value.subject.startswith(str(small_disk))
    (small_disk / "filler").unlink()
    assert preprocess(job(out, metadata=table, raw=raw)).num_failures == 0
    assert len(names_of(out)) == 4


# --- killed and crowded ----------------------------------------------------------------------

# Ends by SIGKILL at an event of its own: the n-th of a stage, of reading, writing or removing.
RUN_AND_DIE = """
import os, signal, sys
from collections import Counter
from kpmask.config import PreprocessJob
from tasks.preprocess import preprocess
from tasks.storage import LocalStore
from tasks.workbook import Workbook

name, _, number = os.environ["DIE_AT"].partition(" ")
seen = Counter()

def tick(event):
    seen[event] += 1
    if event == name and seen[event] == int(number):
        os.kill(os.getpid(), signal.SIGKILL)

def ticking(event, method):
    def both(*args, **kwargs):
        tick(event)
        return method(*args, **kwargs)
    return both

Workbook.add_failures = ticking("rows", Workbook.add_failures)
LocalStore._publish = ticking("write", LocalStore._publish)
LocalStore.delete = ticking("delete", LocalStore.delete)
job = PreprocessJob.model_validate_json(sys.argv[1])
preprocess(job, on_progress=lambda progress: tick(progress.stage))
"""


@pytest.fixture
def cluster_environment(ray_cluster: None) -> dict[str, str]:
    """What a process needs to be a driver of the tests' Ray."""
    import ray

    settings = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    return settings | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten videos, of two clips each, one in the test split, and a table with a bad row."""
    folder = tmp_path_factory.mktemp("crowd")
    filmed(folder / "raw", [f"v{i}" for i in range(10)])
    lines = [
        line(f"v{i}", start, start + 24, "test" if i == 4 else "train", f"p{i}")
        for i in range(10)
        for start in (0, 24)
    ]
    write_table(folder / "table.csv", [*lines, line("gone", 0, 24, "train", "p"), lines[0]])
    return folder


def crowded(crowd: Path, out: Path) -> PreprocessJob:
    storage = {"clips_per_shard": 3, "keep_versions": 1}
    return job(out, metadata=crowd / "table.csv", raw=crowd / "raw", storage=storage)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_six_times_and_run_to_its_end(
    seed: int,
    crowd: Path,
    tmp_path: Path,
    cluster_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In each stage, at an event drawn by lot; the tree is as if nothing had happened."""
    rng = random.Random(seed)
    one = crowded(crowd, tmp_path / "killed/out")
    deaths = [
        f"rows {rng.randint(1, 2)}",
        f"preprocess {rng.randint(1, 4)}",
        f"preprocess {rng.randint(2, 5)}",
        f"shards {rng.randint(2, 6)}",
        rng.choice(["previews 1", "previews 2", f"write {rng.randint(2, 5)}"]),
        rng.choice([f"write {rng.randint(4, 9)}", f"delete {rng.randint(1, 12)}"]),
    ]
    for death in deaths:
        process = started(
            one, code=RUN_AND_DIE, environment=cluster_environment | {"DIE_AT": death}
        )
        assert process.wait(120) == -signal.SIGKILL, death
    inline_stages(monkeypatch)
    preprocess(one)
    whole = crowded(crowd, tmp_path / "whole/out")
    preprocess(whole)
    killed, expected = placeless(Path(one.out)), placeless(Path(whole.out))
    assert killed.keys() == expected.keys()
    assert [key for key in killed if killed[key] != expected[key]] == []


def test_three_processes_at_once_of_which_one_is_killed(
    crowd: Path,
    tmp_path: Path,
    cluster_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = crowded(crowd, tmp_path / "killed/out")
    processes = [
        started(one, code=RUN_AND_DIE, environment=cluster_environment | {"DIE_AT": death})
        for death in ("preprocess 3", "never", "never")
    ]
    codes = [process.wait(180) for process in processes]
    assert codes[0] in {0, -signal.SIGKILL} and codes[1:] == [0, 0]
    assert not (Path(one.out) / ".state").exists()
    inline_stages(monkeypatch)
    whole = crowded(crowd, tmp_path / "whole/out")
    preprocess(whole)
    assert placeless(Path(one.out)) == placeless(Path(whole.out))


def test_killed_folders_are_completed(
    raw: Path, tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of folders is changed in place: a kill costs no clip that is there already,
    be it in a folder or, of another layout, in a shard.
    """
    table = tmp_path / "t.csv"
    trees, cut = {}, {}
    for name, before in (("killed", "folders"), ("changed", "shards"), ("whole", "folders")):
        out = tmp_path / name / "out"
        one = job(out, metadata=table, raw=raw, storage={"layout": "folders"})
        write_table(table, LINES)
        preprocess(job(out, metadata=table, raw=raw, storage={"layout": before}))
        write_table(table, [*LINES[1:], line("ddd", 0, 24, "train", "p4")])
        with monkeypatch.context() as patch:
            if name != "whole":
                patch.setattr("tasks.preprocess.publish", killed_here)
                with pytest.raises(Killed):
                    preprocess(one)
                patch.undo()
                inline_stages(patch)
            cuts = recorded_cuts(patch)
            preprocess(one)
            cut[name] = taken(cuts)
        trees[name] = placeless(tmp_path / name / "out")
    assert cut == {"killed": [], "changed": [], "whole": ["aaa", "ddd"]}
    assert trees["killed"].keys() == trees["changed"].keys() == trees["whole"].keys()
    assert trees["killed"] == trees["whole"]
    assert trees["changed"].pop("versions.json") != trees["whole"].pop("versions.json")
    assert trees["changed"] == trees["whole"]
    assert len(names_of(tmp_path / "killed/out")) == 4


class Killed(BaseException):
    """As good as SIGKILL: nothing is written after it."""


def killed_here(*args: object, **kwargs: object) -> None:
    raise Killed


# --- the internal media ----------------------------------------------------------------------


class Fifths(http.server.BaseHTTPRequestHandler):
    """Files of a folder, by ranges; one request in five fails, by 503 and half way in turn."""

    folder: Path
    count = itertools.count()
    failed: Counter[str]

    def log_message(self, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        data = (self.folder / urllib.parse.unquote(self.path[1:])).read_bytes()
        number = next(self.count)
        if number % 10 == 0:
            self.failed["503"] += 1
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if self.headers["Range"] else 200)
        if self.headers["Range"]:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Type", "video/mp4")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{len(data)}"')
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        if number % 10 == 5:
            self.failed["closed"] += 1
            body = body[: len(body) // 2]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.mark.usefixtures("ray_cluster")
def test_the_same_dataset_by_files_and_by_a_host_that_fails(dev_data: Path, tmp_path: Path) -> None:
    """From the table: local files, and over HTTP where one request in five fails."""
    table = dev_data / "metadata/vox-like-metadata.csv"
    two = {"num_workers": 2}
    by_file = job(tmp_path / "file/out", metadata=table, raw=dev_data / "raw", cluster=two)
    preprocess(by_file)
    state = {"folder": dev_data / "raw", "count": itertools.count(), "failed": Counter()}
    handler = type("Handler", (Fifths,), state)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        download = {
            "enabled": True,
            "url_template": f"http://127.0.0.1:{server.server_port}/{{video_id}}.mp4",
            "allow_private_hosts": True,
            "backoff_s": 0.05,
        }
        by_http = job(tmp_path / "http/out", metadata=table, download=download, cluster=two)
        try:
            preprocess(by_http)
        finally:
            server.shutdown()
            thread.join()
    failed: Counter[str] = state["failed"]  # type: ignore[assignment]
    assert failed["503"] >= 1 and failed["closed"] >= 1
    trees = [placeless(tmp_path / name / "out") for name in ("file", "http")]
    for tree in trees:
        tree.pop("videos.parquet")  # says which files were read
    raw = {key: trees[1].pop(key) for key in list(trees[1]) if key.startswith("raw/")}
    assert len(raw) == 8
    assert all((dev_data / key).read_bytes() == data for key, data in raw.items())
    assert trees[0]["manifest.parquet"] == trees[1]["manifest.parquet"]
    assert trees[0] == trees[1]
    assert failures_of(by_http.out) == []
