"""Catalogs and pairs end to end: against the animator itself, with damage, reruns and kills."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import av
import imageio_ffmpeg
import numpy as np
import pyarrow.parquet as pq
import pytest

from kpmask import Animator, provenance
from kpmask.config import AnimateJob, Cluster, Credentials, MediaLimits, MediaWorkers, Output
from kpmask.errors import ConfigError, MediaError, RunFailed, StorageError
from kpmask.media import decode, images
from kpmask.media.encode import encode
from kpmask.media.probe import probe
from kpmask.records import AnimationRecord, Failure, FeatureRecord, Progress, from_table
from tasks.animate import _fitting, animate_catalog, animate_pair, plan
from tasks.cluster import with_gpus
from tasks.globs import matching
from tasks.inputs import content_digest
from tasks.parts import read_parts
from tasks.render import JOURNAL, ModelWorker, RenderItem, WorkerSettings, features_of
from tasks.storage import ObjectStore, open_store
from tests.support import signers
from tests.support.catalogs import inline_catalogs, whole_plan
from tests.support.models import HEATMAP, SIDE_PX, save_weights

LIMITS = MediaLimits(min_side_px=16)


def some_frames(count: int, *, seed: int = 0, size_px: tuple[int, int] = (48, 40)) -> np.ndarray:
    """A bright square that wanders over stripes; width, height."""
    width_px, height_px = size_px
    frames = np.zeros((count, height_px, width_px, 3), np.uint8)
    frames[:, :, ::4] = 40 + 10 * seed
    for t in range(count):
        left, top = (3 * t + 5 * seed) % (width_px - 12), (5 * t + seed) % (height_px - 12)
        frames[t, top : top + 12, left : left + 12] = (250, 120 + 10 * (t % 8), 30 + 20 * seed)
    return frames


def add_sound(video: Path, out: Path, *, duration_s: float) -> Path:
    sine = f"sine=frequency=440:duration={duration_s}"
    arguments = ["-nostdin", "-v", "error", "-i", str(video), "-f", "lavfi", "-i", sine]
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), *arguments, "-c:v", "copy", "-c:a", "aac", str(out)],
        check=True,
        timeout=60,
    )
    return out


def cut_short(video: Path, out: Path) -> Path:
    """The first part of a file whose index is at its front."""
    data = video.read_bytes()
    out.write_bytes(data[: len(data) * 6 // 10])
    return out


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, images and driving videos."""
    folder = tmp_path_factory.mktemp("media")
    save_weights(folder / "w.safetensors")
    for number, size_px in enumerate([(48, 48), (40, 64)]):
        image = some_frames(1, seed=number + 3, size_px=size_px)[0]
        (folder / f"face{number}.png").write_bytes(images.encode_png(image))
    (folder / "text.png").write_text("no picture")
    encode(folder / "walk.mp4", some_frames(21), fps=12.5)
    encode(folder / "jump.mp4", some_frames(9, seed=1, size_px=(64, 64)), fps=25)
    encode(folder / "still.mp4", some_frames(1), fps=25)
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    encode(folder / "whole.mp4", noise, fps=25)
    cut_short(folder / "whole.mp4", folder / "cut.mp4")
    add_sound(folder / "walk.mp4", folder / "sound.mp4", duration_s=3)
    (folder / "frames").mkdir()
    for number, frame in enumerate(some_frames(5, seed=2)):
        (folder / "frames" / f"{number:03d}.png").write_bytes(images.encode_png(frame))
    return folder


def job_of(media: Path, out: Path | str, **changed: Any) -> AnimateJob:
    values: dict[str, Any] = {
        "checkpoint": str(media / "w.safetensors"),
        "out": str(out),
        "device": "cpu",
        "limits": LIMITS,
        "cluster": Cluster(num_workers=2),
    }
    return AnimateJob(**(values | changed))


def write_catalog(media: Path, name: str, text: str) -> str:
    path = media / name
    path.write_text(text)
    return str(path)


def by_name(out: Path) -> dict[str, AnimationRecord]:
    records = from_table(pq.read_table(out / "manifest.parquet"), AnimationRecord)
    return {record.name: record for record in records}


def failed(out: Path) -> dict[str, Failure]:
    return {f.item: f for f in from_table(pq.read_table(out / "failures.parquet"), Failure)}


