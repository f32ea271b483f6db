"""What finds the subject of a video: a face, a person, or whatever moves.

All of them run on one CPU thread and give the same answer for the same frames. The face detector's
weights are fetched or installed (`kpmask.estimators.weights`), OpenCV brings the person detector's,
and motion needs none. One thread, because the workers around them use the others.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from kpmask.errors import ConfigError
from kpmask.estimators.weights import KNOWN, locate

FloatBox = tuple[float, float, float, float]  # left, top, right, bottom
Kind = Literal["face", "person", "motion"]
KINDS: Final[tuple[Kind, ...]] = ("face", "person", "motion")  # as `auto` tries them

_MAX_FOUND = 32  # in a frame: crowds are cut short, best first
_SAME = 0.6  # boxes that share so much of the smaller one are of one subject


@dataclass(frozen=True, slots=True)
class Detection:
    """A subject in a frame: its box in that frame's pixels, which may leave it, and how sure."""

    box_px: FloatBox
    score: float


class Detector(Protocol):
    """Finds subjects in frames.

    Attributes:
        name, version, weights_sha256: which detector this is; two detections compare where all
            three agree. The digest is None where there are no weights of our own to check.
        licence: of the weights.
        subject: what it finds, in words.
        long_side_px: the longer side of the frames that it wants.
        enlarge: whether smaller frames should be enlarged to that.
        every_s: seconds between two looks that are enough for it.
        min_score: what is surely one.
        batch: how many frames are looked at together; it knows the background from them.
    """

    name: str
    version: str
    weights_sha256: str | None
    licence: str
    subject: str
    long_side_px: int
    enlarge: bool
    every_s: float
    min_score: float
    batch: int

    def watch(self, frames_THWC: Sequence[NDArray[np.uint8]]) -> None:
        """Learn the background of frames of one shot; before `detect` is asked about them."""
        ...

    def detect(self, frame_HWC: NDArray[np.uint8]) -> list[Detection]:
        """The subjects in a frame, uint8 RGB, best first; at most 32."""
        ...


@functools.lru_cache(maxsize=len(KINDS))
def detector_of(kind: Kind) -> Detector:
    """The detector of a kind, made once for a process.

    Raises:
        ConfigError: face: its weights are not here; the hint is the command that gets them.
        CheckpointError: face: they are not the ones known.
    """
    if kind == "face":
        return FaceDetector(_yunet_file())
    return PersonDetector() if kind == "person" else MotionDetector()


def require_detector(detector: Literal["none", "auto", "face", "person", "motion"]) -> None:
    """Refuse a setting that cannot be had here, before any video is looked at.

    Raises:
        ConfigError, CheckpointError: see `detector_of`.
    """
    if detector in ("face", "auto"):
        _yunet_file()


@contextmanager
def one_thread() -> Iterator[None]:
    """OpenCV on one thread; afterwards as before."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _distinct(found: list[Detection]) -> list[Detection]:
    """The best detections, without those that lie mostly on a better one."""
    kept: list[Detection] = []
    for one in sorted(found, key=lambda d: (-d.score, d.box_px)):
        if all(_shared(one.box_px, other.box_px) < _SAME for other in kept):
            kept.append(one)
            if len(kept) == _MAX_FOUND:
                break
    return kept


def _shared(a: FloatBox, b: FloatBox) -> float:
    """What two boxes have in common, over the smaller one's area."""
    smaller = min(area(a), area(b))
    return intersection(a, b) / smaller if smaller > 0 else 0.0


def area(box: FloatBox) -> float:
    """A box's area; 0 for one that is inside out."""
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def intersection(a: FloatBox, b: FloatBox) -> float:
    """The area that two boxes have in common."""
    return area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))


# --- faces -----------------------------------------------------------------------------------

_YUNET: Final = KNOWN["yunet"]


def _yunet_file() -> Path:
    """The face detector's weights, fetched or installed."""
    try:
        (path,) = locate(_YUNET)
    except ConfigError as error:
        raise ConfigError(
            "the face detector's weights are not here",
            subject="subject.detector",
            hint=f"{error.hint}, or subject.detector = 'person' or 'motion'",
        ) from error
    return path


class FaceDetector:
    """YuNet (Wu, Peng and Yu 2023), through OpenCV."""

    name: str = "yunet"
    version: str = "2023mar-int8bq"
    weights_sha256: str | None = _YUNET.sha256
    licence: str = _YUNET.licence
    subject: str = "face"
    long_side_px: int = 320
    enlarge: bool = False
    every_s: float = 0.1
    min_score: float = 0.7
    batch: int = 1

    def __init__(self, weights: Path) -> None:
        self._net = cv2.FaceDetectorYN.create(str(weights), "", (320, 320), 0.3, 0.3, 100)

    def watch(self, frames_THWC: Sequence[NDArray[np.uint8]]) -> None:
        """It needs no background."""

    def detect(self, frame_HWC: NDArray[np.uint8]) -> list[Detection]:
        """See `Detector`; scores are in [0, 1]."""
        with one_thread():
            self._net.setInputSize((frame_HWC.shape[1], frame_HWC.shape[0]))
            _, faces = self._net.detect(cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2BGR))
        found = []
        for left, top, width, height, *_, score in [] if faces is None else faces.tolist():
            if width > 0 and height > 0:
                found.append(Detection((left, top, left + width, top + height), score))
        return _distinct(found)


# --- people ----------------------------------------------------------------------------------


