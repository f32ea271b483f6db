"""From a raw video and the rows about it to clips: planned, then cut in one decode pass.

- Which frames: frame i of a file with rate F belongs to reference frames [start, end) when
  start * F <= i * ref_fps < end * F; by timestamps, where the rate varies. Tables round rates to
  two decimals (29.97 for 30000/1001), so rates that are equal to that precision are taken as equal.
- A span with more than `max_frames` frames becomes several clips of about equal length.
- A video without a table is cut into such clips from its first frame to its last, from the largest
  square about its centre; or, with `subject.detector`, into the tubes of what is found in it.
- Frames go to a file as encoded images, one at a time: memory does not grow with a clip's length.
- Every clip is measured while it is cut (`kpmask.data.quality`); limits do not enter its id.
- Where the video is damaged or ends early, a clip keeps its good frames if they are `min_frames`
  or more, and says how many are lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kpmask.config import Clips, MediaLimits, Quality, Storage, Subject
from kpmask.data.crop import Box, centre_square, crop_box
from kpmask.data.metadata import clip_name
from kpmask.data.quality import ClipMeter, Measures, check_quality
from kpmask.data.subjects import Found, find_first, find_tubes, no_subject
from kpmask.errors import ItemError, MediaError, QualityError
from kpmask.media.decode import Frame, Span, as_rate, spans
from kpmask.media.encode import storage_error
from kpmask.media.images import encode_jpeg, encode_png
from kpmask.records import ClipPlan, ClipRecord, Failure, SourceRow, VideoProbe, digest

CODE_VERSION = 2  # in every clip id: a change of what is cut makes other clips
_ROUNDED_RATE = 0.005
_MAX_UNKNOWN_PIECES = 1000
_CLOSE_S = 0.1  # a clip is closed when the pass is this far behind its end
# Clips that overlap so often take another pass: each holds a file, and half a megabyte of samples.
_MAX_OPEN = 64


@dataclass(frozen=True, slots=True)
class CutClip:
    """A clip as cut: encoded images end to end in `path`, image i ending at byte `ends[i]`.

    `sha256` is over the RGB frames before they were encoded; `damage` is what cut it short.
    """

    plan: ClipPlan
    path: Path
    ends: tuple[int, ...]
    fps: float
    num_frames_lost: int
    sha256: str
    measures: Measures
    damage: MediaError | None

    def record(self) -> ClipRecord:
        """The clip's record, not yet in a shard."""
        plan = self.plan
        return ClipRecord(
            clip_id=plan.clip_id,
            name=plan.name,
            partition=plan.partition,
            identity=plan.identity,
            video_id=plan.video_id,
            shard="",
            row=0,
            num_frames=len(self.ends),
            fps=self.fps,
            width_px=plan.size_px,
            height_px=plan.size_px,
            start_s=plan.start_s,
            end_s=plan.end_s,
            crop_px=plan.crop_px,
            clamped=plan.clamped,
            num_frames_lost=self.num_frames_lost,
            sha256=self.sha256,
            sharpness=self.measures.sharpness,
            brightness=self.measures.brightness,
            motion=self.measures.motion,
            overlay=self.measures.overlay,
            look=self.measures.look,
        )


# --- planning --------------------------------------------------------------------------------


def plan_clips(
    rows: Sequence[SourceRow],
    probe: VideoProbe,
    raw_sha256: str,
    *,
    path: Path,
    clips: Clips,
    storage: Storage,
    subject: Subject,
    limits: MediaLimits,
) -> tuple[list[ClipPlan], list[Failure]]:
    """What to cut from one video, and the rows from which nothing can be.

    Args:
        rows: about the video.
        probe: of it.
        raw_sha256: its checksum.
        path: where it is; it is looked at only where a row has no span and `subject` a detector.
        clips, storage: how clips are made.
        subject: what to look for.
        limits: for reading.

    Raises:
        ConfigError: the subject's detector cannot be had here.
    """
    plans: list[ClipPlan] = []
    failures: list[Failure] = []
    for row in rows:
        try:
            if row.start_frame is None and subject.detector != "none":
                pieces, losses = _subject_pieces(row, probe, path, clips, subject, limits)
                failures += losses
            else:
                pieces = _row_pieces(row, probe, clips, limits)
        except ItemError as error:
            failures.append(failure_of(row_name(row), "plan", error))
            continue
        plans += [_plan(row, piece, raw_sha256, clips, storage) for piece in pieces]
    return plans, failures


