"""ArcFace (Deng et al. 2019): 512 numbers that are alike for faces of one person.

A ResNet-50 of InsightFace. The largest face is laid over five points of a square of 112 px, as in
its training. The paper that reports a cosine by ArcFace says neither which network nor how faces
were aligned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from kpmask.data.detectors import one_thread
from kpmask.errors import CheckpointError
from kpmask.estimators import Frames, Subject
from kpmask.estimators.frames import EachFrame
from kpmask.estimators.weights import digest_of, find
from kpmask.estimators.yunet import FaceFinder

SIZE: Final = 512
_SIDE_PX: Final = 112
# Where eyes, tip of the nose and corners of the mouth are, those on the picture's left first.
_POINTS: Final = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


class ArcFace:
    """The vector of the largest face of a frame, which is aligned by YuNet's five points."""

    name: str = "arcface"
    version: str = f"w600k-r50-1+{FaceFinder.version}"
    licence: str = "LicenseRef-InsightFace AND MIT"
    subject: Subject = "face"
    size: int = SIZE

    def __init__(self, finder: FaceFinder, path: Path, *, weights_sha256: str) -> None:
        """
        Raises:
            CheckpointError: the file cannot be read as such a network.
        """
        self.weights_sha256 = weights_sha256
        self._finder = finder
        try:
            self._net = cv2.dnn.readNetFromONNX(str(path))
        except cv2.error as error:
            raise CheckpointError("cannot be read as ONNX", subject=str(path)) from error
        self._each = EachFrame(self._embedding, shape=(SIZE,), name=self.name)

    @classmethod
    def load(cls) -> ArcFace:
        """Raises `find`'s errors."""
        finder = FaceFinder.load()
        found = find("arcface")
        digest = digest_of((found.sha256, FaceFinder.weights.sha256))
        return cls(finder, found.paths[0], weights_sha256=digest)

    def estimate(self, frames_THWC: Frames) -> NDArray[np.float64]:
        """See `EmbeddingEstimator`."""
        return self._each(frames_THWC)

    def _embedding(self, frame_HWC: NDArray[np.uint8]) -> NDArray[np.float64] | None:
        face = self._finder.find(frame_HWC)
        if face is None:
            return None
        to_square = similarity(face[4:14].reshape(5, 2).astype(np.float64), _POINTS)
        with one_thread():
            square_HWC = cv2.warpAffine(frame_HWC, to_square, (_SIDE_PX, _SIDE_PX))
            self._net.setInput(cv2.dnn.blobFromImage(square_HWC, 1 / 127.5, mean=(127.5,) * 3))
            found = self._net.forward()
        vector_D = found.ravel().astype(np.float64)
        length = float(np.linalg.norm(vector_D))
        return vector_D / length if length > 0 else None


def similarity(from_N2: NDArray[np.float64], to_N2: NDArray[np.float64]) -> NDArray[np.float64]:
    """The turn, scale and shift (2x3) that bring points nearest to others, without mirroring.

    In least squares (Umeyama 1991). As complex numbers, z to a z + b: one division.
    """
    start_N, end_N = (p_N2[:, 0] + 1j * p_N2[:, 1] for p_N2 in (from_N2, to_N2))
    around_N = start_N - start_N.mean()
    turn = np.vdot(around_N, end_N - end_N.mean()) / np.vdot(around_N, around_N).real
    shift = end_N.mean() - turn * start_N.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])
