"""Datasets looked at, checked, and moved out and in again: what comes back is what went out."""

from __future__ import annotations

import csv
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from kpmask.config import Cluster, ExportJob, ImportJob, PreprocessJob, validated
from kpmask.data.dataset import Dataset
from kpmask.data.shards import ShardWriter
from kpmask.errors import ConfigError, DatasetError, RunFailed
from kpmask.media.encode import encode
from kpmask.records import ClipRecord, Failure, as_dict
from tasks.dataset import open_dataset
from tasks.export import ExportManifest, export_dataset
from tasks.imports import import_dataset
from tasks.manifest import read_json, read_table, write_json, write_table
from tasks.preprocess import preprocess
from tasks.storage import open_store
from tasks.verify import Verified, dataset_info, verify_dataset
from tests.support.inline import run_inline

ONE = Cluster(num_workers=1)
STAGES = ("preprocess", "fetching", "export", "imports", "verify")
HEADER = "video_id,start,end,bbox,fps,width,height,partition,person_id"
LINES = [
    "aaa,0,24,0-0-96-64,24,96,64,train,p1",
    "aaa,24,48,0-0-96-64,24,96,64,train,p1",
    "b.b,8,40,0-0-64-64,24,96,64,train,p2",
    "d é,10,30,0-0-96-64,24,96,64,test,p4",
]


