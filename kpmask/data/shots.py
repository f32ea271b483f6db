"""Where a video is cut into shots: PySceneDetect's detectors, on frames that are decoded here.

The detectors get one small frame after the other and never open a file: what strangers send is
read by one reader only, under its limits.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode

from kpmask.config import Subject

MAX_SIDE_PX = 320  # the detectors' thresholds are meant for frames of about this size
_RATE = 25.0  # PySceneDetect's time codes have one; frames are only counted here


class ShotDetector:
    """Says which frames begin a new shot.

    Args:
        settings: the fields `shots` and `shot_threshold`.

    Attributes:
        delay: how many frames later than a shot's first frame it can be known that it is one.
    """

    def __init__(self, settings: Subject) -> None:
        self._detector = _new_detector(settings)
        self.delay = self._detector.event_buffer_length if self._detector else 0

    def starts(self, number: int, frame_HWC: NDArray[np.uint8]) -> list[int]:
        """The frames, `number` or up to `delay` before it, of which it is now known that a shot
        begins with them.

        Args:
            number: of the frame; they must come one after the other.
            frame_HWC: uint8 RGB, all of one size.
        """
        if self._detector is None:
            return []
        code = FrameTimecode(number, _RATE)
        cuts = self._detector.process_frame(code, _small_bgr(frame_HWC))
        return [cut.frame_num for cut in cuts]


def _new_detector(settings: Subject) -> ContentDetector | None:
    if settings.shots == "none":
        return None
    threshold = settings.shot_threshold
    if settings.shots == "content":
        return ContentDetector(threshold=27.0 if threshold is None else threshold, min_scene_len=0)
    return AdaptiveDetector(
        adaptive_threshold=3.0 if threshold is None else threshold, min_scene_len=0
    )


def _small_bgr(frame_HWC: NDArray[np.uint8]) -> cv2.typing.MatLike:
    bgr_HWC = cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2BGR)
    scale = MAX_SIDE_PX / max(bgr_HWC.shape)
    if scale >= 1:
        return bgr_HWC
    size_px = max(1, round(bgr_HWC.shape[1] * scale)), max(1, round(bgr_HWC.shape[0] * scale))
    return cv2.resize(bgr_HWC, size_px, interpolation=cv2.INTER_AREA)
