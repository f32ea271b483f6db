"""What a clip is like: sharpness, brightness, motion, what is burnt in, and how it looks.

Measured frame by frame while a clip is cut, on its frames as stored. Nothing grows with its length:

- Motion compares every two neighbouring frames, on a grid of at most 64 x 64 means of luma, so that
  noise and size say little.
- All else is measured on samples: every k-th frame, with k doubled and every second sample dropped
  whenever there are 32 of them, so that 16 to 32 are evenly spread over a length that nobody knows
  beforehand. A sample is kept as luma of at most 128 x 128 pixels.
- Luma is that of ITU-R BT.601, 0.299 R + 0.587 G + 0.114 B, as 8 bits.

The look is for finding the same frames again, coded anew, resized or cropped a little. Hashes of
pictures alone do not tell that from another span of the same video: a still camera shows a talking
head alike for minutes. What differs is the motion. So a clip is blended into four pictures, one for
each quarter of its time (a blend does not depend on which frames a rate has), and hashed are the
mean picture and the three changes from quarter to quarter; where nothing moves, the later quarter.
A hash holds the signs of the 63 lowest frequencies of the cosine transform, without the mean, as in
Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010), there of
pictures. In pictures without contrast all are 0, so that black clips look the same.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from kpmask.config import Quality
from kpmask.errors import QualityError

MEASURES_VERSION: Final = 1  # of what is measured: a change makes stored values stale
LOOK_HASHES: Final = 4  # one of the mean picture, then those of the changes
LOOK_LENGTH: Final = 16 * LOOK_HASHES

_MAX_SAMPLES: Final = 32
_SAMPLE_PX: Final = 128
_GRID_PX: Final = 64
_HASH_PX: Final = 32
_LEAST_RMS: Final = 0.5  # of 255: a picture or change below it has nothing to hash

_STILL: Final = 4.0  # standard deviation of a pixel over time, of 255: coding noise is below it
_MOVING: Final = 8.0
_EDGE: Final = 16.0  # change of luma from pixel to pixel, of 255
_ABOUT: Final = 3 / 8  # side of what is about a pixel, as a part of the frame's
_ABOUT_MOVING: Final = 1 / 3  # how much of it must move

_Luma = NDArray[np.uint8]
_Picture = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Measures:
    """What was measured of a clip.

    Attributes:
        sharpness: median over the samples of the variance of the Laplacian (4-neighbours) of
            8-bit luma. Grows with detail, with noise and with the size of the frames.
        brightness: mean luma, 0 to 1.
        motion: mean absolute change of luma from frame to frame, 0 to 1; it is per frame, so that
            the same movement has less at a higher rate.
        jump: the largest such change.
        overlay: share of pixels, 0 to 1, that lie on an edge and stay the same while at least a
            third of what is about them moves: logos, frames and watermarks that are opaque. Text
            that comes and goes is not found, and the edges of things that stand still before or
            behind what moves have up to 0.01.
        look: `LOOK_HASHES` hashes of 64 bits, hexadecimal.
    """

    sharpness: float
    brightness: float
    motion: float
    jump: float
    overlay: float
    look: str


class ClipMeter:
    """Measures one clip, whose frames are given one after the other."""

    def __init__(self) -> None:
        self._num_frames = 0
        self._stride = 1
        self._samples: list[tuple[_Luma, float]] = []  # small luma, sharpness
        self._grid: _Luma | None = None  # of the frame before
        self._sum_motion = 0.0
        self._jump = 0.0

    def add(self, frame_HWC: NDArray[np.uint8]) -> None:
        """Take the next frame, uint8 HWC RGB, of the same size as those before."""
        luma_HW = _u8(cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2GRAY))
        grid_HW = _at_most(luma_HW, _GRID_PX)
        if self._grid is not None:
            change = float(cv2.norm(grid_HW, self._grid, cv2.NORM_L1)) / (255 * grid_HW.size)
            self._sum_motion += change
            self._jump = max(self._jump, change)
        self._grid = grid_HW
        if self._num_frames % self._stride == 0:
            self._sample(luma_HW)
        self._num_frames += 1

    def _sample(self, luma_HW: _Luma) -> None:
        if len(self._samples) == _MAX_SAMPLES:
            del self._samples[1::2]
            self._stride *= 2
            # Of 32 samples the next would be sample 32: an even one, which is kept.
        self._samples.append((_at_most(luma_HW, _SAMPLE_PX), laplacian_variance(luma_HW)))

    def measures(self) -> Measures:
        """What was measured of the frames so far, of which there must be one."""
        assert self._samples, "no frame was added"
        samples_THW = np.stack([luma_HW for luma_HW, _ in self._samples])
        times = (np.arange(len(samples_THW)) + 0.5) * self._stride / self._num_frames
        return Measures(
            sharpness=float(np.median([sharpness for _, sharpness in self._samples])),
            brightness=float(samples_THW.mean()) / 255,
            motion=self._sum_motion / max(self._num_frames - 1, 1),
            jump=self._jump,
            overlay=overlay_share(samples_THW),
            look=look_of(samples_THW, times),
        )


def _u8(image: object) -> _Luma:
    """OpenCV's result, whose type its stubs leave open."""
    assert isinstance(image, np.ndarray)
    return image