def packets(path: Path) -> list[tuple[int | None, bytes]]:
    """A video without what surrounds it: two signatures of it differ."""
    with av.open(str(path)) as file:
        return [(p.pts, bytes(p)) for p in file.demux(video=0) if p.size]


def square_frames(path: Path) -> np.ndarray:
    """What the animator should see of a driving video."""
    found = probe(path, LIMITS)
    side_px = min(found.width_px, found.height_px)
    left, top = (found.width_px - side_px) // 2, (found.height_px - side_px) // 2
    crop_px = (left, top, left + side_px, top + side_px)
    frames = decode.frames(path, LIMITS, crop_px=crop_px, size_px=(SIDE_PX, SIDE_PX))
    return np.stack([frame.rgb_HWC for frame in frames])


# --- a catalog -------------------------------------------------------------------------------

CATALOG = """source,driving,name,motion,adapt_scale,best_frame,audio
face0.png,walk.mp4,plain,,,,
face1.png,walk.mp4,relative,relative,true,true,
face0.png,sound.mp4,loud,,,,true
face1.png,jump.mp4,,,,,
face0.png,frames,folder,,,,
face1.png,cut.mp4,damaged,,,,
text.png,walk.mp4,no image,,,,
face0.png,still.mp4,one frame,,,,
face0.png,absent.mp4,absent,,,,
face0.png,../walk.mp4,outside,,,,
face0.png,walk.mp4,plain,,,,
face0.png,walk.mp4,plain again,,,,
"""


