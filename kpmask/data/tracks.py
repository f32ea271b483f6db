"""Tubes: one subject through the frames of one shot, and the square that is cut around it.

Detections come now and then; between two of them a subject's box is taken to move evenly, so that
a tube begins and ends at a frame and not at a look. With rule "follow" (VoxCeleb) a tube's box is
the union of the subject's, with "fixed" (Tai-Chi-HD) the first one, grown. A tube ends

- where the subject's box overlaps its first one by less than `min_iou` (follow), or is inside the
  tube's box by less than `min_inside` (fixed); another begins there;
- where no subject is found for `max_missed` looks in a row: at the last frame that had it;
- where another subject touches its box, with `alone`: at the last frame before;
- at a cut, at the end, and after `max_frames`.

Tubes that are too short, too small, or whose square leaves the frame are refused, and counted.
Of a tube only its box and its ends are kept, whatever its length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from kpmask.config import Subject
from kpmask.data.crop import Box, Size, subject_box
from kpmask.data.detectors import Detection, FloatBox, area, intersection
from kpmask.errors import MediaError

Ended = Literal["moved", "lost", "touched", "length", "cut"]


class Moment(NamedTuple):
    """A frame: its number from 0, and its time."""

    number: int
    time_s: float


@dataclass(frozen=True, slots=True)
class Tube:
    """Frames [start_frame, end_frame), with start_s <= time < end_s, and what is cut out of them.

    `clamped`: a part of the subject is outside `crop_px`. `ended` says why it is no longer.
    """

    start_frame: int
    end_frame: int
    start_s: float
    end_s: float
    crop_px: Box
    clamped: bool
    ended: Ended


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tube must be like: frames [min_frames, max_frames], and a box of which a side has
    `min_box_px` before it is grown.
    """

    min_frames: int
    max_frames: int
    min_box_px: int


class Refusals:
    """What was refused, by error code: of each the error with the largest value, and how many."""

    def __init__(self) -> None:
        self.by_code: dict[str, tuple[MediaError, int]] = {}

    def add(self, error: MediaError) -> None:
        """Count one more."""
        known, count = self.by_code.get(error.code, (error, 0))
        if (error.value or 0.0) > (known.value or 0.0):
            known = error
        self.by_code[error.code] = known, count + 1


def iou(a: FloatBox, b: FloatBox) -> float:
    """Intersection over union, in [0, 1]."""
    both = intersection(a, b)
    either = area(a) + area(b) - both
    return both / either if either > 0 else 0.0


def inside(box: FloatBox, outer: FloatBox) -> float:
    """How much of a box's area lies in another, in [0, 1]."""
    return intersection(box, outer) / area(box) if area(box) > 0 else 0.0


def square_of(
    box: FloatBox, *, frame_px: Size, settings: Subject, min_box_px: int
) -> tuple[Box, bool]:
    """The square to cut around a box, and whether a part of the box is lost.

    Raises:
        MediaError: too_small, leaves_frame.
    """
    left, top, right, bottom = (round(side) for side in box)
    width, height = right - left, bottom - top
    if max(width, height) < max(min_box_px, 1) or min(width, height) < 1:
        raise MediaError(
            f"the subject is {width}x{height} px, under {min_box_px} px",
            code="too_small",
            value=max(width, height),
        )
    return subject_box(
        (left, top, right, bottom),
        frame_px=frame_px,
        increase=settings.increase,
        border=settings.border,
    )


@dataclass(eq=False, slots=True)
class _Track:
    """A tube that is still growing.

    Attributes:
        start: its first frame.
        first_px: the subject's box there.
        box_px: the union so far, or the fixed box.
        crop: the fixed box as it will be cut.
        last_px, last_s: the subject where it was found last.
        gap: the frames since.
    """

    start: Moment
    first_px: FloatBox
    box_px: FloatBox
    crop: tuple[Box, bool] | None
    last_px: FloatBox
    last_s: float
    num_missed: int = 0
    gap: list[Moment] = field(default_factory=list)


