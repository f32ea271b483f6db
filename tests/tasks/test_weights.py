"""Bundled weights by name, in jobs whose workers are elsewhere; and how such weights are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kpmask import Animator, bundled, checkpoint
from kpmask.config import AnimateJob, Cluster, Credentials, EvaluateJob, MediaLimits
from kpmask.demo.videos import film, plan_takes
from kpmask.errors import CheckpointError, StorageError
from kpmask.media import images
from kpmask.media.encode import encode
from tasks import release as made
from tasks.animate import animate_catalog, animate_pair
from tasks.evaluate import ScoreSettings
from tasks.release import release
from tasks.render import WorkerSettings
from tasks.storage import open_store
from tasks.weights import local_weights, reference
from tests.support.catalogs import whole_plan
from tests.support.models import HEATMAP, save_weights


def trained(path: Path) -> Path:
    """Weights that say of themselves how they were trained."""
    info = {"run_id": "r", "seed": 7, "phases": [{"name": "a", "steps": 9}]}
    return save_weights(path, HEATMAP, info=info)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of bundled weights that holds `small`, in place of the package's."""
    src, folder = trained(tmp_path / "w.safetensors"), tmp_path / "bundle"
    release(str(src), folder / "small.safetensors", name="small", command="make it")
    monkeypatch.setenv(bundled.VARIABLE, str(folder))
    return folder


@pytest.fixture
def media(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 255, (4, 40, 40, 3), dtype=np.uint8)
    (tmp_path / "face.png").write_bytes(images.encode_png(frames[0]))
    encode(tmp_path / "walk.mp4", frames, fps=25)
    return tmp_path


def job_of(media: Path, out: str, **changed: Any) -> AnimateJob:
    values: dict[str, Any] = {
        "checkpoint": "small",
        "out": out,
        "device": "cpu",
        "limits": MediaLimits(min_side_px=16),
        "cluster": Cluster(num_workers=1),
        "sources": str(media / "face.png"),
        "drivings": str(media / "walk.mp4"),
        "credentials": Credentials(enabled=False),  # two signatures of the same differ
    }
    return AnimateJob(**(values | changed))


# --- by name ---------------------------------------------------------------------------------


def test_a_catalog_by_name_is_the_catalog_by_path(
    bundle: Path, media: Path, ray_cluster: None, s3: str
) -> None:
    path = str(bundle / "small.safetensors")
    by_name = whole_plan(job_of(media, s3))
    assert by_name == whole_plan(job_of(media, s3, checkpoint=path))
    manifest = animate_catalog(job_of(media, f"{s3}/out"))
    assert (manifest.num_items, manifest.num_failures) == (1, 0)
    assert manifest.weights_sha256 == bundled.entries()["small"].sha256
    pair = {"source": str(media / "face.png"), "driving": str(media / "walk.mp4")}
    none = {"sources": None, "drivings": None}
    animate_pair(job_of(media, str(media / "pair.mp4"), **pair, **none))
    (item,) = by_name.items
    assert open_store(f"{s3}/out").get(f"{item.item_id}.mp4") == (media / "pair.mp4").read_bytes()


def test_what_the_workers_are_told(
    bundle: Path, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of one's own as a path; the package's weights by the name they have everywhere."""
    scored = EvaluateJob(checkpoint="small", data="d", out="o")
    path = str(bundle / "small.safetensors")
    assert WorkerSettings.of(job_of(media, "o")).checkpoint == path
    assert ScoreSettings.of(scored).checkpoint == path
    monkeypatch.setattr(bundled, "folder", lambda: bundle)
    monkeypatch.delenv(bundled.VARIABLE)
    assert WorkerSettings.of(job_of(media, "o")).checkpoint == "small"
    assert ScoreSettings.of(scored).checkpoint == "small"
    assert local_weights("small") == bundle / "small.safetensors"


def test_references(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle)
    assert reference("small.safetensors") == str(bundle / "small.safetensors")
    assert reference("./small") == str(bundle / "small")
    assert reference("s3://b/small") == "s3://b/small"
    with pytest.raises(CheckpointError, match="no bundled weights of this name"):
        reference("smal")


@pytest.mark.parametrize("absent", ["absent.safetensors", "./small"])
def test_a_missing_file_tells_the_names(bundle: Path, media: Path, absent: str) -> None:
    with pytest.raises(StorageError, match="bundled weights: small") as caught:
        whole_plan(job_of(media, "o", checkpoint=absent))
    assert caught.value.code == "not_found"
    with pytest.raises(CheckpointError, match="bundled weights: small"):
        whole_plan(job_of(media, "o", checkpoint="absent"))


# --- made ------------------------------------------------------------------------------------


def test_what_a_release_draws(tmp_path: Path) -> None:
    """On a frame of the demonstration: as before, to less than 2/255 in every channel."""
    src, out = trained(tmp_path / "w.safetensors"), tmp_path / "small.safetensors"
    told = release(str(src), out)
    take = next(t for t in plan_takes(24, seed=0) if t.partition == "test")
    frame = next(film(take))
    before, after = (
        Animator.load(path, device="cpu").animate(frame, frame[None]).astype(int)
        for path in (src, out)
    )
    assert np.ptp(before) > 20  # it draws something
    assert np.abs(before - after).max() <= 2
    assert told.difference < 2 / 255
    assert told.size_bytes == out.stat().st_size
    assert told.sha256 == checkpoint.load(out).sha256
    assert not (tmp_path / bundled.INDEX).exists()


def test_a_release_that_draws_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, out = trained(tmp_path / "w.safetensors"), tmp_path / "small.safetensors"
    release(str(src), out)
    before = out.read_bytes()
    monkeypatch.setattr(made, "MAX_DIFFERENCE", 0.0)
    with pytest.raises(CheckpointError, match=r"float16 changes what it draws by \d\.\d\d/255"):
        release(str(src), out)
    assert out.read_bytes() == before
    assert not list(tmp_path.glob(".tmp*"))


def test_the_index_gets_the_scores(tmp_path: Path) -> None:
    src, folder = trained(tmp_path / "w.safetensors"), tmp_path / "bundle"
    rows = [
        {"metric": metric, "method": method, "mean": mean}
        for metric, method, mean in (
            ("l1", "model", 0.0123456),
            ("l1", "copy", 0.04),
            ("ssim", "model", 0.9),
        )
    ]
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "summary.json").write_text(json.dumps({"summaries": rows}))
    told = release(
        str(src),
        folder / "small.safetensors",
        name="small",
        command="make weights",
        scores=str(tmp_path / "scores"),
    )
    entry = bundled.entries(folder)["small"]
    assert entry.scores == {"l1": 0.01235, "l1_copy": 0.04, "ssim": 0.9}
    assert (entry.command, entry.sha256) == ("make weights", told.sha256)
    assert entry.made["phases"] == [{"name": "a", "steps": 9}]
    assert entry.made["made_from"] == checkpoint.load(src).sha256
    assert "run_id" not in entry.made
    with pytest.raises(StorageError):
        release(str(src), folder / "x.safetensors", scores=str(tmp_path / "absent"))
    assert not (folder / "x.safetensors").exists()
