"""SFace (Zhong et al. 2021): 128 numbers that are alike for faces of one person."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kpmask.data.detectors import one_thread
from kpmask.estimators import Frames, Subject
from kpmask.estimators.frames import EachFrame
from kpmask.estimators.weights import KNOWN, digest_of, locate
from kpmask.estimators.yunet import FaceFinder

SIZE = 128


class SFace:
    """The embedding of the largest face of a frame, which is aligned by YuNet's five points."""

    name: str = "sface"
    version: str = f"2021dec-int8bq+{FaceFinder.version}"
    licence: str = "Apache-2.0 AND MIT"
    subject: Subject = "face"
    size: int = SIZE
    weights = KNOWN["sface"]
    weights_sha256: str = digest_of((weights.sha256, FaceFinder.weights.sha256))

    def __init__(self, finder: FaceFinder, path: Path) -> None:
        self._finder = finder
        self._net = cv2.FaceRecognizerSF.create(str(path), "")
        self._each = EachFrame(self._embedding, shape=(SIZE,), name=self.name)

    @classmethod
    def load(cls) -> SFace:
        """Raises `locate`'s errors."""
        finder = FaceFinder.load()
        (path,) = locate(cls.weights)
        return cls(finder, path)

    def estimate(self, frames_THWC: Frames) -> NDArray[np.float64]:
        """See `EmbeddingEstimator`."""
        return self._each(frames_THWC)

    def _embedding(self, frame_HWC: NDArray[np.uint8]) -> NDArray[np.float64] | None:
        face = self._finder.find(frame_HWC)
        if face is None:
            return None
        with one_thread():
            picture_HWC = cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2BGR)
            found = self._net.feature(self._net.alignCrop(picture_HWC, face))
        vector_D = found.ravel().astype(np.float64)
        length = float(np.linalg.norm(vector_D))
        return vector_D / length if length > 0 else None
