"""Decoded frames of a video with their times, forwards, with seeks that land exactly.

- Time 0 is the first displayed frame of the stream; times come from timestamps, never from an
  index times a rate (except in raw streams and AVI, which have no usable timestamps).
- After a seek, frames count from the first key frame in display order: pictures that are shown
  before it may lean on ones that were skipped. If that key frame is late, the seek is repeated
  from further back, and in the end the file is read from its start.
- A damaged stream gives the frames before the damage and then raises.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Self

import av.error
from av.video.frame import VideoFrame

from kpmask.config import MediaLimits
from kpmask.errors import MediaError
from kpmask.media.container import (
    HEADER_LENGTH_DEMUXERS,
    SEEKABLE_DEMUXERS,
    UNTIMED_DEMUXERS,
    check_size,
    declared_bytes,
    frame_rate,
    open_container,
    pick_stream,
    reason,
)
from kpmask.media.graph import Geometry, orientation_of

_TOLERANCE_S = 1e-6
_BLIND_SEEK_S = 10.0  # without an index, a shorter way is decoded: key frames may be that far apart
_BACK_OFF_S = (0.0, 1.0, 5.0, 25.0)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A frame as coded, and its time in seconds."""

    frame: VideoFrame
    time_s: float


class Reader:
    """An opened video whose first frame is decoded.

    Attributes:
        geometry: how the coded picture is displayed.
        rate: frames per second on average, exact.
        timed: whether the file says each frame's time.
        seekable: whether it can be read from its middle.
        num_decoded: frames decoded so far, those passed over included.
        tolerance_s: for comparing times: 1e-6 s, and half a tick more where the container's
            ticks cannot hold the frame times (Matroska's milliseconds at 29.97 fps).

    Raises:
        MediaError: the file cannot be read, has no frame, or breaks a limit.
    """

    def __init__(self, path: Path, limits: MediaLimits) -> None:
        self._path = path
        self._limits = limits
        self.num_decoded = 0
        self._time_s: float | None = None  # of the last frame read in this run of frames
        self._sought_s = -1.0
        self._open()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._frames.close()
        self.container.close()

    def _open(self) -> None:
        self.container = open_container(self._path, self._limits)
        try:
            self.stream = pick_stream(self.container, self._limits, subject=self._path.name)
        except MediaError:
            self.container.close()
            raise
        self._frames = self._decode(after_seek=False)

    def _start(self) -> None:
        frame = next(self._frames, None)
        if frame is None:
            raise self._error("not one frame could be decoded", "no_frames")
        self._ahead: VideoFrame | None = frame
        self._first_pts = frame.pts
        self.geometry = self._geometry_of(frame)
        check_size(*self.geometry.displayed_px, self._limits, subject=self._path.name)
        self.rate = frame_rate(self.container, self.stream, self._limits)
        self.timed = self.container.format.name not in UNTIMED_DEMUXERS and frame.pts is not None
        self.seekable = self.timed and self.container.format.name in SEEKABLE_DEMUXERS
        self._time_base = self.stream.time_base or Fraction(1)
        self.tolerance_s = self._tolerance_s()
        self._count = 0

    def _geometry_of(self, frame: VideoFrame) -> Geometry:
        return Geometry(
            coded_px=(frame.width, frame.height),
            aspect=self.stream.sample_aspect_ratio or Fraction(1),
            orientation=orientation_of(frame),
        )

    def _tolerance_s(self) -> float:
        if not self.timed or (1 / self.rate / self._time_base).denominator == 1:
            return _TOLERANCE_S
        return _TOLERANCE_S + float(min(self._time_base / 2, 1 / self.rate / 10))

    @property
    def next_time_s(self) -> float:
        """About when the next frame is due."""
        return 0.0 if self._time_s is None else self._time_s + float(1 / self.rate)

    # --- reading -----------------------------------------------------------------------------

    def read(self) -> Decoded | None:
        """The next frame; None at the end.

        Raises:
            MediaError: decode_errors, truncated, timestamp_gap, inconsistent_frames,
                frames_over_limit; every frame before it was good.
        """
        frame, self._ahead = self._ahead, None
        if frame is None:
            frame = next(self._frames, None)
        if frame is None:
            return None
        if (frame.width, frame.height) != self.geometry.coded_px:
            was = "x".join(map(str, self.geometry.coded_px))
            raise self._error(
                f"the picture changes from {was} to {frame.width}x{frame.height} at "
                f"{self.next_time_s:.3f} s",
                "inconsistent_frames",
            )
        time_s = self._time_of(frame)
        if self._time_s is not None and time_s - self._time_s > self._limits.max_gap_s:
            raise self._error(
                f"a hole of {time_s - self._time_s:.1f} s after {self._time_s:.3f} s",
                "timestamp_gap",
            )
        self._time_s = time_s
        self._count += 1
        return Decoded(frame, time_s)

    def _time_of(self, frame: VideoFrame) -> float:
        if not self.timed:
            return float(self._count / self.rate)
        if frame.pts is None or self._first_pts is None:
            return self.next_time_s
        time_s = float((frame.pts - self._first_pts) * self._time_base)
        return time_s if self._time_s is None else max(time_s, self._time_s)

    def _decode(self, *, after_seek: bool) -> Generator[VideoFrame]:
        """Frames in display order; from the first key frame on where the start was cut off."""
        wait_for_key = after_seek
        saw_key = False
        last_end_s = 0.0
        started = False
        try:
            for packet in self.container.demux():
                if packet.pts is not None and packet.time_base is not None:
                    end = (packet.pts + (packet.duration or 0)) * packet.time_base
                    last_end_s = max(last_end_s, float(end))
                if packet.stream.index != self.stream.index:
                    continue
                if not packet.size and started:
                    # Before the decoder is emptied: where a file was cut, pictures that are
                    # coded ahead of earlier ones would come out with a hole before them.
                    self._check_end(last_end_s)
                if packet.is_corrupt and not wait_for_key:
                    raise self._damage("a packet is incomplete")
                saw_key = saw_key or packet.is_keyframe
                try:
                    frames = packet.decode()
                except av.error.FFmpegError as error:
                    # A cut between key frames begins with packets that cannot be decoded.
                    if wait_for_key or not saw_key:
                        wait_for_key = True
                        continue
                    raise self._damage(reason(error)) from error
                for frame in frames:
                    assert isinstance(frame, VideoFrame)
                    if wait_for_key and not frame.key_frame:
                        continue
                    wait_for_key = False
                    started = True
                    self._count_decoded()
                    yield frame
        except av.error.FFmpegError as error:
            raise self._damage(reason(error)) from error
        if not after_seek and not started and not saw_key:
            raise self._error("no key frame, so nothing can be decoded", "no_keyframe")
        if not started:
            self._check_end(last_end_s)

    def _count_decoded(self) -> None:
        self.num_decoded += 1
        if self.num_decoded > self._limits.max_frames:
            raise self._error(f"more than {self._limits.max_frames} frames", "frames_over_limit")

    # --- damage ------------------------------------------------------------------------------

    def _error(self, cause: str, code: str) -> MediaError:
        return MediaError(cause, subject=self._path.name, code=code)

    def _damage(self, cause: str) -> MediaError:
        at = f"at about {self.next_time_s:.3f} s"
        if self._is_cut_short():
            return self._error(f"the file is cut off; decoding ends {at}", "truncated")
        return self._error(f"damaged {at}: {cause}", "decode_errors")

    def _is_cut_short(self) -> bool:
        """Whether the header or the index points behind the end of the file."""
        size_bytes = self._path.stat().st_size
        if declared_bytes(self._path) > size_bytes:
            return True
        return any(entry.pos + entry.size > size_bytes for entry in self.stream.index_entries)

    def _check_end(self, last_end_s: float) -> None:
        """A file that was cut between two packets ends without any error of the demuxer's."""
        if self._is_cut_short():
            raise self._error(f"the file ends at {self.next_time_s:.3f} s", "truncated")
        duration = self.container.duration
        if self.container.format.name not in HEADER_LENGTH_DEMUXERS or duration is None:
            return
        header_s = (duration + (self.container.start_time or 0)) / 1e6
        # Headers are a little off; live recordings' by more.
        if header_s - last_end_s > max(0.5, min(0.02 * header_s, 5.0)):
            raise self._error(
                f"the file ends at {last_end_s:.3f} s of {header_s:.3f} s", "truncated"
            )

    # --- seeking -----------------------------------------------------------------------------

    def skip_to(self, time_s: float) -> None:
        """Get to a frame at or before `time_s`, if a seek gets there sooner than reading on.

        Raises:
            MediaError: the file cannot be read from its start either.
        """
        if time_s == self._sought_s:
            return  # once for a target: what is left of the way is decoded
        if not self._seek_pays(time_s):
            return
        self._sought_s = time_s
        for back_s in _BACK_OFF_S:
            if time_s - back_s > 0 and self._land(time_s - back_s, time_s):
                return
        self.close()
        self._time_s = None
        self._open()
        self._start()

    def _ticks(self, time_s: float) -> int:
        return (self._first_pts or 0) + int(time_s / self._time_base)

    def _seek_pays(self, time_s: float) -> bool:
        now_s = self.next_time_s
        if not self.seekable or time_s - now_s < 0.5:
            return False
        index = self.stream.index_entries
        at = index.search_timestamp(self._ticks(time_s), backward=True) if len(index) else -1
        if at < 0 or index[len(index) - 1].timestamp < self._ticks(time_s):
            return time_s - now_s > _BLIND_SEEK_S
        return index[at].timestamp > self._ticks(now_s)

    def _land(self, target_s: float, time_s: float) -> bool:
        """Seek; whether the first whole frame from there is not later than `time_s`."""
        self._frames.close()
        try:
            self.container.seek(self._ticks(target_s), stream=self.stream, backward=True)
        except (av.error.FFmpegError, PermissionError):
            return False
        self._frames = self._decode(after_seek=True)
        self._time_s = None
        try:
            frame = next(self._frames, None)
        except MediaError:
            return False
        if frame is None or frame.pts is None or self._time_of(frame) > time_s + self.tolerance_s:
            return False
        self._ahead = frame
        return True
