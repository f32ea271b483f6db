"""Keypoint metrics on tables made by hand, and on frames with estimators that are told what to see.

The expected numbers are the original scripts' as they are described: per frame the mean of the
absolute differences over joints that both have and over both coordinates; frames without any are
skipped; MKR is missing over present, of the truth's joints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kpmask.errors import ConfigError
from kpmask.estimators import Keypoints, Subject, point_estimator
from kpmask.estimators.frames import EachFrame
from kpmask.evaluate import score_video
from kpmask.metric_names import KEYPOINT_METRICS, PointsKind
from kpmask.metrics import Metric
from kpmask.metrics import keypoints as kp
from kpmask.metrics.keypoints import KeypointMetric, keypoint_metric

NAN = math.nan
MISSING = (NAN, NAN)

# Three frames of three joints; in the truth's second frame one is missing, in the third all.
TRUE = np.array(
    [
        [(10, 20), (30, 40), (50, 60)],
        [(11, 21), MISSING, (51, 61)],
        [MISSING, MISSING, MISSING],
    ]
)
MADE = np.array(
    [
        [(13, 16), (30, 41), MISSING],
        [(11, 23), (99, 99), MISSING],
        [(5, 5), (6, 6), (7, 7)],
    ]
)


def by_the_description(true: NDArray[Any], made: NDArray[Any]) -> tuple[list[float], list[float]]:
    """AKD and MKR of the frames that the original scripts score, in plain loops."""
    distances, rates = [], []
    for true_frame, made_frame in zip(true, made, strict=True):
        differences, present, missing = [], 0, 0
        for (x, y), (u, v) in zip(true_frame, made_frame, strict=True):
            if math.isnan(x):
                continue
            present += 1
            if math.isnan(u):
                missing += 1
            else:
                differences += [abs(x - u), abs(y - v)]
        if differences:
            distances.append(sum(differences) / len(differences))
        if present:
            rates.append(missing / present)
    return distances, rates


def test_akd_and_mkr_of_a_table_made_by_hand() -> None:
    np.testing.assert_array_equal(kp.akd(TRUE, MADE), [(3 + 4 + 0 + 1) / 4, (0 + 2) / 2, NAN])
    np.testing.assert_array_equal(kp.akd_euclidean(TRUE, MADE), [(5 + 1) / 2, 2, NAN])
    np.testing.assert_array_equal(kp.mkr(TRUE, MADE), [1 / 3, 1 / 2, NAN])
    np.testing.assert_array_equal(kp.coverage(TRUE, MADE), [1, 1, 0])


def test_akd_and_mkr_are_the_original_scripts_on_many_tables() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        true, made = rng.uniform(0, 64, (2, 9, 18, 2))
        true[rng.random((9, 18)) < 0.3] = NAN
        made[rng.random((9, 18)) < 0.3] = NAN
        true[4], made[6] = NAN, NAN
        distances, rates = by_the_description(true, made)
        akd, mkr = kp.akd(true, made), kp.mkr(true, made)
        np.testing.assert_allclose(akd[~np.isnan(akd)], distances, rtol=1e-13)
        np.testing.assert_allclose(mkr[~np.isnan(mkr)], rates, rtol=1e-13)
        assert np.isnan(akd[[4, 6]]).all()
        assert mkr[6] == 1


def test_a_missed_point_counts_as_the_farthest_place_of_the_frame() -> None:
    most = kp.farthest(TRUE, width_px=64, height_px=101)
    np.testing.assert_array_equal(most[0], [(53, 80), (33, 60), (50, 60)])
    assert np.isnan(most[2]).all()
    expected = [(3 + 4 + 0 + 1 + 50 + 60) / 6, (0 + 2 + 51 + 61) / 4, NAN]
    np.testing.assert_array_equal(kp.akd(TRUE, MADE, missed_TK2=most), expected)
    euclidean = [(5 + 1 + math.hypot(50, 60)) / 3, (2 + math.hypot(51, 61)) / 2, NAN]
    np.testing.assert_allclose(kp.akd_euclidean(TRUE, MADE, missed_TK2=most), euclidean)


@pytest.mark.parametrize("formula", [kp.akd, kp.akd_euclidean, kp.jitter])
def test_nothing_in_the_frame_scores_worse_than_not_being_found(
    formula: Callable[..., NDArray[np.float64]],
) -> None:
    rng = np.random.default_rng(5)
    size = {"width_px": 48, "height_px": 32}
    last = np.array([47, 31])
    for _ in range(50):
        true = rng.uniform(0, last, (6, 7, 2))
        most = kp.farthest(true, **size)
        unfound = rng.random((6, 7)) < 0.4
        anywhere = rng.integers(0, 2, (6, 7, 2)) * last  # corners are the worst places
        lost = np.where(unfound[..., None], NAN, anywhere)
        seen = formula(true, anywhere, missed_TK2=most)
        unseen = formula(true, lost, missed_TK2=most)
        assert (np.nan_to_num(unseen) >= np.nan_to_num(seen) - 1e-9).all()
        assert np.isfinite(unseen[2:]).all()


def test_jitter_is_the_mean_second_difference_of_the_errors() -> None:
    rng = np.random.default_rng(7)
    true, made = rng.uniform(0, 99, (2, 8, 5, 2))
    error = made - true
    expected = [NAN, NAN] + [
        float(np.mean([abs(error[t] - 2 * error[t - 1] + error[t - 2])])) for t in range(2, 8)
    ]
    np.testing.assert_allclose(kp.jitter(true, made), expected)
    # A shift, and one that grows steadily, are no jitter; noise is.
    steady = true + 3 + np.arange(8.0)[:, None, None]
    np.testing.assert_allclose(kp.jitter(true, steady)[2:], 0, atol=1e-12)
    assert np.isnan(kp.jitter(true[:2], made[:2])).all()
    assert np.isnan(kp.jitter(true[:1], made[:1])).all()


# --- on frames -------------------------------------------------------------------------------


class Bright:
    """Sees one point, at the brightest pixel, if that is bright; and breaks on white frames."""

    name = "bright"
    version = "3"
    weights_sha256 = "ab" * 32
    licence = "MIT"
    subject: Subject = "face"
    num_points = 1

    def __init__(self) -> None:
        self.looked = 0
        self._each = EachFrame(self._look, shape=(1, 3), name=self.name)

    def _look(self, frame_HWC: NDArray[np.uint8]) -> NDArray[np.float64] | None:
        self.looked += 1
        if frame_HWC.min() == 255:
            raise ValueError("blinded")
        grey_HW = frame_HWC.max(2)
        y, x = np.unravel_index(grey_HW.argmax(), grey_HW.shape)
        return np.array([[x, y, 1.0]]) if grey_HW.max() > 100 else None

    def estimate(self, frames_THWC: NDArray[np.uint8]) -> Keypoints:
        found = self._each(frames_THWC)
        return Keypoints(found[..., :2], np.nan_to_num(found[..., 2]))


def dots(*places: tuple[int, int] | None) -> torch.Tensor:
    """Frames of 40x24 px, black but for a dot."""
    frames = torch.zeros(len(places), 3, 24, 40)
    for frame, place in zip(frames, places, strict=True):
        if place is not None:
            frame[:, place[1], place[0]] = 1
    return frames


def values(kind: PointsKind, made: torch.Tensor, true: torch.Tensor, **more: Any) -> list[float]:
    return list(KeypointMetric(kind, Bright(), **more).per_frame(made, true, true[0]))


def test_frames_without_a_subject_on_either_side() -> None:
    true = dots((10, 10), (10, 10), None, None)
    made = dots((14, 10), None, (1, 1), None)
    np.testing.assert_array_equal(values("akd", made, true), [2, (29 + 13) / 2, NAN, NAN])
    np.testing.assert_array_equal(values("akd", made, true, only_found=True), [2, NAN, NAN, NAN])
    np.testing.assert_array_equal(values("mkr", made, true), [0, 1, NAN, NAN])
    np.testing.assert_array_equal(values("coverage", made, true), [1, 0, 0, 0])
    nothing = dots(None, None, None)
    assert np.isnan(values("akd", true[:3], nothing)).all()
    assert np.isnan(values("jitter", true[:3], nothing)).all()


def test_a_frame_that_is_no_picture_and_one_that_breaks_the_estimator_are_empty(
    caplog: pytest.LogCaptureFixture,
) -> None:
    true = dots((10, 10), (10, 10), (10, 10))
    made = true.clone()
    made[1, 0, 3, 3] = NAN
    made[2] = 1
    np.testing.assert_array_equal(values("mkr", made, true), [0, 1, 1])
    np.testing.assert_array_equal(values("akd", made, true), [0, 21, 21])
    assert "bright breaks on a frame, which counts as empty: blinded" in caplog.text
    assert np.isnan(values("akd", true, made)[1:]).all()
    assert values("coverage", torch.full_like(true, NAN), true) == [0, 0, 0]


def test_an_estimator_that_never_worked_is_no_bad_frame() -> None:
    def broken(frame_HWC: NDArray[np.uint8]) -> NDArray[np.float64] | None:
        raise RuntimeError("no such instruction")

    each = EachFrame(broken, shape=(1, 3), name="broken")
    frames = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), np.uint8)
    assert np.isnan(each(frames[:15])).all()
    with pytest.raises(RuntimeError, match="no such instruction"):
        each(frames[15:])


def test_a_gpu_without_memory_is_no_empty_frame() -> None:
    def full(frame_HWC: NDArray[np.uint8]) -> NDArray[np.float64] | None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    each = EachFrame(full, shape=(1, 3), name="full")
    with pytest.raises(torch.OutOfMemoryError):
        each(np.zeros((1, 4, 4, 3), np.uint8))


def test_one_frame_and_pieces_with_the_frames_before() -> None:
    places = [(3 * t % 40, 5 * t % 24) for t in range(9)]
    true, made = dots(*places), dots(*[(x, (y + x) % 24) for x, y in places])
    for kind in get_args(PointsKind):
        metric = KeypointMetric(kind, Bright())
        whole = metric.per_frame(made, true, true[0])
        assert whole.shape == (9,)
        before = metric.frames_before
        piece = metric.per_frame(made[5 - before :], true[5 - before :], true[0])
        np.testing.assert_array_equal(piece[before:], whole[5:])
        assert metric.per_frame(made[:1], true[:1], true[0]).shape == (1,)


def test_scores_of_a_video_are_those_of_its_chunks() -> None:
    """Through the evaluation's own protocol, which leaves frame 0 out."""
    rng = np.random.default_rng(11)
    places = [(int(x), int(y)) for x, y in rng.integers(2, 20, (11, 2))]
    true = dots(*places)
    made = dots(*[(x + 1, y) if t % 4 else None for t, (x, y) in enumerate(places)])
    metrics: list[Metric] = [KeypointMetric(kind, Bright()) for kind in get_args(PointsKind)]
    whole = score_video([(made, true)], metrics, clip_id="a", name="a")
    chunks = [(made[i:j], true[i:j]) for i, j in ((0, 1), (1, 5), (5, 7), (7, 11))]
    in_chunks = score_video(chunks, metrics, clip_id="a", name="a")
    assert (in_chunks.metrics, in_chunks.methods) == (whole.metrics, whole.methods)
    assert in_chunks.num_frames == whole.num_frames
    np.testing.assert_allclose(in_chunks.values, whole.values, rtol=1e-12)
    rows = list(zip(whole.metrics, whole.methods, strict=True))
    scores = dict(zip(rows, whole.values, strict=True))
    counts = dict(zip(rows, whole.num_frames, strict=True))
    assert scores["mkr_bright", "model"] == pytest.approx(2 / 10)
    assert scores["coverage_bright", "model"] == pytest.approx(8 / 10)
    assert counts["akd_bright", "model"] == 10
    assert counts["jitter_bright", "model"] == 9


