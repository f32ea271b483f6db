"""Frames of whatever moves: a video, a GIF, a folder of pictures, frames side by side in one.

- Frames are uint8 HWC RGB, upright, square samples, alpha over black; time 0 is the first frame.
- Frames with start_s <= time < end_s are given, one at a time: memory does not grow with length.
- A damaged source gives the frames before the damage, then raises `MediaError`: its code says
  what is lost, and the caller decides whether the rest is enough. Nothing is raised when all the
  frames asked for came before the damage.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import inf
from pathlib import Path
from typing import Literal

import av.error
import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from kpmask.config import MediaLimits
from kpmask.errors import MediaError
from kpmask.media.container import reason, sniff
from kpmask.media.graph import Box, Geometry, Renderer, Size
from kpmask.media.images import image_size, read_image, read_stack
from kpmask.media.reader import Decoded, Reader

Kind = Literal["video", "folder", "stack"]

DEFAULT_FPS = 25.0  # of sources that do not say: folders and stacks
_IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)
_NTSC = (24, 30, 48, 60, 120)


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame: uint8 HWC RGB, upright, and its time in seconds from the first frame."""

    rgb_HWC: NDArray[np.uint8]
    time_s: float


@dataclass(frozen=True, slots=True)
class Span:
    """Frames with start_s <= time < end_s, cropped (left, top, right, bottom), then scaled.

    The crop is in displayed pixels and must lie within the frame; `size_px` is width, height.
    """

    start_s: float = 0.0
    end_s: float | None = None
    crop_px: Box | None = None
    size_px: Size | None = None


def kind_of(path: Path) -> Kind:
    """How a source is read, by its content and not its name.

    Raises:
        MediaError: not_found, empty_file, not_media.
    """
    content = sniff(path)
    if content == "folder":
        return "folder"
    return "stack" if content == "image" else "video"


def as_rate(fps: float) -> Fraction:
    """Frames per second as an exact rate: 29.97 becomes 30000/1001, 25.0 becomes 25.

    Raises:
        ValueError: not a positive number.
    """
    if not 0 < fps < inf:
        raise ValueError(f"{fps} is not a frame rate")
    for base in _NTSC:
        if abs(fps - base * 1000 / 1001) < 1e-3:
            return Fraction(base * 1000, 1001)
    return Fraction(fps).limit_denominator(1001 if fps >= 1 else 1_000_000) or Fraction(fps)


def check_length(num_frames: int, *, min_frames: int, subject: str) -> None:
    """Refuse what is left of a source where it is too little.

    Raises:
        MediaError: too_short.
    """
    if num_frames < min_frames:
        raise MediaError(
            f"{num_frames} frames, and the least is {min_frames}", subject=subject, code="too_short"
        )


def frames(
    path: Path,
    limits: MediaLimits,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    crop_px: Box | None = None,
    size_px: Size | None = None,
    fps: float = DEFAULT_FPS,
) -> Iterator[Frame]:
    """Frames of a source, in order; see `Span` for the arguments.

    Args:
        fps: of a folder or stack, which do not say it.

    Raises:
        MediaError: the source cannot be read, or after its good frames: it is damaged.
        ValueError: the crop is not within the frame.
    """
    span = Span(start_s or 0.0, end_s, crop_px, size_px)
    return (frame for _, frame in spans(path, limits, [span], fps=fps))


def spans(
    path: Path, limits: MediaLimits, spans: Sequence[Span], *, fps: float = DEFAULT_FPS
) -> Iterator[tuple[int, Frame]]:
    """Frames of many spans of one source in one pass, as (index of the span, frame), by time.

    The pass seeks to the first span and over long holes between them. A frame that is in several
    spans is decoded once. Raises what `frames` raises.
    """
    jobs = [_Job(index, span) for index, span in enumerate(spans)]
    kind = kind_of(path)
    if kind == "video":
        yield from _video_spans(path, limits, jobs)
        return
    images = folder_images(path, limits) if kind == "folder" else stack_images(path, limits)
    rate = as_rate(fps)
    renderers: dict[tuple[Box | None, Size | None], Renderer] = {}
    for number, image_HWC in enumerate(images):
        time_s = float(number / rate)
        if all(time_s >= job.end_s for job in jobs):
            return
        for job in jobs:
            if job.start_s - _EXACT_S <= time_s < job.end_s - _EXACT_S:
                yield job.index, Frame(_render_array(image_HWC, job.span, renderers), time_s)


_EXACT_S = 1e-6


class _Job:
    """A span at work."""

    def __init__(self, index: int, span: Span) -> None:
        self.index = index
        self.span = span
        self.start_s = span.start_s
        self.end_s = inf if span.end_s is None else span.end_s


# --- videos ----------------------------------------------------------------------------------


