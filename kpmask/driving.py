"""A driving video as the animator takes it: square frames of the model's size, as often as wanted.

A damaged video counts as far as it is good, if that is far enough; how much was lost is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kpmask.config import MediaLimits
from kpmask.data.crop import centre_square
from kpmask.errors import MediaError
from kpmask.media import decode
from kpmask.media.probe import probe

# After these the frames before the damage are good ones.
DAMAGE_CODES = frozenset({"decode_errors", "truncated", "timestamp_gap"})


class DrivingVideo:
    """Frames of a video, GIF, image folder or stacked-frame image; each pass decodes anew.

    Attributes:
        fps: frames per second (the average, where the rate varies).
        has_audio: whether there is a sound track.
        num_frames_expected: what the header says, which may be wrong; None if it says nothing.
        num_frames: how many frames the last whole pass gave.
        num_frames_lost: how many more the header had promised, at least 1 after damage.
    """

    def __init__(self, path: Path, limits: MediaLimits, *, side_px: int, min_frames: int) -> None:
        """Args:
        side_px: of the frames given: the largest centred square, resized.
        min_frames: a video with fewer usable frames is refused.

        Raises:
            MediaError: it cannot be read or breaks a limit.
        """
        found = probe(path, limits)
        self.path = path
        self.fps = found.fps
        self.has_audio = found.has_audio
        self.num_frames_expected = found.num_frames_from_header
        self.num_frames = 0
        self.num_frames_lost = 0
        self._limits = limits
        self._crop_px = centre_square((found.width_px, found.height_px))
        self._side_px = side_px
        self._min_frames = min_frames

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """uint8 HWC RGB frames.

        Raises:
            MediaError: after the usable frames, when they are fewer than wanted: the damage's own
                code, or too_short.
        """
        count = 0
        lost = 0
        try:
            size_px = (self._side_px, self._side_px)
            for frame in decode.frames(
                self.path, self._limits, crop_px=self._crop_px, size_px=size_px
            ):
                count += 1
                yield frame.rgb_HWC
        except MediaError as error:
            if error.code not in DAMAGE_CODES or count < self._min_frames:
                raise
            lost = max((self.num_frames_expected or 0) - count, 1)
        if count < self._min_frames:
            raise MediaError(
                f"{count} frames, and {self._min_frames} are wanted",
                subject=self.path.name,
                code="too_short",
            )
        self.num_frames, self.num_frames_lost = count, lost
