"""What an evaluation leaves behind: curves, values of sets, previews; and what reruns keep."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray

from kpmask import Animator
from kpmask.animate import to_frames
from kpmask.config import Cluster
from kpmask.data.dataset import Dataset
from kpmask.errors import CheckpointError, ConfigError, RunFailed, StorageError
from kpmask.evaluate import ScoredVideo
from kpmask.media.encode import encode
from kpmask.metrics.frechet import FrechetSFace
from kpmask.records import Failure, FrameScores, VideoScore, from_table
from tasks import score_worker
from tasks.evaluate import LEASE, evaluate, plan
from tasks.score_plan import NUM_PREVIEWS, ScorePlan, entry_of, score_plan
from tasks.score_worker import ClipWorker, ScoreSettings, media_of
from tasks.storage import open_store
from tests.support import estimators
from tests.support.evaluations import (
    clip_record,
    job_of,
    make_dataset,
    model_job,
    some_frames,
    write_weights,
)
from tests.support.inline import inline_evaluation, run_inline

METRICS = ("l1", "temporal_error", "akd_motion_facemesh")
LENGTHS = {"test": (11, 5, 6, 7), "train": (4,)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_weights(folder / "w.safetensors")
    make_dataset(folder / "data", lengths=LENGTHS)
    return folder


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    inline_evaluation(monkeypatch)
    estimators.use(monkeypatch)


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The clips that were scored, as they are."""
    seen: list[str] = []
    leave = score_worker.leave

    def noted(store: Any, entry: str, scored: ScoredVideo) -> None:
        seen.append(scored.scores.clip_id)
        leave(store, entry, scored)

    monkeypatch.setattr(score_worker, "leave", noted)
    return seen