class Tracker:
    """From detections to tubes, in one pass.

    Args:
        settings: the rules.
        frame_px: width and height in which boxes are given.
        limits: of a tube.

    Attributes:
        refusals: tubes that were none.
    """

    def __init__(self, settings: Subject, *, frame_px: Size, limits: Limits) -> None:
        self._settings = settings
        self._frame_px = frame_px
        self._limits = limits
        self._tracks: list[_Track] = []
        self._now = Moment(-1, 0.0)
        self.refusals = Refusals()

    def frame(self, moment: Moment) -> None:
        """The next frame of the shot."""
        self._now = moment
        for track in self._tracks:
            track.gap.append(moment)

    def found(self, detections: Sequence[Detection]) -> list[Tube]:
        """What was found in the frame that came last; the tubes that end by it."""
        boxes = [detection.box_px for detection in detections]
        matches = self._matches(boxes)
        tubes: list[Tube] = []
        tracks, self._tracks = self._tracks, []
        free = set(range(len(boxes)))
        for index, track in enumerate(tracks):
            match = matches.get(index)
            others = [box for other, box in enumerate(boxes) if other != match]
            now_px = track.last_px if match is None else boxes[match]
            if self._touched(track, now_px, others):
                tubes += self._closed(track, track.gap[0], "touched")
            elif match is not None:
                free.discard(match)
                tubes += self._advance(track, boxes[match])
            else:
                tubes += self._missed(track)
        for index in sorted(free):
            others = [box for other, box in enumerate(boxes) if other != index]
            new = self._start(boxes[index], self._now)
            if new is not None and not self._touched(new, boxes[index], others):
                self._tracks.append(new)
        return tubes

    def cut(self, moment: Moment) -> list[Tube]:
        """End all tubes: `moment`, which was not given to `frame`, begins another shot or is what
        would come after the last frame. A subject that the last look found is there up to it.
        """
        tubes: list[Tube] = []
        for track in self._tracks:
            end, ended = (track.gap[0], "lost") if track.num_missed else (moment, "cut")
            full = track.start.number + self._limits.max_frames
            if end.number > full:
                end = next(late for late in (*track.gap, moment) if late.number >= full)
            tubes += self._closed(track, end, "cut" if ended == "cut" else "lost")
        self._tracks = []
        return tubes

    # --- one look

    def _matches(self, boxes: Sequence[FloatBox]) -> dict[int, int]:
        """Which track goes on with which box: largest overlaps first."""
        pairs = [
            (iou(track.last_px, box), -i, -j)
            for i, track in enumerate(self._tracks)
            for j, box in enumerate(boxes)
        ]
        matches: dict[int, int] = {}
        taken: set[int] = set()
        for overlap, i, j in sorted(pairs, reverse=True):
            if overlap > 0 and -i not in matches and -j not in taken:
                matches[-i] = -j
                taken.add(-j)
        return matches

    def _touched(self, track: _Track, now_px: FloatBox, others: Sequence[FloatBox]) -> bool:
        """Whether another subject is in a track's box, or touches its subject, which is in
        `now_px`.
        """
        if not self._settings.alone:
            return False
        return any(
            intersection(mine, other) > 0 for mine in (track.box_px, now_px) for other in others
        )

    def _missed(self, track: _Track) -> list[Tube]:
        track.num_missed += 1
        if track.num_missed >= self._settings.max_missed:
            return self._closed(track, track.gap[0], "lost")
        self._tracks.append(track)
        return []

    def _advance(self, track: _Track, box: FloatBox) -> Iterator[Tube]:
        """Take a track through the frames up to one in which it was found again."""
        before_px, before_s, gap = track.last_px, track.last_s, track.gap
        current: _Track | None = track
        for moment in gap:
            whole_s = self._now.time_s - before_s
            share = (moment.time_s - before_s) / whole_s if whole_s > 0 else 1.0
            there = _between(before_px, box, share)
            ended = self._why_over(current, there, moment) if current else None
            if current is not None and ended is not None:
                yield from self._closed(current, moment, ended)
            if current is None or ended is not None:
                current = self._start(there, moment)
            elif self._settings.rule == "follow":
                current.box_px = _union(current.box_px, there)
        if current is not None:
            current.last_px, current.last_s = box, self._now.time_s
            current.num_missed, current.gap = 0, []
            self._tracks.append(current)

    def _why_over(self, track: _Track, box: FloatBox, moment: Moment) -> Ended | None:
        if moment.number - track.start.number >= self._limits.max_frames:
            return "length"
        if self._settings.rule == "follow":
            return "moved" if iou(track.first_px, box) < self._settings.min_iou else None
        return "moved" if inside(box, track.box_px) < self._settings.min_inside else None

    # --- a track's start and end

    def _start(self, box: FloatBox, moment: Moment) -> _Track | None:
        """A new track; none where its fixed box would be refused."""
        outer, crop = box, None
        if self._settings.rule == "fixed":
            try:
                crop = self._square(box)
            except MediaError as error:
                self.refusals.add(error)
                return None
            left, top, right, bottom = crop[0]
            outer = (float(left), float(top), float(right), float(bottom))
        return _Track(moment, box, outer, crop, box, moment.time_s)

    def _closed(self, track: _Track, end: Moment, ended: Ended) -> list[Tube]:
        """A finished tube; none where it is refused."""
        count = end.number - track.start.number
        if count < self._limits.min_frames or end.time_s <= track.start.time_s:
            cause = f"a subject is seen for {count} frames, under {self._limits.min_frames}"
            self.refusals.add(MediaError(cause, code="too_short", value=count))
            return []
        try:
            crop_px, clamped = track.crop or self._square(track.box_px)
        except MediaError as error:
            self.refusals.add(error)
            return []
        start = track.start
        return [
            Tube(start.number, end.number, start.time_s, end.time_s, crop_px, clamped, ended),
        ]

    def _square(self, box: FloatBox) -> tuple[Box, bool]:
        return square_of(
            box,
            frame_px=self._frame_px,
            settings=self._settings,
            min_box_px=self._limits.min_box_px,
        )


def _between(a: FloatBox, b: FloatBox, share: float) -> FloatBox:
    left, top, right, bottom = (p + (q - p) * share for p, q in zip(a, b, strict=True))
    return left, top, right, bottom


def _union(a: FloatBox, b: FloatBox) -> FloatBox:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])