@pytest.fixture(autouse=True)
def _stages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run in this process, but in tests that ask for Ray: an actor a stage takes seconds."""
    if "ray_cluster" not in request.fixturenames:
        inline(monkeypatch)


def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STAGES:
        monkeypatch.setattr(f"tasks.{name}.run_items", run_inline)
        if name != "fetching":
            monkeypatch.setattr(f"tasks.{name}.ray_session", nullcontext)


def film(seed: int, count: int = 48) -> list[np.ndarray]:
    """A textured square that moves over a smooth background."""
    rng = np.random.default_rng(seed)
    square = rng.integers(64, 255, (8, 8, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    ramp = np.linspace(0, 90, 96, dtype=np.uint8)
    frames = []
    for i in range(count):
        frame = np.broadcast_to(ramp[None, :, None], (64, 96, 3)).copy()
        frame[16:48, i % 64 : i % 64 + 32] = square
        frames.append(frame)
    return frames


def made_dataset(folder: Path, **storage: object) -> Path:
    """A dataset of the ordinary preprocess job."""
    (folder / "raw").mkdir(parents=True)
    for i, name in enumerate(["aaa", "b.b", "d é"]):
        encode(folder / "raw" / f"{name}.mp4", film(i), fps=Fraction(24))
    table = folder / "table.csv"
    table.write_text("\n".join([HEADER, *LINES, "x,0,9,0-0-9-9,24,96,64,train,p9"]) + "\n")
    job = {
        "out": str(folder / "data"),
        "metadata": str(table),
        "raw": str(folder / "raw"),
        "clips": {"size_px": 33, "min_frames": 8},
        "storage": {"clips_per_shard": 2, **storage},
        "download": {"enabled": False},
        "cluster": {"num_workers": 1},
    }
    preprocess(validated(PreprocessJob, job))
    return folder / "data"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        inline(monkeypatch)
        return made_dataset(tmp_path_factory.mktemp("exchange"))


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return shutil.copytree(made, tmp_path / "data")


def clips_of(data: Path | str) -> dict[str, ClipRecord]:
    return {clip.name: clip for clip in open_dataset(str(data)).records}


def frames_of(data: Path | str) -> dict[str, np.ndarray]:
    dataset = open_dataset(str(data))
    return {clip.name: dataset.read(clip) for clip in dataset.records}


def content_of(data: Path | str) -> dict[str, dict[str, Any]]:
    """All of the records but where the clips lie."""
    apart = {"shard", "row"}
    return {
        name: {k: v for k, v in as_dict(clip).items() if k not in apart}
        for name, clip in clips_of(data).items()
    }


def tree_of(folder: Path) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(files)}


def exported(data: Path | str, out: Path | str, form: str, **settings: object) -> ExportManifest:
    tree = {"data": str(data), "out": str(out), "form": form, "cluster": {"num_workers": 1}}
    return export_dataset(validated(ExportJob, tree | settings))


def imported(source: Path | str, out: Path | str, form: str, **settings: object) -> Path:
    tree = {"source": str(source), "out": str(out), "form": form, "cluster": {"num_workers": 1}}
    import_dataset(validated(ImportJob, tree | settings))
    return Path(out)


def codes_of(data: Path | str) -> dict[str, str]:
    failures = read_table(open_store(str(data)), "failures.parquet", Failure)
    return {failure.item: failure.code for failure in failures}


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "metadata.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- info ------------------------------------------------------------------------------------


def test_info_counts_what_the_manifest_lists(made: Path) -> None:
    found = dataset_info(str(made))
    clips = list(clips_of(made).values())
    by_split = {split.partition: split for split in found.splits}
    for partition in ("train", "test"):
        mine = [clip for clip in clips if clip.partition == partition]
        split = by_split[partition]
        assert split.num_clips == len(mine)
        assert split.num_identities == len({clip.identity for clip in mine})
        assert split.num_videos == len({clip.video_id for clip in mine})
        assert split.num_frames == sum(clip.num_frames for clip in mine)
        assert split.seconds == pytest.approx(sum(clip.num_frames / 24 for clip in mine))
    assert (found.fps, found.sizes_px, found.image_format) == ({"24": 4}, {"33x33": 4}, "png")
    assert found.num_frames == (20, 32)
    assert found.failures == {"missing_raw": 1}
    shards = [path for path in made.rglob("*.arrow") if "train" in str(path) or "test" in str(path)]
    assert found.size_bytes == sum(path.stat().st_size for path in shards)
    assert found.dataset_id == json.loads((made / "stats.json").read_text())["dataset_id"]


def test_info_of_a_dataset_that_was_made_before_versions(data: Path) -> None:
    (data / "changes.json").unlink(missing_ok=True)
    found = dataset_info(str(data))
    assert (found.version, found.changes) == (None, None)
    with pytest.raises(DatasetError, match="no finished dataset"):
        dataset_info(str(data / "train"))


# --- verify ----------------------------------------------------------------------------------


def verified(data: Path | str) -> Verified:
    return verify_dataset(str(data), cluster=ONE)


def problems_of(data: Path | str) -> dict[str, str]:
    return {problem.item: problem.code for problem in verified(data).problems}


def test_verify_finds_nothing_wrong_with_what_was_made(made: Path) -> None:
    before = tree_of(made)
    found = verified(made)
    assert found.problems == () and found.leftovers == ()
    assert (found.num_clips, found.num_checked, found.num_hashed) == (4, 4, 4)
    assert found.num_frames == 24 + 24 + 32 + 20
    assert tree_of(made) == before


def shard_of(data: Path, name: str) -> Path:
    return data / clips_of(data)[name].shard


NAME = "p1#aaa#000000#000024"


def test_verify_finds_a_flipped_bit(data: Path) -> None:
    shard = shard_of(data, NAME)
    raw = bytearray(shard.read_bytes())
    image = next(Dataset.from_folder(data).read_encoded(clips_of(data)[NAME], [3]).__iter__())
    at = bytes(raw).index(image) + len(image) // 2
    raw[at] ^= 4
    shard.write_bytes(raw)
    assert problems_of(data)[NAME] == "damaged_file"


def test_verify_finds_frames_that_are_others(data: Path) -> None:
    """Valid shards with other images: only the checksum tells."""
    clip = clips_of(data)[NAME]
    shard = data / clip.shard
    dataset = Dataset.from_folder(data)
    rows = sorted((c for c in dataset.records if c.shard == clip.shard), key=lambda c: c.row)
    images = {c.clip_id: dataset.read_encoded(c) for c in rows}
    images[clip.clip_id][0] = images[clip.clip_id][1]
    shard.unlink()
    with ShardWriter(shard) as writer:
        for c in rows:
            writer.add(c.clip_id, c.fps, images[c.clip_id])
    assert problems_of(data) == {NAME: "wrong_frames"}
    with ShardWriter(shard) as writer:
        for c in rows:
            writer.add(c.clip_id, c.fps, images[c.clip_id][: 5 if c == clip else None])
    assert problems_of(data) == {NAME: "wrong_length"}
    with ShardWriter(shard) as writer:
        for c in rows:
            writer.add(c.clip_id, c.fps + (c == clip), images[c.clip_id])
    assert problems_of(data) == {NAME: "wrong_row"}


def test_verify_finds_shards_that_are_missing_cut_or_left_over(data: Path) -> None:
    (data / "train" / "shard-00ff.arrow").write_bytes(b"of a run that was killed")
    found = verified(data)
    assert found.problems == () and found.leftovers == ("train/shard-00ff.arrow",)
    cut, gone = shard_of(data, NAME), shard_of(data, "p4#d é#000010#000030")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    gone.unlink()
    problems = {problem.item: problem for problem in verified(data).problems}
    assert problems[str(cut.relative_to(data))].code == "damaged_file"
    assert problems[str(gone.relative_to(data))].code == "missing_file"
    assert "p4#d é#000010#000030" in problems[str(gone.relative_to(data))].cause


def test_verify_holds_the_tables_against_each_other(data: Path) -> None:
    store = open_store(str(data))
    clips = list(clips_of(data).values())
    changed = [*clips[:-1], clips[-1].__class__(**{**as_dict(clips[-1]), "identity": "p4"})]
    changed.append(changed[0])
    write_table(store, "manifest.parquet", changed, ClipRecord)
    stats = read_json(store, "stats.json")
    write_json(store, "stats.json", stats | {"num_failures": 7})
    found = [(problem.item, problem.code) for problem in verified(data).problems]
    assert ("p4", "split_leak") in found
    assert (changed[0].name, "duplicate_name") in found
    assert (changed[0].name, "duplicate_clip") in found
    causes = " ".join(p.cause for p in verified(data).problems if p.item == "stats.json")
    assert all(name in causes for name in ("dataset_id", "num_failures is 7", "num_frames"))


def test_verify_says_what_it_cannot_check_of_jpeg(tmp_path: Path) -> None:
    data = made_dataset(tmp_path / "jpeg", image_format="jpeg")
    found = verified(data)
    assert found.problems == ()
    assert (found.num_checked, found.num_hashed) == (4, 0)
    assert dataset_info(str(data)).image_format == "jpeg"


def test_verify_reads_the_layout_of_folders(tmp_path: Path) -> None:
    data = made_dataset(tmp_path / "folders", layout="folders")
    assert verified(data).problems == ()
    (data / "train" / NAME / "0000099.png").write_bytes(b"")
    (data / "train" / NAME / "0000003.png").unlink()
    found = verified(data)
    assert [(p.item, p.code) for p in found.problems] == [(NAME, "missing_file")]
    assert found.leftovers == (f"train/{NAME}/0000099.png",)


# --- out and in again ------------------------------------------------------------------------


LOSSLESS: list[tuple[str, dict[str, object]]] = [
    ("folders", {}),
    ("mp4", {"lossless": True}),
    ("webdataset", {}),
    ("webdataset", {"media": "mp4", "lossless": True}),
]


@pytest.mark.parametrize(("form", "settings"), LOSSLESS, ids=lambda v: str(v))
def test_lossless_forms_come_back_as_the_same_dataset(
    made: Path, tmp_path: Path, form: str, settings: dict[str, object]
) -> None:
    said = exported(made, tmp_path / "out", form, **settings)
    assert said.lossless and (said.num_train, said.num_test, said.num_frames) == (3, 1, 100)
    back = imported(tmp_path / "out", tmp_path / "back", form)
    assert content_of(back) == content_of(made)
    assert verified(back).problems == ()
    assert dataset_info(str(back)).dataset_id == dataset_info(str(made)).dataset_id
    assert codes_of(back) == {}


def test_folders_are_those_of_the_original_code(made: Path, tmp_path: Path) -> None:
    exported(made, tmp_path / "out", "folders", partition="train")
    assert not (tmp_path / "out" / "test").exists()
    files = sorted(p.name for p in (tmp_path / "out" / "train" / NAME).iterdir())
    assert files == [f"{i:07d}.png" for i in range(24)]
    wanted = frames_of(made)[NAME]
    for i, name in enumerate(files):
        found = np.asarray(Image.open(tmp_path / "out" / "train" / NAME / name))
        assert np.array_equal(found, wanted[i])


@pytest.mark.parametrize("form", ["mp4", "webdataset"])
def test_lossy_videos_are_as_near_as_the_table_says(made: Path, tmp_path: Path, form: str) -> None:
    said = exported(made, tmp_path / "out", form, media="mp4", crf=12)
    rows = {row["name"]: row for row in rows_of(tmp_path / "out")}
    back = imported(tmp_path / "out", tmp_path / "back", form)
    wanted, found = frames_of(made), frames_of(back)
    assert found.keys() == wanted.keys()
    worst = []
    for name, frames_THWC in wanted.items():
        assert found[name].shape == frames_THWC.shape  # 33 px, which 4:2:0 pads to 34
        error = (found[name].astype(float) - frames_THWC) ** 2
        psnr_db = 10 * np.log10(255**2 / error.mean())
        assert psnr_db == pytest.approx(float(rows[name]["psnr_db"]), abs=1e-6)
        worst.append(psnr_db)
    assert min(worst) == pytest.approx(said.min_psnr_db)
    assert min(worst) > 26  # hard content: colours change with every pixel or two
    before, after = content_of(made), content_of(back)
    for name, values in after.items():
        assert values["clip_id"] != before[name]["clip_id"]  # other frames: another clip
        for what in ("partition", "identity", "video_id", "fps", "start_s", "end_s", "crop_px"):
            assert values[what] == before[name][what]
    assert verified(back).problems == ()


# The reader leaves its files open.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tars_are_read_by_webdataset(made: Path, tmp_path: Path) -> None:
    exported(made, tmp_path / "out", "webdataset", max_samples=2)
    names = sorted(p.name for p in (tmp_path / "out").glob("*.tar"))
    assert names == ["test-000000.tar", "train-000000.tar", "train-000001.tar"]
    urls = [str(tmp_path / "out" / name) for name in names]
    wanted, num_samples = frames_of(made), 0
    reader = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8")
    for sample in reader:
        record = sample["json"]
        clip = clips_of(made)[record["name"]]
        assert (record["fps"], record["partition"], record["identity"]) == (
            *(clip.fps, clip.partition, clip.identity),
        )
        keys = sorted(key for key in sample if key.endswith(".png"))
        found = np.stack([sample[key] for key in keys])
        assert np.array_equal(found, wanted[record["name"]])
        num_samples += 1
    assert num_samples == 4
    del reader, sample
    gc.collect()


def test_tars_are_the_same_bytes_and_within_their_limits(made: Path, tmp_path: Path) -> None:
    limit = 60_000
    for out in ("a", "b"):
        exported(made, tmp_path / out, "webdataset", max_tar_bytes=limit)
    a, b = tree_of(tmp_path / "a"), tree_of(tmp_path / "b")
    tars = [name for name in a if name.endswith(".tar")]
    assert len(tars) > 2
    for name in tars:
        assert a[name] == b[name]
        with tarfile.open(fileobj=io.BytesIO(a[name])) as tar:
            members = tar.getmembers()
        samples = {member.name.split(".")[0] for member in members}
        assert len(a[name]) <= limit + 10240 or len(samples) == 1
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}


def test_jpeg_goes_out_as_it_is_stored(tmp_path: Path) -> None:
    data = made_dataset(tmp_path / "jpeg", image_format="jpeg")
    exported(data, tmp_path / "tars", "webdataset")
    exported(data, tmp_path / "folders", "folders")
    clip = clips_of(data)[NAME]
    stored = open_dataset(str(data)).read_encoded(clip, [5])[0]
    with tarfile.open(tmp_path / "tars" / "train-000000.tar") as tar:
        file = tar.extractfile(f"{clip.clip_id}.0000005.jpg")
        assert file is not None and file.read() == stored
    back = imported(tmp_path / "folders", tmp_path / "back", "folders")
    for name, frames_THWC in frames_of(data).items():
        assert np.array_equal(frames_of(back)[name], frames_THWC)


# --- resume ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "settings"), LOSSLESS, ids=lambda v: str(v))
def test_a_rerun_writes_what_is_not_there_whole(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    settings: dict[str, object],
) -> None:
    out = tmp_path / "out"
    said = exported(made, out, form, **settings, max_samples=1)
    before = tree_of(out)
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert not any(".work" in name for name in before)
    with monkeypatch.context() as patched:
        patched.setattr("tasks.export.run_items", None)  # nothing is written
        assert exported(made, out, form, **settings, max_samples=1) == said
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == times
    media = sorted(p for p in out.rglob("*") if p.suffix in {".png", ".mp4", ".tar"})
    media[0].unlink()
    media[-1].write_bytes(b"short")
    todo: list[str] = []
    with monkeypatch.context() as patched:
        record_items(patched, todo)
        assert exported(made, out, form, **settings, max_samples=1) == said
    assert tree_of(out) == before
    assert 1 <= len(set(todo)) <= 2


def record_items(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    from tasks import export as module

    original: Callable[..., Iterator[object]] = module.run_items

    def recording(items: list[Any], *args: object, **kwargs: object) -> Iterator[object]:
        names.extend(clip.name for item in items for clip in item.clips)
        return original(items, *args, **kwargs)

    monkeypatch.setattr(module, "run_items", recording)


def test_an_export_follows_its_dataset(made: Path, data: Path, tmp_path: Path) -> None:
    """Another form and other clips in the same place leave nothing of the old ones."""
    out = tmp_path / "out"
    exported(data, out, "mp4")
    (out / "train" / "mine.mp4").write_bytes(b"not of an export")
    exported(data, out, "folders", partition="test")
    left = {str(p.relative_to(out)) for p in out.rglob("*.mp4")}
    assert left == {"train/mine.mp4"}
    said = json.loads((out / "export.json").read_text())
    assert (said["form"], said["num_train"], said["num_test"]) == ("folders", 0, 1)


NUM_CLIPS = 24  # enough to be killed among them
KILLED = """
import sys
from kpmask.config import ExportJob, ImportJob, validated
from tasks.export import export_dataset
from tasks.imports import import_dataset
name, form, source, out = sys.argv[1:]
tree = {"out": out, "form": form, "cluster": {"num_workers": 1}}
if name == "export":
    export_dataset(validated(ExportJob, tree | {"data": source}))