def read(out: Path, kind: type[Any], name: str) -> list[Any]:
    return from_table(pq.read_table(out / f"{name}.parquet"), kind)


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def dies_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The store is gone once `count` items are scored."""

    def dying(items: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, outcome in enumerate(run_inline(items, *args, **kwargs)):
            if number == count:
                raise StorageError("gone", code="unavailable")
            yield outcome

    monkeypatch.setattr("tasks.evaluate.run_items", dying)


# --- curves ----------------------------------------------------------------------------------


def test_the_mean_of_a_curve_is_the_score(inputs: Path, tmp_path: Path) -> None:
    evaluate(model_job(inputs, tmp_path, metrics=METRICS))
    curves = {(c.clip_id, c.metric, c.method): c for c in read(tmp_path, FrameScores, "frames")}
    scores = read(tmp_path, VideoScore, "scores")
    assert len(curves) == len(scores) > 0
    for score in scores:
        values = np.array(curves[score.clip_id, score.metric, score.method].values)
        assert len(values) == LENGTHS["test"][int(score.clip_id.removeprefix("test"))]
        assert np.nanmean(values[1:]) == pytest.approx(score.value, rel=1e-12)
        assert np.isfinite(values[1:]).sum() == score.num_frames
    assert np.isnan(curves["test0", "temporal_error", "model"].values[0])


def test_an_interrupted_run_goes_on_and_ends_the_same(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_at: list[str]
) -> None:
    job = model_job(inputs, tmp_path / "whole", metrics=METRICS)
    evaluate(job)
    assert looked_at == ["test0", "test1", "test2", "test3"]
    looked_at.clear()
    job = model_job(inputs, tmp_path / "torn", metrics=METRICS)
    with monkeypatch.context() as patched:
        dies_after(patched, 2)
        with pytest.raises(StorageError):
            evaluate(job)
    assert not (tmp_path / "torn" / "scores.parquet").exists()
    evaluate(job)
    assert looked_at == ["test0", "test1", "test2", "test2", "test3"]  # test2 was in flight
    whole, torn = files(tmp_path / "whole"), files(tmp_path / "torn")
    assert whole["frames.parquet"] == torn["frames.parquet"]
    assert whole["scores.parquet"] == torn["scores.parquet"]
    assert not [p for p in (tmp_path / "torn" / "journal").rglob("*") if p.is_file()]


def test_more_clips_are_added_to_a_finished_evaluation(
    inputs: Path, tmp_path: Path, looked_at: list[str]
) -> None:
    evaluate(model_job(inputs, tmp_path / "two", metrics=METRICS, max_clips=2))
    evaluate(model_job(inputs, tmp_path / "two", metrics=METRICS))
    assert looked_at == ["test0", "test1", "test2", "test3"]
    evaluate(model_job(inputs, tmp_path / "all", metrics=METRICS))
    added, whole = (read(tmp_path / name, FrameScores, "frames") for name in ("two", "all"))
    assert repr(added) == repr(whole)  # NaN is not equal to itself
    evaluate(model_job(inputs, tmp_path / "two", metrics=METRICS, max_clips=1))  # and fewer
    assert {row.clip_id for row in read(tmp_path / "two", FrameScores, "frames")} == {"test0"}


def test_scores_without_their_curves_are_made_again(
    inputs: Path, tmp_path: Path, looked_at: list[str]
) -> None:
    job = model_job(inputs, tmp_path, metrics=("l1",))
    evaluate(job)
    before = files(tmp_path)
    (tmp_path / "frames.parquet").unlink()
    evaluate(job)
    assert looked_at == ["test0", "test1", "test2", "test3"] * 2
    assert files(tmp_path) == before


def test_the_page_has_the_curves_of_what_it_shows(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    page = "tasks.score_results.evaluation_page"

    def noted(*, frames: Any, **values: Any) -> str:
        given.update(values, frames=list(frames))  # they come one by one
        return "page"

    monkeypatch.setattr(page, noted)
    monkeypatch.setattr("tasks.score_plan.NUM_PREVIEWS", 2)
    evaluate(model_job(inputs, tmp_path, metrics=METRICS))
    assert set(given["media"]) == {"test0", "test2"}
    assert {row.clip_id for row in given["frames"]} == {"test0", "test2"}
    assert {row.metric for row in given["frames"]} == {*METRICS, "coverage_facemesh"}
    assert given["preview_frames"] == score_worker.PREVIEW_FRAMES


@pytest.mark.parametrize("count", [0, 1, 7, 200, 201, 450, 10_007])
def test_previews_are_spread_over_the_videos(count: int) -> None:
    clips = tuple(clip_record(f"c{n}", "test", n, 2, 32) for n in range(count))
    planned = ScorePlan(clips, (), (), (), "videos", "reconstruction", "absolute")
    places = [n for n, item in enumerate(planned.items()) if item.preview]
    assert len(places) == min(count, NUM_PREVIEWS)
    if len(places) > 1:
        gaps = np.diff([*places, count])
        assert places[0] == 0 and gaps.max() - gaps.min() <= 1


def test_previews_are_of_the_same_weights_as_the_scores(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.score_plan.NUM_PREVIEWS", 2)
    write_weights(tmp_path / "other.safetensors", seed=8)
    out = tmp_path / "out"
    job = model_job(inputs, out, metrics=("l1",))
    other = model_job(
        inputs, out, metrics=("l1",), checkpoint=str(tmp_path / "other.safetensors"), max_clips=3
    )
    first = evaluate(job)
    with monkeypatch.context() as patched:
        dies_after(patched, 1)
        with pytest.raises(StorageError):
            evaluate(other)
    assert evaluate(job) == first
    assert shown(out) == {entry_of(first.settings_digest, clip) for clip in ("test0", "test2")}
    second = evaluate(other)  # of fewer clips, so that others are shown
    assert shown(out) == {entry_of(second.settings_digest, clip) for clip in ("test0", "test1")}
    assert all(media_of(entry).result in (out / "index.html").read_text() for entry in shown(out))


def shown(out: Path) -> set[str]:
    return {path.stem for path in (out / "media").glob("*.jpg")}


# --- reruns and other runs -------------------------------------------------------------------


def test_a_second_run_waits_for_the_first(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_at: list[str]
) -> None:
    job = model_job(inputs, tmp_path, metrics=("l1",))
    begun, waited = threading.Event(), threading.Event()

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            waited.set()

    def slow(*args: Any, **kwargs: Any) -> Iterator[Any]:
        begun.set()
        assert waited.wait(60)
        yield from run_inline(*args, **kwargs)

    monkeypatch.setattr("tasks.evaluate.run_items", slow)
    handler = Told()
    logging.getLogger("tasks.evaluate").addHandler(handler)
    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(evaluate, job)
            assert begun.wait(60)
            second = pool.submit(evaluate, job)
            assert first.result() == second.result()
    finally:
        logging.getLogger("tasks.evaluate").removeHandler(handler)
    assert looked_at == ["test0", "test1", "test2", "test3"]
    assert not [path for path in (tmp_path / LEASE).rglob("*") if path.is_file()]


def test_a_run_that_lost_its_place_writes_nothing_more(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: Any) -> None:
        raise RunFailed("another run took over", code="busy")

    monkeypatch.setattr("tasks.lease.Lease.check", lost)
    with pytest.raises(RunFailed, match="took over"):
        evaluate(model_job(inputs, tmp_path, metrics=("l1",)))
    assert not (tmp_path / "scores.parquet").exists()
    assert not [path for path in (tmp_path / "journal" / "scores").rglob("*") if path.is_file()]


def test_a_clip_without_a_score_is_not_looked_at_again(
    inputs: Path, tmp_path: Path, looked_at: list[str]
) -> None:
    make_dataset(tmp_path / "data", lengths={"test": (6, 1, 1)})
    job = model_job(inputs, tmp_path / "out", data=str(tmp_path / "data"), metrics=("l1",))
    table = evaluate(job)
    assert table.num_videos == 3
    assert {row.clip_id for row in read(tmp_path / "out", VideoScore, "scores")} == {"test0"}
    before = files(tmp_path / "out")
    assert evaluate(job) == table
    assert looked_at == ["test0", "test1", "test2"]
    assert files(tmp_path / "out") == before


def test_a_machine_with_other_weights_scores_nothing(inputs: Path, tmp_path: Path) -> None:
    job = model_job(inputs, tmp_path, metrics=("l1", "akd_facemesh"))
    planned = score_plan(job)
    told = ScoreSettings.of(job).as_planned(planned)
    ClipWorker(told)
    with pytest.raises(CheckpointError, match="not the weights with which the run began"):
        ClipWorker(dataclasses.replace(told, weights_sha256="0" * 64))
    infos = [
        dataclasses.replace(info, weights_sha256="d0" * 32) if info.estimator else info
        for info in planned.metrics
    ]
    with pytest.raises(CheckpointError, match="weights c0c0c0c0c0c0c0c0 and d0d0") as caught:
        ClipWorker(dataclasses.replace(told, measured=tuple(infos)))
    assert caught.value.subject == "akd_facemesh"


# --- metrics of the whole set ----------------------------------------------------------------

SET = ("l1", "frechet_sface")


@pytest.fixture
def of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of three is enough."""
    monkeypatch.setattr(FrechetSFace, "min_videos", 3)


