"""MoveNet Thunder (Google 2021): 17 points of a person, in the order of COCO.

Nose; eyes, ears, shoulders, elbows, wrists, hips, knees and ankles, each the left one first. The
network always answers with 17 points, so a point counts as found from a score on.
"""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kpmask.data.detectors import one_thread
from kpmask.estimators import Frames, Keypoints, Subject
from kpmask.estimators.frames import EachFrame
from kpmask.estimators.tfjs import GraphModel
from kpmask.estimators.weights import KNOWN, locate

NUM_POINTS: Final = 17
MIN_SCORE: Final = 0.3
_SIDE_PX: Final = 256  # of what the network sees


class MoveNet:
    """17 points of the person nearest to the middle of a frame, which the network prefers."""

    name: str = "movenet"
    version: str = "thunder-4"
    licence: str = "Apache-2.0"
    subject: Subject = "person"
    num_points: int = NUM_POINTS
    weights = KNOWN["movenet"]
    weights_sha256: str = weights.sha256

    def __init__(self, graph: GraphModel) -> None:
        self._graph = graph
        self._each = EachFrame(self._person, shape=(NUM_POINTS, 3), name=self.name)

    @classmethod
    def load(cls) -> MoveNet:
        """Raises `locate`'s errors."""
        return cls(GraphModel(*locate(cls.weights)))

    def estimate(self, frames_THWC: Frames) -> Keypoints:
        """See `PointEstimator`."""
        found_TKC = self._each(frames_THWC)
        points_TK2, scores_TK = found_TKC[..., :2], np.nan_to_num(found_TKC[..., 2], nan=0.0)
        points_TK2[scores_TK < MIN_SCORE] = np.nan
        return Keypoints(points_TK2=points_TK2, scores_TK=scores_TK)

    def _person(self, frame_HWC: NDArray[np.uint8]) -> NDArray[np.float64]:
        """x, y and score of each point (K3)."""
        height_px, width_px = frame_HWC.shape[:2]
        scale = _SIDE_PX / max(height_px, width_px)
        with one_thread():
            # The corners of pixels meet: the frame lies in the square's middle, black around.
            to_square = np.array(
                [
                    [scale, 0, (scale - 1) / 2 + (_SIDE_PX - scale * width_px) / 2],
                    [0, scale, (scale - 1) / 2 + (_SIDE_PX - scale * height_px) / 2],
                ]
            )
            square_HWC = cv2.warpAffine(frame_HWC, to_square, (_SIDE_PX, _SIDE_PX))
        found = self._graph(torch.from_numpy(square_HWC).int()[None]).numpy().reshape(-1, 3)
        y_K, x_K, score_K = found.astype(np.float64).T
        points_K2 = _SIDE_PX * np.column_stack([x_K, y_K]) - 0.5
        back = cv2.invertAffineTransform(to_square)
        return np.column_stack([points_K2 @ back[:, :2].T + back[:, 2], score_K])