else:
    import_dataset(validated(ImportJob, tree | {"source": source}))
"""


def killed_after(pattern: str, count: int, name: str, form: str, source: Path, out: Path) -> int:
    """Run a job, and kill its processes once so many files match; how many there were."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, name, form, str(source), str(out)],
        cwd=Path(__file__).parents[2],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob(pattern))) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return len(list(out.glob(pattern)))


@pytest.mark.slow
def test_killed_half_way_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = many_clips(tmp_path)
    out = tmp_path / "out"
    done = killed_after(".work/*/clips/done/*.json", 3, "export", "mp4", data, out)
    assert not (out / "export.json").exists()
    todo: list[str] = []
    record_items(monkeypatch, todo)
    exported(data, out, "mp4")
    assert len(todo) == NUM_CLIPS - done
    exported(data, tmp_path / "whole", "mp4")
    mine, whole = tree_of(out), tree_of(tmp_path / "whole")
    assert mine.pop("export.json") != whole.pop("export.json")  # these hold the place
    assert mine == whole
    back = tmp_path / "back"
    killed_after(".work/*/results/*.json", 3, "import", "mp4", out, back)
    assert not (back / "manifest.parquet").exists()
    imported(out, back, "mp4")
    imported(out, tmp_path / "again", "mp4")
    assert content_of(back) == content_of(tmp_path / "again")
    assert not list(back.glob(".work/**/*.*"))


