"""The subjects of a video without annotations: shots, detections and tubes in one decode pass.

The pass decodes every frame once, small; memory does not grow with the video's length. Where the
video is damaged, what comes before is used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kpmask.config import Clips, MediaLimits, Subject
from kpmask.data.crop import Box, Size
from kpmask.data.detectors import Detection, Detector, FloatBox, Kind, area, detector_of
from kpmask.data.shots import ShotDetector
from kpmask.data.tracks import Limits, Moment, Refusals, Tracker, Tube, square_of
from kpmask.errors import MediaError
from kpmask.media.decode import Frame, Span, as_rate, frames, spans
from kpmask.records import VideoProbe

_LEAST_SIDE_PX: Final = 32  # of the frames that are looked at
_EXACT_S: Final = 1e-6
_FIRST_S: Final = 1.0  # rule "first" looks as long

# `auto`: in how many of the sampled frames a subject must be, and how large, as its height over
# the frame's shorter side. A small face belongs to a person who is the subject as a whole.
_SAMPLES: Final = 7
_SAMPLE_EVERY_S: Final = 0.5  # where a video's length is not known
_SHARES: Final[dict[Kind, float]] = {"face": 1 / 3, "person": 1 / 2}
_HEIGHTS: Final[dict[Kind, float]] = {"face": 1 / 6, "person": 1 / 4}


@dataclass(frozen=True, slots=True)
class Found:
    """What was found in a video.

    Attributes:
        tubes: in order of their first frames.
        refusals: subjects that were no tubes.
        looked_for: what, and with which detector.
        num_looks: how many frames were looked at.
        damage: what ended the pass early.
    """

    tubes: list[Tube]
    refusals: Refusals
    looked_for: str
    num_looks: int
    damage: MediaError | None


def find_tubes(
    path: Path, probe: VideoProbe, *, subject: Subject, clips: Clips, limits: MediaLimits
) -> Found:
    """The tubes of a video's subjects; for the rules "follow" and "fixed".

    Args:
        path: the video, or a folder of its frames.
        probe: of it.
        subject: what to look for, and the rules.
        clips: the settings `min_frames`, `max_frames` and `min_box_px`.
        limits: for reading.

    Raises:
        ConfigError: the detector cannot be had here.
    """
    detector = _detector_for(path, probe, subject, limits)
    eye = _Eye(detector, subject, probe)
    return _Pass(eye, subject, probe, clips).run(path, limits)


def find_first(
    path: Path, probe: VideoProbe, *, subject: Subject, clips: Clips, limits: MediaLimits
) -> tuple[Box, bool]:
    """The square around the largest subject of the first frame that has one, within the first
    second, and whether a part of the subject is lost; for the rule "first".

    Raises:
        ConfigError: the detector cannot be had here.
        MediaError: no_subject, too_small, leaves_frame; or the video cannot be read.
    """
    detector = _detector_for(path, probe, subject, limits)
    eye = _Eye(detector, subject, probe)
    looks: list[NDArray[np.uint8]] = []
    for frame in frames(path, limits, end_s=_FIRST_S, size_px=eye.size_px):
        if eye.is_due(frame.time_s):
            looks.append(frame.rgb_HWC)
    if looks:
        detector.watch(looks)
    for look_HWC in looks:
        boxes = [detection.box_px for detection in eye.look(look_HWC)]
        if boxes:
            return square_of(
                max(boxes, key=area),
                frame_px=(probe.width_px, probe.height_px),
                settings=subject,
                min_box_px=max(clips.min_box_px, subject.min_box_px),
            )
    raise no_subject(eye.looked_for, len(looks), "the first second")


def no_subject(looked_for: str, num_looks: int, where: str) -> MediaError:
    """That there is nothing to cut."""
    cause = f"no {looked_for} in {num_looks} frames of {where}"
    return MediaError(cause, code="no_subject", hint="subject.detector says what is looked for")


class _Eye:
    """A detector at work on one video: how large its frames are, when it looks, what counts.

    Boxes are in pixels of the video as displayed.
    """

    def __init__(self, detector: Detector, settings: Subject, probe: VideoProbe) -> None:
        self.detector = detector
        self.size_px = frame_size((probe.width_px, probe.height_px), detector)
        self._scale = probe.width_px / self.size_px[0], probe.height_px / self.size_px[1]
        self._every_s = detector.every_s if settings.every_s is None else settings.every_s
        score = settings.min_score
        self._min_score = detector.min_score if score is None else score
        self._next_s = 0.0
        self.num_looks = 0
        self.looked_for = f"{detector.subject} (by {detector.name} {detector.version})"
        if settings.detector == "auto" and detector is detector_of("motion"):
            self.looked_for = f"face, person or {self.looked_for}"

    def is_due(self, time_s: float) -> bool:
        """Whether to look at a frame of this time; times must not go back."""
        if time_s < self._next_s - _EXACT_S:
            return False
        self._next_s += self._every_s
        if self._next_s <= time_s:
            self._next_s = time_s + self._every_s
        return True

    def restart(self, time_s: float) -> None:
        """Look at the frame of this time, and from there on again."""
        self._next_s = time_s

    def look(self, frame_HWC: NDArray[np.uint8]) -> list[Detection]:
        """The subjects of a frame."""
        self.num_looks += 1
        found = self.detector.detect(frame_HWC)
        sure = [one for one in found if one.score >= self._min_score]
        return [Detection(self._displayed(one.box_px), one.score) for one in sure]

    def _displayed(self, box: FloatBox) -> FloatBox:
        x, y = self._scale
        return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def frame_size(size_px: Size, detector: Detector) -> Size:
    """How large a video's frames are for a detector: its aspect ratio is kept, very long or very
    high pictures apart.
    """
    scale = detector.long_side_px / max(size_px)
    if not detector.enlarge:
        scale = min(scale, 1.0)
    width_px, height_px = (max(_LEAST_SIDE_PX, round(side * scale)) for side in size_px)
    return width_px, height_px


class _Pass:
    """One pass over one video."""

    def __init__(self, eye: _Eye, settings: Subject, probe: VideoProbe, clips: Clips) -> None:
        self._eye = eye
        self._settings = settings
        self._frame_s = float(1 / as_rate(probe.fps))
        self._shots = ShotDetector(settings)
        limits = Limits(
            min_frames=max(clips.min_frames, settings.min_frames),
            max_frames=clips.max_frames,
            min_box_px=max(clips.min_box_px, settings.min_box_px),
        )
        frame_px = (probe.width_px, probe.height_px)
        self._tracker = Tracker(settings, frame_px=frame_px, limits=limits)
        self._tubes: list[Tube] = []
        self._batch: list[tuple[Moment, NDArray[np.uint8] | None]] = []
        self._num_due = 0
        self._history: deque[NDArray[np.uint8]] = deque(maxlen=2 * eye.detector.batch)
        self._damage: MediaError | None = None

    def run(self, path: Path, limits: MediaLimits) -> Found:
        last: Moment | None = None
        for moment, image_HWC, is_cut in self._with_cuts(self._frames(path, limits)):
            if is_cut:
                self._end_shot(moment)
            self._step(moment, image_HWC)
            last = moment
            if len(self._tubes) >= self._settings.max_tubes:
                break
        if last is None and self._damage is not None:
            raise self._damage
        if last is not None:
            self._end_shot(Moment(last.number + 1, last.time_s + self._frame_s))
        tubes = sorted(self._tubes, key=lambda t: (t.start_frame, t.end_frame, t.crop_px))
        return Found(
            tubes=tubes[: self._settings.max_tubes],
            refusals=self._tracker.refusals,
            looked_for=self._eye.looked_for,
            num_looks=self._eye.num_looks,
            damage=self._damage,
        )

    def _frames(self, path: Path, limits: MediaLimits) -> Iterator[Frame]:
        """The frames up to the damage, if there is any."""
        try:
            yield from frames(path, limits, size_px=self._eye.size_px)
        except MediaError as error:
            self._damage = error

    def _with_cuts(
        self, images: Iterator[Frame]
    ) -> Iterator[tuple[Moment, NDArray[np.uint8], bool]]:
        """Each frame as late as it takes to know whether a shot begins with it."""
        waiting: deque[tuple[Moment, NDArray[np.uint8]]] = deque()
        cuts: set[int] = set()
        for number, frame in enumerate(images):
            cuts.update(self._shots.starts(number, frame.rgb_HWC))
            waiting.append((Moment(number, frame.time_s), frame.rgb_HWC))
            if len(waiting) > self._shots.delay:
                moment, image_HWC = waiting.popleft()
                yield moment, image_HWC, moment.number in cuts
                cuts.discard(moment.number)
        for moment, image_HWC in waiting:
            yield moment, image_HWC, moment.number in cuts

    def _step(self, moment: Moment, image_HWC: NDArray[np.uint8]) -> None:
        is_due = self._eye.is_due(moment.time_s)
        self._batch.append((moment, image_HWC if is_due else None))
        self._num_due += is_due
        if self._num_due >= self._eye.detector.batch:
            self._flush()

    def _flush(self) -> None:
        """Look at what waits to be looked at."""
        due = [image_HWC for _, image_HWC in self._batch if image_HWC is not None]
        self._history.extend(due)
        if due:
            self._eye.detector.watch(self._history)
        for moment, image_HWC in self._batch:
            self._tracker.frame(moment)
            if image_HWC is not None:
                self._tubes += self._tracker.found(self._eye.look(image_HWC))
        self._batch.clear()
        self._num_due = 0

    def _end_shot(self, moment: Moment) -> None:
        """What was on screen is not from this frame on."""
        self._flush()
        self._tubes += self._tracker.cut(moment)
        self._history.clear()
        self._eye.restart(moment.time_s)


# --- which detector --------------------------------------------------------------------------


def _detector_for(path: Path, probe: VideoProbe, subject: Subject, limits: MediaLimits) -> Detector:
    assert subject.detector != "none"
    if subject.detector != "auto":
        return detector_of(subject.detector)
    for kind in _SHARES:
        detector = detector_of(kind)
        if _is_subject(kind, detector, path, probe, limits):
            return detector
    return detector_of("motion")


def _is_subject(
    kind: Kind, detector: Detector, path: Path, probe: VideoProbe, limits: MediaLimits
) -> bool:
    """Whether a few frames of a video show a face, or a person, that is large enough."""
    size_px = frame_size((probe.width_px, probe.height_px), detector)
    least_px = _HEIGHTS[kind] * min(size_px)
    samples = list(_samples(path, probe, limits, size_px))
    count = 0
    for sample_HWC in samples:
        found = detector.detect(sample_HWC)
        count += any(
            one.score >= detector.min_score and one.box_px[3] - one.box_px[1] >= least_px
            for one in found
        )
    return count > 0 and count >= _SHARES[kind] * len(samples)


def _samples(
    path: Path, probe: VideoProbe, limits: MediaLimits, size_px: Size
) -> Iterator[NDArray[np.uint8]]:
    """A few frames, evenly over the video, up to its damage, which the pass after this reports.

    The first frame is one of them: a header that lies about the length hides the others only.
    """
    length_s = probe.duration_s or _SAMPLES * _SAMPLE_EVERY_S
    times_s = [length_s * i / _SAMPLES for i in range(_SAMPLES)]
    frame_s = float(1 / as_rate(probe.fps))
    wanted = [Span(time_s, time_s + 1.5 * frame_s, None, size_px) for time_s in times_s]
    seen: set[int] = set()
    try:
        for index, frame in spans(path, limits, wanted):
            if index not in seen:
                seen.add(index)
                yield frame.rgb_HWC
    except MediaError:
        return
