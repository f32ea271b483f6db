"""Planning a catalog: inputs that are found, hashed and counted, and found again unread."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest

from kpmask.config import AnimateJob, Cluster, Credentials, MediaLimits
from kpmask.errors import StorageError
from kpmask.media import images
from kpmask.media.encode import encode
from tasks import catalog, hashes, inputs
from tasks.catalog import CatalogPlan, feature_id, feature_ids, planned_catalog
from tasks.globs import matching
from tasks.storage import open_store
from tests.support import big_catalog

NUM_FRAMES = {"long.mp4": 21, "short.mp4": 6, "frames": 9}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    big_catalog.write_media(folder)
    noise = np.random.default_rng(1).integers(0, 255, (21, 40, 48, 3), np.uint8)
    for name in ("long.mp4", "short.mp4"):
        encode(folder / name, noise[: NUM_FRAMES[name]], fps=25)
    (folder / "frames").mkdir()
    for number in range(NUM_FRAMES["frames"]):
        data = images.encode_png(noise[number])
        (folder / "frames" / f"{number}.png").write_bytes(data)
    (folder / "text.mp4").write_text("no video")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SETTLED_NS", 0)  # the files are new, and do not change in a tick
    return tmp_path / "cache" / "hashes.sqlite"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the content of each file or folder was read, by name."""
    counted: Counter[str] = Counter()
    original = inputs.content_digest

    def counting(path: Path) -> str:
        counted[path.name] += 1
        return original(path)

    for module in (catalog, inputs):
        monkeypatch.setattr(module, "content_digest", counting)
    return counted


def job_of(media: Path, **changed: Any) -> AnimateJob:
    values: dict[str, Any] = {
        "checkpoint": str(media / "w.safetensors"),
        "out": "unused",
        "credentials": Credentials(enabled=False),
        "limits": MediaLimits(min_side_px=16),
    }
    return AnimateJob(**(values | changed))


def table(folder: Path, *rows: str) -> str:
    path = folder / "catalog.csv"
    path.write_text("\n".join(["source,driving", *rows]))
    return str(path)


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    """Where each plan finds a folder of its own."""
    (tmp_path / "plans").mkdir()
    return tmp_path / "plans"


def planned(job: AnimateJob, folders: Path) -> Any:
    folder = folders / str(len(list(folders.iterdir())))
    folder.mkdir()
    return planned_catalog(job, folder)


def hashes_of(plan: CatalogPlan) -> dict[str, str]:
    items = list(plan.book.items())
    found = {item.source: item.source_sha256 for item in items}
    return found | {item.driving: item.driving_sha256 for item in items}


# --- what is found of an input ---------------------------------------------------------------


def ffmpeg_frames(path: Path) -> int:
    arguments = ["-nostdin", "-i", str(path), "-map", "0:v", "-f", "null", "-"]
    done = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), *arguments], capture_output=True, text=True, check=True
    )
    return int(done.stderr.rpartition("frame=")[2].split()[0])


def test_driving_videos_are_counted_by_their_headers(media: Path, folders: Path) -> None:
    drivings = ["short.mp4", "frames", "long.mp4", "text.mp4"]
    job = job_of(media, catalog=table(media, *(f"s0.png,{name}" for name in drivings)))
    with planned(job, folders) as plan:
        assert [Path(item.driving).name for item in plan.book.items()] == [
            *("long.mp4", "frames", "short.mp4", "text.mp4")
        ]
        query = "SELECT name, num_frames FROM item"
        found = dict(plan.book._db.execute(query))
    assert found == {
        "s0--long": ffmpeg_frames(media / "long.mp4"),
        "s0--short": ffmpeg_frames(media / "short.mp4"),
        "s0--frames": len(list((media / "frames").iterdir())),
        "s0--text": 0,  # who reads it tells what is wrong
    }


def test_digests_are_those_of_the_contents(media: Path, folders: Path) -> None:
    rows = ["s0.png,long.mp4", "long.mp4,s0.png", "absent.png,long.mp4", "s0.png,../x.mp4"]
    with planned(job_of(media, catalog=table(media, *rows)), folders) as plan:
        assert hashes_of(plan) == {
            str(media / name): hashlib.sha256((media / name).read_bytes()).hexdigest()
            for name in ("s0.png", "long.mp4")
        }
        assert {f.item: (f.stage, f.code) for f in plan.book.failures()} == {
            "absent--long": ("catalog", "not_found"),
            "line 5": ("catalog", "path_escape"),
        }


