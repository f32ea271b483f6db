"""The videos of a study's item, made alike: one size, rate, length, encoder and number of bytes.

What could tell a method by other things than its pictures is taken away: sound, metadata, content
credentials, names, the order of writing, and the length of the file (MP4 allows bytes that mean
nothing at its end).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kpmask.config import MediaLimits
from kpmask.driving import paced
from kpmask.errors import MediaError
from kpmask.media import decode, images
from kpmask.media.decode import as_rate
from kpmask.media.encode import encode
from kpmask.media.graph import Size
from kpmask.media.probe import probe
from kpmask.records import VideoProbe, digest
from kpmask.study import StudyItem, blind
from tasks.inputs import content_digest, local_media
from tasks.storage import os_errors

Frame = NDArray[np.uint8]  # HWC RGB

MEDIA: Final = "media"
MAX_SIDE_PX: Final = 512  # several stand side by side on a screen
MAX_FPS: Final = 60.0
MAX_LAG_S: Final = 0.25  # a result that is longer or shorter by more is out of step
CRF: Final = 14  # better than results are stored with: people are to judge those, not this
JPEG_QUALITY: Final = 92


@dataclass(frozen=True, slots=True)
class MatchedItem:
    """One item's inputs by URI; `source` is empty where there is none."""

    name: str
    driving: str
    source: str
    results: Mapping[str, str]  # by method


@dataclass(frozen=True, slots=True)
class _Film:
    """One input video as it is shown."""

    path: Path
    found: VideoProbe
    rate: Fraction  # that it is shown at
    max_s: float
    limits: MediaLimits

    def frames(self, size_px: Size | None = None) -> Iterator[Frame]:
        """Its frames at the study's rate, `size_px` as the decoder scales them."""
        own_fps = self.found.fps
        decoded = decode.frames(
            self.path, self.limits, end_s=self.max_s, size_px=size_px, fps=own_fps
        )
        return (frame.rgb_HWC for frame in paced(decoded, self.rate, own_rate=as_rate(own_fps)))

    def num_frames(self) -> int:
        """How many there are, by decoding all of it: a header may say anything."""
        return sum(1 for _ in self.frames((32, 32)))

    @property
    def size_px(self) -> Size:
        return self.found.width_px, self.found.height_px


def make_item(
    matched: MatchedItem, folder: Path, *, seed: int, max_s: float, limits: MediaLimits
) -> StudyItem:
    """Write the blind media of one item into `folder`.

    Args:
        seed: of the blind names, with the contents of all files.
        max_s: what is longer is cut.

    Raises:
        MediaError: a file is not there or cannot be read to its end, or a result's length is not
            that of the driving video; the cause names which.
    """
    with ExitStack() as stack:
        paths = {
            method: stack.enter_context(_named(method, uri))
            for method, uri in matched.results.items()
        }
        driving_path = stack.enter_context(_named("the driving video", matched.driving))
        source_path = None
        if matched.source:
            source_path = stack.enter_context(_named("the source image", matched.source))
        secret = _secret(matched, seed, driving_path, source_path, paths)
        with _telling("the driving video"):
            driving = _film(driving_path, None, max_s, limits)
            num_driving = driving.num_frames()
        films, counts = {}, {}
        for method, path in paths.items():
            with _telling(method):
                films[method] = _film(path, driving.rate, max_s, limits)
                counts[method] = films[method].num_frames()
                _check_length(counts[method], num_driving, driving.rate)
        num_frames = min(num_driving, *counts.values())
        size_px = max((_shown_size(film.size_px) for film in films.values()), key=_area)
        video_of = {blind(secret, "video", method): method for method in films}
        for video in sorted(video_of):  # times of writing tell no more than the names do
            with _telling(video_of[video]):
                _write(folder / f"{video}.mp4", films[video_of[video]], num_frames, size_px)
        _equal_lengths([folder / f"{video}.mp4" for video in video_of])
        driving_key = blind(secret, "driving")
        _write(folder / f"{driving_key}.mp4", driving, num_frames, _shown_size(driving.size_px))
        source_key = "" if source_path is None else blind(secret, "source")
        if source_path is not None:
            with _telling("the source image"):
                _write_picture(folder / f"{source_key}.jpg", source_path, limits)
    return StudyItem(
        item_id=blind(secret, "item"),
        name=matched.name,
        secret=secret,
        driving=f"{MEDIA}/{driving_key}.mp4",
        source=f"{MEDIA}/{source_key}.jpg" if source_key else "",
        videos=tuple(sorted(video_of)),
        methods=tuple(video_of[video] for video in sorted(video_of)),
        width_px=size_px[0],
        height_px=size_px[1],
    )