def _video_spans(
    path: Path, limits: MediaLimits, jobs: Sequence[_Job]
) -> Iterator[tuple[int, Frame]]:
    with Reader(path, limits) as reader:
        waiting = deque(sorted(jobs, key=lambda job: (job.start_s, job.index)))
        active: list[_Job] = []
        renderers: dict[tuple[Box | None, Size | None], Renderer] = {}
        while waiting or active:
            if not active:
                reader.skip_to(waiting[0].start_s)
            due_s = reader.next_time_s
            try:
                decoded = reader.read()
            except MediaError:
                # Half a frame's time is left for variable rates.
                if waiting or any(job.end_s > due_s + 0.5 / reader.rate for job in active):
                    raise
                return
            if decoded is None:
                return
            _move_on(waiting, active, decoded.time_s, reader.tolerance_s)
            _forget(renderers, [*active, *waiting])
            for job in active:
                yield job.index, _rendered(decoded, job.span, renderers, reader.geometry, path.name)


def _move_on(waiting: deque[_Job], active: list[_Job], time_s: float, tolerance_s: float) -> None:
    """Begin the spans that have begun by `time_s` and drop those that are over."""
    while waiting and waiting[0].start_s - tolerance_s <= time_s:
        active.append(waiting.popleft())
    active[:] = [job for job in active if time_s < job.end_s - tolerance_s]
    active.sort(key=lambda job: job.index)


def _forget(
    renderers: dict[tuple[Box | None, Size | None], Renderer], jobs: Sequence[_Job]
) -> None:
    """Drop filter graphs that no span needs any more."""
    wanted = {(job.span.crop_px, job.span.size_px) for job in jobs}
    for key in [key for key in renderers if key not in wanted]:
        del renderers[key]


def _rendered(
    decoded: Decoded,
    span: Span,
    renderers: dict[tuple[Box | None, Size | None], Renderer],
    geometry: Geometry,
    subject: str,
) -> Frame:
    key = (span.crop_px, span.size_px)
    if key not in renderers:
        renderers[key] = Renderer(geometry, crop_px=span.crop_px, size_px=span.size_px)
    try:
        return Frame(renderers[key].render(decoded.frame), decoded.time_s)
    except av.error.FFmpegError as error:
        # Such as a matrix of colours, named by a damaged header, that libswscale has not.
        cause = f"frames cannot be turned into RGB: {reason(error)}"
        raise MediaError(cause, subject=subject, code="decode_errors") from error


# --- pictures --------------------------------------------------------------------------------


def _render_array(
    image_HWC: NDArray[np.uint8],
    span: Span,
    renderers: dict[tuple[Box | None, Size | None], Renderer],
) -> NDArray[np.uint8]:
    key = (span.crop_px, span.size_px)
    if key == (None, None):
        return image_HWC
    if key not in renderers:
        height_px, width_px = image_HWC.shape[:2]
        geometry = Geometry((width_px, height_px))
        renderers[key] = Renderer(geometry, crop_px=span.crop_px, size_px=span.size_px)
    return renderers[key].render(VideoFrame.from_ndarray(image_HWC, format="rgb24"))


def folder_paths(folder: Path, limits: MediaLimits) -> list[Path]:
    """The pictures of a folder by name, numbers in it by value; other files are passed over.

    Raises:
        MediaError: no_frames, frames_over_limit, and what `image_size` raises.
        MediaError: inconsistent_frames: not all of one size.
    """
    paths = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in _IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and path.is_file()
    ]
    if not paths:
        raise MediaError("no picture in the folder", subject=folder.name, code="no_frames")
    if len(paths) > limits.max_frames:
        raise MediaError(
            f"{len(paths)} pictures, and the limit is {limits.max_frames}",
            subject=folder.name,
            code="frames_over_limit",
        )
    paths.sort(key=lambda path: (_natural(path.name), path.name))
    size_px = image_size(paths[0], limits)
    for path in paths[1:]:
        other_px = image_size(path, limits)
        if other_px != size_px:
            raise MediaError(
                f"{path.name} is {other_px[0]}x{other_px[1]}, and {paths[0].name} is "
                f"{size_px[0]}x{size_px[1]}",
                subject=folder.name,
                code="inconsistent_frames",
            )
    return paths


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"([0-9]+)", name.lower())
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def folder_images(folder: Path, limits: MediaLimits) -> Iterator[NDArray[np.uint8]]:
    """The pictures of a folder, one after the other; raises as `folder_paths` and `read_image`."""
    return (read_image(path, limits) for path in folder_paths(folder, limits))


def stack_images(path: Path, limits: MediaLimits) -> Iterator[NDArray[np.uint8]]:
    """The square frames that stand side by side in one picture; raises as `read_stack`."""
    stack_HWC = read_stack(path, limits)
    side_px = stack_HWC.shape[0]
    for left_px in range(0, stack_HWC.shape[1], side_px):
        yield np.ascontiguousarray(stack_HWC[:, left_px : left_px + side_px])