def by_scipy(a_ND: NDArray[Any], b_ND: NDArray[Any]) -> float:
    a_DD, b_DD = (np.cov(table, rowvar=False) for table in (a_ND, b_ND))
    root = scipy.linalg.sqrtm(a_DD @ b_DD)
    return float(
        (np.square(a_ND.mean(0) - b_ND.mean(0)).sum() + np.trace(a_DD + b_DD - 2 * root)).real
    )


@pytest.mark.usefixtures("of_three")
def test_a_set_s_value_is_of_all_its_frames(inputs: Path, tmp_path: Path) -> None:
    table = evaluate(model_job(inputs, tmp_path, metrics=SET))
    dataset = Dataset.from_folder(inputs / "data")
    animator = Animator.load(inputs / "w.safetensors", device="cpu", precision="plain")
    sides: dict[str, list[NDArray[np.uint8]]] = {"model": [], "copy": [], "true": []}
    for record in dataset.partition("test"):
        true = dataset.read(record)
        with torch.inference_mode():
            state = animator.encode_source(true[0])
            drawn = to_frames(animator.render(state, animator.encode_driving(true)))
        sides["true"].append(true[1:])
        sides["model"].append(drawn[1:])
        sides["copy"].append(np.stack([true[0]] * (len(true) - 1)))
    colours = {k: estimators.Colour().estimate(np.concatenate(v)) for k, v in sides.items()}
    found = {score.method: score for score in table.sets}
    assert set(found) == {"model", "copy", "codec"}
    for method in ("model", "copy"):
        expected = by_scipy(colours[method], colours["true"])
        assert found[method].value == pytest.approx(expected, rel=1e-3, abs=1e-6)  # in 32 bits
    assert 0 < found["codec"].value < found["copy"].value
    assert {(s.num_videos, s.num_windows) for s in table.sets} == {(4, 10 + 4 + 5 + 6)}
    info = {info.name: info for info in table.metrics}["frechet_sface"]
    assert (info.of_set, info.coverage, info.estimator) == (True, "coverage_sface", "sface")
    assert "coverage_sface" in {s.metric for s in table.summaries}
    assert "frechet_sface" not in {s.metric for s in table.summaries}


