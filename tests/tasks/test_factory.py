"""The dataset factory over many runs, as its users have it: more rows, fewer, other settings, bad
tables, hosts that fail, disks that fill, clocks that jump, and kills at any moment.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from kpmask.config import PreprocessJob
from kpmask.errors import DatasetError
from kpmask.media.encode import encode
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
