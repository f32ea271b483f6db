"""MediaPipe's face mesh (Kartynnik et al. 2019): 468 points of a face.

The network sees a square around the face, turned so that the eyes are level. YuNet gives the first
square and the network's own points a second one, as the points of the frame before do in
MediaPipe: YuNet's boxes jump by pixels, and what is measured should not.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from kpmask.data.detectors import one_thread
from kpmask.estimators import Frames, Keypoints, Subject
from kpmask.estimators.frames import EachFrame
from kpmask.estimators.weights import KNOWN, digest_of, locate
from kpmask.estimators.yunet import FaceFinder

NUM_POINTS: Final = 468
MIN_SCORE: Final = 0.5
_SIDE_PX: Final = 192  # of what the network sees
_ROOM: Final = 1.5  # the square's side, over the face's longer side
_EYES: Final = (33, 263)  # outer corners of the right and the left eye
_OUTPUTS: Final = ("conv2d_21", "conv2d_31")  # points, and the score before its sigmoid


class FaceMesh:
    """468 points of the largest face of a frame; one score for all of them."""

    name: str = "facemesh"
    version: str = f"1+{FaceFinder.version}"
    licence: str = "Apache-2.0 AND MIT"
    subject: Subject = "face"
    num_points: int = NUM_POINTS
    weights = KNOWN["facemesh"]
    weights_sha256: str = digest_of((weights.sha256, FaceFinder.weights.sha256))

    def __init__(self, finder: FaceFinder, path: Path) -> None:
        self._finder = finder
        self._net = cv2.dnn.readNetFromTFLite(str(path))
        self._each = EachFrame(self._face, shape=(NUM_POINTS, 3), name=self.name)

    @classmethod
    def load(cls) -> FaceMesh:
        """Raises `locate`'s errors."""
        finder = FaceFinder.load()
        (path,) = locate(cls.weights)
        return cls(finder, path)

    def estimate(self, frames_THWC: Frames) -> Keypoints:
        """See `PointEstimator`."""
        found_TKC = self._each(frames_THWC)
        scores_TK = np.nan_to_num(found_TKC[..., 2], nan=0.0)
        return Keypoints(points_TK2=found_TKC[..., :2], scores_TK=scores_TK)

    def _face(self, frame_HWC: NDArray[np.uint8]) -> NDArray[np.float64] | None:
        """x, y and score of each point (K3)."""
        face = self._finder.find(frame_HWC)
        if face is None:
            return None
        corners_N2 = face[[0, 1, 0, 1]].reshape(2, 2).astype(np.float64)
        corners_N2[1] += face[2:4]
        to_square = _square(corners_N2, right_eye=face[4:6], left_eye=face[6:8])
        points_K2, score = self._points(frame_HWC, to_square)
        if score < MIN_SCORE:
            return None
        right, left = (points_K2[eye] for eye in _EYES)
        points_K2, score = self._points(
            frame_HWC, _square(points_K2, right_eye=right, left_eye=left)
        )
        if score < MIN_SCORE:
            return None
        return np.column_stack([points_K2, np.full(NUM_POINTS, score)])

    def _points(
        self, frame_HWC: NDArray[np.uint8], to_square: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], float]:
        """The points (K2) that the network finds in a square of a frame, and how sure it is."""
        with one_thread():
            square_HWC = cv2.warpAffine(
                frame_HWC,
                to_square,
                (_SIDE_PX, _SIDE_PX),
                flags=cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REPLICATE,
            )
            self._net.setInput(cv2.dnn.blobFromImage(square_HWC, scalefactor=1 / 255))
            points, logit = self._net.forward(_OUTPUTS)
        points_K2 = points.reshape(NUM_POINTS, 3)[:, :2].astype(np.float64)
        back = cv2.invertAffineTransform(to_square)
        score = 1 / (1 + math.exp(-min(max(float(logit.item()), -50.0), 50.0)))
        return points_K2 @ back[:, :2].T + back[:, 2], score


def _square(
    points_N2: NDArray[np.float64],
    *,
    right_eye: NDArray[np.floating],
    left_eye: NDArray[np.floating],
) -> NDArray[np.float64]:
    """The map (2x3) of frames to the square around points, with level eyes."""
    across = (left_eye - right_eye).astype(np.float64)
    angle = math.atan2(across[1], across[0])
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    turned_N2 = points_N2 @ turn.T
    low, high = turned_N2.min(axis=0), turned_N2.max(axis=0)
    scale = _SIDE_PX / (_ROOM * max(float((high - low).max()), 1.0))
    shift = _SIDE_PX / 2 - scale * (low + high) / 2
    return np.column_stack([scale * turn, shift])