class PersonDetector:
    """Histograms of oriented gradients (Dalal and Triggs 2005) with OpenCV's own weights.

    It finds people who stand or walk and are seen whole, with some room around them.
    """

    name: str = "opencv-hog"
    version: str = cv2.__version__
    weights_sha256: str | None
    licence: str = "Apache-2.0"
    subject: str = "person"
    long_side_px: int = 400
    enlarge: bool = True  # its window is 64x128 px
    every_s: float = 0.2
    min_score: float = 0.3
    batch: int = 1

    # The window has a margin around the person, of which the box keeps a part.
    _MARGIN_X: ClassVar[float] = 1 / 8
    _MARGIN_Y: ClassVar[float] = 1 / 16

    def __init__(self) -> None:
        weights = np.asarray(cv2.HOGDescriptor.getDefaultPeopleDetector(), "<f4")
        self._hog = cv2.HOGDescriptor()
        self._hog.setSVMDetector(weights)
        self.weights_sha256 = hashlib.sha256(weights.tobytes()).hexdigest()

    def watch(self, frames_THWC: Sequence[NDArray[np.uint8]]) -> None:
        """It needs no background."""

    def detect(self, frame_HWC: NDArray[np.uint8]) -> list[Detection]:
        """See `Detector`; scores are distances from the classifier's plane, about 0 to 3."""
        with one_thread():
            boxes, scores = self._hog.detectMultiScale(
                cv2.cvtColor(_with_room(frame_HWC), cv2.COLOR_RGB2GRAY),
                hitThreshold=0.0,
                winStride=(8, 8),
                padding=(16, 16),
                scale=1.05,
                groupThreshold=2.0,
            )
        found = []
        for (left, top, width, height), score in zip(boxes, scores, strict=True):
            x, y = self._MARGIN_X * width, self._MARGIN_Y * height
            box = (left + x, top + y, left + width - x, top + height - y)
            left_px, top_px, right_px, bottom_px = map(float, box)
            found.append(Detection((left_px, top_px, right_px, bottom_px), float(score)))
        return _distinct(found)


def _with_room(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture with room for one window: without, OpenCV's search reads beside it."""
    height_px, width_px = image_HWC.shape[:2]
    below, beside = max(0, 128 - height_px), max(0, 64 - width_px)
    return np.pad(image_HWC, ((0, below), (0, beside), (0, 0)), mode="edge")


# --- what moves ------------------------------------------------------------------------------


class MotionDetector:
    """The thing that moves before a camera that does not: what differs from the temporal median.

    The background is the median, pixel by pixel, of frames of one shot. What differs from it by
    more than its noise, in pieces that are not small beside the largest, is one subject: limbs
    that move apart are of one body. Where most of the picture changes, nothing is found: then the
    camera moves.
    """

    name: str = "temporal-median"
    version: str = "1"
    weights_sha256: str | None = None
    licence: str = "Apache-2.0"
    subject: str = "moving thing"
    long_side_px: int = 320
    enlarge: bool = False
    every_s: float = 0.1
    min_score: float = 0.1
    batch: int = 32

    _MIN_LEVELS: ClassVar[int] = 16  # of 255: what compression and noise do not do
    _MIN_AREA: ClassVar[float] = 0.002  # of the frame: less is noise
    _MAX_AREA: ClassVar[float] = 0.6  # of the frame: more is the camera
    _MIN_SHARE: ClassVar[float] = 0.2  # of the largest piece

    def __init__(self) -> None:
        self._background_HWC: NDArray[np.uint8] | None = None

    def watch(self, frames_THWC: Sequence[NDArray[np.uint8]]) -> None:
        """See `Detector`."""
        self._background_HWC = np.median(np.stack(frames_THWC), axis=0).astype(np.uint8)

    def detect(self, frame_HWC: NDArray[np.uint8]) -> list[Detection]:
        """See `Detector`; the score is the mean difference within the subject, in [0, 1]."""
        assert self._background_HWC is not None, "watch() comes first"
        with one_thread():
            levels_HW = cv2.absdiff(frame_HWC, self._background_HWC).max(axis=2)
            levels_HW = cv2.medianBlur(levels_HW, 3)
            least = max(self._MIN_LEVELS, 4 * float(np.median(levels_HW)))
            moves_HW = (levels_HW > least).astype(np.uint8)
            return self._of_pieces(moves_HW, levels_HW)

    def _of_pieces(
        self, moves_HW: NDArray[np.uint8], levels_HW: NDArray[np.uint8]
    ) -> list[Detection]:
        height_px, width_px = moves_HW.shape
        gap_px = max(3, max(moves_HW.shape) // 32) | 1
        closed_HW = cv2.morphologyEx(moves_HW, cv2.MORPH_CLOSE, np.ones((gap_px, gap_px), np.uint8))
        _, labels_HW, stats, _ = cv2.connectedComponentsWithStats(closed_HW, connectivity=8)
        areas = stats[1:, cv2.CC_STAT_AREA]
        least = self._MIN_AREA * height_px * width_px
        if not len(areas) or areas.max() < least or moves_HW.mean() > self._MAX_AREA:
            return []
        chosen = 1 + np.flatnonzero(areas >= max(least, self._MIN_SHARE * areas.max()))
        left, top = (stats[chosen, c].min() for c in (cv2.CC_STAT_LEFT, cv2.CC_STAT_TOP))
        right = (stats[chosen, cv2.CC_STAT_LEFT] + stats[chosen, cv2.CC_STAT_WIDTH]).max()
        bottom = (stats[chosen, cv2.CC_STAT_TOP] + stats[chosen, cv2.CC_STAT_HEIGHT]).max()
        mine_HW = np.isin(labels_HW, chosen) & (moves_HW > 0)
        score = float(levels_HW[mine_HW].mean()) / 255
        return [Detection((float(left), float(top), float(right), float(bottom)), score)]