def test_states_are_known_by_content_cut_and_settings(media: Path, folders: Path) -> None:
    path = media / "views.csv"
    path.write_text(
        "source,driving,crop,driving_crop,fps,motion\n"
        "s0.png,long.mp4,,,,\ns0.png,long.mp4,,,,relative\n"
        "s0.png,long.mp4,0-0-20-20,,,\ns0.png,long.mp4,,0-0-20-20,,\ns0.png,long.mp4,,,5,\n"
    )
    with planned(job_of(media, catalog=str(path)), folders) as plan:
        items = {item.name: item for item in plan.book.items()}
        assert len(items) == 5
        first, moved, cut, driven, slow = (feature_ids(items[name], "s") for name in sorted(items))
        stored = {
            (source, driving)
            for source, driving in plan.book._db.execute(
                "SELECT source_feature, driving_feature FROM item"
            )
        }
        expected = {feature_ids(item, plan.settings_digest) for item in items.values()}
    assert stored == expected
    assert first == moved
    assert cut[0] != first[0] and cut[1] == first[1]
    assert driven[0] == first[0] and driven[1] != first[1]
    assert slow[0] == first[0] and slow[1] not in {first[1], driven[1]}
    item = items[min(items)]
    sha256 = item.source_sha256
    assert feature_id("source", sha256, item, "s") != feature_id("source", sha256, item, "t")
    assert feature_id("source", sha256, item, "s") != feature_id("driving", sha256, item, "s")


# --- a second run ----------------------------------------------------------------------------


def test_a_rerun_reads_what_changed_only(
    media: Path, folders: Path, tmp_path: Path, read: Counter[str]
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "frames").mkdir()
    for name in ("s0.png", "s1.png", "long.mp4", "frames/0.png"):
        (own / name).write_bytes((media / name).read_bytes())
    rows = ["s0.png,long.mp4", "s1.png,long.mp4", "s0.png,frames"]
    job = job_of(media, catalog=table(own, *rows))
    with planned(job, folders) as plan:
        first, items = hashes_of(plan), list(plan.book.items())
    assert read == {"s0.png": 1, "s1.png": 1, "long.mp4": 1, "frames": 1, "0.png": 1}
    read.clear()
    with planned(job, folders) as plan:
        assert (hashes_of(plan), list(plan.book.items())) == (first, items)
    assert read == {}
    (own / "s1.png").write_bytes((media / "s2.png").read_bytes())
    (own / "frames" / "1.png").write_bytes((media / "s2.png").read_bytes())
    os.utime(own / "long.mp4")  # touched: read again, and the same
    with planned(job, folders) as plan:
        second = hashes_of(plan)
    assert read == {"s1.png": 1, "long.mp4": 1, "frames": 1, "0.png": 1, "1.png": 1}
    changed = {Path(uri).name for uri in first if first[uri] != second[uri]}
    assert changed == {"s1.png", "frames"}


def test_an_image_that_is_known_is_counted_when_it_drives(
    media: Path, folders: Path, read: Counter[str]
) -> None:
    with planned(job_of(media, catalog=table(media, "long.mp4,v0.mp4")), folders):
        assert read == {"long.mp4": 1, "v0.mp4": 1}
    with planned(job_of(media, catalog=table(media, "v0.mp4,long.mp4")), folders) as plan:
        assert plan.book._one("SELECT num_frames FROM item") == 21
    assert read == {"long.mp4": 1, "v0.mp4": 1}