@pytest.fixture(scope="module")
def finished(media: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A catalog that was run, and the progress that it reported."""
    out = tmp_path_factory.mktemp("out") / "catalog"
    seen: list[Progress] = []
    job = job_of(media, out, catalog=write_catalog(media, "c.csv", CATALOG))
    manifest = animate_catalog(job, on_progress=seen.append)
    return job, out, manifest, seen


def test_a_catalog_makes_what_it_can_and_records_the_rest(finished: Any) -> None:
    _, out, manifest, _ = finished
    assert set(by_name(out)) == {"plain", "relative", "loud", "face1--jump", "folder", "damaged"}
    assert {name: failure.code for name, failure in failed(out).items()} == {
        "no_image": "not_media",
        "one_frame": "too_short",
        "absent": "not_found",
        "line 11": "path_escape",
        "line 12": "duplicate_name",
        "plain_again": "duplicate_row",
    }
    assert (manifest.num_items, manifest.num_failures) == (6, 6)
    assert manifest.num_frames == sum(r.num_frames for r in by_name(out).values())


def test_videos_are_those_of_the_animator(finished: Any, media: Path, tmp_path: Path) -> None:
    _, out, _, _ = finished
    animator = Animator.load(media / "w.safetensors", device="cpu")
    records = by_name(out)
    relative: dict[str, Any] = {"motion": "relative", "adapt_scale": True, "best_frame": True}
    cases: list[tuple[str, str, str, dict[str, Any]]] = [
        ("plain", "face0.png", "walk.mp4", {}),
        ("relative", "face1.png", "walk.mp4", relative),
        ("face1--jump", "face1.png", "jump.mp4", {}),
    ]
    for name, source, driving, options in cases:
        image = images.read_image(media / source, LIMITS)
        frames = animator.animate(image, square_frames(media / driving), **options)
        expected = encode(tmp_path / "e.mp4", frames, fps=probe(media / driving, LIMITS).fps)
        record = records[name]
        assert record.sha256 == expected.sha256, name
        assert packets(out / record.key) == packets(tmp_path / "e.mp4")
        assert (record.fps, record.num_frames) == (expected.fps, len(frames))


def test_sound_is_carried_over_when_asked_for(finished: Any) -> None:
    _, out, _, _ = finished
    records = by_name(out)
    assert probe(out / records["loud"].key, LIMITS).has_audio
    assert not probe(out / records["plain"].key, LIMITS).has_audio
    assert records["loud"].num_frames == records["plain"].num_frames == 21


def test_a_damaged_video_gives_its_good_frames(finished: Any) -> None:
    _, out, _, _ = finished
    record = by_name(out)["damaged"]
    assert 2 <= record.num_frames < 40
    assert record.num_frames + record.num_frames_lost == 40
    assert by_name(out)["plain"].num_frames_lost == 0


def test_each_input_is_encoded_once(finished: Any) -> None:
    _, _, _, seen = finished
    totals = {progress.stage: progress.total for progress in seen}
    # walk, sound, jump, frames, cut, still; face0, face1, text. Absent ones are never tried.
    assert totals["features"] == 9
    # Two animations are over because one of their features cannot be had.
    assert Counter(progress.stage for progress in seen) == {"features": 9, "render": 8}


def test_the_folder_holds_results_only_and_the_page_finds_them(finished: Any) -> None:
    _, out, _, _ = finished
    files = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    assert {f.name for f in files if f.parts[0] == "posters"} == {
        f"{record.item_id}.jpg" for record in by_name(out).values()
    }
    others = {str(f) for f in files if f.suffix != ".mp4" and len(f.parts) == 1}
    assert others == {"manifest.parquet", "failures.parquet", "summary.json", "index.html"}
    page = (out / "index.html").read_text()
    for record in by_name(out).values():
        assert record.key in page
    shown = [path for path in (out / "media").iterdir() if path.name in page]
    assert len(shown) == 2 + 5  # images, and driving videos that made something


def test_a_rerun_makes_what_is_lost_and_nothing_else(finished: Any) -> None:
    job, out, manifest, _ = finished
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    lost = by_name(out)["plain"].key
    video = packets(out / lost)
    (out / lost).unlink()
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*.mp4")}
    seen: list[Progress] = []
    assert animate_catalog(job, on_progress=seen.append) == manifest
    # What failed is tried again, and fails again.
    assert {p.total for p in seen if p.stage == "render"} == {3}
    assert [p.message for p in seen if p.stage == "render"][-1] == "2 failed"
    after = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    assert len(after[lost]) == len(before[lost])
    assert {**after, lost: b""} == {**before, lost: b""}
    assert packets(out / lost) == video
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_a_grid_is_every_image_by_every_video(
    ray_cluster: None, media: Path, tmp_path: Path
) -> None:
    job = job_of(
        media,
        tmp_path / "out",
        sources=f"{media}/face*.png",
        drivings=f"{media}/[jw]*p.mp4",
        cluster=Cluster(num_workers=1),
    )
    manifest = animate_catalog(job)
    assert set(by_name(tmp_path / "out")) == {"face0--jump", "face1--jump"}
    assert (manifest.num_items, manifest.num_frames) == (2, 18)
    seen: list[Progress] = []
    assert animate_catalog(job, on_progress=seen.append) == manifest
    assert seen == [], "nothing is left to do"


def test_too_many_failures_fail_the_run_after_they_are_written(media: Path, tmp_path: Path) -> None:
    catalog = write_catalog(media, "e.csv", "source,driving,name\nx.png,jump.mp4,b\n,jump.mp4,c\n")
    with pytest.raises(RunFailed, match="2 of 2 items failed") as caught:
        animate_catalog(job_of(media, tmp_path / "out", catalog=catalog))
    assert caught.value.code == "too_many_failures"
    assert by_name(tmp_path / "out") == {}
    assert set(failed(tmp_path / "out")) == {"b", "line 3"}


def noted(out: Path) -> set[str]:
    """Results that an unfinished run has noted."""
    return {record.key for record in read_parts(open_store(str(out)), JOURNAL, AnimationRecord)}


def test_a_killed_run_ends_in_the_same_bytes(finished: Any, tmp_path: Path) -> None:
    job, undisturbed, _, _ = finished
    out = tmp_path / "killed"
    job = job.model_copy(update={"out": str(out), "cluster": Cluster(num_workers=1)})
    code = (
        "import sys; from kpmask.config import AnimateJob; from tasks.animate import "
        "animate_catalog; animate_catalog(AnimateJob.model_validate_json(sys.argv[1]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, job.model_dump_json()],
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while len(noted(out)) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.parquet").exists()
    left = len(noted(out))
    assert 2 <= left < 6
    stamps = {key: (out / key).stat().st_mtime_ns for key in noted(out)}

    seen: list[Progress] = []
    animate_catalog(job, on_progress=seen.append)
    counts = Counter(p.stage for p in seen)
    # With those that fail, for their inputs may be there now.
    assert counts["render"] == 8 - left
    assert counts["features"] <= 9
    assert {key: (out / key).stat().st_mtime_ns for key in stamps} == stamps
    for name in ("manifest.parquet", "failures.parquet"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()

    def files(folder: Path) -> list[str]:
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())

    assert files(out) == files(undisturbed)


# --- credentials -----------------------------------------------------------------------------


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catalogs in this process."""
    inline_catalogs(monkeypatch)


def test_every_result_says_how_it_was_made(finished: Any, media: Path) -> None:
    _, out, manifest, _ = finished
    for name, record in by_name(out).items():
        found = provenance.read_credentials(out / record.key)
        assert found is not None, name
        assert (found.state, found.problems) == ("valid", ("signingCredential.untrusted",))
        assert record.credentials == found.signer == "kpmask development, not trusted"
        assert dict(found.ingredients) == {
            "model": f"sha256:{manifest.weights_sha256}",
            "source image": f"sha256:{record.source_sha256}",
            "driving video": f"sha256:{record.driving_sha256}",
        }
        # The driving video's own sound is no model's work.
        assert found.source_type.startswith("composite") == (name == "loud")


def test_without_credentials_it_is_said_and_another_result(
    media: Path, tmp_path: Path, inline: None
) -> None:
    grid = {"sources": f"{media}/face0.png", "drivings": f"{media}/jump.mp4"}
    plain = job_of(media, tmp_path, **grid, credentials=Credentials(enabled=False))
    animate_catalog(plain)
    (unsigned,) = by_name(tmp_path).values()
    assert unsigned.credentials == "none"
    assert provenance.read_credentials(tmp_path / unsigned.key) is None
    assert unsigned.sha256 == content_digest(tmp_path / unsigned.key)

    job = job_of(media, tmp_path, **grid)
    animate_catalog(job)
    (signed,) = by_name(tmp_path).values()
    assert signed.item_id != unsigned.item_id, "what is not labelled is not taken for what is"
    assert signed.sha256 == unsigned.sha256
    assert packets(tmp_path / signed.key) == packets(tmp_path / unsigned.key)
    stamp = (tmp_path / signed.key).stat().st_mtime_ns
    animate_catalog(job)
    assert (tmp_path / signed.key).stat().st_mtime_ns == stamp, "signed once"


def test_a_pair_without_credentials(media: Path, tmp_path: Path) -> None:
    pair = {"source": str(media / "face0.png"), "driving": str(media / "jump.mp4")}
    out = tmp_path / "a.mp4"
    video = animate_pair(job_of(media, out, **pair, credentials=Credentials(enabled=False)))
    assert (video.credentials, video.sha256) == ("none", content_digest(out))
    assert provenance.read_credentials(out) is None


def test_somebodys_own_certificate(media: Path, tmp_path: Path) -> None:
    chain, key = signers.write_pair(tmp_path / "s", signers.Authority())
    own = Credentials(certificate=chain, private_key=key)
    pair = {"source": str(media / "face0.png"), "driving": str(media / "jump.mp4")}
    assert animate_pair(job_of(media, tmp_path / "a.mp4", **pair, credentials=own)).credentials == (
        "Studio Signer"
    )
    grid = {"sources": f"{media}/face0.png", "drivings": f"{media}/jump.mp4"}
    ids = {
        whole_plan(job_of(media, tmp_path, **grid, credentials=given)).items[0].item_id
        for given in (own, own, Credentials(), Credentials(enabled=False))
    }
    assert len(ids) == 3
    settings = WorkerSettings.of(job_of(media, tmp_path, **pair, credentials=own))
    assert "PRIVATE" in str(pickle.dumps(settings))
    assert "PRIVATE" not in repr(settings)


@pytest.mark.parametrize("issued", [{"days": (-10, -1)}, {"purpose": signers.SERVERS}])
def test_a_certificate_that_cannot_sign_is_refused_before_anything_is_read(
    media: Path, tmp_path: Path, issued: dict[str, Any]
) -> None:
    chain, key = signers.write_pair(tmp_path / "s", signers.Authority(), **issued)
    own: dict[str, Any] = {"credentials": Credentials(certificate=chain, private_key=key)}
    pair = {"source": str(media / "absent.png"), "driving": str(media / "jump.mp4")}
    grid = {"sources": f"{media}/face0.png", "drivings": f"{media}/jump.mp4"}
    for make in (animate_catalog, plan):
        with pytest.raises(ConfigError) as caught:
            make(job_of(media, tmp_path / "out", **grid, **own))
        assert caught.value.subject == "credentials.certificate"
    with pytest.raises(ConfigError, match="Studio Signer"):
        animate_pair(job_of(media, tmp_path / "out" / "a.mp4", **pair, **own))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_signed_is_not_published(
    media: Path, tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = {"source": str(media / "face0.png"), "driving": str(media / "jump.mp4")}
    monkeypatch.setattr(provenance, "_format", lambda path: "png")  # it is none
    with pytest.raises(MediaError) as caught:
        animate_pair(job_of(media, tmp_path / "out.mp4", **pair))
    assert caught.value.code == "signing_failed"
    assert "--no-credentials" in caught.value.cause
    assert list(tmp_path.iterdir()) == []

    grid = {"sources": f"{media}/face*.png", "drivings": f"{media}/jump.mp4"}
    animate_catalog(job_of(media, tmp_path, **grid, max_failed_fraction=1.0))
    assert by_name(tmp_path) == {}
    assert [failure.code for failure in failed(tmp_path).values()] == ["signing_failed"] * 2
    assert not list(tmp_path.glob("*.mp4"))


def test_a_webm_has_its_credentials_beside_it(media: Path, tmp_path: Path, inline: None) -> None:
    grid = {"sources": f"{media}/face0.png", "drivings": f"{media}/jump.mp4"}
    job = job_of(media, tmp_path, **grid, output=Output(format="webm"))
    animate_catalog(job)
    (record,) = by_name(tmp_path).values()
    found = provenance.read_credentials(tmp_path / record.key)
    assert found is not None
    assert (found.state, found.sidecar, record.credentials) == ("valid", True, found.signer)
    (tmp_path / record.key).with_suffix(".c2pa").unlink()
    animate_catalog(job)
    assert provenance.read_credentials(tmp_path / record.key) is not None, "a lost one is made"


# --- object storage --------------------------------------------------------------------------


def test_all_of_it_in_object_storage(
    ray_cluster: None, s3: str, media: Path, tmp_path: Path
) -> None:
    store = open_store(f"{s3}/in")
    for name in ("w.safetensors", "face0.png", "face1.png", "jump.mp4"):
        store.put_file(f"a/{name}", media / name)
    for path in (media / "frames").iterdir():
        store.put_file(f"a/frames/{path.name}", path)
    text = "source,driving,name\nface0.png,jump.mp4,a\nface1.png,frames,b\nface9.png,jump.mp4,c\n"
    store.put("a/c.csv", text.encode())
    wanted: dict[str, Any] = {
        "catalog": f"{s3}/in/a/c.csv",
        "checkpoint": f"{s3}/in/a/w.safetensors",
        "cluster": Cluster(num_workers=1),
    }
    manifest = animate_catalog(job_of(media, f"{s3}/out", **wanted))
    assert (manifest.num_items, manifest.num_failures) == (2, 1)
    out = open_store(f"{s3}/out")
    keys = {info.key for info in out.list()}
    records = by_name(tmp_path_of(out, "manifest.parquet"))
    assert {r.key for r in records.values()} == {k for k in keys if "/" not in k and ".mp4" in k}
    assert not [key for key in keys if key.startswith(("journal", "features"))]

    here = tmp_path / "here"
    animate_catalog(job_of(media, here, **wanted))
    for name in ("manifest.parquet", "failures.parquet"):
        assert out.get(name) == (here / name).read_bytes()
    for record in records.values():
        stored = tmp_path_of(out, record.key) / record.key
        assert packets(stored) == packets(here / record.key)

    assert matching(f"{s3}/in/a/face*.png", folders=False) == [
        f"{s3}/in/a/face0.png",
        f"{s3}/in/a/face1.png",
    ]
    assert matching(f"{s3}/in/*/fra*", folders=True) == [f"{s3}/in/a/frames"]
    assert f"{s3}/in/a/frames" in matching(f"{s3}/in/a", folders=True)
    assert len(matching(f"{s3}/in/**/0*.png", folders=True)) == 5

    pair = {"source": f"{s3}/in/a/face0.png", "driving": f"{s3}/in/a/jump.mp4"}
    animate_pair(job_of(media, f"{s3}/pair.mp4", **pair))
    pair_file = tmp_path_of(open_store(s3), "pair.mp4") / "pair.mp4"
    assert packets(pair_file) == packets(here / records["a"].key)
    found = provenance.read_credentials(pair_file)
    assert found == provenance.read_credentials(here / records["a"].key)
    assert found is not None


def tmp_path_of(store: ObjectStore, key: str) -> Path:
    """The folder of a local copy that has the object's own name."""
    folder = Path(tempfile.mkdtemp())
    (folder / key).write_bytes(store.get(key))
    return folder


def test_a_store_that_refuses_ends_the_run(s3: str, media: Path, tmp_path: Path) -> None:
    text = "source,driving\nface0.png,s3://no-such-bucket-here/x.mp4\n"
    job = job_of(media, tmp_path, catalog=write_catalog(media, "s.csv", text))
    with pytest.raises(StorageError) as caught:
        animate_catalog(job)
    assert caught.value.code == "no_bucket"


# --- real files ------------------------------------------------------------------------------


def test_each_bad_file_fails_by_itself(
    ray_cluster: None, dev_data: Path, media: Path, tmp_path: Path
) -> None:
    with (dev_data / "bad" / "cases.csv").open(newline="") as file:
        cases = {c["file"]: c for c in csv.DictReader(file) if c["kind"] != "metadata"}
    lines = []
    for name, case in cases.items():
        good = str(media / ("face0.png" if case["kind"] != "image" else "walk.mp4"))
        bad = str(dev_data / "bad" / name)
        pair = (bad, good) if case["kind"] == "image" else (good, bad)
        lines.append(f"{','.join(pair)},{name}")
    catalog = write_catalog(media, "bad.csv", "source,driving,name\n" + "\n".join(lines) + "\n")
    job = job_of(
        media,
        tmp_path,
        catalog=catalog,
        limits=MediaLimits(),
        max_failed_fraction=0.9,
        min_driving_frames=11,  # more than `slow_1fps.mp4` has
    )
    manifest = animate_catalog(job)
    made, lost = by_name(tmp_path), failed(tmp_path)
    assert manifest.num_items + manifest.num_failures == len(cases)
    num_partial = 0
    for name, case in cases.items():
        verdict = case["expected_verdict"]
        if verdict == "reject":
            assert lost[name].code == case["reason_code"], name
        elif verdict == "accept":
            assert name in made, lost.get(name)
            assert case["kind"] == "image" or made[name].num_frames == int(case["expected_frames"])
        elif verdict == "accept_partial":
            # 11 good frames are enough for two of three; the damage's own code is said of the other
            assert (
                lost[name].code == case["reason_code"]
                if name in lost
                else made[name].num_frames_lost
            )
            num_partial += name in made
        else:
            assert (name in made) != (name in lost)
    assert num_partial == 2


# --- workers ---------------------------------------------------------------------------------


def test_rendering_encodes_nothing_again(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(
        media,
        tmp_path / "out",
        sources=f"{media}/face*.png",
        drivings=f"{media}/walk.mp4",
        batch_size=3,
        media_workers=MediaWorkers(per_worker=0),
    )
    planned = whole_plan(job)
    settings, settings_digest = WorkerSettings.of(job), planned.settings_digest
    monkeypatch.setattr("tasks.render.FRAMES_PER_PART", 8)
    counted: Counter[str] = Counter()

    def count(name: str) -> None:
        original = getattr(Animator, name)

        def method(self: Animator, frames: Any) -> Any:
            counted[name] += 1 if name == "encode_source" else len(list(frames))
            return original(self, frames)

        monkeypatch.setattr(Animator, name, method)

    count("encode_source")
    count("encode_driving")
    worker = ModelWorker(settings)
    wanted = {
        feature.feature_id: feature
        for item in planned.items
        for feature in features_of(item, planned.settings_digest)
    }
    made = [worker.process([feature])[0] for feature in wanted.values()]
    features = {record.feature_id: record for record in made if isinstance(record, FeatureRecord)}
    assert counted == {"encode_source": 2, "encode_driving": 21}
    assert sorted(record.num_parts for record in features.values()) == [1, 1, 3]  # 9 + 9 + 3

    worker._animator._state_types  # noqa: B018 - found once, by encoding an empty frame
    counted.clear()
    works = [
        RenderItem(item, *(features[f.feature_id] for f in features_of(item, settings_digest)))
        for item in planned.items
    ]
    for record in worker.process(works):
        assert isinstance(record, AnimationRecord)
        assert record.num_frames == 21
    assert counted == {}


# --- the plan --------------------------------------------------------------------------------


def test_ids_follow_content_and_wishes(media: Path, tmp_path: Path) -> None:
    text = "source,driving,motion,audio\nface0.png,walk.mp4,,\n"
    catalog = write_catalog(media, "p.csv", text)

    def item_id(**changed: Any) -> str:
        return (
            whole_plan(job_of(media, tmp_path, **({"catalog": catalog} | changed))).items[0].item_id
        )

    plain = item_id()
    assert item_id() == plain
    moved = media / "moved"
    moved.mkdir()
    for name in ("face0.png", "walk.mp4"):
        (moved / name).write_bytes((media / name).read_bytes())
    elsewhere = write_catalog(moved, "p.csv", text)
    assert item_id(catalog=elsewhere) == plain
    assert item_id(cluster=Cluster(num_workers=1), max_failed_fraction=0.1) == plain
    other = save_weights(media / "other.safetensors", seed=8)
    assert len({plain, item_id(motion="relative"), item_id(audio=True)}) == 3
    assert item_id(checkpoint=str(other)) != plain
    assert item_id(limits=MediaLimits(min_side_px=16, max_frames=5)) != plain
    (moved / "face0.png").write_bytes((media / "face1.png").read_bytes())
    assert item_id(catalog=elsewhere) != plain


def test_items_of_a_driving_video_stay_together(media: Path, tmp_path: Path) -> None:
    job = job_of(media, tmp_path, sources=str(media), drivings=f"{media}/*.mp4")
    drivings = [item.driving for item in whole_plan(job).items]
    changes = sum(a != b for a, b in itertools.pairwise(drivings))
    assert changes == len(set(drivings)) - 1


def test_a_dry_run_writes_nothing(media: Path, tmp_path: Path) -> None:
    job = job_of(media, tmp_path / "out", catalog=write_catalog(media, "c.csv", CATALOG))
    manifest = animate_catalog(job, dry_run=True)
    assert (manifest.num_items, manifest.num_failures) == (8, 4)
    lines = plan(job)
    assert "8 animations of 3 images by 6 videos" in lines[0]
    assert any("path_escape" in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_a_row_with_motion_that_the_model_lacks_fails_alone(media: Path, tmp_path: Path) -> None:
    weights = save_weights(tmp_path / "h.safetensors", HEATMAP)
    text = "source,driving,name,motion\nface0.png,walk.mp4,a,\nface0.png,walk.mp4,b,relative\n"
    catalog = write_catalog(media, "m.csv", text)
    planned = whole_plan(job_of(media, tmp_path, checkpoint=str(weights), catalog=catalog))
    assert [item.name for item in planned.items] == ["a"]
    assert [(f.item, f.code) for f in planned.failures] == [("b", "bad_row")]
    with pytest.raises(ConfigError, match="supports absolute"):
        whole_plan(
            job_of(media, tmp_path, checkpoint=str(weights), catalog=catalog, motion="relative")
        )


def test_what_is_wrong_with_the_command_is_said_before_anything_runs(
    media: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        animate_catalog(job_of(media, tmp_path, sources=f"{media}/*.tif", drivings=str(media)))
    assert (caught.value.subject, caught.value.code) == ("sources", "nothing_to_do")
    for catalog in ("absent.csv", str(media / "absent.csv")):
        with pytest.raises(ConfigError, match="no such catalog"):
            animate_catalog(job_of(media, tmp_path, catalog=catalog))
    with pytest.raises(ConfigError, match="best_frame"):
        whole_plan(
            job_of(media, tmp_path, sources=str(media), drivings=str(media), best_frame=True)
        )


def test_globs(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = lambda found: [Path(uri).name for uri in found]  # noqa: E731
    assert names(matching(f"{media}/face?.png", folders=False)) == ["face0.png", "face1.png"]
    assert names(matching(f"{media}/**/00[0-2].png", folders=False)) == [
        "000.png",
        "001.png",
        "002.png",
    ]
    assert names(matching(f"{media}/fr*", folders=True)) == ["frames"]
    assert matching(f"{media}/fr*", folders=False) == []
    assert names(matching(str(media / "walk.mp4"), folders=True)) == ["walk.mp4"]
    assert "frames" in names(matching(str(media), folders=True))
    assert "frames" not in names(matching(str(media), folders=False))
    monkeypatch.chdir(media)
    assert matching("walk.*", folders=True) == [str(media / "walk.mp4")]
    assert matching(str(media / "nowhere"), folders=True) == []


# --- one pair --------------------------------------------------------------------------------


def test_a_pair_is_the_animators_video(media: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "result.mp4"
    seen: list[Progress] = []
    job = job_of(
        media, out, source=str(media / "face1.png"), driving=str(media / "walk.mp4"), batch_size=4
    )
    video = animate_pair(job, on_progress=seen.append)
    animator = Animator.load(media / "w.safetensors", device="cpu")
    image = images.read_image(media / "face1.png", LIMITS)
    frames = animator.animate(image, square_frames(media / "walk.mp4"), batch_size=4)
    expected = encode(tmp_path / "e.mp4", frames, fps=12.5)
    assert video == dataclasses.replace(
        expected, size_bytes=out.stat().st_size, credentials="kpmask development, not trusted"
    )
    assert packets(out) == packets(tmp_path / "e.mp4")
    assert seen[-1] == Progress("animate", 21, 21)


def test_a_pair_with_every_option(media: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.mp4"
    wanted: dict[str, Any] = {"motion": "relative", "adapt_scale": True, "best_frame": True}
    job = job_of(
        media,
        out,
        source=str(media / "face0.png"),
        driving=str(media / "sound.mp4"),
        audio=True,
        **wanted,
    )
    video = animate_pair(job)
    assert video.has_audio
    assert (video.num_frames, video.fps, video.width_px) == (21, 12.5, SIDE_PX)
    assert probe(out, LIMITS).has_audio


def test_a_pair_keeps_the_good_part_of_a_damaged_video(media: Path, tmp_path: Path) -> None:
    wanted = {"source": str(media / "face0.png"), "driving": str(media / "cut.mp4")}
    job = job_of(media, tmp_path / "a.mp4", **wanted)
    video = animate_pair(job)
    assert 2 <= video.num_frames < 40
    strict = job.model_copy(update={"min_driving_frames": 39, "out": str(tmp_path / "b.mp4")})
    with pytest.raises(MediaError) as caught:
        animate_pair(strict)
    assert caught.value.code in {"truncated", "decode_errors"}
    assert not (tmp_path / "b.mp4").exists()


@pytest.mark.parametrize(
    ("source", "driving", "code"),
    [
        ("text.png", "walk.mp4", "not_media"),
        ("absent.png", "walk.mp4", "not_found"),
        ("face0.png", "absent.mp4", "not_found"),
        ("face0.png", "still.mp4", "too_short"),
    ],
)
def test_a_pair_that_cannot_be(
    media: Path, tmp_path: Path, source: str, driving: str, code: str
) -> None:
    wanted = {"source": str(media / source), "driving": str(media / driving)}
    with pytest.raises(MediaError) as caught:
        animate_pair(job_of(media, tmp_path / "out.mp4", **wanted))
    assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_where_a_pair_cannot_go(media: Path, tmp_path: Path) -> None:
    wanted = {"source": str(media / "face0.png"), "driving": str(media / "walk.mp4")}
    with pytest.raises(ConfigError) as caught:
        animate_pair(job_of(media, tmp_path, **wanted))
    assert caught.value.subject == "out"
    with pytest.raises(StorageError):
        animate_pair(job_of(media, media / "walk.mp4" / "x.mp4", **wanted))


def test_records_are_plain(finished: Any) -> None:
    _, out, _, _ = finished
    for record in by_name(out).values():
        assert all(not isinstance(v, Path) for v in dataclasses.asdict(record).values())


def test_media_workers_take_processors_where_there_are_enough(
    media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(media, "out", catalog="c.csv")
    on_cpu = WorkerSettings.of(job)
    assert (on_cpu.media_workers, on_cpu.also_cpus) == (1, 0.0)
    cluster = Cluster(gpus_per_worker=1)
    on_gpu = WorkerSettings.of(job.model_copy(update={"cluster": cluster}))
    assert (on_gpu.media_workers, on_gpu.also_cpus) == (3, 3.0)
    for num_cpus, taken in ((16, 3.0), (4, 3.0), (3, 0.0)):
        found = {"CPU": float(num_cpus), "GPU": 1.0}
        monkeypatch.setattr("ray.cluster_resources", lambda found=found: found)
        assert _fitting(on_gpu, cluster).also_cpus == taken


def test_workers_get_the_gpus_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    assert with_gpus(Cluster(), "auto").gpus_per_worker == 1
    assert with_gpus(Cluster(), "cuda").gpus_per_worker == 1
    assert with_gpus(Cluster(gpus_per_worker=0.5), "auto").gpus_per_worker == 0.5
    assert with_gpus(Cluster(), "cpu").gpus_per_worker == 0
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    assert with_gpus(Cluster(), "auto").gpus_per_worker == 0
