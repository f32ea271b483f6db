"""What a source is: size as displayed, rate, length, codec."""

from __future__ import annotations

from pathlib import Path

from kpmask.config import MediaLimits
from kpmask.media.container import decodable
from kpmask.media.decode import DEFAULT_FPS, folder_paths, kind_of
from kpmask.media.images import image_size, stack_size
from kpmask.media.reader import Reader
from kpmask.records import VideoProbe


def probe(path: Path, limits: MediaLimits, *, fps: float = DEFAULT_FPS) -> VideoProbe:
    """Look at a video, GIF, folder of pictures or stacked-frame picture.

    One frame is decoded, so that a file with none is refused here. The size is that of a
    displayed frame: turned upright, samples made square. `rotation_deg` is the clockwise turn
    that was applied. The largest video stream counts. `fps` is of a folder or stack.

    Raises:
        MediaError: it cannot be read, or breaks a limit.
    """
    kind = kind_of(path)
    if kind == "folder":
        paths = folder_paths(path, limits)
        return _of_images(image_size(paths[0], limits), len(paths), "images", fps)
    if kind == "stack":
        size_px, num_frames = stack_size(path, limits)
        return _of_images(size_px, num_frames, "image", fps)
    with Reader(path, limits) as reader:
        return _of_video(reader)


def can_seek(path: Path, limits: MediaLimits) -> bool:
    """Whether a video can be read from its middle; if not, `ffmpeg.normalise` makes it so.

    Raises:
        MediaError: it cannot be read, or breaks a limit.
    """
    with Reader(path, limits) as reader:
        return reader.seekable


def _of_video(reader: Reader) -> VideoProbe:
    stream, container = reader.stream, reader.container
    duration_s: float | None = None
    if stream.duration is not None and stream.time_base is not None:
        duration_s = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        duration_s = container.duration / 1e6
    width_px, height_px = reader.geometry.displayed_px
    return VideoProbe(
        fps=float(reader.rate),
        duration_s=duration_s,
        width_px=width_px,
        height_px=height_px,
        codec=stream.codec_context.codec.canonical_name,
        pixel_format=stream.codec_context.pix_fmt or "unknown",
        rotation_deg=reader.geometry.orientation.clockwise_deg,
        stream_index=stream.index,
        has_audio=any(decodable(track) for track in container.streams.audio),
        num_frames_from_header=stream.frames or None,
    )


def _of_images(size_px: tuple[int, int], num_frames: int, codec: str, fps: float) -> VideoProbe:
    return VideoProbe(
        fps=fps,
        duration_s=num_frames / fps,
        width_px=size_px[0],
        height_px=size_px[1],
        codec=codec,
        pixel_format="rgb24",
        rotation_deg=0,
        stream_index=0,
        has_audio=False,
        num_frames_from_header=num_frames,
    )