def many_clips(folder: Path) -> Path:
    """A dataset with a shard for each clip."""
    (folder / "videos" / "train").mkdir(parents=True)
    for i in range(NUM_CLIPS):
        encode(folder / "videos/train" / f"v{i:02d}.mp4", film(i, 16), fps=25.0)
    storage = {"clips_per_shard": 1}
    return imported(folder / "videos", folder / "data", "mp4", storage=storage)


# --- what others made ------------------------------------------------------------------------


def test_folders_and_videos_of_others(tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    for split, names in (("train", ["ann#1", "ann#2", "bob"]), ("test", ["cid#1"])):
        for name in names:
            (source / split / name).mkdir(parents=True)
            for i, frame in enumerate(film(len(name), 4)):
                Image.fromarray(frame).save(source / split / name / f"{i}.jpg", quality=95)
    strip = np.concatenate([frame[:, :64] for frame in film(9, 5)], axis=1)
    Image.fromarray(strip).save(source / "test" / "dee.png")
    (source / "train" / "notes.txt").write_text("foreign")
    (source / "train" / "bob" / "9.jpg").write_bytes(b"\xff\xd8\xff no picture")
    data = imported(source, tmp_path / "data", "folders", fps=12.5)
    clips = clips_of(data)
    assert {name: (c.identity, c.partition, c.fps) for name, c in clips.items()} == {
        "ann#1": ("ann", "train", 12.5),
        "ann#2": ("ann", "train", 12.5),
        "cid#1": ("cid", "test", 12.5),
        "dee": ("dee", "test", 12.5),
    }
    assert codes_of(data) == {"train/bob": "decode_errors", "train/notes.txt": "foreign_file"}
    assert np.array_equal(frames_of(data)["dee"], np.stack([f[:, :64] for f in film(9, 5)]))
    assert clips["ann#1"].motion > 0 and clips["ann#1"].look  # measured as preprocess does
    assert verified(data).problems == ()
    assert dataset_info(str(data)).version == 1


def test_clips_are_cut_to_size_when_asked(tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    source.mkdir()
    for i in range(6):
        encode(source / f"v{i}.mp4", film(i, 4), fps=30.0)
    data = imported(source, tmp_path / "data", "mp4", size_px=32, test_fraction=0.4)
    clips = clips_of(data)
    assert {(c.width_px, c.height_px, c.crop_px) for c in clips.values()} == {
        (32, 32, (16, 0, 80, 64))
    }
    assert {c.partition for c in clips.values()} == {"train", "test"}
    wanted = np.stack([frame[::2, 16:80:2] for frame in film(2, 4)]).astype(int)
    assert np.abs(frames_of(data)["v2"] - wanted).mean() < 8


def test_an_identity_in_both_splits_stays_in_test(tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    for split, name in (("train", "ann#1"), ("train", "bob#1"), ("test", "ann#2")):
        (source / split).mkdir(parents=True, exist_ok=True)
        encode(source / split / f"{name}.mp4", film(1, 4), fps=25.0)
    data = imported(source, tmp_path / "data", "mp4")
    assert {c.name: c.partition for c in clips_of(data).values()} == {
        "ann#2": "test",
        "bob#1": "train",
    }
    assert codes_of(data) == {"ann#1": "bad_row"}


def test_rows_that_lie_are_refused(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported(made, out, "folders")
    rows = rows_of(out)
    names = [row["name"] for row in rows]
    rows[0]["num_frames"] = "7"
    rows[1]["name"] = "../../etc"
    rows[2]["width_px"] = "20"
    rows[3]["fps"] = "nan"
    with (out / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    data = imported(out, tmp_path / "data", "folders")
    codes = codes_of(data)
    key = [f"{row['partition']}/{name}" for row, name in zip(rows, names, strict=True)]
    assert codes == {
        key[0]: "wrong_length",
        "metadata.csv:3": "path_escape",
        key[2]: "wrong_size",
        "metadata.csv:5": "bad_row",
    }
    assert set(clips_of(data)) == {names[1], names[3]}  # by their folders' names alone


def test_links_out_of_the_source_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "theirs" / "train"
    source.mkdir(parents=True)
    encode(source / "good.mp4", film(1, 4), fps=25.0)
    encode(tmp_path / "secret.mp4", film(2, 4), fps=25.0)
    (source / "evil.mp4").symlink_to(tmp_path / "secret.mp4")
    data = imported(source.parent, tmp_path / "data", "mp4")
    assert set(clips_of(data)) == {"good"}
    assert codes_of(data) == {"train/evil.mp4": "path_escape"}


def test_a_tar_of_others(tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    source.mkdir()
    encode(tmp_path / "a.mp4", film(1, 6), fps=25.0)
    video = (tmp_path / "a.mp4").read_bytes()
    pictures = [io.BytesIO() for _ in range(4)]
    for picture, frame in zip(pictures, film(2, 4), strict=True):
        Image.fromarray(frame).save(picture, "JPEG")
    members = [("x/ann#1.mp4", video), ("x/ann#1.json", b'{"fps": 8, "caption": "hi"}')]
    members += [(f"bob.{i}.jpg", p.getvalue()) for i, p in enumerate(pictures)]
    members += [("bob.json", b'{"fps": 8}'), ("bob.txt", b"caption"), ("cid.txt", b"x")]
    write_tar(source / "train-000.tar", members)
    (source / "old.tar.gz").write_bytes(b"\x1f\x8b")
    data = imported(source, tmp_path / "data", "webdataset")
    assert {n: (c.num_frames, c.fps) for n, c in clips_of(data).items()} == {
        "x__ann#1": (6, 25.0),
        "bob": (4, 8.0),
    }
    assert codes_of(data) == {"old.tar.gz": "foreign_file", "train-000.tar:*.txt": "foreign_file"}


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_a_truncated_tar_gives_the_clips_before_the_damage(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported(made, out, "webdataset")
    tar = out / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size * 2 // 3])
    data = imported(out, tmp_path / "data", "webdataset")
    kept = content_of(data)
    assert 2 <= len(kept) <= 3
    assert all(values == content_of(made)[name] for name, values in kept.items())
    assert codes_of(data) == {"train-000000.tar": "truncated"}


def test_what_cannot_be_imported_at_all(made: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="nothing of the form"):
        imported(tmp_path / "none", tmp_path / "data", "mp4")
    (tmp_path / "none" / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(RunFailed, match="not one clip"):
        imported(tmp_path / "none", tmp_path / "data", "mp4")
    assert codes_of(tmp_path / "data") == {"bad.mp4": "not_media"}
    exported(made, tmp_path / "out", "mp4")
    before = tree_of(made)
    with pytest.raises(ConfigError, match="not imported from"):
        imported(tmp_path / "out", made, "mp4")
    assert tree_of(made) == before


def test_an_import_that_has_nothing_new_does_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    exported(made, out, "mp4")
    imported(out, data, "mp4")
    before = tree_of(data)
    with monkeypatch.context() as patched:
        patched.setattr("tasks.imports.run_items", None)
        imported(out, data, "mp4")
    assert tree_of(data) == before
    (out / "train" / f"{NAME}.mp4").unlink()
    imported(out, data, "mp4")
    assert len(clips_of(data)) == 3
    found = dataset_info(str(data))
    assert found.changes is not None
    assert (found.version, found.changes.clips_removed, found.changes.clips_kept) == (2, 1, 3)
    assert verified(data).problems == () and verified(data).leftovers == ()


def test_damaged_clips_are_failures_of_an_export(data: Path, tmp_path: Path) -> None:
    shard_of(data, "p4#d é#000010#000030").unlink()
    for form in ("folders", "mp4", "webdataset"):
        said = exported(data, tmp_path / form, form)
        assert (said.num_train, said.num_test, said.num_failures) == (3, 0, 1)
        assert codes_of(tmp_path / form) == {"p4#d é#000010#000030": "missing_file"}
        again = exported(data, tmp_path / form, form)
        assert again == said and (tmp_path / form / "export.json").exists()


def test_dry_runs_write_nothing(made: Path, tmp_path: Path) -> None:
    job = validated(ExportJob, {"data": str(made), "out": str(tmp_path / "out"), "form": "mp4"})
    planned = export_dataset(job, dry_run=True)
    assert (planned.num_train, planned.num_test, planned.num_frames) == (3, 1, 100)
    exported(made, tmp_path / "mp4", "mp4")
    tree = {"source": str(tmp_path / "mp4"), "out": str(tmp_path / "out"), "form": "mp4"}
    found = import_dataset(validated(ImportJob, tree), dry_run=True)
    assert (found.num_train, found.num_test, found.num_failures) == (3, 1, 0)
    assert not (tmp_path / "out").exists()


# --- object storage --------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_cluster")
def test_everything_in_object_storage(made: Path, s3: str, tmp_path: Path) -> None:
    exported(made, f"{s3}/tars", "webdataset", max_samples=1)
    data = f"{s3}/data"
    tree = {"source": f"{s3}/tars", "out": data, "form": "webdataset"}
    import_dataset(validated(ImportJob, tree | {"cluster": {"num_workers": 1}}))
    assert content_of(data) == content_of(made)
    assert verified(data).problems == ()
    assert dataset_info(data).dataset_id == dataset_info(str(made)).dataset_id
    exported(data, f"{s3}/folders", "folders")
    store = open_store(f"{s3}/folders")
    local = open_dataset(str(made)).read_encoded(clips_of(made)[NAME], [7])[0]
    assert store.get(f"train/{NAME}/0000007.png") == local
    exported(data, f"{s3}/folders", "folders", partition="test")
    assert list(store.list("train/")) == []
