"""YuNet (Wu, Peng and Yu 2023) through OpenCV: the face of a frame, for other estimators."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from kpmask.data.detectors import one_thread
from kpmask.estimators.weights import KNOWN, locate

MIN_SCORE: Final = 0.7
_OVERLAP: Final = 0.3  # boxes that share more are of one face
_SIDES_PX: Final = (160, 320)  # the longer side of what it looks at: faces beyond are missed


class FaceFinder:
    """Finds the largest face of a frame.

    The largest, since a video is cut so that its subject fills the frame. Whoever stands behind is
    not measured, in true and generated frames alike.
    """

    version: str = "yunet-2023mar-int8bq"
    weights = KNOWN["yunet"]

    def __init__(self, path: Path) -> None:
        self._net = cv2.FaceDetectorYN.create(str(path), "", (320, 320), MIN_SCORE, _OVERLAP, 100)

    @classmethod
    def load(cls) -> FaceFinder:
        """Raises `locate`'s errors."""
        (path,) = locate(cls.weights)
        return cls(path)

    def find(self, frame_HWC: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        """The largest face, as OpenCV's 15 numbers in the frame's pixels; None without one.

        Left, top, width and height; x and y of the right eye, left eye, tip of the nose, right and
        left corner of the mouth (right is the person's own); the score in [0, 1].
        """
        height_px, width_px = frame_HWC.shape[:2]
        long_px = max(height_px, width_px)
        scale = min(max(long_px, _SIDES_PX[0]), _SIDES_PX[1]) / long_px
        size_px = (max(1, round(width_px * scale)), max(1, round(height_px * scale)))
        with one_thread():
            picture_HWC = cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2BGR)
            if scale != 1:
                method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
                picture_HWC = cv2.resize(picture_HWC, size_px, interpolation=method)
            self._net.setInputSize(size_px)
            _, faces = self._net.detect(picture_HWC)
        if faces is None or not len(faces):
            return None
        areas = faces[:, 2] * faces[:, 3]
        face: NDArray[np.float32] = faces[np.argmax(areas)].astype(np.float32)
        face[0:14:2] *= width_px / size_px[0]
        face[1:14:2] *= height_px / size_px[1]
        return face