@pytest.mark.usefixtures("of_three")
def test_a_set_s_value_survives_reruns_and_kills(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_at: list[str]
) -> None:
    whole = evaluate(model_job(inputs, tmp_path / "whole", metrics=SET))
    looked_at.clear()
    job = model_job(inputs, tmp_path / "torn", metrics=SET)
    with monkeypatch.context() as patched:
        dies_after(patched, 2)
        with pytest.raises(StorageError):
            evaluate(job)
    table = evaluate(job)
    assert table.sets == whole.sets
    assert len(looked_at) == 5
    before = files(tmp_path / "torn")
    assert evaluate(job) == table
    assert (len(looked_at), files(tmp_path / "torn")) == (5, before)
    fewer = evaluate(job.model_copy(update={"max_clips": 3}))
    assert looked_at[5:] == ["test0", "test1", "test2"]  # whose features were removed
    assert fewer.sets != whole.sets
    again = evaluate(job)
    assert looked_at[8:] == ["test3", "test0", "test1", "test2"]
    assert again.sets == whole.sets


@pytest.mark.usefixtures("of_three")
def test_a_set_with_a_clip_without_a_score_is_not_looked_at_again(
    inputs: Path, tmp_path: Path, looked_at: list[str]
) -> None:
    make_dataset(tmp_path / "data", lengths={"test": (6, 1, 5, 4)})
    job = model_job(inputs, tmp_path / "out", data=str(tmp_path / "data"), metrics=SET)
    table = evaluate(job)
    assert {score.num_videos for score in table.sets} == {3}
    assert evaluate(job) == table
    assert looked_at == ["test0", "test1", "test2", "test3"]


@pytest.mark.usefixtures("of_three")
def test_too_few_videos_that_are_left_are_told_of(tmp_path: Path, looked_at: list[str]) -> None:
    for name in ("a", "b", "c"):
        for side, count in (("made", 5), ("true", 5 if name != "b" else 6)):
            (tmp_path / side).mkdir(exist_ok=True)
            encode(tmp_path / side / f"{name}.mp4", some_frames(count, seed=len(name)), fps=25)
            encode(tmp_path / side / f"{name}.mp4", some_frames(count, seed=ord(name) % 7), fps=25)
    job = job_of(
        tmp_path / "out",
        generated=str(tmp_path / "made"),
        reference=str(tmp_path / "true"),
        metrics=SET,
    )
    for _ in range(2):
        table = evaluate(job)
        assert table.sets == ()
        failures = {f.item: f for f in read(tmp_path / "out", Failure, "failures")}
        assert failures["b"].code == "inconsistent_frames"
        assert failures["frechet_sface"].code == "dataset_too_small"
        assert "takes 3 videos" in failures["frechet_sface"].cause
        assert (table.num_videos, table.num_failures) == (2, 2)
    assert looked_at == looked_at[:2]  # what was scored is not scored again