def _at_most(luma_HW: _Luma, side_px: int) -> _Luma:
    """Luma as means of its pixels, where it is larger than `side_px`."""
    height_px, width_px = luma_HW.shape
    size_px = (min(width_px, side_px), min(height_px, side_px))
    if size_px == (width_px, height_px):
        return luma_HW
    return _u8(cv2.resize(luma_HW, size_px, interpolation=cv2.INTER_AREA))


def laplacian_variance(luma_HW: NDArray[np.uint8]) -> float:
    """The variance of the Laplacian: how much fine detail there is.

    Source: Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (2000).
    """
    _, deviation = cv2.meanStdDev(cv2.Laplacian(luma_HW, cv2.CV_16S, ksize=1))
    return float(deviation[0, 0]) ** 2


# --- what is burnt in ------------------------------------------------------------------------


def overlay_share(samples_THW: NDArray[np.uint8]) -> float:
    """The share of pixels on edges that stay while what is about them moves; see `Measures`."""
    mean_HW, deviation_HW = _over_time(samples_THW)
    edges_HW = cv2.magnitude(
        cv2.Sobel(mean_HW, cv2.CV_32F, 1, 0, scale=1 / 8),
        cv2.Sobel(mean_HW, cv2.CV_32F, 0, 1, scale=1 / 8),
    )
    side_px = max(1, round(_ABOUT * min(mean_HW.shape)))
    moving_HW = (deviation_HW > _MOVING).astype(np.float32)
    about_HW = cv2.blur(moving_HW, (side_px, side_px))
    marks_HW = (edges_HW > _EDGE) & (deviation_HW < _STILL) & (about_HW > _ABOUT_MOVING)
    return float(marks_HW.mean())


def _over_time(samples_THW: NDArray[np.uint8]) -> tuple[_Picture, _Picture]:
    """Mean and standard deviation of each pixel; exact sums, with one frame in floats at a time."""
    sums_HW = samples_THW.sum(axis=0, dtype=np.int64)
    squares_HW = np.zeros_like(sums_HW)
    for sample_HW in samples_THW:
        squares_HW += sample_HW.astype(np.int32) ** 2
    count = len(samples_THW)
    variance_HW = (count * squares_HW - sums_HW**2) / count**2
    return (sums_HW / count).astype(np.float32), np.sqrt(variance_HW).astype(np.float32)


# --- the look --------------------------------------------------------------------------------


def look_of(samples_THW: NDArray[np.uint8], times: NDArray[np.float64]) -> str:
    """The look of a clip: see the top of this file.

    Args:
        samples_THW: luma of frames in order.
        times: when each is, as a part of the clip's length.
    """
    pictures_THW = np.stack([_small(sample_HW) for sample_HW in samples_THW])
    parts = _quarters(pictures_THW, times)
    hashes = [_hash(pictures_THW.mean(axis=0))]
    for before_HW, after_HW in itertools.pairwise(parts):
        change_HW = after_HW - before_HW
        hashes.append(_hash(change_HW if _rms(change_HW) >= _LEAST_RMS else after_HW))
    return "".join(f"{value:016x}" for value in hashes)


def _small(luma_HW: _Luma) -> _Picture:
    small_HW = cv2.resize(luma_HW, (_HASH_PX, _HASH_PX), interpolation=cv2.INTER_AREA)
    return np.asarray(small_HW, np.float32)


def _quarters(pictures_THW: _Picture, times: NDArray[np.float64]) -> list[_Picture]:
    """Blends of the pictures about the middle of each quarter, fading into its neighbours."""
    num_parts = LOOK_HASHES
    parts = []
    for part in range(num_parts):
        weights = np.maximum(0.0, 1.0 - np.abs(num_parts * times - (part + 0.5)))
        weights += 1e-6  # where no picture is near
        weighed_HW = np.tensordot(weights / weights.sum(), pictures_THW, axes=1)
        parts.append(weighed_HW.astype(np.float32))
    return parts


def _rms(picture_HW: _Picture) -> float:
    """How far a picture is from being even."""
    return float(picture_HW.std())


def _hash(picture_HW: _Picture) -> int:
    """Signs of the lowest 8 x 8 frequencies, the first row's first bit highest; 0 for the mean."""
    if _rms(picture_HW) < _LEAST_RMS:
        return 0
    signs = np.asarray(cv2.dct(picture_HW))[:8, :8].ravel() > 0
    signs[0] = False
    return int.from_bytes(np.packbits(signs).tobytes(), "big")


# --- limits ----------------------------------------------------------------------------------


def check_quality(measures: Measures, quality: Quality) -> None:
    """Refuse a clip that is beyond a limit.

    Raises:
        QualityError: dark, bright, static, jumpy, blurred, overlay; `value` is the measured one.
    """
    one = measures
    for code, what, value, low, high in (
        ("dark", "brightness", one.brightness, quality.min_brightness, math.inf),
        ("bright", "brightness", one.brightness, -math.inf, quality.max_brightness),
        ("static", "motion", one.motion, quality.min_motion, math.inf),
        ("jumpy", "largest change between two frames", one.jump, -math.inf, quality.max_jump),
        ("blurred", "sharpness", one.sharpness, quality.min_sharpness, math.inf),
        ("overlay", "share of burnt-in pixels", one.overlay, -math.inf, quality.max_overlay),
    ):
        if value < low:
            raise QualityError(f"{what} {value:.4g}, under {low:g}", code=code, value=value)
        if value > high:
            raise QualityError(f"{what} {value:.4g}, over {high:g}", code=code, value=value)
