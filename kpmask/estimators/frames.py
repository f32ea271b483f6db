"""Frames on their way to an estimator: one by one, each once, and none that is no picture."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kpmask.estimators import EmbeddingEstimator, Frames, Keypoints, PointEstimator

log = logging.getLogger(__name__)

REMEMBERED: Final = 1024  # frames; of a face mesh 11 kB each
_NEVER_WORKED: Final = 16  # frames on which an estimator broke before it worked on any

# What OpenCV, torch and numpy raise at a picture that they cannot work on.
_BROKE: Final = (cv2.error, RuntimeError, ValueError, ArithmeticError)


class EachFrame:
    """Asks about frames one by one, and about equal frames once.

    Several metrics ask about the same true and generated frames, and of a frozen picture all
    frames are equal. An answer belongs to the frame's pixels, so it never goes stale.
    """

    def __init__(
        self,
        look: Callable[[NDArray[np.uint8]], NDArray[np.float64] | None],
        *,
        shape: tuple[int, ...],
        name: str,
    ) -> None:
        """
        Args:
            look: what is to be said of a frame (HWC), of shape `shape`; None for nothing.
            name: of the estimator, for the log.
        """
        self._look = look
        self._shape = shape
        self._name = name
        self._known: OrderedDict[bytes, NDArray[np.float64]] = OrderedDict()
        self._has_worked = False
        self._num_broken = 0

    def __call__(self, frames_THWC: Frames) -> NDArray[np.float64]:
        """What is said of each frame (T, *shape), NaN for nothing. The array is the caller's.

        Raises:
            Whatever OpenCV, torch and numpy raise, where it broke on each of the first frames.
        """
        answers = np.full((len(frames_THWC), *self._shape), np.nan)
        for index, frame_HWC in enumerate(frames_THWC):
            answers[index] = self._answer(frame_HWC)
        return answers

    def _answer(self, frame_HWC: NDArray[np.uint8]) -> NDArray[np.float64]:
        key = _identity(frame_HWC)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        try:
            seen = self._look(np.ascontiguousarray(frame_HWC))
            self._has_worked = True
        except torch.OutOfMemoryError:
            raise  # of a GPU, which is no fault of the frame
        except _BROKE as error:
            self._num_broken += 1
            if not self._has_worked and self._num_broken >= _NEVER_WORKED:
                raise  # it is not the frames
            log.warning("%s breaks on a frame, which counts as empty: %s", self._name, error)
            seen = None
        answer = np.full(self._shape, np.nan) if seen is None else seen
        self._known[key] = answer
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return answer


def _identity(frame_HWC: NDArray[np.uint8]) -> bytes:
    digest = hashlib.blake2b(np.ascontiguousarray(frame_HWC).data, digest_size=16)
    digest.update(str(frame_HWC.shape).encode())
    return digest.digest()


def keypoints_of(estimator: PointEstimator, image_TCHW: Tensor) -> Keypoints:
    """The points in frames as metrics have them.

    Args:
        image_TCHW: float RGB in [0, 1]. Estimators see 8 bits of it, rounded, as they were trained
            on such pictures. A frame with a value that is no number is one without a subject.
    """
    frames_THWC, whole_T = pictures(image_TCHW)
    points_TK2 = np.full((len(whole_T), estimator.num_points, 2), np.nan)
    scores_TK = np.zeros((len(whole_T), estimator.num_points))
    if whole_T.any():
        found = estimator.estimate(frames_THWC[whole_T])
        points_TK2[whole_T], scores_TK[whole_T] = found.points_TK2, found.scores_TK
    return Keypoints(points_TK2=points_TK2, scores_TK=scores_TK)


def embeddings_of(estimator: EmbeddingEstimator, image_TCHW: Tensor) -> NDArray[np.float64]:
    """The vectors of frames (TD); see `keypoints_of`."""
    frames_THWC, whole_T = pictures(image_TCHW)
    vectors_TD = np.full((len(whole_T), estimator.size), np.nan)
    if whole_T.any():
        vectors_TD[whole_T] = estimator.estimate(frames_THWC[whole_T])
    return vectors_TD


def pictures(image_TCHW: Tensor) -> tuple[Frames, NDArray[np.bool_]]:
    """Frames in 8 bits (THWC), and which of them are pictures (T): all their values numbers."""
    whole_T = torch.isfinite(image_TCHW).flatten(1).all(1)
    clean_TCHW = torch.nan_to_num(image_TCHW, nan=0.0, posinf=0.0, neginf=0.0).clamp(0, 1)
    levels_TCHW = (clean_TCHW * 255).round().to(torch.uint8)
    return levels_TCHW.movedim(1, -1).cpu().numpy(), whole_T.cpu().numpy()
