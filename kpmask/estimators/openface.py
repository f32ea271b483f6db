"""OpenFace (Amos et al. 2016), nn4.small2.v1: 128 numbers that are alike for faces of one person.

As the papers' code uses it: the whole frame as 96 by 96 px in BGR, though the network was trained
with aligned faces in RGB. So nothing is ever missed, and a vector is of more than the face. The
file is of Lua's torch; OpenCV reads it, and runs nothing in it but layers that it knows.
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
from kpmask.estimators.weights import find

SIZE: Final = 128
_SIDE_PX: Final = 96


class OpenFace:
    """The vector of a whole frame, of length 1."""

    name: str = "openface"
    version: str = "nn4.small2-1"
    licence: str = "Apache-2.0"
    subject: Subject = "face"
    size: int = SIZE

    def __init__(self, path: Path, *, weights_sha256: str) -> None:
        """
        Raises:
            CheckpointError: the file cannot be read as such a network.
        """
        self.weights_sha256 = weights_sha256
        try:
            self._net = cv2.dnn.readNetFromTorch(str(path))
        except cv2.error as error:
            raise CheckpointError(
                "cannot be read as a network of Lua's torch", subject=str(path)
            ) from error
        self._each = EachFrame(self._embedding, shape=(SIZE,), name=self.name)

    @classmethod
    def load(cls) -> OpenFace:
        """Raises `find`'s errors."""
        found = find("openface")
        return cls(found.paths[0], weights_sha256=found.sha256)

    def estimate(self, frames_THWC: Frames) -> NDArray[np.float64]:
        """See `EmbeddingEstimator`."""
        return self._each(frames_THWC)

    def _embedding(self, frame_HWC: NDArray[np.uint8]) -> NDArray[np.float64] | None:
        with one_thread():
            # In floats and without smoothing, as scikit-image 0.14 does it.
            image_HWC = frame_HWC[..., ::-1].astype(np.float32) / 255
            image_HWC = cv2.resize(
                image_HWC, (_SIDE_PX, _SIDE_PX), interpolation=cv2.INTER_LINEAR
            ).astype(np.float32)
            self._net.setInput(image_HWC.transpose(2, 0, 1)[None])
            found = self._net.forward()
        vector_D = found.ravel().astype(np.float64)
        length = float(np.linalg.norm(vector_D))
        return vector_D / length if length > 0 else None
