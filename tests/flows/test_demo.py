"""The demonstration: bundled weights first, a training of one's own after, both on one page."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import flows.animate
import flows.evaluate
import flows.preprocess
import flows.train
from flows import demo, engine
from flows.demo import DemoResult, demo_flow, demo_job, run_demo
from kpmask import bundled, checkpoint, config
from kpmask.config import TrainJob
from kpmask.errors import CheckpointError, ConfigError
from kpmask.models import build_system
from kpmask.records import (
    AnimationRecord,
    DatasetChanges,
    DatasetManifest,
    Progress,
    from_table,
)
from tasks.demo import DemoInputs
from tasks.release import release


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Bundled weights of the size of the preset `debug`, in place of the package's."""
    job = config.resolve_job(TrainJob, preset="debug", flags={"data": "d", "out": "o"})
    checkpoint.save(tmp_path / "w.safetensors", build_system(job.phases[-1].model), {})
    path = tmp_path / "bundle" / "demo.safetensors"
    release(str(tmp_path / "w.safetensors"), path, name="demo")
    monkeypatch.setenv(bundled.VARIABLE, str(path.parent))
    return path


NOTHING_NEW = DatasetChanges(1, "d", 0, 0, 2, 0, 0, 0, 0, 0, 0)


def ignore(progress: Progress) -> None:
    """For those who do not watch."""


def test_the_jobs(bundle: Path, tmp_path: Path) -> None:
    job = demo_job(tmp_path, DemoInputs.of(tmp_path / "videos"), preset="debug")
    data = str(tmp_path / "dataset")
    assert job.preprocess.out == job.train.data == data
    assert job.evaluate.data == job.evaluate_own.data == data
    assert job.animate.checkpoint == job.evaluate.checkpoint == "demo"
    assert job.evaluate_own.checkpoint == f"{job.train.out}/weights.safetensors"
    outs = {part.out for part in (job.preprocess, job.animate, job.evaluate, job.train)}
    assert len(outs | {job.evaluate_own.out}) == 5
    assert not job.preprocess.download.enabled


def test_a_preset_of_another_size_is_refused_before_anything_is_drawn(
    bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="have 64 px, and the bundled weights draw 32 px"):
        run_demo(tmp_path / "out", preset="demo", on_progress=ignore)
    bundle.write_bytes(b"other")
    with pytest.raises(CheckpointError, match="not the file that was released"):
        run_demo(tmp_path / "out", preset="debug", on_progress=ignore)
    assert not (tmp_path / "out").exists()


def test_what_the_bundled_weights_make_comes_first(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, Any]] = []

    def stage(name: str) -> Callable[..., Any]:
        def run(job: Any, *, on_progress: Callable[[Progress], None]) -> Any:
            given.append((name, job))
            if name == "preprocess_with_changes":
                return DatasetManifest(job.out, "d", "s", 1, 1, 1, 0), NOTHING_NEW
            return f"{name} in {job.out}"

        return run

    for module, name in (
        (flows.preprocess, "preprocess_with_changes"),
        (flows.animate, "animate_catalog"),
        (flows.evaluate, "evaluate"),
        (flows.train, "train"),
    ):
        monkeypatch.setattr(module, name, stage(name))
    for publish in ("publish_dataset", "publish_catalog", "publish_scores", "publish_run"):
        monkeypatch.setattr(demo, publish, lambda made: None)
    job = demo_job(tmp_path, DemoInputs.of(tmp_path / "videos"), preset="debug")
    result = engine.run_flow(demo_flow, job)
    assert given == [
        ("preprocess_with_changes", job.preprocess),
        ("animate_catalog", job.animate),
        ("evaluate", job.evaluate),
        ("train", job.train),
        ("evaluate", job.evaluate_own),
    ]
    assert isinstance(result, DemoResult)
    assert result.scores != result.own_scores


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_the_whole_of_it_in_small(bundle: Path, tmp_path: Path, ray_cluster: None) -> None:
    page = run_demo(tmp_path / "out", preset="debug", num_videos=8, on_progress=ignore)
    records = from_table(
        pq.read_table(page.parent / "animations" / "manifest.parquet"), AnimationRecord
    )
    assert records and all(record.width_px == 32 for record in records)
    html = page.read_text()
    names = re.findall(r'<th scope="row" class="name">(.*?)</th>', html)
    assert names == [
        "the bundled weights",
        "your own training, 16 steps",
        "copy of the source",
        "the codec alone",
    ]
    assert "--checkpoint demo" in html
    links = re.findall(r'<a href="([a-z-]+/index.html)">', html)
    assert len(links) == 5
    assert all((page.parent / link).is_file() for link in links)
    sha256 = bundled.entries()["demo"].sha256
    assert sha256[:16] in html
