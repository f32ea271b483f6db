"""Fréchet distances against scipy's matrix root, a closed form, and what they must be."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray

from kpmask.estimators import Subject
from kpmask.evaluate import WindowFeatures
from kpmask.metrics.frechet import MIN_VIDEOS, FrechetSFace, frechet_distance, moments

Features = NDArray[np.float64]


def by_scipy(a_ND: Features, b_ND: Features) -> float:
    """The formula as it is written, with a general matrix root."""
    a_DD, b_DD = np.cov(a_ND, rowvar=False), np.cov(b_ND, rowvar=False)
    root_DD = scipy.linalg.sqrtm(a_DD @ b_DD)
    apart = np.square(a_ND.mean(0) - b_ND.mean(0)).sum()
    return float((apart + np.trace(a_DD + b_DD - 2 * root_DD)).real)


def samples(count: int, size: int, *, seed: int) -> Features:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) + rng.normal(size=size)


@pytest.mark.parametrize("size", [2, 7, 40])
def test_the_distance_is_that_of_scipy_s_matrix_root(size: int) -> None:
    a, b = samples(90, size, seed=1), samples(120, size, seed=2)
    found = frechet_distance(*moments([a]), *moments([b]))
    assert found == pytest.approx(by_scipy(a, b), rel=1e-8)
    assert frechet_distance(*moments([b]), *moments([a])) == pytest.approx(found, rel=1e-8)


def test_the_distance_in_one_dimension_has_a_closed_form() -> None:
    one = (np.array([0.3]), np.array([[4.0]]))
    other = (np.array([-0.5]), np.array([[0.25]]))
    assert frechet_distance(*one, *other) == pytest.approx(0.8**2 + (2 - 0.5) ** 2)


def test_equal_sets_are_at_no_distance_and_a_shift_counts_squared() -> None:
    few = samples(10, 40, seed=3)  # their covariance is singular
    assert frechet_distance(*moments([few]), *moments([few])) == pytest.approx(0, abs=1e-6)
    shifted = moments([few + 0.5])
    assert frechet_distance(*moments([few]), *shifted) == pytest.approx(40 * 0.25, rel=1e-6)


def test_moments_are_numpy_s_however_the_rows_come() -> None:
    rows = samples(100, 5, seed=4) + 1e4  # far from 0: squares would lose their digits
    mean, covariance = moments([rows[:1], np.empty((0, 0)), rows[1:40], rows[40:]])
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(rows, rowvar=False), rtol=1e-8)
    with pytest.raises(ValueError, match="1 rows"):
        moments([rows[:1]])


class Brightest:
    """Takes the brightest channel of a frame for who is in it; nobody is in dark frames."""

    name, version, weights_sha256, licence = "sface", "4", "ef" * 32, "MIT"
    subject: Subject = "face"
    size = 3

    def estimate(self, frames_THWC: NDArray[np.uint8]) -> Features:
        means_TC = frames_THWC.mean((1, 2))
        vectors_TC = np.eye(3)[means_TC.argmax(1)]
        vectors_TC[means_TC.max(1) < 10] = np.nan
        return vectors_TC


def features_of(*colours: tuple[float, float, float]) -> Features:
    frames_TCHW = torch.tensor(colours)[:, :, None, None].expand(-1, -1, 8, 8)
    windows = WindowFeatures(FrechetSFace(Brightest()))
    windows.add(frames_TCHW)
    return windows.table()


RED, GREEN, DARK = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)


def test_a_frame_without_a_face_is_the_vector_of_zeros() -> None:
    assert features_of(RED, DARK, GREEN).tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_faces_that_are_lost_cost_and_other_faces_cost_more() -> None:
    metric = FrechetSFace(Brightest())
    true = features_of(RED, RED, GREEN)
    assert metric.score([true], [true]) == pytest.approx(0, abs=1e-9)
    lost = metric.score([features_of(RED, DARK, GREEN)], [true])
    none = metric.score([features_of(DARK, DARK, DARK)], [true])
    blue = (0.0, 0.0, 1.0)
    others = metric.score([features_of(blue, blue, blue)], [true])
    assert 0 < lost < none < others <= 4
    assert (metric.name, metric.version, metric.min_videos) == ("frechet_sface", "1+4", MIN_VIDEOS)