def test_equal_frames_are_looked_at_once() -> None:
    estimator = Bright()
    true, frozen = dots(*[(x, 3) for x in range(8)]), dots(*[(0, 3)] * 8)
    for kind in get_args(PointsKind):
        KeypointMetric(kind, estimator).per_frame(frozen, true, true[0])
    assert estimator.looked == 8


def test_names_say_the_estimator_and_what_missed_points_count() -> None:
    metric = KeypointMetric("akd", Bright())
    assert (metric.name, metric.version, metric.weights_sha256) == ("akd_bright", "1+3", "ab" * 32)
    assert KeypointMetric("akd", Bright(), only_found=True).name == "akd_bright_found"
    assert [KeypointMetric(k, Bright()).higher_is_better for k in get_args(PointsKind)] == [
        kind == "coverage" for kind in get_args(PointsKind)
    ]


@pytest.mark.parametrize("name", KEYPOINT_METRICS)
def test_every_name_is_known_and_without_weights_names_the_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(estimator: str) -> Any:
        made = Bright()
        made.name = estimator
        return made

    with monkeypatch.context() as patched:
        patched.setattr(kp, "point_estimator", found)
        assert keypoint_metric(name).name == name

    monkeypatch.setenv("KPMASK_CACHE", "/nowhere")
    monkeypatch.setattr(kp, "point_estimator", point_estimator.__wrapped__)
    with pytest.raises(ConfigError, match=r"kpmask weights (fetch|add) \w+"):
        keypoint_metric(name)
