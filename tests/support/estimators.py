"""Estimators without weights, whose answers can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from kpmask.estimators import Keypoints, Subject

Frames = NDArray[np.uint8]  # THWC
DARK = 3.0  # of 255: below this nobody is there


class Centroids:
    """Where the brightness of each channel lies: three points; none in a dark channel."""

    name, version, weights_sha256, licence = "facemesh", "7", "c0" * 32, "MIT"
    subject: Subject = "face"
    num_points = 3

    def estimate(self, frames_THWC: Frames) -> Keypoints:
        points_TK2 = np.full((len(frames_THWC), 3, 2), math.nan)
        y_HW, x_HW = np.mgrid[: frames_THWC.shape[1], : frames_THWC.shape[2]]
        for t, frame_HWC in enumerate(frames_THWC.astype(np.float64)):
            for k in range(3):
                weights_HW = frame_HWC[..., k]
                if weights_HW.mean() > DARK:
                    total = weights_HW.sum()
                    place = (weights_HW * x_HW).sum() / total, (weights_HW * y_HW).sum() / total
                    points_TK2[t, k] = place
        return Keypoints(points_TK2=points_TK2, scores_TK=np.ones(points_TK2.shape[:2]))


class Colour:
    """The mean colour of a frame, of length 1; nobody is in dark frames."""

    name, version, weights_sha256, licence = "sface", "5", "ca" * 32, "MIT"
    subject: Subject = "face"
    size = 3

    def estimate(self, frames_THWC: Frames) -> NDArray[np.float64]:
        means_TC = frames_THWC.mean((1, 2))
        lengths_T = np.linalg.norm(means_TC, axis=1, keepdims=True)
        vectors_TC = means_TC / np.maximum(lengths_T, 1e-9)
        vectors_TC[means_TC.max(1) < DARK] = math.nan
        return vectors_TC


def use(monkeypatch: pytest.MonkeyPatch, *, points: object = None, vectors: object = None) -> None:
    """Have these behind every metric of points and of vectors, in this process."""
    points, vectors = points or Centroids(), vectors or Colour()
    for module in ("keypoints", "motion"):
        name = f"kpmask.metrics.{module}.point_estimator"
        monkeypatch.setattr(name, lambda name: points)
    for module in ("identity", "frechet"):
        name = f"kpmask.metrics.{module}.embedding_estimator"
        monkeypatch.setattr(name, lambda name: vectors)