@contextmanager
def _named(what: str, uri: str) -> Iterator[Path]:
    """`local_media`, whose errors say what it was to be."""
    with ExitStack() as stack:
        with _telling(what):
            path = stack.enter_context(local_media(uri))
        yield path


@contextmanager
def _telling(what: str) -> Iterator[None]:
    try:
        yield
    except MediaError as error:
        raise MediaError(f"{what}: {error.cause}", code=error.code, value=error.value) from error


def _secret(
    matched: MatchedItem, seed: int, driving: Path, source: Path | None, results: Mapping[str, Path]
) -> str:
    """A key that nobody has who lacks the files or the seed, and everybody who has both."""
    contents = {method: content_digest(path) for method, path in results.items()}
    own = [content_digest(path) for path in (driving, source) if path is not None]
    return digest([seed, matched.name, own, contents])


def _film(path: Path, rate: Fraction | None, max_s: float, limits: MediaLimits) -> _Film:
    """`rate` is None for the driving video, whose own one all others are shown at."""
    fps = decode.DEFAULT_FPS if rate is None else float(rate)
    found = probe(path, limits, fps=fps)  # a folder of pictures has none of its own
    return _Film(path, found, rate or as_rate(min(found.fps, MAX_FPS)), max_s, limits)


def _check_length(count: int, num_driving: int, rate: Fraction) -> None:
    if abs(count - num_driving) / rate > MAX_LAG_S:
        raise MediaError(
            f"{count} frames at {float(rate):g} frames/s, and the driving video has {num_driving}",
            code="inconsistent_frames",
        )


def _area(size_px: Size) -> int:
    return size_px[0] * size_px[1]


def _shown_size(size_px: Size) -> Size:
    """The size on the page: even sides, neither longer than `MAX_SIDE_PX`."""
    scale = min(1.0, MAX_SIDE_PX / max(size_px))
    width_px, height_px = (max(2, 2 * round(side * scale / 2)) for side in size_px)
    return width_px, height_px


def _write(path: Path, film: _Film, num_frames: int, size_px: Size) -> None:
    frames = itertools.islice(film.frames(), num_frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    encode(path, (_fitted(frame, size_px) for frame in frames), fps=film.rate, crf=CRF)


def _fitted(frame_HWC: Frame, size_px: Size) -> Frame:
    """The whole frame in the middle of black, at this size."""
    height_px, width_px = frame_HWC.shape[:2]
    scale = min(size_px[0] / width_px, size_px[1] / height_px)
    inner_px = (max(1, round(width_px * scale)), max(1, round(height_px * scale)))
    scaled_HWC = images.resize(frame_HWC, inner_px)
    if inner_px == size_px:
        return scaled_HWC
    fitted_HWC = np.zeros((size_px[1], size_px[0], 3), np.uint8)
    left_px, top_px = (size_px[0] - inner_px[0]) // 2, (size_px[1] - inner_px[1]) // 2
    fitted_HWC[top_px : top_px + inner_px[1], left_px : left_px + inner_px[0]] = scaled_HWC
    return fitted_HWC


def _write_picture(path: Path, source: Path, limits: MediaLimits) -> None:
    image_HWC = images.read_image(source, limits)
    height_px, width_px = image_HWC.shape[:2]
    shown_HWC = images.resize(image_HWC, _shown_size((width_px, height_px)))
    with os_errors(str(path)):
        path.write_bytes(images.encode_jpeg(shown_HWC, quality=JPEG_QUALITY))


def _equal_lengths(paths: list[Path]) -> None:
    """Make all files as long as the longest, by a box that players skip."""
    sizes_bytes = {path: path.stat().st_size for path in paths}
    wanted_bytes = max(sizes_bytes.values()) + 8  # a box is no shorter than its own head
    for path, size_bytes in sizes_bytes.items():
        missing_bytes = wanted_bytes - size_bytes
        with os_errors(str(path)), path.open("ab") as file:
            file.write(missing_bytes.to_bytes(4, "big") + b"free" + bytes(missing_bytes - 8))
