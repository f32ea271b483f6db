"""A driving video as the animator takes it: square frames of the model's size, as often as wanted.

A damaged video counts as far as it is good, if that is far enough; how much was lost is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kpmask.config import MediaLimits
from kpmask.data.crop import Box, centre_square
from kpmask.errors import MediaError
from kpmask.media import decode
from kpmask.media.decode import Frame, as_rate
from kpmask.media.probe import probe

# After these the frames before the damage are good ones.
DAMAGE_CODES = frozenset({"decode_errors", "truncated", "timestamp_gap"})


class DrivingVideo:
    """Frames of a video, GIF, image folder or stacked-frame image; each pass decodes anew.

    Attributes:
        fps: frames per second of what is given (the average, where the rate varies).
        has_audio: whether there is a sound track.
        num_frames_expected: what the header says, which may be wrong; None if it says nothing.
        num_frames: how many frames the last whole pass gave.
        num_frames_lost: how many more the header had promised of the video, at least 1 after
            damage.
    """

    def __init__(
        self,
        path: Path,
        limits: MediaLimits,
        *,
        side_px: int,
        min_frames: int,
        crop_px: Box | None = None,
        fps: float | None = None,
        max_fps: float | None = None,
    ) -> None:
        """Args:
        side_px: of the frames given.
        min_frames: a video with fewer usable frames is refused.
        crop_px: what is given of each frame, within it; None is the largest centred square.
        fps: the rate to give frames at (see `paced`); None is the video's own, every frame once.
        max_fps: the rate to give frames at where the video's own is higher.

        Raises:
            MediaError: it cannot be read or breaks a limit.
        """
        found = probe(path, limits)
        self.path = path
        if fps is None and max_fps is not None and found.fps > max_fps:
            fps = max_fps
        self.fps = found.fps if fps is None else float(as_rate(fps))
        self.has_audio = found.has_audio
        self.num_frames_expected = found.num_frames_from_header
        if fps is not None and self.num_frames_expected is not None:
            ratio = self.fps / found.fps
            self.num_frames_expected = max(1, round(self.num_frames_expected * ratio))
        self.num_frames = 0
        self.num_frames_lost = 0
        self._promised = found.num_frames_from_header or 0
        self._own_rate = as_rate(found.fps)
        self._rate = None if fps is None else as_rate(fps)
        self._limits = limits
        self._crop_px = crop_px or centre_square((found.width_px, found.height_px))
        self._side_px = side_px
        self._min_frames = min_frames

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """uint8 HWC RGB frames.

        Raises:
            MediaError: after the usable frames, when they are fewer than wanted: the damage's own
                code, or too_short.
        """
        frames = self._usable()
        if self._rate is not None:
            frames = paced(frames, self._rate, own_rate=self._own_rate)
        count = 0
        for frame in frames:
            count += 1
            if count > self._limits.max_frames:  # a few frames, far apart, at a high rate
                cause = f"more than {self._limits.max_frames} frames at {self.fps:g} frames/s"
                raise MediaError(cause, subject=self.path.name, code="frames_over_limit")
            yield frame.rgb_HWC
        self.num_frames = count

    def _usable(self) -> Iterator[Frame]:
        count = 0
        lost = 0
        try:
            size_px = (self._side_px, self._side_px)
            for frame in decode.frames(
                self.path, self._limits, crop_px=self._crop_px, size_px=size_px
            ):
                count += 1
                yield frame
        except MediaError as error:
            if error.code not in DAMAGE_CODES or count < self._min_frames:
                raise
            lost = max(self._promised - count, 1)
        decode.check_length(count, min_frames=self._min_frames, subject=self.path.name)
        self.num_frames_lost = lost


def paced(frames: Iterable[Frame], rate: Fraction, *, own_rate: Fraction) -> Iterator[Frame]:
    """The frames that are on screen at the times 0, 1/rate, 2/rate ...: some left out, some
    repeated, so that the duration is kept to less than a frame of the slower rate.

    Args:
        frames: in order of time, the first at 0.
        rate: wanted, frames per second.
        own_rate: of the frames: how long the last of them is shown.
    """
    # Times are those of a container's clock: a frame that is late by less counts as in time.
    slack_s = float(1 / (4 * max(rate, own_rate)))
    shown: Frame | None = None
    count = 0
    for frame in frames:
        while shown is not None and count / rate < frame.time_s - slack_s:
            yield shown
            count += 1
        shown = frame
    if shown is not None:
        total = max(1, round((shown.time_s + float(1 / own_rate)) * float(rate)))
        for _ in range(count, total):
            yield shown