def cuts_whole(rows: Sequence[SourceRow], subject: Subject) -> bool:
    """Whether the plans for a video cover it from its first frame to its last (`CutSettings`)."""
    follows = subject.detector != "none" and subject.rule != "first"
    return rows[0].start_frame is None and not follows


def row_name(row: SourceRow) -> str:
    """What a row's clip is called (its only one, or the part before a piece's numbers)."""
    if row.start_frame is None:
        return row.video_id
    return clip_name(row, start_frame=row.start_frame, end_frame=row.end_frame)


def failure_of(item: str, stage: str, error: ItemError) -> Failure:
    """An item's error as a record."""
    cause = f"{error.cause} ({error.hint})" if error.hint else error.cause
    return Failure(
        item=item,
        stage=stage,
        code=error.code,
        cause=cause,
        retryable=error.retryable,
        attempts=1,
        value=error.value,
    )


@dataclass(frozen=True, slots=True)
class _Piece:
    name: str
    start_s: float
    end_s: float
    crop_px: Box
    clamped: bool


def _plan(
    row: SourceRow, piece: _Piece, raw_sha256: str, clips: Clips, storage: Storage
) -> ClipPlan:
    quality = storage.jpeg_quality if storage.image_format == "jpeg" else None
    identity = {
        "raw": raw_sha256,
        "name": piece.name,  # copies of a video are videos of their own
        "span_s": [piece.start_s, piece.end_s],
        "crop_px": piece.crop_px,
        "settings": [CODE_VERSION, clips.size_px, storage.image_format, quality],
    }
    return ClipPlan(
        clip_id=digest(identity)[:32],
        name=piece.name,
        video_id=row.video_id,
        partition=row.partition,
        identity=row.identity,
        start_s=piece.start_s,
        end_s=piece.end_s,
        crop_px=piece.crop_px,
        clamped=piece.clamped,
        size_px=clips.size_px,
    )


def _row_pieces(
    row: SourceRow, probe: VideoProbe, clips: Clips, limits: MediaLimits
) -> list[_Piece]:
    """The clips that a row asks for."""
    if row.start_frame is None:
        return _whole_video(row, probe, clips, limits)
    assert row.end_frame is not None
    assert row.bbox_px is not None and row.ref_size_px is not None and row.ref_fps is not None
    crop_px, clamped = crop_box(
        row.bbox_px,
        ref_size_px=row.ref_size_px,
        frame_px=(probe.width_px, probe.height_px),
        clips=clips,
    )
    rate = as_rate(probe.fps)
    reference = Fraction(row.ref_fps).limit_denominator(1_000_000)
    if abs(rate - reference) < _ROUNDED_RATE:
        reference = rate
    num_frames = frames_until(row.end_frame, reference, rate) - frames_until(
        row.start_frame, reference, rate
    )
    if num_frames > limits.max_frames:  # a slip of the table's would make a million plans
        raise MediaError(
            f"a span of {num_frames} frames, and the limit is {limits.max_frames}",
            code="frames_over_limit",
            value=num_frames,
        )
    edges = _even_edges(row.start_frame, row.end_frame, math.ceil(num_frames / clips.max_frames))
    return [
        _Piece(
            name=clip_name(row, start_frame=start, end_frame=end),
            start_s=float(start / reference),
            end_s=float(end / reference),
            crop_px=crop_px,
            clamped=clamped,
        )
        for start, end in itertools.pairwise(edges)
    ]


def frames_until(reference_frame: int, reference_fps: Fraction, fps: Fraction) -> int:
    """How many frames of a file of constant rate lie before a frame of the reference video."""
    return math.ceil(reference_frame * fps / reference_fps)