def test_what_changes_while_it_is_read_is_not_kept(
    media: Path, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "s.png"
    image.write_bytes((media / "s0.png").read_bytes())
    original = catalog.content_digest

    def overtaken(path: Path) -> str:
        found = original(path)
        if path == image:
            image.write_bytes((media / "s1.png").read_bytes() + b"more")
        return found

    job = job_of(media, catalog=table(tmp_path, f"s.png,{media}/v0.mp4"))
    with monkeypatch.context() as patched:
        patched.setattr(catalog, "content_digest", overtaken)
        with planned(job, folders) as plan:
            before = hashes_of(plan)[str(image)]
    with planned(job, folders) as plan:
        assert hashes_of(plan)[str(image)] == original(image) != before


def test_without_a_cache_all_is_read_again(
    media: Path, folders: Path, cache: Path, read: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    job = job_of(media, catalog=table(media, "s0.png,v0.mp4"))
    with planned(job, folders) as plan:
        first = hashes_of(plan)
    cache.write_bytes(b"no table of ours " * 1000)
    for end in ("-wal", "-shm"):
        cache.with_name(cache.name + end).unlink(missing_ok=True)
    with planned(job, folders) as plan:
        assert hashes_of(plan) == first
    assert read == {"s0.png": 2, "v0.mp4": 2}
    assert "hashes.sqlite cannot be used" in caplog.text


def test_objects_are_fetched_once(
    s3: str, media: Path, folders: Path, read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3)
    for name in ("s0.png", "long.mp4", "frames/0.png", "frames/1.png"):
        store.put_file(name, media / name)
    rows = [f"{s3}/s0.png,{s3}/long.mp4", f"{s3}/s0.png,{s3}/frames", f"{s3}/absent.png,x"]
    job = job_of(media, catalog=table(folders.parent, *rows))
    with planned(job, folders) as plan:
        first = hashes_of(plan)
        assert {f.code for f in plan.book.failures()} == {"not_found"}
    assert first[f"{s3}/long.mp4"] == catalog.content_digest(media / "long.mp4")
    read.clear()

    def refused(self: object, key: str) -> Path:
        raise AssertionError(f"{key} was fetched again")

    with monkeypatch.context() as patched:
        patched.setattr("tasks.s3.S3Store.local", refused)
        with pytest.raises(AssertionError, match="absent"), planned(job, folders):
            pass
        job = job_of(media, catalog=table(folders.parent, *rows[:2]))
        with planned(job, folders) as plan:
            assert hashes_of(plan) == first
    assert read == {}
    store.put_file("s0.png", media / "s1.png")
    with planned(job, folders) as plan:
        assert hashes_of(plan)[f"{s3}/s0.png"] == catalog.content_digest(media / "s1.png")


def test_a_store_at_fault_ends_planning(media: Path, folders: Path, s3: str) -> None:
    rows = [f"s3://no-such-bucket-here/{i}.png,v0.mp4" for i in range(500)]
    with pytest.raises(StorageError), planned(job_of(media, catalog=table(media, *rows)), folders):
        pass


def test_a_store_that_is_away_is_waited_for(
    media: Path, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals: Counter[str] = Counter()
    original = hashes.version

    def refusing(uri: str) -> str | None:
        refusals[Path(uri).name] += 1
        if refusals[Path(uri).name] <= 2:
            raise StorageError("away", subject=uri, code="unavailable", retryable=True)
        return original(uri)

    monkeypatch.setattr(hashes, "version", refusing)
    job = job_of(media, catalog=table(media, "s0.png,v0.mp4"))
    with planned(job, folders) as plan:
        assert plan.book.counts() == (1, 1, 1, 0)
    assert min(refusals.values()) > 2
    refusals.clear()
    job = job_of(media, catalog=table(media, "s0.png,v0.mp4"), cluster=Cluster(outage_s=0.01))
    refusals.update({"s0.png": -100})
    with pytest.raises(StorageError, match="away"), planned(job, folders):
        pass


# --- globs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("folders", [True, False])
@pytest.mark.parametrize(
    "pattern",
    ["", "*", "**", "*.png", "**/*.png", "deep/*", "deep/**/?.mp4", "*/*/*", "deep", "a.png", "x*"],
)
def test_a_store_matches_as_a_folder_does(
    pattern: str, folders: bool, s3: str, tmp_path: Path
) -> None:
    for key in ("a.png", "b.mp4", ".h.png", "deep/1.png", "deep/er/1.png", "deep/er/2.mp4"):
        path = tmp_path / "in" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        open_store(f"{s3}/in").put(key, b"x")
    found = [
        [uri.removeprefix(root) for uri in matching(f"{root}/{pattern}", folders=folders)]
        for root in (f"{tmp_path}/in", f"{s3}/in")
    ]
    # A path has no folder of its own inside: pathlib's `**` counts the first one, too.
    assert [uri for uri in found[0] if uri] == found[1]