def test_a_small_set_is_refused_before_anything_is_scored(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="4 videos are too few: it takes 256") as caught:
        plan(model_job(inputs, tmp_path / "out", metrics=SET))
    assert caught.value.subject == "frechet_sface"
    assert "csim_truth_sface" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_an_entry_of_an_earlier_version_is_no_score(
    inputs: Path, tmp_path: Path, looked_at: list[str]
) -> None:
    entries = tmp_path / "journal" / "scores" / "done"
    entries.mkdir(parents=True)
    (entries / "x.json").write_text('{"id": "x", "record": {"clip_id": "test0"}}')
    (tmp_path / "journal" / "done").mkdir()
    (tmp_path / "journal" / "done" / "y.json").write_text("{}")
    evaluate(model_job(inputs, tmp_path, metrics=("l1",)))
    assert looked_at == ["test0", "test1", "test2", "test3"]
    assert not [p for p in (tmp_path / "journal").rglob("*") if p.is_file()]


# --- where it runs ---------------------------------------------------------------------------


def test_workers_ask_for_a_gpu_where_the_device_may_be_one(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    given: list[float] = []

    def with_gpus(cluster: Cluster, device: str) -> Cluster:
        asked.append(device)
        return cluster.model_copy(update={"gpus_per_worker": 1.0})

    def noting(items: Any, *args: Any, cluster: Cluster, **kwargs: Any) -> Iterator[Any]:
        given.append(cluster.gpus_per_worker)
        return run_inline(items, *args, cluster=cluster, **kwargs)

    monkeypatch.setattr("tasks.evaluate.with_gpus", with_gpus)
    monkeypatch.setattr("tasks.evaluate.run_items", noting)
    evaluate(model_job(inputs, tmp_path, metrics=("l1",), max_clips=1))
    assert (set(asked), set(given)) == ({"cpu"}, {1.0})


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["model", "videos"])
def test_scores_are_the_same_on_a_gpu(inputs: Path, tmp_path: Path, kind: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for side, seed in (("made", 1), ("true", 0)):
        (tmp_path / side).mkdir()
        encode(tmp_path / side / "v.mp4", some_frames(9, seed=seed), fps=25)
    folders = {"generated": str(tmp_path / "made"), "reference": str(tmp_path / "true")}
    tables = []
    for device in ("cpu", "cuda"):
        out, wanted = tmp_path / device, {"metrics": METRICS, "device": device}
        job = job_of(out, **folders, **wanted) if kind == "videos" else None
        tables.append(evaluate(job or model_job(inputs, out, **wanted)))
    cpu, gpu = ({(s.metric, s.method): s.mean for s in table.summaries} for table in tables)
    assert gpu == pytest.approx(cpu, rel=1e-3, abs=1e-4)


@pytest.mark.usefixtures("of_three")
def test_results_lie_in_s3_as_well(
    inputs: Path, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch, looked_at: list[str]
) -> None:
    here = evaluate(model_job(inputs, tmp_path, metrics=SET))
    looked_at.clear()
    job = model_job(inputs, tmp_path, metrics=SET).model_copy(update={"out": f"{s3}/scores"})
    evaluate(job.model_copy(update={"max_clips": 3}))
    with monkeypatch.context() as patched:
        dies_after(patched, 1)
        with pytest.raises(StorageError):
            evaluate(job)  # dies after the new clip, before the others' features are there again
    table = evaluate(job)
    assert looked_at[:3] == ["test0", "test1", "test2"]
    assert set(looked_at[3:]) == {"test0", "test1", "test2", "test3"}
    assert (table.sets, table.summaries) == (here.sets, here.summaries)
    store = open_store(f"{s3}/scores")
    assert not list(store.list("journal/"))
    rows = from_table(pq.read_table(store.local("frames.parquet")), FrameScores)
    assert {row.clip_id for row in rows} == {"test0", "test1", "test2", "test3"}