def _even_edges(start: int, end: int, count: int) -> list[int]:
    count = max(min(count, end - start), 1)
    return [start + (end - start) * i // count for i in range(count + 1)]


def _whole_video(
    row: SourceRow, probe: VideoProbe, clips: Clips, limits: MediaLimits
) -> list[_Piece]:
    """A video from its first frame to its last, from the square about its centre."""
    crop_px = centre_square((probe.width_px, probe.height_px))
    if crop_px[2] - crop_px[0] < clips.min_box_px:
        raise MediaError(
            f"the frame is {probe.width_px}x{probe.height_px} px, under {clips.min_box_px} px",
            code="too_small",
        )
    return _all_frames(row, probe, clips, limits, crop_px, clamped=False)


def _all_frames(
    row: SourceRow,
    probe: VideoProbe,
    clips: Clips,
    limits: MediaLimits,
    crop_px: Box,
    *,
    clamped: bool,
) -> list[_Piece]:
    """One square of a video from its first frame to its last."""
    rate = as_rate(probe.fps)
    num_frames = _num_frames(probe, clips, limits)
    edges = _even_edges(0, num_frames, math.ceil(num_frames / clips.max_frames))
    # The last frames of a variable rate come later than the average rate has it.
    last_s = max(float(num_frames / rate), probe.duration_s or 0.0) + float(1 / rate)
    pieces = []
    for start, end in itertools.pairwise(edges):
        number = f"#{start:06d}#{end:06d}" if len(edges) > 2 else ""
        end_s = last_s if end == num_frames else float(end / rate)
        pieces.append(_Piece(row.video_id + number, float(start / rate), end_s, crop_px, clamped))
    return pieces


def _subject_pieces(
    row: SourceRow,
    probe: VideoProbe,
    path: Path,
    clips: Clips,
    subject: Subject,
    limits: MediaLimits,
) -> tuple[list[_Piece], list[Failure]]:
    """The clips of a video's subjects, and what was found and is none.

    Raises:
        ConfigError: the detector cannot be had here.
        MediaError: nothing was found, the frame is too small, or the video cannot be read.
    """
    shorter_px = min(probe.width_px, probe.height_px)
    if shorter_px < subject.min_side_px:
        raise MediaError(
            f"the frame is {probe.width_px}x{probe.height_px} px, its shorter side under "
            f"{subject.min_side_px} px",
            code="too_small",
            value=shorter_px,
        )
    if subject.rule == "first":
        crop_px, clamped = find_first(path, probe, subject=subject, clips=clips, limits=limits)
        return _all_frames(row, probe, clips, limits, crop_px, clamped=clamped), []
    found = find_tubes(path, probe, subject=subject, clips=clips, limits=limits)
    counts: dict[str, int] = {}
    pieces = []
    for tube in found.tubes:
        number = f"#{tube.start_frame:06d}#{tube.end_frame:06d}"
        counts[number] = counts.get(number, 0) + 1
        # Of subjects that are there for the same frames, all but one have a number.
        turn = f"#{counts[number]}" if counts[number] > 1 else ""
        name = row.video_id + turn + number
        pieces.append(_Piece(name, tube.start_s, tube.end_s, tube.crop_px, tube.clamped))
    return pieces, _subject_losses(row, found)


def _subject_losses(row: SourceRow, found: Found) -> list[Failure]:
    """One failure for each reason why subjects of a video are not cut.

    Raises:
        MediaError: there was no subject at all.
    """
    errors = []
    for code, (error, count) in sorted(found.refusals.by_code.items()):
        if code == "too_short" and found.tubes:
            continue  # passers-by
        cause = f"{error.cause} (the best of {count})" if count > 1 else error.cause
        errors.append(MediaError(cause, code=code, hint=error.hint, value=error.value))
    if found.damage is not None:
        count = len(found.tubes)
        cause = f"{found.damage.cause}; {count} clip{'s' * (count != 1)} before that"
        errors.append(MediaError(cause, code=found.damage.code))
    if not errors and not found.tubes:
        raise no_subject(found.looked_for, found.num_looks, "the video")
    return [failure_of(row.video_id, "plan", error) for error in errors]


def _num_frames(probe: VideoProbe, clips: Clips, limits: MediaLimits) -> int:
    """How many frames a video has, as far as its header says; else more than it will have.

    A damaged header may promise centuries; more than the limit are never read.
    """
    if probe.num_frames_from_header:
        return min(probe.num_frames_from_header, limits.max_frames)
    if probe.duration_s:
        return max(1, round(min(probe.duration_s * probe.fps, limits.max_frames)))
    return min(_MAX_UNKNOWN_PIECES * clips.max_frames, limits.max_frames)


# --- cutting ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CutSettings:
    """How clips are cut.

    Attributes:
        clips: the setting `min_frames`.
        storage: the image format.
        limits: for reading the video.
        whole: the plans cover a video as it is: spans that its header promised and that do not
            come are no loss, unless the video is damaged.
        quality: which clips are refused.
    """

    clips: Clips
    storage: Storage
    limits: MediaLimits
    whole: bool
    quality: Quality = field(default_factory=Quality)


def cut_clips(
    path: Path,
    plans: Sequence[ClipPlan],
    probe: VideoProbe,
    *,
    settings: CutSettings,
    folder: Path,
) -> Iterator[CutClip | Failure]:
    """The clips of one video, as each is finished, in one decode pass.

    (In more, where more than `_MAX_OPEN` clips have a moment in common.)

    Args:
        path: the video.
        plans: what to cut from it.
        probe: of this video.
        settings: how.
        folder: where each clip's images are written; the caller removes them.

    Yields:
        A clip, or why there is none.

    Raises:
        StorageError: the images cannot be written.
    """
    if not plans:
        return
    with ExitStack() as files:
        cutters = (_Cutter(some, probe, settings, folder, files) for some in _passes(plans))
        results = itertools.chain.from_iterable(cutter.run(path) for cutter in cutters)
        yield from _of_whole(results, plans) if settings.whole else results


def _passes(plans: Sequence[ClipPlan]) -> Iterator[list[ClipPlan]]:
    """The plans, each once, so that at most `_MAX_OPEN` of a pass are being written at a time."""
    left = sorted(enumerate(plans), key=lambda item: item[1].start_s)
    while left:
        some: list[tuple[int, ClipPlan]] = []
        over: list[tuple[int, ClipPlan]] = []
        ends_s: list[float] = []  # of those that are open, a heap
        for item in left:
            while ends_s and ends_s[0] + 2 * _CLOSE_S < item[1].start_s:
                heapq.heappop(ends_s)
            if len(ends_s) < _MAX_OPEN:
                heapq.heappush(ends_s, item[1].end_s)
                some.append(item)
            else:
                over.append(item)
        yield [plan for _, plan in sorted(some, key=lambda item: item[0])]
        left = over


def _of_whole(
    results: Iterator[CutClip | Failure], plans: Sequence[ClipPlan]
) -> Iterator[CutClip | Failure]:
    """The results for a video as it is: none for a short remainder, and one failure at most of
    those that are of the video and not of a clip.
    """
    failures: list[Failure] = []
    any_clip = False
    for result in results:
        if isinstance(result, Failure) and result.stage != "quality":
            failures.append(result)
        else:
            any_clip = True
            yield result
    telling = [failure for failure in failures if failure.code != "too_short"]
    if telling or not any_clip:
        yield dataclasses.replace((telling or failures)[0], item=plans[0].video_id)


@dataclass(eq=False)
class _Spool:
    """A clip that is being written."""

    plan: ClipPlan
    path: Path
    file: BinaryIO
    ends: list[int] = field(default_factory=list)
    last_s: float = -math.inf
    hash: hashlib._Hash = field(default_factory=hashlib.sha256)
    meter: ClipMeter = field(default_factory=ClipMeter)

    def add(self, frame: Frame, image: bytes) -> None:
        self.hash.update(np.ascontiguousarray(frame.rgb_HWC).data)
        self.meter.add(frame.rgb_HWC)
        try:
            self.file.write(image)
        except OSError as error:
            raise storage_error(error, self.path) from error
        self.ends.append((self.ends[-1] if self.ends else 0) + len(image))
        self.last_s = frame.time_s

    def close(self) -> None:
        try:
            self.file.close()
        except OSError as error:
            raise storage_error(error, self.path) from error


class _Cutter:
    """One pass over one video."""

    def __init__(
        self,
        plans: Sequence[ClipPlan],
        probe: VideoProbe,
        settings: CutSettings,
        folder: Path,
        files: ExitStack,
    ) -> None:
        self._plans = plans
        self._probe = probe
        self._settings = settings
        self._folder = folder
        self._files = files  # closes what an error leaves open
        self._open: dict[int, _Spool] = {}
        self._damage: MediaError | None = None
        self._seen_s = -math.inf

    def run(self, path: Path) -> Iterator[CutClip | Failure]:
        waiting = dict(enumerate(self._plans))
        for index, frame in self._frames(path):
            self._seen_s = frame.time_s
            for other in [
                i for i, s in self._open.items() if s.plan.end_s + _CLOSE_S < frame.time_s
            ]:
                yield self._closed(waiting.pop(other), self._open.pop(other), at_end=False)
            if index not in self._open:
                self._open[index] = self._spool(self._plans[index])
            self._open[index].add(frame, _encoded(frame.rgb_HWC, self._settings.storage))
        for index, plan in waiting.items():
            spool = self._open.pop(index, None)
            yield self._closed(plan, spool, at_end=spool is None or spool.last_s >= self._seen_s)

    def _frames(self, path: Path) -> Iterator[tuple[int, Frame]]:
        """The frames of all plans, up to the damage if there is any."""
        wanted = [Span(p.start_s, p.end_s, p.crop_px, (p.size_px, p.size_px)) for p in self._plans]
        try:
            yield from spans(path, self._settings.limits, wanted)
        except MediaError as error:
            self._damage = error

    def _spool(self, plan: ClipPlan) -> _Spool:
        path = self._folder / f"{plan.clip_id}.images"
        try:
            file = path.open("wb")
        except OSError as error:
            raise storage_error(error, path) from error
        self._files.callback(_abandon, file)
        return _Spool(plan, path, file)

    def _closed(self, plan: ClipPlan, spool: _Spool | None, *, at_end: bool) -> CutClip | Failure:
        """A finished clip; or a failure, where too few frames came.

        `at_end`: the video gave no frame after this clip's last one.
        """
        damage = self._damage if at_end else None
        if spool is not None:
            spool.close()
        if spool is None or len(spool.ends) < self._settings.clips.min_frames:
            if spool is not None:
                spool.path.unlink()
            return self._too_short(plan, len(spool.ends) if spool else 0, damage)
        measures = spool.meter.measures()
        if refused := self._refused(plan, measures):
            spool.path.unlink()
            return refused
        lost = self._num_lost(plan, spool.last_s, damaged=damage is not None) if at_end else 0
        return CutClip(
            plan=plan,
            path=spool.path,
            ends=tuple(spool.ends),
            fps=self._probe.fps,
            num_frames_lost=lost,
            sha256=spool.hash.hexdigest(),
            measures=measures,
            damage=damage if lost else None,
        )

    def _refused(self, plan: ClipPlan, measures: Measures) -> Failure | None:
        try:
            check_quality(measures, self._settings.quality)
        except QualityError as error:
            return failure_of(plan.name, "quality", error)
        return None

    def _too_short(self, plan: ClipPlan, count: int, damage: MediaError | None) -> Failure:
        cause = f"{count} frame{'s' * (count != 1)}, under {self._settings.clips.min_frames}"
        if damage is None:
            return failure_of(plan.name, "cut", MediaError(cause, code="too_short"))
        error = MediaError(f"{damage.cause}; {cause}", code=damage.code)
        return failure_of(plan.name, "cut", error)

    def _num_lost(self, plan: ClipPlan, last_s: float, *, damaged: bool) -> int:
        """How many frames of a plan would come after the last one that there is."""
        probe, end_s = self._probe, plan.end_s
        if not damaged:
            if self._settings.whole:
                return 0
            if probe.duration_s is not None and probe.duration_s >= end_s - 1e-3:
                return 0  # the next frame of a variable rate comes after the span
        elif self._settings.whole:
            # Such a plan ends later than its last frame.
            end_s = min(
                end_s, _num_frames(probe, self._settings.clips, self._settings.limits) / probe.fps
            )
        return max(0, math.ceil((end_s - last_s) * probe.fps - 1e-4) - 1)


def _abandon(file: BinaryIO) -> None:
    """Close a file that nobody needs; there may be no space for the rest of it."""
    with contextlib.suppress(OSError):
        file.close()


def _encoded(frame_HWC: np.ndarray, storage: Storage) -> bytes:
    if storage.image_format == "jpeg":
        return encode_jpeg(frame_HWC, quality=storage.jpeg_quality)
    return encode_png(frame_HWC)
