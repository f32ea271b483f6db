"""Videos and weights that are not as they should be, through a whole evaluation.

Estimators whose answers can be worked out by hand stand in for those with weights, and workers run
in this process. What is not here has tests of its own: files out of step or alone
(`test_evaluate.py`), rows of pairs (`test_evaluate_settings.py`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from kpmask import checkpoint
from kpmask.errors import CheckpointError, RunFailed
from kpmask.estimators import Keypoints
from kpmask.estimators.frames import EachFrame
from kpmask.estimators.weights import KNOWN, fetched_files
from kpmask.media import images
from kpmask.models import build_system
from kpmask.records import Failure, FrameScores, ScoreTable, VideoScore, from_table
from tasks.evaluate import evaluate
from tests.support import estimators
from tests.support.estimator_weights import need_weights
from tests.support.evaluations import (
    MODEL,
    SIDE_PX,
    job_of,
    make_dataset,
    model_job,
    some_frames,
    write_weights,
)
from tests.support.inline import inline_evaluation

Frames = NDArray[np.uint8]
OF_FACES = (
    *("akd_facemesh", "akd_facemesh_found", "akd_motion_facemesh", "mkr_facemesh"),
    *("csim_truth_sface", "csim_truth_sface_found", "csim_source_sface"),
)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    inline_evaluation(monkeypatch)
    estimators.use(monkeypatch)


def put(folder: Path, side: str, name: str, frames: Frames) -> None:
    """A video without loss: a folder of its frames."""
    video = folder / side / name
    video.mkdir(parents=True)
    for number, frame_HWC in enumerate(frames):
        (video / f"{number:04d}.png").write_bytes(images.encode_png(frame_HWC))


Rows = dict[tuple[str, str, str], VideoScore]


def scored(
    folder: Path, metrics: tuple[str, ...] = OF_FACES, **values: Any
) -> tuple[ScoreTable, Rows]:
    job = job_of(
        folder / "out",
        generated=str(folder / "made"),
        reference=str(folder / "true"),
        metrics=metrics,
        **values,
    )
    table = evaluate(job)
    rows = from_table(pq.read_table(folder / "out" / "scores.parquet"), VideoScore)
    return table, {(row.name, row.metric, row.method): row for row in rows}


def failures_of(out: Path) -> dict[str, str]:
    rows = from_table(pq.read_table(out / "failures.parquet"), Failure)
    return {row.item: row.code for row in rows}


# --- nobody is found -------------------------------------------------------------------------


def test_faces_that_are_lost_score_worst_and_are_left_out_of_found(tmp_path: Path) -> None:
    true = some_frames(6)
    put(tmp_path, "true", "gone", true)
    put(tmp_path, "made", "gone", np.zeros_like(true))
    table, rows = scored(tmp_path)
    last = SIDE_PX - 1
    points_TK2 = estimators.Centroids().estimate(true[1:]).points_TK2
    worst = np.maximum(points_TK2, last - points_TK2).mean()
    assert rows["gone", "akd_facemesh", "model"].value == pytest.approx(worst)
    assert rows["gone", "akd_motion_facemesh", "model"].value > last
    assert rows["gone", "mkr_facemesh", "model"].value == 1
    assert rows["gone", "csim_truth_sface", "model"].value == pytest.approx(-1)
    assert rows["gone", "csim_source_sface", "model"].value == pytest.approx(-1)
    for metric in ("akd_facemesh_found", "csim_truth_sface_found"):
        assert ("gone", metric, "model") not in rows
        assert ("gone", metric, "copy") in rows
    for metric in ("coverage_facemesh", "coverage_sface", "coverage_source_sface"):
        assert rows["gone", metric, "model"].value == 0
        assert rows["gone", metric, "copy"].value == 1
    assert table.num_failures == 0


def test_a_truth_without_faces_has_nothing_to_compare_with(tmp_path: Path) -> None:
    put(tmp_path, "made", "dark", some_frames(5))
    put(tmp_path, "true", "dark", np.zeros_like(some_frames(5)))
    put(tmp_path, "made", "light", some_frames(5, seed=1))
    put(tmp_path, "true", "light", some_frames(5))
    table, rows = scored(tmp_path)
    found = {metric for name, metric, _ in rows if name == "dark"}
    assert found == {"coverage_facemesh", "coverage_sface", "coverage_source_sface"}
    assert all(rows["dark", m, "model"].value == 0 for m in found)
    akd = next(s for s in table.summaries if (s.metric, s.method) == ("akd_facemesh", "model"))
    assert (akd.num_videos, table.num_videos) == (1, 2)


def test_one_frame_is_the_source_alone(tmp_path: Path) -> None:
    put(tmp_path, "true", "one", some_frames(1))
    put(tmp_path, "made", "one", some_frames(1, seed=3))
    _, rows = scored(tmp_path, ("l1", "l1_with_first", "temporal_error", "akd_facemesh"))
    assert {metric for _, metric, _ in rows} == {"l1_with_first"}
    (row,) = [row for key, row in rows.items() if key[2] == "model"]
    difference = np.abs(some_frames(1) / 255 - some_frames(1, seed=3) / 255).mean()
    assert (row.value, row.num_frames) == (pytest.approx(difference), 1)
    with pytest.raises(RunFailed, match="nothing could be scored"):
        scored(tmp_path, ("l1", "jitter_facemesh"))


# --- estimators that break -------------------------------------------------------------------


class Breaking:
    """`Centroids` that breaks on frames with a green corner, or on all."""

    version, weights_sha256, licence, subject = "1", "bb" * 32, "MIT", "face"
    name = "facemesh"
    num_points = 3

    def __init__(self, *, always: bool = False) -> None:
        self._always = always
        self._each = EachFrame(self._look, shape=(3, 2), name="breaking")

    def _look(self, frame_HWC: NDArray[np.uint8]) -> NDArray[np.float64]:
        if self._always or tuple(frame_HWC[0, 0]) == (0, 255, 0):
            raise cv2.error("assertion failed")
        points: NDArray[np.float64] = estimators.Centroids().estimate(frame_HWC[None]).points_TK2[0]
        return points

    def estimate(self, frames_THWC: Frames) -> Keypoints:
        points_TK2 = self._each(frames_THWC)
        return Keypoints(points_TK2=points_TK2, scores_TK=np.ones(points_TK2.shape[:2]))


def test_a_frame_on_which_an_estimator_breaks_counts_as_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimators.use(monkeypatch, points=Breaking())
    true, made = some_frames(6), some_frames(6, seed=1)
    made[3, 0, 0] = (0, 255, 0)
    put(tmp_path, "true", "v", true)
    put(tmp_path, "made", "v", made)
    table, rows = scored(tmp_path, ("akd_facemesh", "akd_facemesh_found"))
    curves = from_table(pq.read_table(tmp_path / "out" / "frames.parquet"), FrameScores)
    model = {curve.metric: curve.values for curve in curves if curve.method == "model"}
    assert [math.isnan(value) for value in model["akd_facemesh_found"]] == [
        t == 3 for t in range(6)
    ]
    assert model["akd_facemesh"][3] > max(
        value for t, value in enumerate(model["akd_facemesh"]) if t != 3
    )
    assert rows["v", "coverage_facemesh", "model"].value == pytest.approx(4 / 5)
    assert table.num_failures == 0


def test_an_estimator_that_never_works_is_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimators.use(monkeypatch, points=Breaking(always=True))
    put(tmp_path, "true", "v", some_frames(40))
    put(tmp_path, "made", "v", some_frames(40, seed=1))
    with pytest.raises(cv2.error):  # in a process of its own it is the item's failure, a bug
        scored(tmp_path, ("akd_facemesh",))
    assert not (tmp_path / "out" / "scores.parquet").exists()


# --- weights ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_weights(folder / "w.safetensors")
    make_dataset(folder / "data")
    return folder


def test_a_model_that_draws_no_numbers_fails_its_clips(inputs: Path, tmp_path: Path) -> None:
    system = build_system(MODEL)
    for parameter in system.parameters():
        torch.nn.init.constant_(parameter, 1e20)  # a number, of which sums of products are none
    checkpoint.save(tmp_path / "huge.safetensors", system, {"perceptual": "none"})
    job = model_job(
        inputs, tmp_path / "out", checkpoint=str(tmp_path / "huge.safetensors"), metrics=("ssim",)
    )
    with pytest.raises(RunFailed, match="pixels that are no numbers") as caught:
        evaluate(job)
    assert caught.value.code == "too_many_failures"
    assert set(failures_of(tmp_path / "out").values()) == {"bad_item"}


def test_other_weights_of_a_model_are_scored_anew(inputs: Path, tmp_path: Path) -> None:
    job = model_job(inputs, tmp_path / "out", metrics=("l1",))
    first = evaluate(job)
    write_weights(tmp_path / "other.safetensors", seed=8)
    second = evaluate(job.model_copy(update={"checkpoint": str(tmp_path / "other.safetensors")}))
    assert first.weights_sha256 != second.weights_sha256
    assert first.settings_digest != second.settings_digest
    assert first.summaries != second.summaries


def test_other_weights_of_an_estimator_are_another_measure(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = model_job(inputs, tmp_path / "out", metrics=("akd_facemesh",))
    first = evaluate(job)
    other = estimators.Centroids()
    other.weights_sha256 = "dd" * 32  # type: ignore[misc]
    estimators.use(monkeypatch, points=other)
    second = evaluate(job)
    assert {info.weights_sha256 for info in second.metrics} == {"dd" * 32}
    assert first.settings_digest != second.settings_digest


def test_an_estimator_s_file_with_another_digest_is_refused_before_anything_is_scored(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real estimator
    monkeypatch.setenv("KPMASK_CACHE", str(tmp_path / "cache"))
    from kpmask.estimators import point_estimator

    point_estimator.cache_clear()
    for path in fetched_files(KNOWN["movenet"]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"other weights")
    with pytest.raises(CheckpointError):
        evaluate(model_job(inputs, tmp_path / "out", metrics=("akd_movenet",)))
    assert not (tmp_path / "out").exists()


# --- two people ------------------------------------------------------------------------------


def face(dev_data: Path) -> Frames:
    """Frames of somebody who talks, 256 px."""
    from kpmask.config import MediaLimits
    from kpmask.media import decode

    frames = []
    for number, frame in enumerate(
        decode.frames(dev_data / "raw" / "smmKXvxUApc.mp4", MediaLimits())
    ):
        if number % 8 == 0:
            frames.append(images.resize(images.square_crop(frame.rgb_HWC), (256, 256)))
        if len(frames) == 4:
            return np.stack(frames)
    raise AssertionError("the video is shorter than it was")


def test_of_two_people_the_larger_is_scored(
    tmp_path: Path, dev_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_weights("facemesh")
    need_weights("sface")
    monkeypatch.undo()
    inline_evaluation(monkeypatch)
    large = face(dev_data)
    two = np.zeros((len(large), 256, 512, 3), np.uint8)
    two[:, :, :256] = large
    alone = two.copy()
    for frame_HWC, one_HWC in zip(two, large, strict=True):
        frame_HWC[:128, -128:] = images.resize(one_HWC[:, ::-1], (128, 128))
    put(tmp_path, "true", "v", alone)
    put(tmp_path, "made", "v", two)
    _, rows = scored(tmp_path, ("akd_facemesh", "csim_truth_sface"))
    assert rows["v", "akd_facemesh", "model"].value < 1
    assert rows["v", "csim_truth_sface", "model"].value > 0.95
    assert rows["v", "coverage_facemesh", "model"].value == 1
